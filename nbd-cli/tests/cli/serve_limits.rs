//! Limits: connections, time for the handshake.

use std::io::Read as _;
use std::os::unix::net::UnixStream;

use crate::support::{Server, nbd_cli};

#[test]
fn a_connection_too_many_is_closed_at_once() {
    let server = Server::ours(&["--max-connections", "1", "memory:1M"]);
    let mut first = UnixStream::connect(server.socket()).expect("a connection");
    let mut greeting = [0; 18];
    first.read_exact(&mut greeting).expect("the greeting");
    let mut second = UnixStream::connect(server.socket()).expect("a connection");
    assert_eq!(second.read(&mut greeting).expect("its end"), 0);
    drop(first);
}

#[test]
fn a_client_that_says_nothing_is_dropped() {
    let server = Server::ours(&["--handshake-timeout", "100ms", "memory:1M"]);
    let mut silent = UnixStream::connect(server.socket()).expect("a connection");
    let mut received = Vec::new();
    silent.read_to_end(&mut received).expect("its end");
    assert!(received.starts_with(b"NBDMAGICIHAVEOPT"), "{received:?}");
    nbd_cli(&["info", server.uri()]).success();
}

#[test]
fn requests_are_served_with_and_without_polling() {
    for poll_max in ["0", "1000000"] {
        let server = Server::ours(&["--poll-max-ns", poll_max, "memory:8M"]);
        let one_by_one = ["copy", "--connections", "1", "--requests", "1", "--request-size", "4K"];
        nbd_cli(&[&one_by_one[..], &[server.uri(), "null:"]].concat()).success();
        server.end();
    }
}

#[test]
fn a_small_budget_still_serves_large_requests() {
    let arguments = ["--connection-budget", "64K", "--memory", "64K", "--max-requests", "1"];
    let server = Server::ours(&[&arguments[..], &["memory:64M"]].concat());
    nbd_cli(&["copy", "--request-size", "32M", server.uri(), "null:"]).success();
    server.end();
}
