//! What clients cost others that have not chosen an export: connections, options.

use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nbd_proto::transmission::{Command, Fragmentation};
use nbd_proto::wire::ReplyMode;
use nbd_server::ServerConfig;
use nbd_server::export::{MayBlock, MemoryExport};

use crate::support::{Client, Script, Scripted, TestServer, wait_until};

/// A connection that has exchanged greetings.
fn greet(server: &TestServer) -> UnixStream {
    let mut stream = server.connect();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    stream
}

#[test]
fn clients_that_leave_at_once_do_not_take_the_places_of_others() {
    let script =
        Script { gated: Some(4096..8192), prompt: Some(MayBlock::No), ..Script::default() };
    let disk = Scripted::new(1 << 20, script);
    let mut config = ServerConfig::default();
    config.max_connections = 80;
    config.workers = NonZeroUsize::MIN;
    let server = TestServer::with(config, disk.clone());
    // The thread that serves all connections cannot look at any of them for now.
    let mut first = Client::connect(&server, ReplyMode::Simple);
    first.submit(4096, 512, &Command::Read(Fragmentation::Allowed), &[]);
    wait_until("the thread is busy", || disk.gate.arrived() == 1);
    for _ in 0..200 {
        drop(server.connect());
    }
    let mut last = server.connect();
    disk.gate.open();
    let mut greeting = [0; 18];
    last.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    assert_eq!(first.next_finished().1.result, Ok(()));
}

#[test]
fn long_options_of_all_clients_together_take_a_bounded_amount_of_memory() {
    const SET_META_CONTEXT: u32 = 10;
    const OPTION_LEN: usize = 1 << 20;
    let server = TestServer::of(MemoryExport::new(1 << 20));
    let option = {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(SET_META_CONTEXT.to_be_bytes());
        bytes.extend((OPTION_LEN as u32).to_be_bytes());
        // No name; the first query is longer than the option.
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.resize(16 + OPTION_LEN, 0xff);
        bytes
    };
    // Each stops in the middle of its option.
    let mut attackers: Vec<_> = (0..70).map(|_| greet(&server)).collect();
    for attacker in &mut attackers {
        // Those for whom there is no memory are closed meanwhile.
        let _ = attacker.write_all(&option[..100_000]);
        attacker.set_nonblocking(true).unwrap();
    }
    let is_closed = |stream: &mut UnixStream| match stream.read(&mut [0; 100]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    };
    let mut closed = [false; 70];
    wait_until("those beyond 64 MiB are closed", || {
        for (closed, attacker) in closed.iter_mut().zip(&mut attackers) {
            *closed = *closed || is_closed(attacker);
        }
        closed.iter().filter(|closed| **closed).count() == 6
    });
    // A client that asks for less is served, and for as much once they are gone.
    let mut client = Client::connect(&server, ReplyMode::Extended);
    assert_eq!(client.read(0, 10), [0; 10]);
    drop(attackers);
    wait_until("there is memory again", || {
        let mut stream = greet(&server);
        let mut reply = [0; 20];
        let is_answered = stream.write_all(&option).and_then(|()| stream.read_exact(&mut reply));
        is_answered.is_ok_and(|()| reply[8..12] == SET_META_CONTEXT.to_be_bytes())
    });
}

#[test]
fn a_client_that_asks_about_a_thousand_exports_is_answered_beside_a_flood_of_options() {
    let server = TestServer::with(ServerConfig::default(), Arc::new(MemoryExport::new(1 << 20)));
    let list = b"IHAVEOPT\0\0\0\x03\0\0\0\0";
    // More answers than any of them takes.
    let attackers: Vec<_> = (0..64)
        .map(|_| {
            let mut stream = greet(&server);
            let _ = stream.set_nonblocking(true);
            let _ = stream.write(&list.repeat(4000));
            stream
        })
        .collect();
    let mut client = greet(&server);
    for _ in 0..1000 {
        client.write_all(list).unwrap();
        // The one name, which is empty, and an acknowledgement.
        client.read_exact(&mut [0; 44]).unwrap();
    }
    drop(attackers);
}
