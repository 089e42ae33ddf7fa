//! A client that does not get through its handshake in time.

use std::io::{Read, Write};
use std::time::Duration;

use nbd_proto::wire::ReplyMode;
use nbd_server::ServerConfig;
use nbd_server::export::MemoryExport;
use std::sync::Arc;

use crate::support::{Client, TestServer};

fn server(deadline: Duration) -> TestServer {
    let mut config = ServerConfig::default();
    config.handshake_timeout = deadline;
    TestServer::with(config, Arc::new(MemoryExport::new(1 << 20)))
}

#[test]
fn a_client_that_says_nothing_is_dropped() {
    let server = server(Duration::from_millis(100));
    let mut stream = server.connect();
    let mut greeting = Vec::new();
    // Without a deadline this would not end before the read times out, which is an error.
    stream.read_to_end(&mut greeting).unwrap();
    assert_eq!(greeting.len(), 18);
}

#[test]
fn a_client_that_goes_on_saying_little_is_dropped_as_well() {
    let server = server(Duration::from_millis(100));
    let mut stream = server.connect();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    // An option that is never refused and never ends: its payload comes byte by byte.
    stream.write_all(b"IHAVEOPT\0\0\0\x63\0\x10\0\0").unwrap();
    for _ in 0..100_000 {
        if stream.write_all(&[0]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the server waited for all of it");
}

#[test]
fn the_deadline_ends_with_the_handshake() {
    let deadline = Duration::from_secs(1);
    let server = server(deadline);
    let mut client = Client::connect(&server, ReplyMode::Extended);
    std::thread::sleep(deadline + Duration::from_millis(300));
    assert_eq!(client.read(0, 10), [0; 10]);
}

#[test]
fn thousands_of_options_are_answered_in_bursts_and_all_of_them() {
    let server = server(Duration::from_secs(10));
    let mut stream = server.connect();
    stream.read_exact(&mut [0; 18]).unwrap();
    // Two thousand LISTs at once, and an ABORT.
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(b"IHAVEOPT\0\0\0\x03\0\0\0\0".repeat(2000));
    bytes.extend(b"IHAVEOPT\0\0\0\x02\0\0\0\0");
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let mut replies = Vec::new();
    stream.read_to_end(&mut replies).unwrap();
    writing.join().unwrap();
    // A reply with the one name, which is empty, and an acknowledgement; one more for the ABORT.
    assert_eq!(replies.len(), 2000 * (24 + 20) + 20);
}
