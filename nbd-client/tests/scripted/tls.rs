//! Servers, or attackers in the middle, that refuse TLS or break its handshake.

use std::time::Duration;

use nbd_client::{
    Client, Connector, Error, ReplyMode, Result, TlsError, TlsMode, TlsOptions, VerifyPeer,
};
use tokio::net::UnixStream;

use crate::script::{Offer, Script, guarded};

const STARTTLS: u32 = 5;
const ACK: u32 = 1;
const UNSUPPORTED: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQUIRED: u32 = 0x8000_0005;

/// Without credentials: none of these servers gets that far.
fn connector(mode: TlsMode) -> Connector {
    let options = TlsOptions::new(mode).verify_peer(VerifyPeer::Off);
    "nbd://scripted".parse::<Connector>().unwrap().tls(options)
}

/// Greets, takes STARTTLS and goes on with the script. Its result is the client's.
async fn after_starttls<F, S>(connector: Connector, script: S) -> Result<Client>
where
    S: FnOnce(Script) -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.greet().await.unwrap();
        assert_eq!(server.option().await.unwrap(), (STARTTLS, Vec::new()), "TLS comes first");
        script(server).await;
    });
    let result = guarded(connector.connect_over(ours)).await;
    server.await.unwrap();
    result
}

fn tls_error(result: Result<Client>) -> TlsError {
    match result {
        Err(Error::Tls { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_refusal_of_tls_ends_a_connection_that_requires_it_and_nothing_more_is_said() {
    for reply in [UNSUPPORTED, POLICY, INVALID, 0x8000_0077] {
        let result = after_starttls(connector(TlsMode::Require), move |mut server| async move {
            server.answer(STARTTLS, reply, b"no").await.unwrap();
            server.closed().await;
        });
        let error = tls_error(result.await);
        assert!(matches!(error, TlsError::Refused(_)), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_without_options_is_too_old_for_a_connection_that_requires_tls() {
    for greeting in [
        &b"NBDMAGICIHAVEOPT\0\0"[..],
        &[&b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53"[..], &[0; 136]].concat(),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let greeting = greeting.to_vec();
        let server = tokio::spawn(async move {
            let mut server = Script::over(theirs);
            server.send(&greeting).await.unwrap();
            server.closed().await;
        });
        let result = guarded(connector(TlsMode::Require).connect_over(ours)).await;
        let error = tls_error(result);
        assert!(matches!(error, TlsError::TooOld), "{error:?}");
        server.await.unwrap();
    }
}

#[tokio::test]
async fn preferred_tls_is_done_without_only_if_the_server_says_it_has_none() {
    for reply in [UNSUPPORTED, POLICY] {
        let result = after_starttls(connector(TlsMode::Prefer), move |mut server| async move {
            server.answer(STARTTLS, reply, b"no").await.unwrap();
            server.options(&Offer::new(ReplyMode::Extended)).await.unwrap();
        });
        assert!(!result.await.unwrap().is_encrypted());
    }
    let result = after_starttls(connector(TlsMode::Prefer), |mut server| async move {
        server.answer(STARTTLS, INVALID, b"no").await.unwrap();
        server.closed().await;
    });
    assert!(matches!(tls_error(result.await), TlsError::Refused(_)));
}

#[tokio::test]
async fn a_failed_tls_handshake_never_leads_to_a_connection_without_tls() {
    for mode in [TlsMode::Prefer, TlsMode::Require] {
        let result = after_starttls(connector(mode), |mut server| async move {
            server.answer(STARTTLS, ACK, b"").await.unwrap();
            // Dies in the middle of the client's first message.
            assert_eq!(server.take::<3>().await.unwrap(), [22, 3, 1], "a TLS handshake record");
        });
        let error = tls_error(result.await);
        assert!(matches!(error, TlsError::Closed { .. }), "{mode:?} {error:?}");

        let result = after_starttls(connector(mode), |mut server| async move {
            server.answer(STARTTLS, ACK, b"").await.unwrap();
            assert_eq!(server.take::<3>().await.unwrap(), [22, 3, 1]);
            server.send(b"HTTP/1.0 400 Bad Request\r\n\r\n").await.unwrap();
            // The client may say what it thinks of that, in TLS; no option follows.
            let rest = server.rest().await;
            assert!(!rest.windows(8).any(|part| part == b"IHAVEOPT"), "{rest:?}");
        });
        let error = tls_error(result.await);
        assert!(matches!(&error, TlsError::Failed(why) if why.contains("not TLS")), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_that_stalls_in_the_tls_handshake_runs_into_the_deadline() {
    let limit = Duration::from_millis(200);
    for answer in [&[][..], &[22, 3, 3, 0]] {
        let connector = connector(TlsMode::Require).handshake_timeout(limit);
        let result = after_starttls(connector, move |mut server| async move {
            server.answer(STARTTLS, ACK, b"").await.unwrap();
            assert_eq!(server.take::<3>().await.unwrap(), [22, 3, 1]);
            server.send(answer).await.unwrap();
            server.rest().await;
        });
        match result.await {
            Err(Error::HandshakeTimeout { limit: told, .. }) => assert_eq!(told, limit),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn bytes_injected_behind_the_answer_to_starttls_end_the_connection() {
    let result = after_starttls(connector(TlsMode::Require), |mut server| async move {
        let answer = crate::script::option_reply(STARTTLS, ACK, b"");
        let injected = crate::script::option_reply(8, ACK, b"");
        server.send(&[answer, injected].concat()).await.unwrap();
        server.rest().await;
    });
    match result.await {
        Err(Error::Handshake { source, .. }) => {
            assert!(source.to_string().contains("injected"), "{source}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_server_that_requires_tls_is_not_argued_with() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.greet().await.unwrap();
        let (option, _) = server.option().await.unwrap();
        server.answer(option, TLS_REQUIRED, b"").await.unwrap();
        server.closed().await;
    });
    let connector: Connector = "nbd://scripted".parse().unwrap();
    let error = tls_error(guarded(connector.connect_over(ours)).await);
    assert!(matches!(error, TlsError::RequiredByServer), "{error:?}");
    server.await.unwrap();
}

#[tokio::test]
async fn mistakes_are_found_before_anybody_is_asked() {
    let refused = async |uri: &str, options: Option<TlsOptions>| {
        let mut connector: Connector = uri.parse().unwrap();
        if let Some(options) = options {
            connector = connector.tls(options);
        }
        // Nothing listens there.
        let error = tls_error(connector.connect().await);
        error.to_string()
    };
    let error = refused("nbds+unix:///?socket=/nowhere", None).await;
    assert!(error.contains("tls-hostname"), "{error}");
    let error = refused("nbds://h/?tls-certificates=/nowhere", None).await;
    assert!(error.contains("local file with tls-certificates"), "{error}");
    let off = TlsOptions::new(TlsMode::Off);
    let error = refused("nbds://h/", Some(off)).await;
    assert!(error.contains("TLS is off"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let certificates = TlsOptions::new(TlsMode::Require).certificates(directory.path());
    let error = refused("nbd://h/", Some(certificates.clone())).await;
    assert!(error.contains("ca-cert.pem': No such file"), "{error}");
    std::fs::write(directory.path().join("ca-cert.pem"), "no certificate").unwrap();
    let error = refused("nbd://h/", Some(certificates)).await;
    assert!(error.contains("ca-cert.pem' is not usable as the authorities' cert"), "{error}");
    let keys = directory.path().join("keys.psk");
    let pre_shared = TlsOptions::new(TlsMode::Require).pre_shared_keys(directory.path());
    std::fs::write(&keys, "alice:12").unwrap();
    let error = refused("nbd://h/", Some(pre_shared.clone())).await;
    assert!(error.contains("keys.psk' is not usable as pre-shared keys: line 1 has"), "{error}");
    let key = "00112233445566778899aabbccddeeff";
    std::fs::write(&keys, format!("alice:{key}\nbob:{key}\n")).unwrap();
    let error = refused("nbd://h/", Some(pre_shared.clone())).await;
    assert!(error.contains("has the keys of 'alice', 'bob'"), "{error}");
    let error = refused("nbd://h/", Some(pre_shared.user("eve"))).await;
    assert!(error.contains("no key for the user 'eve'"), "{error}");
}
