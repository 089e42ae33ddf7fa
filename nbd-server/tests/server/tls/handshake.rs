//! Who gets in, in both versions.

use std::io::{Read, Write};

use nbd_server::tls::{Authorization, TlsMode};
use openssl::ssl::{SslContextBuilder, SslMethod, SslVersion};

use super::client::{
    ABORT, ACK, ERR_INVALID, ERR_POLICY, ERR_TLS_REQD, EXPORT_NAME, GO, LIST, STARTTLS,
    STRUCTURED_REPLY, Session, ask, certified, connect, go, greet, is_let_in, keyed, option, rest,
    upgrade,
};
use super::credentials::{Authority, Maker, Role, Validity};
use super::{ALICES_KEY, certificates, psk, serve, x509};

const VERSIONS: [SslVersion; 2] = [SslVersion::TLS1_2, SslVersion::TLS1_3];

#[test]
fn without_credentials_starttls_is_refused() {
    let server = serve(TlsMode::Off);
    let mut stream = greet(&server);
    assert_eq!(ask(&mut stream, STARTTLS, &[]), ERR_POLICY);
    assert_eq!(ask(&mut stream, LIST, &[]), ACK);
}

#[test]
fn a_server_that_requires_tls_answers_nothing_else_before_it() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let mut stream = greet(&server);
    for (number, payload) in
        [(LIST, vec![]), (GO, go("")), (STRUCTURED_REPLY, vec![]), (99, vec![])]
    {
        assert_eq!(ask(&mut stream, number, &payload), ERR_TLS_REQD, "option {number}");
    }
    assert_eq!(ask(&mut stream, ABORT, &[]), ACK);
    let mut stream = greet(&server);
    stream.write_all(&option(EXPORT_NAME, &[])).unwrap();
    assert!(rest(&mut stream).is_empty());
}

#[test]
fn users_get_in_with_their_key_and_nobody_else() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    for version in VERSIONS {
        assert!(is_let_in(&server, keyed("alice", ALICES_KEY, version)), "{version:?}");
        assert!(!is_let_in(&server, keyed("bob", ALICES_KEY, version)), "{version:?}");
        assert!(!is_let_in(&server, keyed("eve", ALICES_KEY, version)), "{version:?}");
    }
}

#[test]
fn an_unknown_user_is_told_the_same_as_one_with_a_wrong_key() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    for version in VERSIONS {
        let answer = |user| {
            let mut stream = greet(&server);
            assert_eq!(ask(&mut stream, STARTTLS, &[]), ACK);
            let tls = keyed(user, ALICES_KEY, version);
            let error = connect(tls, stream).expect_err("a wrong key");
            error.to_string()
        };
        assert_eq!(answer("bob"), answer("eve"), "{version:?}");
    }
}

#[test]
fn a_second_starttls_is_invalid_and_what_was_said_before_the_first_is_forgotten() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Allow(credentials));
    let mut stream = greet(&server);
    assert_eq!(ask(&mut stream, STRUCTURED_REPLY, &[]), ACK);
    let mut stream = upgrade(stream, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)).unwrap();
    assert_eq!(ask(&mut stream, STARTTLS, &[]), ERR_INVALID);
    // Structured replies are not in force any more: the reply to a READ is a simple one.
    stream.write_all(&option(EXPORT_NAME, &[])).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    assert_eq!(Session(stream).read(4096, 10), [0; 10]);
}

#[test]
fn only_clients_with_a_valid_certificate_get_in() {
    let Some(directory) = certificates() else { return };
    let server = serve(TlsMode::Require(x509(directory.path(), Authorization::Everyone)));
    let other = tempfile::tempdir().unwrap();
    let (old, stranger) = (other.path().join("old"), other.path().join("stranger"));
    std::fs::create_dir(&stranger).unwrap();
    let authority = Authority::new(Maker::Openssl, &stranger, "Another authority");
    authority.issue(Role::Client, "alice", Validity::Now, &stranger);
    std::fs::copy(directory.path().join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    Authority::existing(Maker::Openssl, directory.path()).issue(
        Role::Client,
        "alice",
        Validity::Expired,
        &old,
    );
    for version in VERSIONS {
        let with = |directory| {
            let mut builder = certified(directory);
            builder.set_max_proto_version(Some(version)).unwrap();
            is_let_in(&server, builder)
        };
        assert!(with(directory.path()), "{version:?}");
        assert!(!with(&old), "expired, {version:?}");
        assert!(!with(&stranger), "another authority, {version:?}");
        let mut without = SslContextBuilder::new(SslMethod::tls_client()).unwrap();
        without.set_ca_file(directory.path().join("ca-cert.pem")).unwrap();
        without.set_max_proto_version(Some(version)).unwrap();
        assert!(!is_let_in(&server, without), "no certificate, {version:?}");
    }
}

#[test]
fn nothing_older_than_tls_1_2_is_spoken() {
    let Some(directory) = certificates() else { return };
    let server = serve(TlsMode::Require(x509(directory.path(), Authorization::Everyone)));
    let mut old = certified(directory.path());
    old.set_cipher_list("ALL:@SECLEVEL=0").unwrap();
    old.set_min_proto_version(Some(SslVersion::TLS1)).unwrap();
    old.set_max_proto_version(Some(SslVersion::TLS1_1)).unwrap();
    assert!(!is_let_in(&server, old));
}

#[test]
fn a_list_of_names_lets_in_those_on_it() {
    let Some(directory) = certificates() else { return };
    let list = directory.path().join("clients");
    let server = serve(TlsMode::Require(x509(directory.path(), Authorization::File(list.clone()))));
    let try_now = || is_let_in(&server, certified(directory.path()));
    assert!(!try_now(), "a missing list denies");
    std::fs::write(&list, "CN=bob,*\n").unwrap();
    assert!(!try_now());
    std::fs::write(&list, "CN=bob,*\nCN=alice,O=Example\n").unwrap();
    assert!(try_now());
}
