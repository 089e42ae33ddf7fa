//! A server that dies after any number of bytes: an error, never a hang, never wrong data.

use nbd_client::{Client, Durability, Error, ExtentLimit, ReplyMode, Result};
use tokio::net::UnixStream;

use crate::script::{
    CONTEXT, DATA, HOLE, NONE, Offer, STATUS, STATUS_EXT, Script, bytes, connector, data_at,
    guarded, span,
};

const LENGTH: u64 = 64;

/// The server's part of the session; gives the number of bytes it takes.
async fn serve(mut server: Script, mode: ReplyMode) -> std::io::Result<usize> {
    server.handshake(&Offer::new(mode)).await?;
    let read = server.request().await?;
    if mode == ReplyMode::Simple {
        server.answer_read(&read).await?;
    } else {
        // Data out of order, a hole between, and the end apart.
        let second = read.offset + 40;
        let body = bytes![second.to_be_bytes(), data_at(second, 24)];
        server.chunk(false, DATA, &read, &body).await?;
        let hole = bytes![(read.offset + 32).to_be_bytes(), 8_u32.to_be_bytes()];
        server.chunk(false, HOLE, &read, &hole).await?;
        let body = bytes![read.offset.to_be_bytes(), data_at(read.offset, 32)];
        server.chunk(false, DATA, &read, &body).await?;
        server.chunk(true, NONE, &read, &[]).await?;
        let status = server.request().await?;
        let (kind, body) = if mode == ReplyMode::Extended {
            let extent = bytes![LENGTH.to_be_bytes(), 3_u64.to_be_bytes()];
            (STATUS_EXT, bytes![CONTEXT.to_be_bytes(), 1_u32.to_be_bytes(), extent])
        } else {
            let extent = bytes![(LENGTH as u32).to_be_bytes(), 3_u32.to_be_bytes()];
            (STATUS, bytes![CONTEXT.to_be_bytes(), extent])
        };
        server.chunk(true, kind, &status, &body).await?;
    }
    let write = server.request().await?;
    server.answer_done(&write).await?;
    let sent = server.sent;
    server.goodbye().await;
    Ok(sent)
}

async fn use_it(client: &Client, mode: ReplyMode) -> Result<()> {
    let offset = 4096;
    let data = client.read(span(offset, LENGTH as usize)).await?;
    let mut expected = data_at(offset, LENGTH as usize);
    if mode != ReplyMode::Simple {
        expected[32..40].fill(0);
        let status = client.block_status(span(0, LENGTH), ExtentLimit::Many).await?;
        assert_eq!(status[0].1[0].length, LENGTH);
    }
    assert_eq!(data, expected, "no wrong data");
    client.write(0, data, Durability::Cached).await
}

async fn session(mode: ReplyMode, budget: usize) -> (Result<()>, std::io::Result<usize>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(serve(Script::dying_after(theirs, budget), mode));
    let result = match guarded(connector().connect_over(ours)).await {
        Ok(client) => {
            let result = guarded(use_it(&client, mode)).await;
            if result.is_err() {
                let again = guarded(client.read(0..1)).await;
                assert!(matches!(again, Err(Error::Lost { .. })), "still lost: {again:?}");
            }
            drop(client);
            result
        }
        Err(error) => Err(error),
    };
    (result, guarded(server).await.unwrap())
}

#[tokio::test]
async fn a_server_that_dies_at_any_byte_is_an_error() {
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let (result, sent) = session(mode, usize::MAX).await;
        result.unwrap();
        let whole = sent.unwrap();
        for budget in 0..whole {
            let (result, _) = session(mode, budget).await;
            let error = result.expect_err("the session was cut short");
            let expected = matches!(error, Error::Lost { .. } | Error::HandshakeLost { .. });
            assert!(expected, "{mode:?}, {budget} of {whole} bytes: {error}");
        }
    }
}
