//! Clients that leave, in good order or not.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{CommandType, ReplyMode};
use nbd_server::export::{MayBlock, MemoryExport};

use crate::support::{Client, MODES, Random, Script, Scripted, TestServer, header, wait_until};

const READ: Command = Command::Read(Fragmentation::Allowed);
const WRITE: Command = Command::Write(Durability::Cached);

#[test]
fn disc_waits_for_what_is_in_flight() {
    for mode in MODES {
        let disk = Scripted::new(1 << 20, Script { gated: Some(0..1), ..Script::default() });
        let server = TestServer::with(Default::default(), disk.clone());
        let mut client = Client::connect(&server, mode);
        client.submit(0, 4096, &WRITE, &[3; 4096]);
        client.submit(0, 4096, &READ, &[]);
        client.send(client.encode(&header(CommandType::DISC, 0, 0)));
        // What follows a goodbye is not looked at.
        client.send(client.encode(&header(CommandType::READ, 4096, 4096)));
        wait_until("both are on their way", || disk.gate.arrived() == 2);
        disk.gate.open();
        for _ in 0..2 {
            assert_eq!(client.next_finished().1.result, Ok(()));
        }
        client.expect_end();
    }
}

#[test]
fn reads_that_wait_for_a_thread_go_with_their_client() {
    let disk = Scripted::new(1 << 20, Script { gated: Some(0..1 << 20), ..Script::default() });
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, ReplyMode::Simple);
    // More than there are threads.
    for _ in 0..400 {
        client.submit(0, 512, &READ, &[]);
    }
    let waiting = || server.handle().statistics().pool.waiting;
    wait_until("some wait", || waiting() > 0);
    drop(client);
    wait_until("none waits, although no thread is free", || waiting() == 0);
    disk.gate.open();
}

#[test]
fn requests_sent_before_the_end_of_the_stream_are_all_answered() {
    // Far more than is carried out at a time: some still wait in the receive buffer when the end of
    // the stream comes.
    for prompt in [MayBlock::Yes, MayBlock::No] {
        for mode in MODES {
            let disk = Scripted::new(1 << 20, Script { prompt: Some(prompt), ..Script::default() });
            let server = TestServer::with(Default::default(), disk);
            let mut client = Client::connect(&server, mode);
            let count = 400;
            for _ in 0..count {
                client.submit(0, 128 << 10, &READ, &[]);
            }
            client.finish_sending();
            for _ in 0..count {
                assert_eq!(client.next_finished().1.result, Ok(()));
            }
            client.expect_end();
        }
    }
}

/// What a client sends in a session, and where in it the handshake ends.
fn session(mode: ReplyMode) -> Vec<u8> {
    let mut bytes = b"\0\0\0\x03".to_vec();
    let mut option = |number: u32, payload: &[u8]| {
        bytes.extend_from_slice(b"IHAVEOPT");
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
    };
    match mode {
        ReplyMode::Simple => {}
        ReplyMode::Structured => option(8, &[]),
        ReplyMode::Extended => option(11, &[]),
    }
    option(7, &[0; 6]);
    for (command, length) in
        [(CommandType::WRITE, 100), (CommandType::READ, 100), (CommandType::FLUSH, 0)]
    {
        let request = header(command, 0, length);
        match mode {
            ReplyMode::Extended => request.encode_extended(&mut bytes),
            _ => request.encode_compact(&mut bytes).unwrap(),
        }
        if command == CommandType::WRITE {
            bytes.extend_from_slice(&[8; 100]);
        }
    }
    bytes
}

#[test]
fn the_server_survives_a_client_that_leaves_at_any_byte() {
    let server = TestServer::of(MemoryExport::new(1 << 20));
    let mut witness = Client::connect(&server, ReplyMode::Extended);
    for mode in MODES {
        let bytes = session(mode);
        for end in 0..=bytes.len() {
            let mut stream = server.connect();
            stream.write_all(&bytes[..end]).unwrap();
            match end % 3 {
                // Without looking at what the server said: it may meet a closed socket.
                0 => drop(stream),
                1 => stream.shutdown(Shutdown::Both).unwrap(),
                _ => {
                    // With the manners to wait for the end.
                    stream.shutdown(Shutdown::Write).unwrap();
                    stream.read_to_end(&mut Vec::new()).unwrap();
                }
            }
        }
        assert_eq!(witness.read(0, 4).len(), 4);
    }
    // A write of which a byte is missing is not carried out.
    let fresh = TestServer::of(MemoryExport::new(1 << 20));
    let bytes = session(ReplyMode::Simple);
    let write_end = bytes.len() - 2 * 28;
    leave(fresh.connect(), &bytes[..write_end - 1]);
    assert_eq!(Client::connect(&fresh, ReplyMode::Simple).read(0, 100), [0; 100]);
    leave(fresh.connect(), &bytes[..write_end]);
    assert_eq!(Client::connect(&fresh, ReplyMode::Simple).read(0, 100), [8; 100]);
}

#[test]
fn the_server_survives_sessions_with_damaged_bytes() {
    let server = TestServer::of(MemoryExport::new(1 << 20));
    let mut random = Random::new();
    let mut witness = Client::connect(&server, ReplyMode::Extended);
    for round in 0..600 {
        let mut bytes = session(MODES[round % 3]);
        for _ in 0..=random.below(4) {
            let place = random.below(bytes.len() as u64) as usize;
            match random.below(3) {
                0 => bytes[place] = random.next() as u8,
                1 => bytes[place] = [0, 0xff, 0x7f, 0x80][random.below(4) as usize],
                _ => drop(bytes.splice(place..place, random.bytes(8))),
            }
        }
        let mut stream = server.connect();
        // It may be cut off at any time, and a damaged length may make it wait for more.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(witness.read(0, 4).len(), 4);
    assert!(server.stop().is_ok());
}

fn leave(mut stream: UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_long_payload_or_reply_is_forgotten() {
    let mut config = nbd_server::ServerConfig::default();
    config.max_connections = 1;
    let disk = Scripted::new(64 << 20, Script::default());
    let server = TestServer::with(config, disk.clone());
    for mode in MODES {
        let client = open_alone(&server, mode);
        let mut bytes = client.encode(&header(CommandType::WRITE, 0, 32 << 20));
        bytes.extend_from_slice(&vec![1; 10 << 20]);
        client.send(bytes);
        drop(client);
        let mut client = open_alone(&server, mode);
        let before = disk.reads.load(Ordering::SeqCst);
        client.submit(0, 32 << 20, &READ, &[]);
        wait_until("it is read", || disk.reads.load(Ordering::SeqCst) > before);
        drop(client);
        assert_eq!(open_alone(&server, mode).read(0, 10), [0; 10]);
        drop(open_alone(&server, mode));
    }
    assert_eq!(disk.writes.load(Ordering::SeqCst), 0);
}

/// Connects as soon as the one place the server has is free.
fn open_alone(server: &TestServer, mode: ReplyMode) -> Client {
    let mut client = None;
    wait_until("the place is free", || {
        client = Client::try_connect(server, mode);
        client.is_some()
    });
    client.unwrap()
}
