//! Writes that need not wait are made where the connection stands; all others in the pool.

use std::sync::atomic::Ordering::SeqCst;

use imgfmt::{Access, CacheMode, CreateOptions, Format, Image, OpenOptions};
use nbd_proto::transmission::{Command, Durability};
use nbd_proto::wire::Errno;
use nbd_server::export::{Export, FastExport, ImageExport, MayBlock, Operation, TryWrite};

use crate::support::{Client, MODES, Script, Scripted, TestServer};

#[test]
fn only_what_the_export_can_write_without_waiting_stays_out_of_the_pool() {
    for mode in MODES {
        let script = Script { quick: Some(0..1 << 20), ..Script::default() };
        let disk = Scripted::new(4 << 20, script);
        let server = TestServer::with(Default::default(), disk.clone());
        let mut client = Client::connect(&server, mode);
        let calls = || (disk.quick_writes.swap(0, SeqCst), disk.writes.swap(0, SeqCst));
        for length in [1, 4096, 100_000] {
            assert_eq!(client.write(512, &vec![7; length]), Ok(()));
            assert_eq!(calls(), (1, 0), "{length} bytes that need no waiting, {mode:?}");
            assert_eq!(client.write(2 << 20, &vec![8; length]), Ok(()));
            assert_eq!(calls(), (0, 1), "{length} bytes that may wait, {mode:?}");
            client.submit(512, length as u64, &Command::Write(Durability::Fua), &vec![9; length]);
            assert_eq!(client.next_finished().1.result, Ok(()));
            assert_eq!(calls(), (0, 1), "{length} bytes that must be durable, {mode:?}");
            assert_eq!(client.read(512, length as u64), vec![9; length]);
        }
    }
}

#[test]
fn a_write_that_fails_or_panics_in_place_is_answered_by_the_pool() {
    for mode in MODES {
        let script = Script {
            quick: Some(0..1 << 20),
            bad: Some(0..512),
            panics: Some(4096..4608),
            ..Script::default()
        };
        let server = TestServer::with(Default::default(), Scripted::new(1 << 20, script));
        let mut client = Client::connect(&server, mode);
        for (offset, length) in [(0, 100), (4096, 100), (0, 100_000)] {
            let error = client.write(offset, &vec![1; length]).unwrap_err();
            assert_eq!(error.errno, Errno::EIO, "{length} bytes at {offset}, {mode:?}");
        }
        assert_eq!(client.write(8192, &[5; 100]), Ok(()));
        assert_eq!(client.read(8192, 100), [5; 100]);
    }
}

#[test]
fn a_qcow2_image_is_written_in_place_where_its_tables_are_in_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, 4 << 20)).unwrap();
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let export = ImageExport::new(Image::open(&path, &options).unwrap());
    let attempt = |offset, data: &[u8]| export.try_write_at(offset, data).unwrap();
    assert_eq!(attempt(0, &[1; 4096]), TryWrite::WouldBlock, "there is no L2 table");
    export.write_at(0, &[1; 4096], Durability::Cached).unwrap();
    assert_eq!(attempt(512, &[2; 512]), TryWrite::Complete);
    assert_eq!(attempt(60_000, &[3; 10_000]), TryWrite::Complete, "half of it is not allocated");
    let mut content = [0; 1536];
    export.read_at(0, &mut content).unwrap();
    assert!(content[..512] == [1; 512] && content[512..1024] == [2; 512]);
    assert!(content[1024..] == [1; 512]);
}

#[test]
fn a_write_that_is_durable_when_it_returns_never_keeps_a_connection_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::write(&path, [0; 1 << 16]).unwrap();
    for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe] {
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite).cache(cache);
        let export = ImageExport::new(Image::open(&path, &options).unwrap());
        let expected = if cache.is_writethrough() { MayBlock::Yes } else { MayBlock::No };
        let write = Operation::Write(512, Durability::Cached);
        assert_eq!(export.may_block(write), expected, "{cache}");
        assert_eq!(export.may_block(Operation::Write(512, Durability::Fua)), MayBlock::Yes);
    }
}
