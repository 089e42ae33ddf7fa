//! Servers that do not answer, and clients with a time limit.

use std::time::Duration;

use nbd_client::{Client, Durability, Error, LostConnection, ReplyMode, Result};
use tokio::net::UnixStream;

use crate::listener::Listener;
use crate::script::{NONE, Offer, Script, chunk, connector, data_at, guarded};

const MODE: ReplyMode = ReplyMode::Structured;
/// Long enough for a scripted server that does answer, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(1);

/// A client with a limit, and its server after the handshake.
async fn pair() -> (Client, Script) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Script::over(theirs);
    let offer = Offer::new(MODE);
    let connector = connector().request_timeout(LIMIT);
    let (client, served) = tokio::join!(connector.connect_over(ours), server.handshake(&offer));
    served.unwrap();
    (client.unwrap(), server)
}

#[track_caller]
fn assert_late<T: std::fmt::Debug>(result: Result<T>, expected: u64) {
    match result {
        Err(Error::Lost {
            reason: LostConnection::RequestTimeout { offset, limit, .. }, ..
        }) => assert_eq!((offset, limit), (expected, LIMIT)),
        other => panic!("not late: {other:?}"),
    }
}

#[tokio::test]
async fn a_request_that_is_not_answered_ends_the_connection_for_all() {
    let (client, mut server) = pair().await;
    let (first, second) = guarded(async {
        let script = async {
            server.request().await.unwrap();
            let second = server.request().await.unwrap();
            // The beginning of an answer is none.
            let whole = chunk(MODE, true, NONE, second.cookie, second.offset, &[]);
            server.send(&whole[..10]).await.unwrap();
        };
        let both = async { tokio::join!(client.read(100..110), client.read(200..210)) };
        tokio::join!(both, script).0
    })
    .await;
    let said = first.as_ref().unwrap_err().to_string();
    assert!(said.contains("did not answer READ of 10 bytes at offset 100"), "{said}");
    assert_late(first, 100);
    assert_late(second, 100);
    assert_late(client.read(300..310).await, 100);
    drop(server);
}

#[tokio::test]
async fn others_that_are_answered_do_not_save_the_one_that_is_not() {
    let (client, mut server) = pair().await;
    let never = guarded(async {
        let script = async {
            let never = server.request().await.unwrap();
            assert_eq!(never.offset, 100);
            while let Ok(request) = server.request().await {
                if server.answer_read(&request).await.is_err() {
                    break;
                }
            }
        };
        let busy = async { while client.read(200..210).await.is_ok() {} };
        tokio::join!(client.read(100..110), busy, script).0
    })
    .await;
    assert_late(never, 100);
}

#[tokio::test]
async fn a_connection_without_requests_has_all_the_time_it_wants() {
    let (client, mut server) = pair().await;
    let script = async {
        for _ in 0..2 {
            let request = server.request().await.unwrap();
            server.answer_read(&request).await.unwrap();
        }
        server.goodbye().await;
    };
    let work = async {
        client.read(0..10).await.unwrap();
        tokio::time::sleep(LIMIT * 2).await;
        assert_eq!(client.read(5..15).await.unwrap(), data_at(5, 10));
        client.disconnect().await.unwrap();
    };
    guarded(async { tokio::join!(work, script) }).await;
}

#[tokio::test]
async fn with_reconnect_the_request_is_sent_again_on_a_new_connection() {
    let listener = Listener::new();
    let connector = listener.connector().reconnect(Duration::from_secs(50)).request_timeout(LIMIT);
    guarded(async {
        let script = async {
            let mut silent = listener.serve(&Offer::new(MODE)).await;
            let write = silent.request().await.unwrap();
            let mut server = listener.serve(&Offer::new(MODE)).await;
            let again = server.request().await.unwrap();
            assert_eq!((write.command, write.offset), (again.command, again.offset));
            server.answer_done(&again).await.unwrap();
            server.goodbye().await;
        };
        let work = async {
            let client = connector.connect().await.unwrap();
            let data = nbd_client::Bytes::from_static(b"again");
            client.write(4096, data, Durability::Cached).await.unwrap();
            assert_eq!(client.reconnects(), 1);
            client.disconnect().await.unwrap();
        };
        tokio::join!(work, script)
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_late_on_every_connection_fails_in_the_end() {
    let listener = Listener::new();
    let connector = listener.connector().reconnect(LIMIT / 2).request_timeout(LIMIT);
    let result = guarded(async {
        // Everything else is answered, so that no outage lasts long.
        let script = async {
            loop {
                let mut server = listener.serve(&Offer::new(MODE)).await;
                while let Ok(request) = server.request().await {
                    if request.offset != 100 && server.answer_read(&request).await.is_err() {
                        break;
                    }
                }
            }
        };
        let work = async {
            let client = connector.connect().await.unwrap();
            let busy = async { while client.read(200..210).await.is_ok() {} };
            tokio::join!(client.read(100..110), busy).0
        };
        tokio::select! {
            result = work => result,
            () = script => unreachable!("it serves for ever"),
        }
    })
    .await;
    assert_late(result, 100);
}
