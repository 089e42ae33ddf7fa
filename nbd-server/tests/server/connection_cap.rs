//! More clients than are allowed.

use std::io::Read;
use std::sync::Arc;

use nbd_proto::wire::ReplyMode;
use nbd_server::ServerConfig;
use nbd_server::export::MemoryExport;

use crate::support::{Client, TestServer, wait_until};

fn is_greeted(server: &TestServer) -> bool {
    let mut greeting = Vec::new();
    let _ = server.connect().take(18).read_to_end(&mut greeting);
    greeting.len() == 18
}

#[test]
fn a_client_over_the_limit_is_closed_at_once_and_served_when_another_has_left() {
    let mut config = ServerConfig::default();
    config.max_connections = 2;
    let server = TestServer::with(config, Arc::new(MemoryExport::new(1 << 20)));
    let mut first = Client::connect(&server, ReplyMode::Simple);
    let second = Client::connect(&server, ReplyMode::Extended);
    for _ in 0..10 {
        assert!(!is_greeted(&server), "a third client was let in");
    }
    assert_eq!(first.read(0, 4), [0; 4], "the clients inside notice nothing");
    drop(second);
    // The server learns of it in its own time.
    wait_until("the place is free", || is_greeted(&server));
    wait_until("the place is free again", || is_greeted(&server));
    assert_eq!(first.read(0, 4), [0; 4]);
}
