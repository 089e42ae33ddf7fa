//! Clients that owe something and do nothing about it.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{CommandType, ReplyMode};
use nbd_server::ServerConfig;
use nbd_server::export::{MayBlock, MemoryExport};

use crate::support::{Client, Script, Scripted, TestServer, header, wait_until};

const LIMIT: Duration = Duration::from_millis(800);
const LARGE: u64 = 32 << 20;

fn config() -> ServerConfig {
    let mut config = ServerConfig::default();
    config.stall_timeout = Some(LIMIT);
    config
}

fn server() -> TestServer {
    TestServer::with(config(), Arc::new(MemoryExport::new(64 << 20)))
}

#[test]
fn who_stalls_in_a_payload_is_closed_and_its_memory_is_free_again() {
    let mut config = config();
    config.memory_limit = 32 << 20;
    let server = TestServer::with(config, Arc::new(MemoryExport::new(64 << 20)));
    for mode in [ReplyMode::Simple, ReplyMode::Extended] {
        let mut stalled = Client::connect(&server, mode);
        let mut bytes = stalled.encode(&header(CommandType::WRITE, 0, LARGE));
        bytes.resize(bytes.len() + (1 << 20), 0x55);
        stalled.send(bytes);
        stalled.expect_end();
        let mut other = Client::connect(&server, mode);
        assert_eq!(other.write(0, &vec![0xaa; 30 << 20]), Ok(()));
    }
}

#[test]
fn who_stalls_in_a_header_or_in_front_of_a_short_or_refused_payload_is_closed() {
    let server = server();
    let cases = [(0, 11), (4096, 2000), (4096, 0), (LARGE, 0), (200 << 20, 1000)];
    let stalled = cases.map(|(length, sent)| {
        let stalled = Client::connect(&server, ReplyMode::Simple);
        let mut bytes = stalled.encode(&header(CommandType::WRITE, 0, length));
        match length {
            0 => bytes.truncate(sent),
            _ => bytes.resize(bytes.len() + sent, 0x55),
        }
        stalled.send(bytes);
        stalled
    });
    for mut stalled in stalled {
        stalled.expect_end();
    }
}

#[test]
fn who_never_takes_its_replies_is_closed() {
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let disk = Scripted::new(64 << 20, Script { prompt: Some(prompt), ..Script::default() });
        let server = TestServer::with(config(), disk);
        let stalled = Client::connect(&server, ReplyMode::Extended);
        stalled.send(stalled.encode(&header(CommandType::READ, 0, LARGE)).repeat(4));
        // And who has said all it wants to say.
        let mut finished = Client::connect(&server, ReplyMode::Simple);
        finished.send(finished.encode(&header(CommandType::READ, 0, LARGE)));
        finished.finish_sending();
        wait_until("both are gone", || server.handle().clients().is_empty());
    }
}

#[test]
fn who_owes_nothing_may_be_silent() {
    let gated = Script { gated: Some(0..4096), ..Script::default() };
    let disk = Scripted::new(64 << 20, gated);
    let server = TestServer::with(config(), disk.clone());
    let mut idle = Client::connect(&server, ReplyMode::Extended);
    assert_eq!(idle.read(8192, 4), [0; 4]);
    let mut patient = Client::connect(&server, ReplyMode::Extended);
    patient.submit(0, 512, &Command::Read(Fragmentation::Allowed), &[]);
    std::thread::sleep(LIMIT * 3);
    disk.gate.open();
    assert_eq!(patient.next_finished().1.result, Ok(()));
    assert_eq!(idle.read(8192, 4), [0; 4]);
}

#[test]
fn who_waits_for_its_part_of_the_budget_is_not_to_blame() {
    let mut config = config();
    config.memory_limit = 32 << 20;
    let gated = Script { gated: Some(0..4096), ..Script::default() };
    let disk = Scripted::new(64 << 20, gated);
    let server = TestServer::with(config, disk.clone());
    let mut first = Client::connect(&server, ReplyMode::Extended);
    first.submit(0, LARGE, &Command::Read(Fragmentation::Allowed), &[]);
    wait_until("the disk is asked", || disk.gate.arrived() > 0);
    let mut second = Client::connect(&server, ReplyMode::Extended);
    second.submit(LARGE, LARGE, &Command::Write(Durability::Cached), &vec![1; LARGE as usize]);
    std::thread::sleep(LIMIT * 3);
    disk.gate.open();
    assert_eq!(first.next_finished().1.result, Ok(()));
    assert_eq!(second.next_finished().1.result, Ok(()));
}

#[test]
fn who_is_slow_is_served() {
    let server = server();
    let step = LIMIT / 8;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = Client::connect(&server, ReplyMode::Simple);
            let mut request = client.encode(&header(CommandType::WRITE, 0, 100_000));
            request.resize(request.len() + 100_000 - 24, 0x55);
            client.send(request);
            for _ in 0..24 {
                std::thread::sleep(step);
                client.send(vec![0x55]);
            }
            assert_eq!(client.raw_reply().1.0, 0);
        });
        scope.spawn(|| {
            let client = Client::connect(&server, ReplyMode::Simple);
            client.send(client.encode(&header(CommandType::READ, 0, LARGE)));
            // Less than what has to leave the socket before there is room in it again.
            for _ in 0..24 {
                client.stream().read_exact(&mut [0; 16 << 10]).unwrap();
                std::thread::sleep(step);
            }
            let mut rest = vec![0; LARGE as usize + 16 - 24 * (16 << 10)];
            client.stream().read_exact(&mut rest).unwrap();
        });
    });
}

#[test]
fn without_a_limit_a_stalled_client_is_waited_for() {
    let mut config = config();
    config.stall_timeout = None;
    let server = TestServer::with(config, Arc::new(MemoryExport::new(1 << 20)));
    let mut client = Client::connect(&server, ReplyMode::Simple);
    client.send(client.encode(&header(CommandType::WRITE, 0, 4096)));
    std::thread::sleep(LIMIT * 2);
    client.send(vec![0x55; 4096]);
    assert_eq!(client.raw_reply().1.0, 0);
}
