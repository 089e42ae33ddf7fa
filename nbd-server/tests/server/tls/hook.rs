//! The hook of a server's owner, and who its clients have proved to be.

use std::sync::{Arc, Mutex};

use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::tls::{PeerIdentity, TlsMode};
use nbd_server::{ExportRegistry, Refusal, Server, ServerConfig};
use openssl::ssl::SslVersion;

use super::client::{is_let_in, keyed};
use super::{ALICES_KEY, psk};
use crate::support::TestServer;

const BOBS_KEY: [u8; 16] = 0xffee_ddcc_bbaa_9988_7766_5544_3322_1100_u128.to_be_bytes();

#[test]
fn it_is_asked_again_after_starttls_and_turns_users_away() {
    let (_directory, credentials) = psk();
    let mut config = ServerConfig::default();
    config.tls = TlsMode::Require(credentials);
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)))).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let server = Server::new(config, exports).on_connection(move |client| {
        log.lock().unwrap().push(client.tls.clone());
        match &client.tls {
            Some(PeerIdentity::User(user)) if user == "bob" => Err(Refusal::new("not bob")),
            _ => Ok(()),
        }
    });
    let server = TestServer::run(server);
    assert!(is_let_in(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)));
    let alice = PeerIdentity::User("alice".to_owned());
    assert_eq!(*asked.lock().unwrap(), [None, Some(alice)]);
    assert!(!is_let_in(&server, keyed("bob", BOBS_KEY, SslVersion::TLS1_3)));
    assert_eq!(asked.lock().unwrap().len(), 4);
}
