//! FUA and FLUSH.

use std::sync::atomic::Ordering;

use nbd_proto::transmission::{Command, Durability, Speed, ZeroMode};
use nbd_proto::wire::{CommandFlags, CommandType, Errno, RequestHeader};

use crate::support::{
    Client, MODES, Script, Scripted, TestServer, disk_file, header, image_export, wait_until,
};

#[test]
fn fua_reaches_the_export_with_every_command_that_writes() {
    let disk = Scripted::new(1 << 20, Script::default());
    let server = TestServer::with(Default::default(), disk.clone());
    let durable = || disk.durable_writes.swap(0, Ordering::SeqCst);
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        for (durability, expected) in [(Durability::Cached, 0), (Durability::Fua, 1)] {
            for length in [512, 100_000] {
                let command = Command::Write(durability);
                client.submit(0, length, &command, &vec![1; length as usize]);
                assert_eq!(client.next_finished().1.result, Ok(()));
                assert_eq!(durable(), expected, "WRITE {durability:?}");
            }
            assert_eq!(client.request(0, 512, &Command::Trim(durability)).result, Ok(()));
            assert_eq!(durable(), expected, "TRIM {durability:?}");
            let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, durability);
            assert_eq!(client.request(0, 512, &zeroes).result, Ok(()));
            assert_eq!(durable(), expected, "WRITE_ZEROES {durability:?}");
        }
    }
}

#[test]
fn fua_is_legal_where_nothing_is_written() {
    let server = TestServer::with(Default::default(), Scripted::new(4096, Script::default()));
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        for command in [CommandType::FLUSH, CommandType::CACHE] {
            let request = RequestHeader { flags: CommandFlags::FUA, ..header(command, 0, 0) };
            assert_eq!(client.raw(&request, &[]), Errno(0));
        }
    }
}

#[test]
fn flush_reaches_the_export_once_for_each_request() {
    let disk = Scripted::new(4096, Script::default());
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    for count in 1..=3 {
        assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
        assert_eq!(disk.flushes.load(Ordering::SeqCst), count);
    }
    // A header with a range, as some clients send it, does the same.
    assert_eq!(client.raw(&header(CommandType::FLUSH, 1 << 40, 7), &[]), Errno(0));
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 4);
}

#[test]
fn an_image_has_the_bytes_after_a_durable_write_and_after_a_flush() {
    let file = disk_file(&[0; 8192]);
    let server = TestServer::of(image_export(file.path()));
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        let byte = mode as u8 + 1;
        client.submit(0, 100, &Command::Write(Durability::Fua), &[byte; 100]);
        assert_eq!(client.next_finished().1.result, Ok(()));
        assert_eq!(client.write(4096, &[byte; 100]), Ok(()));
        assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
        let content = std::fs::read(file.path()).unwrap();
        assert_eq!((&content[..100], &content[4096..4196]), (&[byte; 100][..], &[byte; 100][..]));
    }
}

/// A disk whose first block, and whose flushes, wait at the gate.
fn gated_disk() -> std::sync::Arc<Scripted> {
    let script = Script { gated: Some(0..512), flushes_at_gate: true, ..Script::default() };
    Scripted::new(1 << 20, script)
}

/// Has one durable change under way, and eight more after it, which therefore share flushes.
fn submit_nine(disk: &Scripted, client: &mut Client) {
    let count = |counter: &std::sync::atomic::AtomicUsize| counter.load(Ordering::SeqCst);
    client.submit(0, 512, &Command::Write(Durability::Fua), &[1; 512]);
    wait_until("the first write has begun", || disk.gate.arrived() == 1);
    for place in 1..7 {
        client.submit(place * 4096, 512, &Command::Write(Durability::Fua), &[2; 512]);
    }
    client.submit(7 * 4096, 512, &Command::Trim(Durability::Fua), &[]);
    let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Fua);
    client.submit(8 * 4096, 512, &zeroes, &[]);
    wait_until("all are carried out", || {
        let writes = count(&disk.writes) + count(&disk.quick_writes);
        writes == 7 && count(&disk.discards) == 2 && disk.gate.arrived() == 2
    });
}

#[test]
fn changes_with_fua_that_arrive_together_share_flushes() {
    let disk = gated_disk();
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    submit_nine(&disk, &mut client);
    disk.gate.open();
    for _ in 0..9 {
        assert_eq!(client.next_finished().1.result, Ok(()));
    }
    assert_eq!(disk.durable_writes.load(Ordering::SeqCst), 1, "the one that was alone");
    // One was running when the last change was carried out; the next, at the latest, is for all.
    let flushes = disk.flushes.load(Ordering::SeqCst);
    assert!((1..=3).contains(&flushes), "{flushes} flushes");
}

/// As [`gated_disk`], where a write of what need not be durable needs no waiting.
fn quick_gated_disk() -> std::sync::Arc<Scripted> {
    let (gated, quick) = (Some(0..512), Some(512..1 << 20));
    Scripted::new(1 << 20, Script { gated, quick, flushes_at_gate: true, ..Script::default() })
}

#[test]
fn a_write_with_fua_that_shares_a_flush_and_need_not_wait_stays_out_of_the_pool() {
    let disk = quick_gated_disk();
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    submit_nine(&disk, &mut client);
    disk.gate.open();
    for _ in 0..9 {
        assert_eq!(client.next_finished().1.result, Ok(()));
    }
    assert_eq!(disk.quick_writes.load(Ordering::SeqCst), 6);
    assert_eq!(disk.durable_writes.load(Ordering::SeqCst), 1, "the one that was alone");
    assert_eq!(client.read(4096, 512), [2; 512]);
}

#[test]
fn a_change_with_fua_is_not_answered_before_a_flush_that_began_behind_it() {
    for disk in [gated_disk(), quick_gated_disk()] {
        no_change_is_answered_before_a_flush(&disk);
    }
}

fn no_change_is_answered_before_a_flush(disk: &std::sync::Arc<Scripted>) {
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    submit_nine(disk, &mut client);
    let timeout = Some(std::time::Duration::from_millis(200));
    client.stream().set_read_timeout(timeout).unwrap();
    let answered = std::io::Read::read(&mut client.stream(), &mut [0]);
    assert!(answered.is_err(), "no flush has ended");
    client.stream().set_read_timeout(None).unwrap();
    disk.gate.open();
    for _ in 0..9 {
        assert_eq!(client.next_finished().1.result, Ok(()));
    }
}

#[test]
fn changes_that_share_a_flush_share_its_failure() {
    let failed = |disk: std::sync::Arc<Scripted>| {
        disk.bad_flushes.store(usize::MAX, Ordering::SeqCst);
        let server = TestServer::with(Default::default(), disk.clone());
        let mut client = Client::connect(&server, MODES[1]);
        submit_nine(&disk, &mut client);
        disk.gate.open();
        (0..9).filter(|_| client.next_finished().1.result.is_err()).count()
    };
    // Where the machine holds the test up, changes stop waiting for the flush and are durable each.
    for gated in [gated_disk, quick_gated_disk] {
        let failed = (0..5).map(|_| failed(gated())).find(|failed| *failed >= 8);
        assert!(failed.is_some(), "those that share a flush succeed although it fails");
    }
}

#[test]
fn a_change_with_fua_does_not_wait_for_a_flush_that_takes_long() {
    let disk = gated_disk();
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    submit_nine(&disk, &mut client);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut other = Client::connect(&server, MODES[1]);
    other.submit(4096, 512, &Command::Write(Durability::Fua), &[3; 512]);
    assert_eq!(other.next_finished().1.result, Ok(()));
    disk.gate.open();
    for _ in 0..9 {
        assert_eq!(client.next_finished().1.result, Ok(()));
    }
}

#[test]
fn a_disk_without_flush_makes_each_change_durable_itself() {
    use nbd_proto::wire::TransmissionFlags;
    let script = Script {
        gated: Some(0..512),
        without: Some(TransmissionFlags::SEND_FLUSH),
        ..Script::default()
    };
    let disk = Scripted::new(1 << 20, script);
    let server = TestServer::with(Default::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    client.submit(0, 512, &Command::Write(Durability::Fua), &[1; 512]);
    wait_until("the first write has begun", || disk.gate.arrived() == 1);
    for place in 1..9 {
        client.submit(place * 4096, 512, &Command::Write(Durability::Fua), &[2; 512]);
        assert_eq!(client.next_finished().1.result, Ok(()));
    }
    disk.gate.open();
    assert_eq!(client.next_finished().1.result, Ok(()));
    assert_eq!(disk.durable_writes.load(Ordering::SeqCst), 9);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
}

/// Changes that are durable when they are answered: those that have to be, and all of a disk that
/// writes through its caches.
fn durable_changes() -> impl Iterator<Item = (bool, Command)> {
    [(false, Durability::Fua), (true, Durability::Cached)].into_iter().flat_map(
        |(through, durable)| {
            let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, durable);
            [Command::Write(durable), Command::Trim(durable), zeroes]
                .map(|change| (through, change))
        },
    )
}

#[test]
fn a_flush_is_not_answered_before_a_durable_change_that_may_have_taken_its_error() {
    for (is_writethrough, command) in durable_changes() {
        let (gated, bad) = (Some(0..512), Some(0..512));
        let script = Script { gated, bad, is_writethrough, ..Script::default() };
        let disk = Scripted::new(1 << 20, script);
        let server = TestServer::with(Default::default(), disk.clone());
        let [mut client, mut other, mut third] =
            [(); 3].map(|()| Client::connect(&server, MODES[1]));
        let payload: &[u8] = if matches!(command, Command::Write(_)) { &[1; 512] } else { &[] };
        client.submit(0, 512, &command, payload);
        wait_until("the change is being made durable", || disk.gate.arrived() == 1);
        assert_eq!(other.write(4096, &[2; 512]), Ok(()));
        assert_eq!(third.write(8192, &[2; 512]), Ok(()));
        other.submit(0, 0, &Command::Flush, &[]);
        wait_until("the flush has come", || disk.flushes.load(Ordering::SeqCst) == 1);
        let timeout = Some(std::time::Duration::from_millis(200));
        other.stream().set_read_timeout(timeout).unwrap();
        let answered = std::io::Read::read(&mut other.stream(), &mut [0]);
        assert!(answered.is_err(), "the outcome of the change is unknown");
        other.stream().set_read_timeout(None).unwrap();
        disk.gate.open();
        assert!(client.next_finished().1.result.is_err());
        assert!(other.next_finished().1.result.is_err(), "{command:?}");
        assert_eq!(other.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
        // A client that never flushes is told by the next change that is durable.
        third.submit(8192, 512, &command, payload);
        assert!(third.next_finished().1.result.is_err(), "{command:?}");
        assert_eq!(third.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
    }
}
