//! More clients than are allowed.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

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

#[test]
fn a_client_over_the_limit_may_wait_until_another_one_leaves() {
    let mut config = ServerConfig::default();
    config.max_connections = 1;
    config.queue_timeout = Duration::MAX;
    let server = TestServer::with(config, Arc::new(MemoryExport::new(1 << 20)));
    // Each connects while the one before it may not have left yet in the server's eyes.
    for _ in 0..50 {
        drop(Client::connect(&server, ReplyMode::Extended));
    }
    let inside = Client::connect(&server, ReplyMode::Simple);
    let mut waiting = server.connect();
    drop(inside);
    let mut greeting = [0; 18];
    waiting.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
}

#[test]
fn a_client_that_waited_too_long_is_closed() {
    let mut config = ServerConfig::default();
    config.max_connections = 1;
    config.queue_timeout = Duration::from_millis(50);
    let server = TestServer::with(config, Arc::new(MemoryExport::new(1 << 20)));
    let mut inside = Client::connect(&server, ReplyMode::Simple);
    assert!(!is_greeted(&server), "there was no place");
    assert_eq!(inside.read(0, 4), [0; 4]);
}

#[test]
fn clients_that_wait_do_not_hold_the_end_up() {
    let mut config = ServerConfig::default();
    config.max_connections = 1;
    config.queue_timeout = Duration::MAX;
    let server = TestServer::with(config, Arc::new(MemoryExport::new(1 << 20)));
    let _inside = Client::connect(&server, ReplyMode::Simple);
    let mut waiting = server.connect();
    assert!(server.stop().is_ok());
    let mut greeting = Vec::new();
    let _ = waiting.read_to_end(&mut greeting);
    assert!(greeting.is_empty());
}
