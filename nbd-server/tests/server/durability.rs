//! FUA and FLUSH.

use std::sync::atomic::Ordering;

use nbd_proto::transmission::{Command, Durability, Speed, ZeroMode};
use nbd_proto::wire::{CommandFlags, CommandType, Errno, RequestHeader};

use crate::support::{
    Client, MODES, Script, Scripted, TestServer, disk_file, header, image_export,
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
    // A header with a range, as some clients send it, is no different.
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
