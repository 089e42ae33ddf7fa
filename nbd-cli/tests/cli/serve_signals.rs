//! SIGTERM and SIGINT end the server cleanly, a second one at once.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use rustix::process::Signal;

use crate::support::{Disk, Server, nbd_cli};

#[test]
fn the_first_signal_ends_with_0_and_removes_the_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::ours(&["memory:1M"]);
        assert!(server.socket().exists());
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0));
        assert!(!server.socket().exists());
    }
}

#[test]
fn what_was_written_before_the_end_is_in_the_image() {
    let disk = Disk::sparse();
    let image = disk.blank("blank.img", 8 << 20);
    let server = Server::ours(&[&image]);
    nbd_cli(&["copy", disk.path(), server.uri()]).success();
    server.end();
    disk.assert_equals(&image);
}

#[test]
fn an_idle_client_does_not_hold_the_end_up() {
    let mut server = Server::ours(&["--drain-timeout", "1m", "memory:1M"]);
    let mut idle = UnixStream::connect(server.socket()).expect("a connection");
    let mut greeting = [0; 18];
    idle.read_exact(&mut greeting).expect("the greeting");
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::ours(&["--drain-timeout", "10m", "memory:64M"]);
    // A client that asks for much and takes nothing keeps the server draining.
    let mut client = connect_raw(server.socket());
    for _ in 0..64 {
        client.write_all(&read_request(32 << 20)).expect("a request");
    }
    let mut first = [0; 4];
    client.read_exact(&mut first).expect("the first reply begins");
    server.signal(Signal::TERM);
    // Until it has stopped listening the first signal may not have been seen.
    while UnixStream::connect(server.socket()).is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    server.signal(Signal::INT);
    assert_eq!(server.wait().code(), Some(130));
}

/// A handshake with EXPORT_NAME and no frills.
fn connect_raw(socket: &std::path::Path) -> UnixStream {
    let mut client = UnixStream::connect(socket).expect("a connection");
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).expect("the greeting");
    // Client flags: fixed newstyle, no zeroes. Option 1 with an empty name.
    client.write_all(&3_u32.to_be_bytes()).expect("flags");
    client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").expect("an option");
    let mut export = [0; 10];
    client.read_exact(&mut export).expect("size and flags");
    client
}

/// A compact READ of so many bytes from the start of the disk.
fn read_request(length: u32) -> [u8; 28] {
    let mut request = [0; 28];
    request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    request[24..].copy_from_slice(&length.to_be_bytes());
    request
}
