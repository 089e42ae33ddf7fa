//! What one client may take from the others: threads, turns, memory.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nbd_proto::transmission::{Command, Durability, ExtentLimit, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::{CommandType, Errno, MetaContextName, ReplyMode};
use nbd_server::export::{Export, ExportEntry, MayBlock, MemoryExport};
use nbd_server::{ExportRegistry, ServerConfig};

use crate::support::{Client, MODES, Script, Scripted, TestServer, header, wait_until};

const STATUS: Command = Command::BlockStatus(ExtentLimit::Many, None);
const READ: Command = Command::Read(Fragmentation::Allowed);
const GATED: u64 = 1 << 40;
const SIZE: u64 = 2 << 40;

/// A disk whose second half waits at a gate.
fn gated() -> Arc<Scripted> {
    Scripted::new(SIZE, Script { gated: Some(GATED..SIZE), ..Script::default() })
}

/// Sends a request that is answered where the server stands: it has taken all before it.
fn is_taken(client: &mut Client) {
    let write = client.submit(0, 1, &Command::Write(Durability::Cached), &[0]);
    assert_eq!(client.next_finished().0, write);
}

#[test]
fn a_flood_holds_few_threads_and_the_request_of_another_client_is_next() {
    const ATTACKERS: usize = 16;
    let script = Script { gated: Some(GATED..SIZE), quick: Some(0..512), ..Script::default() };
    let disk = Scripted::new(SIZE, script);
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let contexts = [MetaContextName::base_allocation()];
    let mut attackers: Vec<_> =
        (0..ATTACKERS).map(|_| Client::open(&server, ReplyMode::Extended, "", &contexts)).collect();
    for attacker in &mut attackers {
        for _ in 0..7 {
            attacker.submit(GATED, 1 << 30, &STATUS, &[]);
        }
        is_taken(attacker);
    }
    let cores = std::thread::available_parallelism().unwrap().get();
    let computing = (cores / 2).max(1);
    wait_until("the threads are busy", || disk.gate.arrived() == computing);
    // Reads wait for a disk: there are threads for them.
    let mut reader = Client::connect(&server, ReplyMode::Extended);
    for _ in 0..100 {
        assert_eq!(reader.read(4096, 512), [0; 512]);
    }
    // Each attacker has had its turn.
    for turn in 1..=ATTACKERS {
        disk.gate.pass_one();
        wait_until("the next one runs", || disk.gate.arrived() == computing + turn);
    }
    // A BLOCK_STATUS of another is not behind all of theirs: the next thread that is free takes it.
    let mut good = Client::open(&server, ReplyMode::Extended, "", &contexts);
    good.submit(0, 4096, &STATUS, &[]);
    is_taken(&mut good);
    disk.gate.pass_one();
    assert_eq!(good.next_finished().1.statuses.len(), 1);
    let arrived = disk.gate.arrived();
    assert!(arrived <= computing + ATTACKERS + 1, "{arrived} of {}", 7 * ATTACKERS);
    disk.gate.open();
    drop(attackers);
}

#[test]
fn a_flood_of_changes_holds_few_threads_and_neither_readers_nor_other_disks_wait_for_it() {
    let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Cached);
    let few = (std::thread::available_parallelism().unwrap().get() / 2).max(1);
    for command in [Command::Trim(Durability::Cached), zeroes, Command::Cache] {
        let script = Script {
            gated: Some(GATED..SIZE),
            quick: Some(0..512),
            prompt: Some(MayBlock::Busy),
            ..Script::default()
        };
        let disk = Scripted::new(SIZE, script.clone());
        let exports = ExportRegistry::new();
        exports.add("", ExportEntry::new(disk.clone())).unwrap();
        exports.add("other", ExportEntry::new(Scripted::new(SIZE, script))).unwrap();
        let server = TestServer::start(ServerConfig::default(), exports);
        let mut attackers: Vec<_> =
            (0..8).map(|_| Client::connect(&server, ReplyMode::Extended)).collect();
        for attacker in &mut attackers {
            for _ in 0..4 {
                attacker.submit(GATED, 1 << 20, &command, &[]);
            }
            is_taken(attacker);
        }
        wait_until("they have what they get", || disk.gate.arrived() == few);
        let mut reader = Client::connect(&server, ReplyMode::Extended);
        for _ in 0..100 {
            assert_eq!(reader.read(4096, 512), [0; 512]);
        }
        let mut other = Client::open(&server, ReplyMode::Extended, "other", &[]);
        assert_eq!(other.request(4096, 512, &command).result, Ok(()));
        assert_eq!(disk.gate.arrived(), few, "{command:?}");
        for turn in 1..=attackers.len() {
            disk.gate.pass_one();
            wait_until("the next one runs", || disk.gate.arrived() == few + turn);
        }
        // The change of a newcomer comes before the rest of theirs.
        reader.submit(4096, 512, &command, &[]);
        is_taken(&mut reader);
        disk.gate.pass_one();
        assert_eq!(reader.next_finished().1.result, Ok(()));
        assert!(disk.gate.arrived() <= few + attackers.len() + 1);
        disk.gate.open();
        for attacker in &mut attackers {
            while attacker.in_flight() > 0 {
                assert_eq!(attacker.next_finished().1.result, Ok(()));
            }
        }
    }
}

#[test]
fn long_writes_that_the_system_holds_up_hold_up_no_other_client() {
    let script =
        Script { gated: Some(GATED..SIZE), prompt: Some(MayBlock::No), ..Script::default() };
    let disk = Scripted::new(SIZE, script);
    let mut config = ServerConfig::default();
    config.workers = NonZeroUsize::MIN;
    let server = TestServer::with(config, disk.clone());
    let mut writers: Vec<_> = MODES.iter().map(|mode| Client::connect(&server, *mode)).collect();
    let write = Command::Write(Durability::Cached);
    for writer in &mut writers {
        for place in 0..4 {
            writer.submit(GATED + (place << 20), 1 << 20, &write, &[7; 1 << 20]);
        }
    }
    wait_until("one of them is under way", || disk.gate.arrived() > 0);
    let mut reader = Client::connect(&server, ReplyMode::Extended);
    for _ in 0..100 {
        assert_eq!(reader.read(4096, 512), [0; 512]);
        assert_eq!(reader.write(8192, &[1; 512]), Ok(()));
    }
    disk.gate.open();
    for writer in &mut writers {
        while writer.in_flight() > 0 {
            assert_eq!(writer.next_finished().1.result, Ok(()));
        }
    }
    assert_eq!(reader.read(GATED, 4 << 20), vec![7; 4 << 20]);
}

#[test]
fn clients_that_leave_take_their_requests_with_them() {
    for kind in [CommandType::BLOCK_STATUS, CommandType::READ, CommandType::TRIM] {
        let disk = gated();
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        let attackers: Vec<_> = (0..16)
            .map(|_| {
                let contexts = [MetaContextName::base_allocation()];
                let client = Client::open(&server, ReplyMode::Extended, "", &contexts);
                client.send(client.encode(&header(kind, GATED, 1 << 20)).repeat(100));
                client
            })
            .collect();
        wait_until("all are there", || server.handle().clients().len() == attackers.len());
        wait_until("some of them run", || disk.gate.arrived() > 0);
        drop(attackers);
        wait_until("they are gone", || server.handle().clients().is_empty());
        let begun = disk.gate.arrived();
        assert!(begun <= 128, "as many as there are threads, at most: {begun}");
        disk.gate.open();
        // A client that comes now is served, and nothing else was done.
        let mut client = Client::connect(&server, ReplyMode::Extended);
        for _ in 0..10 {
            assert_eq!(client.read(4096, 512), [0; 512]);
        }
        assert_eq!(disk.gate.arrived(), begun, "{kind}");
    }
}

#[test]
fn a_client_that_says_goodbye_leaves_its_writes_behind() {
    let disk = gated();
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    // More than there are threads for.
    let write = |client: &Client, place: u64| {
        let mut bytes = client.encode(&header(CommandType::WRITE, place, 1));
        bytes.push(7);
        bytes
    };
    let client = Client::connect(&server, ReplyMode::Extended);
    let mut bytes: Vec<u8> =
        (0..60).flat_map(|index| write(&client, GATED + index * 4096)).collect();
    bytes.extend(client.encode(&header(CommandType::DISC, 0, 0)));
    client.send(bytes);
    wait_until("some of them run", || disk.gate.arrived() > 0);
    drop(client);
    wait_until("it is gone", || server.handle().clients().is_empty());
    disk.gate.open();
    let is_written = |index: u64| {
        let mut byte = [0];
        disk.disk.read_at(GATED + index * 4096, &mut byte).unwrap();
        byte == [7]
    };
    wait_until("all are carried out", || (0..60).all(is_written));
}

#[test]
fn a_long_request_is_carried_out_in_steps_and_abandoned_with_its_client() {
    let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Cached);
    for command in [Command::Trim(Durability::Cached), zeroes, Command::Cache] {
        let disk = gated();
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        let mut client = Client::connect(&server, ReplyMode::Extended);
        client.submit(GATED, GATED, &command, &[]);
        wait_until("the first step runs", || disk.gate.arrived() == 1);
        drop(client);
        wait_until("the client is gone", || server.handle().clients().is_empty());
        disk.gate.open();
        let mut other = Client::connect(&server, ReplyMode::Extended);
        assert_eq!(other.request(0, 4096, &command).result, Ok(()));
        assert_eq!(disk.gate.arrived(), 1, "{command:?}");
    }
}

#[test]
fn steps_do_all_that_was_asked_for_and_make_it_durable_once() {
    for without in [None, Some(nbd_proto::wire::TransmissionFlags::SEND_FLUSH)] {
        let disk = Scripted::new(SIZE, Script { without, ..Script::default() });
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        let mut client = Client::connect(&server, ReplyMode::Extended);
        let (start, length) = (4096 + 77, 1 << 30);
        let places = [start - 1, start, start + length / 2, start + length - 1, start + length];
        for command in [
            Command::Trim(Durability::Fua),
            Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Fua),
        ] {
            for place in places {
                assert_eq!(client.write(place, &[7]), Ok(()));
            }
            let before = disk.flushes.load(Ordering::SeqCst);
            assert_eq!(client.request(start, length, &command).result, Ok(()));
            assert_eq!(places.map(|place| client.read(place, 1)[0]), [7, 0, 0, 0, 7]);
            let flushes = disk.flushes.load(Ordering::SeqCst) - before;
            let durable = disk.durable_writes.swap(0, Ordering::SeqCst);
            match without {
                None => assert_eq!((flushes, durable), (1, 0)),
                Some(_) => assert!(flushes == 0 && durable > 1, "each step: {durable}"),
            }
        }
    }
}

#[test]
fn a_fast_zero_that_cannot_be_had_everywhere_changes_nothing() {
    let script = Script { slow_zeroes: Some(GATED..SIZE), ..Script::default() };
    let server = TestServer::with(ServerConfig::default(), Scripted::new(SIZE, script));
    let mut client = Client::connect(&server, ReplyMode::Extended);
    assert_eq!(client.write(4097, &[7]), Ok(()));
    let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::FastOnly, Durability::Cached);
    let error = client.request(4097, GATED, &zeroes).result.unwrap_err();
    assert_eq!(error.errno, Errno::ENOTSUP);
    assert_eq!(client.read(4097, 1), [7]);
}

#[test]
fn flushes_that_wait_for_the_same_share_one() {
    let script = Script { flushes_at_gate: true, ..Script::default() };
    let disk = Scripted::new(1 << 20, script);
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let mut first = Client::connect(&server, ReplyMode::Extended);
    first.submit(0, 0, &Command::Flush, &[]);
    wait_until("a flush runs", || disk.gate.arrived() == 1);
    let mut others: Vec<_> = MODES.iter().map(|mode| Client::connect(&server, *mode)).collect();
    for client in &mut others {
        for _ in 0..10 {
            client.submit(0, 0, &Command::Flush, &[]);
        }
        // Requests of a connection are taken in order: the flushes were when this is answered.
        client.submit(0, 512, &READ, &[]);
        assert_eq!(client.next_finished().1.data, [0; 512]);
    }
    assert_eq!(disk.gate.arrived(), 1, "they came after it began: it is not for them");
    disk.gate.open();
    assert_eq!(first.next_finished().1.result, Ok(()));
    for client in &mut others {
        for _ in 0..10 {
            assert_eq!(client.next_finished().1.result, Ok(()));
        }
    }
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn a_shared_flush_that_fails_fails_for_all_who_waited_and_is_told_once() {
    let script = Script { flushes_at_gate: true, ..Script::default() };
    let disk = Scripted::new(1 << 20, script);
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(&server, MODES[2])).collect();
    clients[0].submit(0, 0, &Command::Flush, &[]);
    wait_until("a flush runs", || disk.gate.arrived() == 1);
    for client in &mut clients {
        client.submit(0, 0, &Command::Flush, &[]);
        client.submit(0, 512, &READ, &[]);
        assert_eq!(client.next_finished().1.data, [0; 512]);
    }
    disk.bad_flushes.store(1, Ordering::SeqCst);
    disk.good_flushes_first.store(1, Ordering::SeqCst);
    disk.gate.open();
    assert_eq!(clients[0].next_finished().1.result, Ok(()));
    for client in &mut clients {
        let told = client.next_finished().1.result.map_err(|error| error.errno);
        assert_eq!(told, Err(Errno::ENOSPC));
        assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
    }
}

#[test]
fn a_flush_that_panics_is_an_error_for_all_who_waited() {
    let script = Script { flushes_panic: true, ..Script::default() };
    let server = TestServer::with(ServerConfig::default(), Scripted::new(1 << 20, script));
    let mut client = Client::connect(&server, MODES[2]);
    for _ in 0..3 {
        let told = client.request(0, 0, &Command::Flush).result.map_err(|error| error.errno);
        assert_eq!(told, Err(Errno::EIO));
    }
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_the_clients_of_another() {
    let bad = gated();
    let exports = ExportRegistry::new();
    exports.add("bad", ExportEntry::new(bad.clone())).unwrap();
    let script = Script::default();
    exports.add("good", ExportEntry::new(Scripted::new(1 << 20, script))).unwrap();
    let server = TestServer::start(ServerConfig::default(), exports);
    let attackers: Vec<_> = (0..8)
        .map(|_| {
            let client = Client::open(&server, ReplyMode::Extended, "bad", &[]);
            client.send(client.encode(&header(CommandType::READ, GATED, 512)).repeat(64));
            client
        })
        .collect();
    wait_until("it has what threads it can get", || bad.gate.arrived() >= 16);
    let mut client = Client::open(&server, ReplyMode::Extended, "good", &[]);
    for _ in 0..100 {
        assert_eq!(client.read(0, 512), [0; 512]);
    }
    assert!(bad.gate.arrived() < 128);
    bad.gate.open();
    drop(attackers);
}

#[test]
fn an_answer_is_as_long_as_there_is_memory_for_it_and_the_rest_can_be_asked_for() {
    // Each page of 64 KiB is an extent: 30,000 of them are not a short answer.
    const COUNT: u64 = 30_000;
    const PAGE: u64 = 64 << 10;
    let disk = MemoryExport::new(COUNT * PAGE);
    let server = TestServer::of(disk);
    let contexts = [MetaContextName::base_allocation()];
    let mut writer = Client::connect(&server, ReplyMode::Extended);
    for page in (0..COUNT).step_by(2) {
        writer.submit(page * PAGE, 1, &Command::Write(Durability::Cached), &[1]);
    }
    while writer.in_flight() > 0 {
        writer.next_finished();
    }
    let mut client = Client::open(&server, ReplyMode::Extended, "", &contexts);
    let whole = client.request(0, COUNT * PAGE, &STATUS);
    assert_eq!(whole.statuses[0].1.len(), COUNT as usize);
    // Clients that take no answer hold the memory for them.
    let status = || header(CommandType::BLOCK_STATUS, 0, COUNT * PAGE);
    let stalled: Vec<_> = (0..32)
        .map(|_| {
            let mut client = Client::open(&server, ReplyMode::Extended, "", &contexts);
            client.send(client.encode(&status()).repeat(100));
            assert_eq!(client.peek_some(), 1);
            client
        })
        .collect();
    let mut at = 0;
    while at < COUNT * PAGE {
        let outcome = client.request(at, COUNT * PAGE - at, &STATUS);
        assert_eq!(outcome.result, Ok(()));
        let found = &outcome.statuses[0].1;
        at += found.iter().map(|descriptor| descriptor.length).sum::<u64>();
    }
    drop(stalled);
}
