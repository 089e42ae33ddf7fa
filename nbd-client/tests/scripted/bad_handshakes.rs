//! Malformed handshakes, and silent servers.

use std::time::Duration;

use nbd_client::{Client, Error, ProtocolError, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::script::{Offer, Script, bytes, connector, guarded, option_reply, span};

/// Connects to a server that says `speech` at once and then listens until the client leaves.
async fn connect_to(speech: Vec<u8>) -> Result<Client> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        theirs.write_all(&speech).await.unwrap();
        drop(theirs.read_to_end(&mut Vec::new()).await);
    });
    guarded(connector().connect_over(ours)).await
}

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const EXTENDED: u32 = 11;
const SET_META: u32 = 10;
const GO: u32 = 7;
const ACK: u32 = 1;
const INFO: u32 = 3;
const META: u32 = 4;

fn reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
    option_reply(option, kind, body)
}

fn export(size: u64) -> Vec<u8> {
    bytes![[0, 0], size.to_be_bytes(), [0, 1]]
}

fn context(id: u32, name: &str) -> Vec<u8> {
    bytes![id.to_be_bytes(), name.as_bytes()]
}

#[tokio::test]
async fn junk_in_the_handshake_is_named() {
    let to_contexts = bytes![GREETING, reply(EXTENDED, ACK, &[])];
    let base = context(1, "base:allocation");
    let to_go = bytes![to_contexts, reply(SET_META, META, &base), reply(SET_META, ACK, &[])];
    let huge = bytes![
        0x0003_e889_0455_65a9_u64.to_be_bytes(),
        GO.to_be_bytes(),
        INFO.to_be_bytes(),
        u32::MAX.to_be_bytes(),
    ];
    let oldstyle = bytes![
        b"NBDMAGIC",
        0x0000_4202_8186_1253_u64.to_be_bytes(),
        (1_u64 << 63).to_be_bytes(),
        [0; 128],
    ];
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "it speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "it speaks SSH"),
        (b"NBDMAGICNBDMAGIC\0\x03".to_vec(), "magic number"),
        (oldstyle, "2^63-1"),
        (bytes![GREETING, b"and now something different"], "option reply"),
        (bytes![GREETING, reply(GO, ACK, &[])], "was not sent"),
        (bytes![GREETING, reply(EXTENDED, ACK, b"x")], "payload"),
        (bytes![GREETING, reply(EXTENDED, INFO, &export(512))], "does not answer"),
        (bytes![to_contexts, reply(SET_META, META, &context(1, "base:other"))], "not requested"),
        (bytes![to_contexts, reply(SET_META, META, &base), reply(SET_META, META, &base)], "twice"),
        (bytes![to_contexts, reply(SET_META, META, &[0, 0])], "shorter"),
        (bytes![to_contexts, reply(SET_META, META, &[b'x'; 5000])], "limit is 4096"),
        (bytes![to_go, reply(GO, ACK, &[])], "INFO_EXPORT"),
        (bytes![to_go, reply(GO, INFO, &export(1 << 63))], "2^63-1"),
        (bytes![to_go, reply(GO, INFO, &export(u64::MAX))], "2^63-1"),
        (bytes![to_go, reply(GO, INFO, &export(512)[..11])], "12 bytes"),
        (bytes![to_go, reply(GO, INFO, &[0])], "shorter"),
        (bytes![to_go, reply(GO, INFO, &[0, 3, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0, 2, 0])], "power"),
        (bytes![to_go, huge], "limit"),
    ];
    for (index, (speech, expected)) in cases.into_iter().enumerate() {
        let error = connect_to(speech).await.expect_err("a bad handshake");
        assert!(matches!(error, Error::Handshake { .. }), "case {index}: {error}");
        let text = error.to_string();
        assert!(text.contains(expected), "case {index}: {text:?} does not say {expected:?}");
    }
}

#[tokio::test]
async fn random_answers_are_never_a_panic_or_a_hang() {
    for seed in 1..500_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let whole = bytes![GREETING, reply(EXTENDED, ACK, &[]), reply(SET_META, ACK, &[])];
        let mut speech = bytes![whole, reply(GO, INFO, &export(512)), reply(GO, ACK, &[])];
        for _ in 0..random() % 4 + 1 {
            let index = random() as usize % speech.len();
            speech[index] = random() as u8;
        }
        tokio::spawn(async move {
            drop(theirs.write_all(&speech).await);
            drop(theirs.shutdown().await);
            drop(theirs.read_to_end(&mut Vec::new()).await);
        });
        // Whether the change hit something that matters depends on the seed; that it ends does not.
        drop(guarded(connector().connect_over(ours)).await);
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_runs_into_the_timeout() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let limit = Duration::from_millis(50);
    let connector = uri.parse::<nbd_client::Connector>().unwrap().handshake_timeout(limit);
    for error in [
        guarded(connector.connect()).await.map(drop).unwrap_err(),
        guarded(connector.list()).await.map(drop).unwrap_err(),
        guarded(connector.inspect(nbd_client::Scope::AllExports)).await.map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::HandshakeTimeout { .. }), "{error}");
        assert!(error.to_string().contains("0.05 s"), "{error}");
    }
}

#[tokio::test]
async fn nobody_listening_is_a_connect_error_with_the_address() {
    let directory = tempfile::tempdir().unwrap();
    let uri = format!("nbd+unix:///?socket={}/none", directory.path().display());
    let error = uri.parse::<nbd_client::Connector>().unwrap().connect().await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(error.to_string().contains("/none"), "{error}");
}

#[tokio::test]
async fn a_list_with_an_impossible_name_length_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut server = Script::over(stream);
        server.greet().await.unwrap();
        let (option, _) = server.option().await.unwrap();
        server.answer(option, 2, &bytes![u32::MAX.to_be_bytes(), b"name"]).await.unwrap();
        server.closed().await;
    });
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let connector = uri.parse::<nbd_client::Connector>().unwrap();
    let error = guarded(connector.list()).await.unwrap_err();
    let malformed =
        matches!(error, Error::Handshake { source: ProtocolError::Malformed { .. }, .. });
    assert!(malformed, "{error}");
}

#[tokio::test]
async fn a_server_that_requires_tls_is_told_apart() {
    let error = connect_to(bytes![GREETING, reply(EXTENDED, 0x8000_0005, b"")]).await.unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error}");
}

#[tokio::test]
async fn an_offer_of_the_largest_size_is_accepted() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let mode = nbd_client::ReplyMode::Extended;
        let offer = Offer { size: i64::MAX as u64, ..Offer::new(mode) };
        let mut server = Script::over(theirs);
        server.handshake(&offer).await.unwrap();
        let read = server.request().await.unwrap();
        server.answer_read(&read).await.unwrap();
        server.goodbye().await;
    });
    let client = guarded(connector().connect_over(ours)).await.unwrap();
    let end = client.info().size;
    assert_eq!(end, i64::MAX as u64);
    assert_eq!(client.read(span(end - 8, 8)).await.unwrap().len(), 8);
    assert!(matches!(client.read(span(end - 8, 9)).await, Err(Error::Misuse(_))));
    assert!(matches!(client.read(u64::MAX - 1..u64::MAX).await, Err(Error::Misuse(_))));
}
