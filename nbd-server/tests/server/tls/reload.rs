//! Credentials read again while the server runs.

use nbd_server::tls::{TlsError, TlsMode};
use openssl::ssl::SslVersion;

use super::client::{Session, is_let_in, keyed};
use super::{ALICES_KEY, psk, serve};

#[test]
fn new_clients_meet_the_new_keys_and_connected_ones_go_on() {
    let (directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials.clone()));
    let alice = || keyed("alice", ALICES_KEY, SslVersion::TLS1_3);
    let eve = || keyed("eve", ALICES_KEY, SslVersion::TLS1_3);
    let mut session = Session::open(&server, alice());
    session.write(4096, &[7; 1000]);
    std::fs::write(directory.path().join("keys.psk"), "eve:00112233445566778899aabbccddeeff\n")
        .unwrap();
    assert!(!is_let_in(&server, eve()), "not before they are read again");
    credentials.reload().unwrap();
    assert!(is_let_in(&server, eve()));
    assert!(!is_let_in(&server, alice()));
    assert_eq!(session.read(4096, 1000), [7; 1000]);
}

#[test]
fn keys_that_cannot_be_read_again_stay_as_they_were() {
    let (directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials.clone()));
    std::fs::write(directory.path().join("keys.psk"), "alice:001122\n").unwrap();
    let error = credentials.reload().unwrap_err();
    assert!(matches!(error, TlsError::KeyFile { .. }), "{error}");
    assert!(error.to_string().contains("line 1"), "{error}");
    std::fs::remove_file(directory.path().join("keys.psk")).unwrap();
    let error = credentials.reload().unwrap_err();
    assert!(error.to_string().contains("there is no such file"), "{error}");
    assert!(is_let_in(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)));
}
