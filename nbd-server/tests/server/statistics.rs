//! What a server counts.

use nbd_proto::transmission::{Command, Durability, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::{CommandType, MetaContextName, ReplyMode};
use nbd_server::export::{ExportEntry, MayBlock};
use nbd_server::statistics::{ExportStatistics, RequestKind};
use nbd_server::{ClientAddress, ExportRegistry, ServerConfig};

use crate::support::{Client, MODES, Script, Scripted, TestServer, header, wait_until};

const SIZE: u64 = 4 << 20;
const BAD: u64 = 3 << 20;

fn server(prompt: MayBlock) -> TestServer {
    let script = Script {
        bad: Some(BAD..BAD + 512),
        gated: Some((2 << 20)..(2 << 20) + 512),
        prompt: Some(prompt),
        ..Script::default()
    };
    TestServer::with(ServerConfig::default(), Scripted::new(SIZE, script))
}

fn export(server: &TestServer) -> ExportStatistics {
    server.handle().statistics().exports.remove("").unwrap()
}

/// Requests, bytes and errors of a command.
fn counts(statistics: &ExportStatistics, kind: RequestKind) -> (u64, u64, u64) {
    let command = statistics.requests.get(kind);
    (command.requests(), command.bytes, command.errors)
}

#[test]
fn every_request_is_counted_once_with_its_bytes_or_its_error() {
    for prompt in [MayBlock::No, MayBlock::Yes] {
        for mode in MODES {
            let server = server(prompt);
            let contexts = [MetaContextName::base_allocation()];
            let contexts = if mode == ReplyMode::Simple { &[][..] } else { &contexts };
            let mut client = Client::open(&server, mode, "", contexts);
            for offset in 0..5 {
                client.read(offset * 512, 512);
            }
            // In parts, where replies may have parts.
            client.read(0, 2 << 20);
            client.request(BAD, 4096, &Command::Read(Fragmentation::Allowed)).result.unwrap_err();
            client.write(0, &[1; 4096]).unwrap();
            client.write(0, &[1; 100_000]).unwrap();
            client.write(BAD, &[1; 512]).unwrap_err();
            let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Fua);
            assert_eq!(client.request(0, 8192, &zeroes).result, Ok(()));
            assert_eq!(client.request(0, 512, &Command::Trim(Durability::Cached)).result, Ok(()));
            assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
            // Past the end: refused before the export sees it.
            assert_ne!(client.raw(&header(CommandType::READ, SIZE, 512), &[]).0, 0);
            assert_ne!(client.raw(&header(CommandType(77), 0, 512), &[]).0, 0);
            let found = export(&server);
            let case = format!("{prompt:?} {mode:?}");
            assert_eq!(counts(&found, RequestKind::Read), (8, 2560 + (2 << 20), 2), "{case}");
            assert_eq!(counts(&found, RequestKind::Write), (3, 104_096, 1), "{case}");
            assert_eq!(counts(&found, RequestKind::WriteZeroes), (1, 8192, 0), "{case}");
            assert_eq!(counts(&found, RequestKind::Trim), (1, 512, 0), "{case}");
            assert_eq!(counts(&found, RequestKind::Flush), (1, 0, 0), "{case}");
            assert_eq!(counts(&found, RequestKind::Other), (1, 0, 1), "{case}");
            assert_eq!(found.requests.requests(), 15, "{case}");
            assert!(found.last_flush.is_some_and(|flush| flush >= found.since), "{case}");
            let read: u64 = found.activity.read.iter().sum();
            assert_eq!(read, 2560 + (2 << 20) + 4096, "the valid ones, {case}");
            let at_bad = (BAD / found.activity.region_length) as usize;
            assert_eq!(found.activity.read[at_bad], 4096, "{case}");
            assert_eq!(found.activity.written[at_bad], 512, "{case}");
        }
    }
}

#[test]
fn clients_are_counted_apart_and_an_export_remembers_those_that_left() {
    let server = server(MayBlock::No);
    let mut first = Client::connect(&server, ReplyMode::Extended);
    let mut second = Client::connect(&server, ReplyMode::Simple);
    first.read(0, 4096);
    for _ in 0..3 {
        second.read(0, 512);
    }
    let found = server.handle().statistics();
    let read = |index: usize| {
        let read = found.clients[index].requests.get(RequestKind::Read);
        (read.requests(), read.bytes)
    };
    assert_eq!((read(0), read(1)), ((1, 4096), (3, 1536)));
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(matches!(
        found.clients[0].client.address,
        ClientAddress::Unix { process: Some(process), .. } if process == own
    ));
    assert_eq!(found.connections, 2);
    assert!(found.since.is_some());
    drop(second);
    wait_until("it has left", || server.handle().statistics().clients.len() == 1);
    let export = export(&server);
    assert_eq!((export.clients, export.clients_total), (1, 2));
    assert_eq!(counts(&export, RequestKind::Read), (4, 4096 + 1536, 0));
}

#[test]
fn a_request_that_waits_for_the_disk_is_in_flight() {
    let script = Script { gated: Some(0..512), ..Script::default() };
    let disk = Scripted::new(SIZE, script);
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let mut client = Client::connect(&server, ReplyMode::Structured);
    client.submit(0, 512, &Command::Read(Fragmentation::Allowed), &[]);
    wait_until("it is at the gate", || disk.gate.arrived() == 1);
    wait_until("it is counted", || export(&server).in_flight == 1);
    let pool = server.handle().statistics().pool;
    assert_eq!((pool.running, pool.waiting), (1, 0));
    assert_eq!(export(&server).requests.requests(), 0, "it is not answered");
    std::thread::sleep(std::time::Duration::from_millis(20));
    disk.gate.open();
    assert_eq!(client.next_finished().1.result, Ok(()));
    let found = export(&server);
    assert_eq!(found.in_flight, 0);
    let latency = found.requests.get(RequestKind::Read).latency;
    assert!(latency.total().as_millis() >= 20, "{latency:?}");
}

#[test]
fn entries_that_are_clones_count_together_and_others_apart() {
    let exports = ExportRegistry::new();
    let disk = ExportEntry::new(Scripted::new(SIZE, Script::default()));
    exports.add("", disk.clone()).unwrap();
    exports.add("again", disk.clone()).unwrap();
    exports.add("other", disk.with_export(disk.export().clone())).unwrap();
    let server = TestServer::start(ServerConfig::default(), exports);
    for name in ["", "again", "other"] {
        Client::open(&server, ReplyMode::Simple, name, &[]).read(0, 512);
    }
    assert_eq!(disk.statistics().requests.requests(), 2);
    let found = server.handle().statistics();
    assert_eq!(found.exports["again"].requests.requests(), 2);
    assert_eq!(found.exports["other"].requests.requests(), 1);
}

#[test]
fn a_write_that_arrives_in_pieces_is_counted_once() {
    let server = server(MayBlock::No);
    let mut client = Client::connect(&server, ReplyMode::Extended);
    let mut bytes = client.encode(&header(CommandType::WRITE, 0, 32768));
    bytes.extend_from_slice(&[1; 32768]);
    for piece in bytes.chunks(8192) {
        client.send(piece.to_vec());
        // Long enough that the server most often sees it alone.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(client.raw_reply().1.0, 0);
    let found = export(&server);
    assert_eq!(counts(&found, RequestKind::Write), (1, 32768, 0));
    assert_eq!(found.activity.written.iter().sum::<u64>(), 32768);
}
