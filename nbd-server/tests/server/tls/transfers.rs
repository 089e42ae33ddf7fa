//! Data through TLS, in both directions at a time and over several connections.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use nbd_server::tls::TlsMode;
use openssl::ssl::SslVersion;

use super::client::{Session, keyed, request};
use super::{ALICES_KEY, DISK_LEN, psk, serve};
use crate::support::{LONG, Random, TestServer};

fn open(server: &TestServer, version: SslVersion) -> Session<impl Read + Write> {
    Session::open(server, keyed("alice", ALICES_KEY, version))
}

#[test]
fn every_length_reads_back_as_it_was_written() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let mut random = Random::new();
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let mut session = open(&server, version);
        // Around the length of a record, of a batch of records, and of the server's buffers.
        for length in [1, 16383, 16384, 16385, 65_535, 262_144, 262_145, 1 << 20, 5 << 20] {
            let data = random.bytes(length);
            session.write(12_345, &data);
            assert!(session.read(12_345, length as u32) == data, "{length} bytes, {version:?}");
        }
    }
}

#[test]
fn connections_do_not_get_in_each_others_way() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let part = DISK_LEN / 8;
    std::thread::scope(|scope| {
        for index in 0..8 {
            let server = &server;
            scope.spawn(move || {
                let mut random = Random::new();
                let mut session = open(server, SslVersion::TLS1_3);
                let data = random.bytes(part as usize);
                for (step, chunk) in data.chunks(300_000).enumerate() {
                    session.write(index * part + step as u64 * 300_000, chunk);
                }
                assert!(session.read(index * part, part as u32) == data);
            });
        }
    });
}

/// The client sends writes while it takes the replies to reads, on one socket that never waits:
/// whichever direction the server held up for the other would stand still for ever.
#[test]
fn reads_and_writes_of_one_connection_move_at_the_same_time() {
    const PIECE: usize = 256 << 10;
    const PIECES: u64 = 64;
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let tls = keyed("alice", ALICES_KEY, SslVersion::TLS1_3);
    let Session(mut stream) = Session::open(&server, tls);
    stream.get_ref().set_nonblocking(true).unwrap();
    let mut out = Vec::new();
    for piece in 0..PIECES {
        let at = piece * PIECE as u64;
        out.extend(request(0, piece, at + DISK_LEN / 2, PIECE as u32));
        out.extend(request(1, piece, at, PIECE as u32));
        out.extend(std::iter::repeat_n(piece as u8 + 1, PIECE));
    }
    let expected = PIECES as usize * (PIECE + 16 + 16);
    let (mut sent, mut received) = (0, 0);
    let mut space = vec![0; PIECE];
    let start = Instant::now();
    let mut mixed = false;
    while sent < out.len() || received < expected {
        let end = out.len().min(sent + 16_384);
        let wrote = moved(if sent < end { stream.write(&out[sent..end]) } else { Ok(0) });
        let read = moved(if received < expected { stream.read(&mut space) } else { Ok(0) });
        sent += wrote;
        received += read;
        mixed |= received > 0 && sent < out.len();
        if wrote + read == 0 {
            assert!(start.elapsed() < LONG, "{sent} bytes sent, {received} received");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    assert_eq!(received, expected);
    assert!(mixed, "replies came before everything was sent");
    stream.get_ref().set_nonblocking(false).unwrap();
    let mut session = Session(stream);
    for piece in 0..PIECES {
        let data = session.read(piece * PIECE as u64, PIECE as u32);
        assert!(data.iter().all(|byte| *byte == piece as u8 + 1), "piece {piece}");
    }
}

fn moved(result: std::io::Result<usize>) -> usize {
    match result {
        Ok(count) => count,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    }
}
