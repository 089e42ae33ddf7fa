//! Invalid credentials on either side: the error names the defect and the remedy.

use nbd_client::{CertificateCheck, Connector, Error, TlsError, TlsMode, TlsOptions, VerifyPeer};

use super::credentials::{Authority, Maker, Role, Validity, add_psk_user};
use super::{Kind, NAME, Program, Site, Version, plain};
use crate::common::{have, pattern};

async fn refusal(connector: Connector) -> TlsError {
    match connector.connect().await {
        Err(Error::Tls { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

async fn check(connector: Connector) -> (CertificateCheck, String) {
    match refusal(connector).await {
        error @ TlsError::Certificate { .. } => {
            let text = error.to_string();
            let TlsError::Certificate { check, .. } = error else { unreachable!() };
            (check, text)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn certificates_that_fail_a_check_are_named_with_the_check() {
    if !have("nbdkit") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let (nbdkit, x509, version) = (Program::Nbdkit, Kind::X509, Version::Tls13);
    let peer = site.serve(nbdkit, x509, version, "server", &pattern(4096)).await;
    let good = || site.options(x509);

    let (found, text) = check(peer.connector().tls(good().hostname("other.example"))).await;
    assert!(matches!(found, CertificateCheck::WrongName { .. }), "{found:?}");
    assert!(text.contains("'O=Example,CN=localhost'"), "{text}");
    assert!(text.contains("localhost, 127.0.0.1, ::1 and not for 'other.example'"), "{text}");
    let (found, _) = check(peer.connector().tls(good().hostname("127.0.0.2"))).await;
    assert!(matches!(found, CertificateCheck::WrongName { .. }), "{found:?}");
    peer.connector().tls(good().hostname("127.0.0.1")).connect().await.unwrap();

    // Another authority, and none at all: the machine's own list.
    let other = site.path("other");
    std::fs::create_dir(&other).unwrap();
    Authority::new(Maker::Openssl, &other, "another authority");
    let options = TlsOptions::new(TlsMode::Require).hostname(NAME);
    for options in [options.clone().certificates(&other), options.clone()] {
        let (found, text) = check(peer.connector().tls(options)).await;
        assert!(matches!(found, CertificateCheck::UnknownAuthority { .. }), "{found:?}");
        assert!(text.contains("signed by 'CN=the authority of the test'"), "{text}");
    }
    // Without verification the authority does not matter, and the client's certificate does.
    let directory = site.path("client");
    let options = TlsOptions::new(TlsMode::Require).verify_peer(VerifyPeer::Off);
    let client = peer.connector().tls(options.certificates(&directory)).connect().await.unwrap();
    assert!(client.is_encrypted());

    site.authority.issue(Role::Server, NAME, Validity::Expired, &site.path("expired"));
    let peer = site.serve(nbdkit, x509, version, "expired", &pattern(4096)).await;
    let (found, text) = check(peer.connector().tls(good())).await;
    assert!(matches!(found, CertificateCheck::Expired(_)), "{found:?}");
    assert!(text.contains("expired on Jan 31 00:00:00 2020"), "{text}");
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_and_others_are_not() {
    if !have("nbdkit") || !have("certtool") {
        return;
    }
    let Some(site) = Site::new(Maker::Certtool) else { return };
    let peer =
        site.serve(Program::Nbdkit, Kind::X509, Version::Tls13, "server", &pattern(4096)).await;
    let list = site.path("client/ca-crl.pem");
    site.authority.revoke(&site.path("client/client-cert.pem"), &list);
    site.connector(&peer, Kind::X509).connect().await.unwrap();
    site.authority.revoke(&site.path("server/server-cert.pem"), &list);
    let (found, _) = check(site.connector(&peer, Kind::X509)).await;
    assert_eq!(found, CertificateCheck::Revoked);
}

#[tokio::test]
async fn a_server_that_wants_a_client_certificate_gets_none_or_a_wrong_one() {
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let nobody = site.path("nobody");
    std::fs::create_dir(&nobody).unwrap();
    std::fs::copy(site.path("client/ca-cert.pem"), nobody.join("ca-cert.pem")).unwrap();
    // A certificate of another authority, beside the right one for the server.
    let stranger = site.path("stranger");
    std::fs::create_dir(&stranger).unwrap();
    let other = Authority::new(Maker::Openssl, &stranger, "another authority");
    other.issue(Role::Client, "a stranger", Validity::Now, &stranger);
    std::fs::copy(site.path("client/ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    let late = site.path("late");
    site.authority.issue(Role::Client, "a late one", Validity::Expired, &late);
    for (program, version) in
        [(Program::QemuNbd, Version::Tls13), (Program::Nbdkit, Version::Tls12)]
    {
        if !have(program.name()) {
            continue;
        }
        let peer = site.serve(program, Kind::X509, version, "server", &pattern(4096)).await;
        for (directory, advice) in [
            (&nobody, "put client-cert.pem and client-key.pem into"),
            (&stranger, "has to be signed by an authority that the server knows"),
            (&late, "expired on Jan 31 00:00:00 2020 GMT: renew it"),
        ] {
            let options = site.options(Kind::X509).certificates(directory);
            let error = refusal(peer.connector().tls(options)).await.to_string();
            assert!(error.contains(advice), "{program:?}: {error}");
        }
    }
}

#[tokio::test]
async fn an_unknown_user_and_a_wrong_key_look_the_same() {
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let wrong = site.path("wrong.psk");
    add_psk_user(&wrong, "alice");
    add_psk_user(&wrong, "eve");
    for (program, version) in
        [(Program::QemuNbd, Version::Tls13), (Program::Nbdkit, Version::Tls12)]
    {
        if !have(program.name()) {
            continue;
        }
        let peer = site.serve(program, Kind::PreSharedKey, version, "keys", &pattern(4096)).await;
        for user in ["alice", "eve"] {
            let options = TlsOptions::new(TlsMode::Require).pre_shared_keys(&wrong).user(user);
            let error = refusal(peer.connector().tls(options)).await.to_string();
            let advice = format!("another key for the user '{user}' or not know the user");
            assert!(error.contains(&advice), "{program:?}: {error}");
        }
    }
}

#[tokio::test]
async fn certificates_and_keys_do_not_fit_together() {
    if !have("nbdkit") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    for version in [Version::Tls12, Version::Tls13] {
        // The server could ignore the key in TLS 1.3 and show its certificate.
        let peer = site.serve(Program::Nbdkit, Kind::X509, version, "server", &pattern(4096)).await;
        let error = refusal(site.connector(&peer, Kind::PreSharedKey)).await;
        match version {
            Version::Tls13 => assert!(matches!(error, TlsError::NotPreSharedKey), "{error:?}"),
            Version::Tls12 => assert!(error.to_string().contains("use certificates"), "{error}"),
        }
        let peer =
            site.serve(Program::Nbdkit, Kind::PreSharedKey, version, "keys", &pattern(4096)).await;
        let error = refusal(site.connector(&peer, Kind::X509)).await.to_string();
        assert!(error.contains("uses pre-shared keys"), "{error}");
    }
}

#[tokio::test]
async fn require_prefer_and_off_meet_servers_with_and_without_tls() {
    if !have("nbdkit") || !have("qemu-nbd") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let keys = site.path("keys");
    let with = |mode| TlsOptions::new(mode).pre_shared_keys(&keys).user("alice");
    let qemu = crate::common::qemu_nbd(&[], &pattern(4096)).await;
    for peer in [&plain(&pattern(4096)).await, &qemu] {
        let error = refusal(peer.connector().tls(with(TlsMode::Require))).await;
        assert!(matches!(error, TlsError::Refused(_)), "{error:?}");
        let client = peer.connector().tls(with(TlsMode::Prefer)).connect().await.unwrap();
        assert!(!client.is_encrypted());
        assert!(client.read(0..4096).await.unwrap() == pattern(4096));
    }
    for program in Program::ALL {
        let peer =
            site.serve(program, Kind::PreSharedKey, Version::Tls13, "keys", &pattern(4096)).await;
        let client = peer.connector().tls(with(TlsMode::Prefer)).connect().await.unwrap();
        assert!(client.is_encrypted());
        for connector in [peer.connector(), peer.connector().tls(with(TlsMode::Off))] {
            let error = refusal(connector).await;
            assert!(matches!(error, TlsError::RequiredByServer), "{error:?}");
        }
        // With a wrong key it must not go on in the clear.
        let wrong = site.path("wrong.psk");
        add_psk_user(&wrong, "alice");
        let options = TlsOptions::new(TlsMode::Prefer).pre_shared_keys(&wrong);
        refusal(peer.connector().tls(options)).await;
    }
}
