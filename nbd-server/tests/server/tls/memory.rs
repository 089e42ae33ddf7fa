//! Credentials that are in memory.

use nbd_server::tls::{
    Authorization, ClientCertificates, CredentialSource, PemCertificates, PreSharedKeys,
    TlsCredentials, TlsMode,
};
use openssl::ssl::SslVersion;

use super::client::{certified, is_let_in, keyed};
use super::{ALICES_KEY, KEYS, certificates, serve};

#[test]
fn certificates_in_memory_serve_clients_as_files_do() {
    let Some(directory) = certificates() else { return };
    let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    let pem = PemCertificates::new(read("server-cert.pem"), read("server-key.pem"));
    let source = |pem: &PemCertificates| CredentialSource::X509Pem {
        certificates: pem.clone(),
        client_certificates: ClientCertificates::Required,
        authorization: Authorization::Everyone,
    };
    assert_eq!(format!("{pem:?}"), "PemCertificates { .. }", "no key in logs");
    let error = TlsCredentials::load(source(&pem)).unwrap_err().to_string();
    assert!(error.contains("the authority's certificate (in memory)"), "{error}");
    let credentials = TlsCredentials::load(source(&pem.authorities(read("ca-cert.pem")))).unwrap();
    assert_eq!(credentials.host_names()[0], "localhost");
    let server = serve(TlsMode::Require(credentials));
    assert!(is_let_in(&server, certified(directory.path())));
}

#[test]
fn keys_in_memory_are_replaced_while_the_server_runs() {
    let keys =
        |text: &str| CredentialSource::PskKeys(PreSharedKeys::parse(text.as_bytes()).unwrap());
    let credentials = TlsCredentials::load(keys(KEYS)).unwrap();
    let server = serve(TlsMode::Require(credentials.clone()));
    let alice = || keyed("alice", ALICES_KEY, SslVersion::TLS1_3);
    assert!(is_let_in(&server, alice()));
    credentials.replace(&keys("eve:00112233445566778899aabbccddeeff\n")).unwrap();
    assert!(!is_let_in(&server, alice()));
    assert!(is_let_in(&server, keyed("eve", ALICES_KEY, SslVersion::TLS1_3)));
}
