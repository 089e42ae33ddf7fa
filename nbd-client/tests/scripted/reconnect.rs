//! A connection that is lost and replaced.

use std::time::Duration;

use nbd_client::{
    Bytes, Client, Durability, Error, ExtentLimit, LostConnection, ReplyMode, TransmissionFlags,
};

use crate::listener::Listener;
use crate::script::{CONTEXT, DATA, Offer, SIZE, STATUS, Script, bytes, data_at, guarded, simple};

const MODE: ReplyMode = ReplyMode::Structured;

async fn connect(listener: &Listener, patience: Duration) -> (Client, Script) {
    let connector = listener.connector().reconnect(patience);
    let offer = Offer::new(MODE);
    let (client, server) = tokio::join!(connector.connect(), listener.serve(&offer));
    (client.unwrap(), server)
}

const LONG: Duration = Duration::from_secs(50);

#[tokio::test]
async fn requests_in_flight_are_sent_again_and_half_answers_forgotten() {
    let listener = Listener::new();
    let (client, mut server) = connect(&listener, LONG).await;
    let script = async {
        let read = server.request().await.unwrap();
        let status = server.request().await.unwrap();
        let write = server.request().await.unwrap();
        assert_eq!((read.command, status.command, write.command), (0, 7, 1));
        // Half of a read with wrong bytes, a whole status without its end, and death.
        let body = bytes![read.offset.to_be_bytes(), [0xee; 50]];
        server.chunk(false, DATA, &read, &body).await.unwrap();
        let extent = bytes![CONTEXT.to_be_bytes(), 512_u32.to_be_bytes(), [0; 4]];
        server.chunk(false, STATUS, &status, &extent).await.unwrap();
        drop(server);
        // Hangs up in the handshake as well.
        drop(listener.stream().await);
        let mut server = listener.serve(&Offer::new(MODE)).await;
        let read = server.request().await.unwrap();
        let status = server.request().await.unwrap();
        let write = server.request().await.unwrap();
        assert_eq!((read.command, status.command, write.command), (0, 7, 1), "the same order");
        assert_eq!((write.offset, write.length), (4096, 5));
        server.answer_read(&read).await.unwrap();
        server.chunk(true, STATUS, &status, &extent).await.unwrap();
        server.answer_done(&write).await.unwrap();
        server
    };
    let (data, status, written, mut server) = guarded(async {
        tokio::join!(
            client.read(300..400),
            client.block_status(0..512, ExtentLimit::Many),
            client.write(4096, Bytes::from_static(b"again"), Durability::Fua),
            script
        )
    })
    .await;
    assert_eq!(data.unwrap(), data_at(300, 100));
    assert_eq!(status.unwrap().len(), 1, "the first answer was forgotten");
    written.unwrap();
    assert_eq!(client.reconnects(), 1, "one that succeeded");
    let (ended, ()) = guarded(async { tokio::join!(client.disconnect(), server.goodbye()) }).await;
    ended.unwrap();
}

#[tokio::test]
async fn requests_made_during_the_outage_wait() {
    let listener = Listener::new();
    let (client, server) = connect(&listener, LONG).await;
    drop(server);
    let script = async {
        let mut server = listener.serve(&Offer::new(MODE)).await;
        let read = server.request().await.unwrap();
        server.answer_read(&read).await.unwrap();
    };
    let (data, ()) = guarded(async { tokio::join!(client.read(1..10), script) }).await;
    assert_eq!(data.unwrap(), data_at(1, 9));
}

#[tokio::test]
async fn an_export_that_changed_is_refused() {
    let offer = Offer::new(MODE);
    let cases = [
        ("size", Offer { size: SIZE * 2, ..offer.clone() }),
        ("read-only", Offer { flags: offer.flags | TransmissionFlags::READ_ONLY, ..offer.clone() }),
        ("SEND_FUA", Offer { flags: offer.flags - TransmissionFlags::SEND_FUA, ..offer.clone() }),
        ("replies", Offer { mode: ReplyMode::Simple, ..offer.clone() }),
    ];
    for (word, other) in cases {
        let listener = Listener::new();
        let (client, server) = connect(&listener, LONG).await;
        drop(server);
        let script = async {
            let mut server = listener.serve(&other).await;
            server.closed().await;
        };
        let (read, ()) = guarded(async { tokio::join!(client.read(0..1), script) }).await;
        let error = read.expect_err(word);
        let changed = matches!(error, Error::Lost { reason: LostConnection::ExportChanged(_), .. });
        assert!(changed && error.to_string().contains(word), "{word}: {error}");
    }
}

#[tokio::test]
async fn patience_ends() {
    let listener = Listener::new();
    let (client, server) = connect(&listener, Duration::from_millis(200)).await;
    // Nobody listens any more.
    drop(server);
    drop(listener);
    let error = guarded(client.read(0..1)).await.unwrap_err();
    let failed =
        matches!(error, Error::Lost { reason: LostConnection::ReconnectFailed { .. }, .. });
    assert!(failed, "{error}");
    assert!(error.to_string().contains("cannot connect to"), "it says why: {error}");
}

async fn connect_to_read(listener: &Listener, offer: &Offer) -> (Client, Script) {
    let connector = listener.connector().reconnect(Duration::from_millis(200)).keep_reading();
    let (client, server) = tokio::join!(connector.connect(), listener.serve(offer));
    (client.unwrap(), server)
}

/// Reads until the answer comes, which is that of a server that is back.
async fn read_in_the_end(client: &Client) {
    loop {
        match client.read(1..10).await {
            Ok(data) => return assert_eq!(data, data_at(1, 9)),
            Err(error) => {
                assert!(matches!(error, Error::Lost { .. }), "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// The next client that stays until the end of the handshake.
async fn handshake_in_the_end(listener: &Listener, offer: &Offer) -> Script {
    loop {
        let mut server = Script::over(listener.stream().await);
        if server.handshake(offer).await.is_ok() {
            return server;
        }
    }
}

/// Answers the next client that stays until then.
async fn answer_in_the_end(listener: &Listener, offer: &Offer) -> Script {
    loop {
        let mut server = handshake_in_the_end(listener, offer).await;
        if let Ok(read) = server.request().await {
            server.answer_read(&read).await.unwrap();
            return server;
        }
    }
}

/// Sends everyone away.
async fn refuse(listener: &Listener) {
    loop {
        drop(listener.stream().await);
    }
}

#[tokio::test]
async fn a_disk_that_is_only_read_is_tried_again_after_the_patience() {
    let (listener, offer) = (Listener::new(), Offer::new(MODE));
    let (client, mut server) = connect_to_read(&listener, &offer).await;
    for _ in 0..2 {
        drop(server);
        let failed = async { [client.read(0..1).await, client.read(0..1).await] };
        let failed = guarded(async {
            tokio::select! { failed = failed => failed, _ = refuse(&listener) => unreachable!() }
        });
        for error in failed.await.map(Result::unwrap_err) {
            let reason = "no new connection within 0.2 s";
            assert!(error.to_string().contains(reason), "{error}");
        }
        let answer = answer_in_the_end(&listener, &offer);
        server = guarded(async { tokio::join!(read_in_the_end(&client), answer) }).await.1;
    }
    assert_eq!(client.reconnects(), 2);
}

#[tokio::test]
async fn another_export_in_the_place_of_a_disk_that_is_read_is_refused_until_it_is_back() {
    let (listener, offer) = (Listener::new(), Offer::new(MODE));
    let (client, server) = connect_to_read(&listener, &offer).await;
    drop(server);
    let other = Offer { size: SIZE * 2, ..offer.clone() };
    let script = async {
        handshake_in_the_end(&listener, &other).await.closed().await;
        answer_in_the_end(&listener, &offer).await
    };
    guarded(async { tokio::join!(read_in_the_end(&client), script) }).await;
}

#[tokio::test]
async fn a_disk_that_was_written_to_is_lost_with_its_connection() {
    let (listener, offer) = (Listener::new(), Offer::new(MODE));
    let (client, mut server) = connect_to_read(&listener, &offer).await;
    let script = async {
        let write = server.request().await.unwrap();
        server.answer_done(&write).await.unwrap();
        server
    };
    let data = Bytes::from_static(b"again");
    let written = client.write(4096, data, Durability::Cached);
    let (written, server) = guarded(async { tokio::join!(written, script) }).await;
    written.unwrap();
    drop(server);
    // Also after the time for another attempt.
    for pause in [0, 1100] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let answer = answer_in_the_end(&listener, &offer);
        let read = guarded(async {
            tokio::select! {
                read = client.read(0..1) => read.unwrap_err(),
                _ = answer => panic!("it came back"),
            }
        });
        let error = read.await;
        assert!(matches!(error, Error::Lost { .. }), "{error}");
        assert!(!error.to_string().contains("no new connection"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_dies_of_every_request_does_not_go_on_for_ever() {
    let listener = Listener::new();
    let (client, server) = connect(&listener, Duration::from_millis(500)).await;
    drop(server);
    let script = async {
        loop {
            let mut server = listener.serve(&Offer::new(MODE)).await;
            server.request().await.unwrap();
        }
    };
    let error = guarded(async {
        tokio::select! {
            read = client.read(0..1) => read.unwrap_err(),
            () = script => panic!("the script has no end"),
        }
    })
    .await;
    let failed =
        matches!(error, Error::Lost { reason: LostConnection::ReconnectFailed { .. }, .. });
    assert!(failed, "{error}");
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_is_not_tried_again() {
    let listener = Listener::new();
    let (client, mut server) = connect(&listener, LONG).await;
    let script = async {
        server.request().await.unwrap();
        server.send(&simple(0, 99)).await.unwrap();
        server.closed().await;
    };
    let (read, ()) = guarded(async { tokio::join!(client.read(0..1), script) }).await;
    let error = read.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: LostConnection::Protocol(_), .. }), "{error}");
}

#[tokio::test]
async fn a_client_that_is_not_needed_any_more_does_not_wait_for_a_connection() {
    let listener = Listener::new();
    let (client, server) = connect(&listener, LONG).await;
    drop(server);
    drop(listener);
    let alone = client.clone();
    {
        let mut read = Box::pin(client.read(0..1));
        let little = tokio::time::timeout(Duration::from_millis(50), &mut read).await;
        assert!(little.is_err(), "there is nobody to answer: {little:?}");
    }
    let ended = tokio::time::timeout(LONG / 5, alone.disconnect()).await;
    ended.expect("nobody waits for an answer").unwrap();
}

/// ESHUTDOWN.
const SHUTTING_DOWN: u32 = 108;

#[tokio::test]
async fn a_server_that_is_shutting_down_is_left_once_it_has_answered_and_refusals_are_sent_again() {
    let listener = Listener::new();
    let (client, mut server) = connect(&listener, LONG).await;
    let script = async {
        let first = server.request().await.unwrap();
        let second = server.request().await.unwrap();
        assert_eq!((first.offset, second.offset), (0, 4096));
        server.send(&simple(SHUTTING_DOWN, first.cookie)).await.unwrap();
        // It still executes the other write: the connection must not end before its answer.
        let early = tokio::time::timeout(Duration::from_millis(50), server.closed()).await;
        assert!(early.is_err(), "the client left a write behind");
        server.answer_done(&second).await.unwrap();
        server.closed().await;
        let mut server = listener.serve(&Offer::new(MODE)).await;
        let again = server.request().await.unwrap();
        assert_eq!((again.command, again.offset, again.length), (1, 0, 5));
        server.answer_done(&again).await.unwrap();
    };
    let (first, second, ()) = guarded(async {
        tokio::join!(
            client.write(0, Bytes::from_static(b"again"), Durability::Cached),
            client.write(4096, Bytes::from_static(b"still"), Durability::Cached),
            script
        )
    })
    .await;
    first.unwrap();
    second.unwrap();
    assert_eq!(client.reconnects(), 1);
}

#[tokio::test]
async fn without_reconnecting_a_shutdown_is_the_error_of_the_request() {
    let listener = Listener::new();
    let offer = Offer::new(MODE);
    let connector = listener.connector();
    let (client, mut server) = tokio::join!(connector.connect(), listener.serve(&offer));
    let client = client.unwrap();
    let script = async {
        let write = server.request().await.unwrap();
        server.send(&simple(SHUTTING_DOWN, write.cookie)).await.unwrap();
        let write = server.request().await.unwrap();
        server.answer_done(&write).await.unwrap();
    };
    let data = || Bytes::from_static(b"data");
    let writes = async {
        let refused = client.write(0, data(), Durability::Cached).await;
        (refused, client.write(0, data(), Durability::Cached).await)
    };
    let ((refused, next), ()) = guarded(async { tokio::join!(writes, script) }).await;
    let error = refused.unwrap_err();
    let is_refusal = matches!(&error, Error::Request { source, .. } if source.is_shutdown());
    assert!(is_refusal, "{error}");
    next.unwrap();
}

#[tokio::test]
async fn a_server_that_is_shutting_down_for_ever_is_given_up() {
    let listener = Listener::new();
    let (client, first) = connect(&listener, Duration::from_millis(500)).await;
    let script = async {
        let mut server = first;
        loop {
            let write = server.request().await.unwrap();
            server.send(&simple(SHUTTING_DOWN, write.cookie)).await.unwrap();
            server = listener.serve(&Offer::new(MODE)).await;
        }
    };
    let error = guarded(async {
        tokio::select! {
            written = client.write(0, Bytes::from_static(b"data"), Durability::Cached) =>
                written.unwrap_err(),
            () = script => panic!("the script has no end"),
        }
    })
    .await;
    assert!(error.to_string().contains("shutting down"), "{error}");
}
