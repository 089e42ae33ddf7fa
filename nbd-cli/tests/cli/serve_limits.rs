//! Limits: connections, handshake time, stalls.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use crate::support::{Disk, Server, nbd_cli};

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
    let disk = Disk::sparse();
    // The last is the spelling of earlier versions.
    for (number, polling) in
        [["--busy-poll", "0"], ["--busy-poll", "1ms"], ["--poll-max-ns", "32768"]]
            .iter()
            .enumerate()
    {
        let server = Server::ours(&[polling[0], polling[1], disk.path()]);
        let copy = disk.beside(&number.to_string());
        // Holes are read as well, so that there are many requests in a row.
        let one_by_one = ["copy", "--no-extents", "-C", "1", "-R", "1", "--request-size", "4K"];
        nbd_cli(&[&one_by_one[..], &[server.uri(), &copy]].concat()).success();
        server.end();
        disk.assert_equals(copy);
    }
}

#[test]
fn a_small_memory_limit_still_serves_large_requests() {
    // The second pair are the spellings of earlier versions.
    for [connection, all] in
        [["--connection-memory-limit", "--memory-limit"], ["--connection-budget", "--memory"]]
    {
        let arguments = [connection, "64K", all, "64K", "--max-requests", "1"];
        let server = Server::ours(&[&arguments[..], &["memory:64M"]].concat());
        nbd_cli(&["copy", "--request-size", "32M", server.uri(), "null:"]).success();
        server.end();
    }
}

#[test]
fn a_client_that_stops_in_the_middle_of_a_write_is_dropped() {
    let server = Server::ours(&["--stall-timeout", "400ms", "memory:64M"]);
    let mut stalled = UnixStream::connect(server.socket()).expect("a connection");
    // Client flags, EXPORT_NAME with the empty name, and a WRITE of 32 MiB without its payload.
    stalled.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").expect("the handshake");
    stalled.write_all(b"\x25\x60\x95\x13\0\0\0\x01cookies!").expect("a request");
    stalled.write_all(b"\0\0\0\0\0\0\0\0\x02\0\0\0").expect("a request");
    let mut received = Vec::new();
    stalled.read_to_end(&mut received).expect("its end");
    assert_eq!(received.len(), 18 + 10, "a greeting and a description, no reply");
    nbd_cli(&["info", server.uri()]).success();
}

#[test]
fn there_need_be_no_such_limit() {
    Server::ours(&["--stall-timeout", "0", "memory:1M"]).end();
}
