//! Clients, and those in the middle, that do not keep to TLS.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::transmission::{Command, ExtentLimit};
use nbd_proto::wire::{MetaContextName, ReplyMode};
use nbd_server::export::MemoryExport;
use nbd_server::tls::TlsMode;
use nbd_server::{ExportRegistry, ServerConfig, export::ExportEntry};
use openssl::ssl::SslVersion;

use super::client::{
    ACK, EXPORT_NAME, LIST, STARTTLS, Session, ask, connect, greet, is_let_in, keyed, option,
    request, rest, upgrade,
};
use super::{ALICES_KEY, psk, serve};
use crate::support::{Client, Script, Scripted, TestServer, wait_until};

#[test]
fn options_in_the_clear_behind_starttls_are_never_answered() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Allow(credentials));
    // In one piece with STARTTLS, as an attacker in the middle would do it.
    let mut stream = greet(&server);
    let injected = option(LIST, &[]);
    stream.write_all(&[option(STARTTLS, &[]), injected.clone()].concat()).unwrap();
    assert!(rest(&mut stream).is_empty());
    // After the answer: the TLS handshake meets something that is not TLS. An alert may come.
    let mut stream = greet(&server);
    assert_eq!(ask(&mut stream, STARTTLS, &[]), ACK);
    stream.write_all(&injected).unwrap();
    let answer = rest(&mut stream);
    assert!(answer.len() <= 7 && !answer.starts_with(&[0]), "{answer:?}");
    assert!(is_let_in(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)));
}

#[test]
fn a_truncated_tls_handshake_ends_the_connection() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let hello = client_hello();
    for length in [0, 1, 5, 6, hello.len() / 2, hello.len() - 1] {
        let mut stream = greet(&server);
        assert_eq!(ask(&mut stream, STARTTLS, &[]), ACK);
        stream.write_all(&hello[..length]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        rest(&mut stream);
    }
    for length in [1, 16, hello.len() / 2] {
        let mut stream = greet(&server);
        assert_eq!(ask(&mut stream, STARTTLS, &[]), ACK);
        let mut bad = hello.clone();
        bad[length] ^= 0xff;
        stream.write_all(&bad).unwrap();
        let _ = stream.shutdown(Shutdown::Write);
        rest(&mut stream);
    }
    assert!(is_let_in(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)));
}

/// The first message of a TLS client.
fn client_hello() -> Vec<u8> {
    let (client, mut server) = std::os::unix::net::UnixStream::pair().unwrap();
    client.set_nonblocking(true).unwrap();
    let pending = connect(keyed("alice", ALICES_KEY, SslVersion::TLS1_3), client);
    assert!(pending.is_err(), "nobody answers");
    drop(pending);
    let mut bytes = Vec::new();
    server.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() > 100);
    bytes
}

#[test]
fn the_deadline_covers_tls_handshakes() {
    let (_directory, credentials) = psk();
    let mut config = ServerConfig::default();
    config.tls = TlsMode::Require(credentials);
    config.handshake_timeout = Duration::from_millis(500);
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)))).unwrap();
    let server = TestServer::start(config, exports);
    // Silence behind STARTTLS, and in the middle of a handshake.
    let hello = client_hello();
    for length in [0, 50] {
        let mut stream = greet(&server);
        assert_eq!(ask(&mut stream, STARTTLS, &[]), ACK);
        stream.write_all(&hello[..length]).unwrap();
        assert!(rest(&mut stream).is_empty());
    }
    // Silence behind a finished one.
    let stream = upgrade(greet(&server), keyed("alice", ALICES_KEY, SslVersion::TLS1_3));
    rest(stream.unwrap().get_mut());
}

#[test]
fn a_client_that_has_finished_sending_still_gets_its_replies() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let Session(mut stream) = Session::open(&server, keyed("alice", ALICES_KEY, version));
        stream.write_all(&request(0, 7, 0, 8 << 20)).unwrap();
        // Without a farewell of TLS, as a client that dies.
        stream.get_ref().shutdown(Shutdown::Write).unwrap();
        let mut replies = Vec::new();
        stream.read_to_end(&mut replies).unwrap();
        assert_eq!(replies.len(), 16 + (8 << 20), "{version:?}");
    }
}

#[test]
fn a_cut_write_is_not_carried_out() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let tls = || keyed("alice", ALICES_KEY, SslVersion::TLS1_3);
    let Session(mut stream) = Session::open(&server, tls());
    let mut bytes = request(1, 7, 0, 100_000).to_vec();
    bytes.extend([0x55; 99_999]);
    stream.write_all(&bytes).unwrap();
    stream.get_ref().shutdown(Shutdown::Write).unwrap();
    let mut replies = Vec::new();
    stream.read_to_end(&mut replies).unwrap();
    assert!(replies.is_empty());
    assert_eq!(Session::open(&server, tls()).read(0, 100_000), vec![0; 100_000]);
}

#[test]
fn what_is_changed_on_the_way_ends_the_connection() {
    let (_directory, credentials) = psk();
    let server = serve(TlsMode::Require(credentials));
    let Session(mut stream) =
        Session::open(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3));
    // A record that nobody with the key has written.
    let mut forged = vec![0x17, 3, 3, 0, 64];
    forged.extend([0; 64]);
    stream.get_mut().write_all(&forged).unwrap();
    // The server may have closed the connection already.
    let _ = stream.get_mut().write_all(&option(EXPORT_NAME, &[]));
    let answer = rest(stream.get_mut());
    assert!(answer.len() < 64, "no more than an alert: {} bytes", answer.len());
}

#[test]
fn handshakes_compute_where_they_hold_up_nobody_else() {
    const SIZE: u64 = 1 << 20;
    let (_directory, credentials) = psk();
    let mut config = ServerConfig::default();
    config.tls = TlsMode::Allow(credentials);
    let disk = Scripted::new(SIZE, Script { gated: Some(4096..SIZE), ..Script::default() });
    let server = TestServer::with(config, disk.clone());
    // Those who compute are busy.
    let cores = std::thread::available_parallelism().unwrap().get();
    let computing = (cores / 2).max(1);
    let status = Command::BlockStatus(ExtentLimit::Many, None);
    let contexts = [MetaContextName::base_allocation()];
    let mut busy: Vec<_> =
        (0..computing).map(|_| Client::open(&server, ReplyMode::Extended, "", &contexts)).collect();
    for client in &mut busy {
        client.submit(4096, 4096, &status, &[]);
    }
    wait_until("they are", || disk.gate.arrived() == computing);
    std::thread::scope(|scope| {
        let newcomers: Vec<_> = (0..32)
            .map(|_| {
                scope.spawn(|| is_let_in(&server, keyed("alice", ALICES_KEY, SslVersion::TLS1_3)))
            })
            .collect();
        let mut client = Client::connect(&server, ReplyMode::Extended);
        for _ in 0..100 {
            assert_eq!(client.read(0, 512), [0; 512]);
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            newcomers.iter().all(|newcomer| !newcomer.is_finished()),
            "nobody was there for it"
        );
        disk.gate.open();
        assert!(newcomers.into_iter().all(|newcomer| newcomer.join().unwrap()));
    });
}
