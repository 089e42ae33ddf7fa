//! Servers that do not support the newer options.

use nbd_client::{Connector, Error, Protocol, ReplyMode};
use tokio::net::UnixStream;

use crate::script::{Script, bytes, connector, guarded};

const UNSUPPORTED: u32 = 0x8000_0001;

#[tokio::test]
async fn every_option_is_tried_and_export_name_comes_last() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.greet().await.unwrap();
        let mut options = Vec::new();
        loop {
            let (option, payload) = server.option().await.unwrap();
            options.push(option);
            if option == 1 {
                assert_eq!(payload, b"disk");
                break;
            }
            server.answer(option, UNSUPPORTED, b"").await.unwrap();
        }
        // NO_ZEROES was agreed: no padding.
        server.send(&bytes![4096_u64.to_be_bytes(), [0, 1]]).await.unwrap();
        let read = server.request().await.unwrap();
        server.answer_read(&read).await.unwrap();
        server.goodbye().await;
        options
    });
    let client = guarded(connector().export_name("disk").connect_over(ours)).await.unwrap();
    assert_eq!(client.protocol(), Protocol::NewstyleFixed);
    assert_eq!(client.reply_mode(), ReplyMode::Simple);
    assert_eq!((client.info().size, client.info().block_sizes), (4096, None));
    assert_eq!(client.info().minimum_block_size(), 1);
    assert!(client.meta_contexts().is_empty());
    guarded(client.read(0..10)).await.unwrap();
    guarded(client.disconnect()).await.unwrap();
    // Extended headers, structured replies, GO, EXPORT_NAME; no contexts without structured
    // replies.
    assert_eq!(server.await.unwrap(), [11, 8, 7, 1]);
}

#[tokio::test]
async fn a_newstyle_server_that_is_not_fixed_gets_export_name_only() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.send(b"NBDMAGICIHAVEOPT\0\0").await.unwrap();
        assert_eq!(server.take().await.unwrap(), [0; 4]);
        let (option, _) = server.option().await.unwrap();
        assert_eq!(option, 1);
        server.send(&bytes![4096_u64.to_be_bytes(), [0, 1], [0; 124]]).await.unwrap();
        let read = server.request().await.unwrap();
        server.answer_read(&read).await.unwrap();
        server.goodbye().await;
    });
    let client = guarded(connector().connect_over(ours)).await.unwrap();
    assert_eq!(client.protocol(), Protocol::Newstyle);
    guarded(client.read(0..10)).await.unwrap();
    guarded(client.disconnect()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_closes_after_export_name_probably_has_no_such_export() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.send(b"NBDMAGICIHAVEOPT\0\0").await.unwrap();
        let _: [u8; 4] = server.take().await.unwrap();
        server.option().await.unwrap();
    });
    let error = guarded(connector().connect_over(ours)).await.unwrap_err();
    assert!(matches!(error, Error::HandshakeLost { .. }), "{error}");
    assert!(error.to_string().contains("no such export"), "{error}");
}

#[tokio::test]
async fn a_stream_of_the_caller_leads_to_the_export_of_the_uri() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.send(b"NBDMAGICIHAVEOPT\0\0").await.unwrap();
        let _: [u8; 4] = server.take().await.unwrap();
        server.option().await.unwrap().1
    });
    let connector: Connector = "nbd://nowhere.invalid/disk".parse().unwrap();
    drop(guarded(connector.connect_over(ours)).await);
    assert_eq!(server.await.unwrap(), b"disk");
}
