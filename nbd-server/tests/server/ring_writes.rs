//! Writes past the page cache: by io_uring, and by threads where it is not to be used.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use imgfmt::{CacheMode, CreateOptions, Format, Image};
use nbd_proto::transmission::{Command, Durability};
use nbd_proto::wire::{Cookie, Errno, TransmissionFlags};
use nbd_server::ServerConfig;
use nbd_server::export::{
    Export, ExportError, ExportInfo, FastExport, ImageExport, PlacedFile, PlacedWrite,
};

use crate::ring;
use crate::support::{Client, MODES, Random, TestServer, disk_file, skip, wait_until};

const SIZE: u64 = 4 << 20;

/// With io_uring if the system has it, and without.
fn configs() -> [ServerConfig; 2] {
    [true, false].map(|io_uring| {
        let mut config = ServerConfig::default();
        config.io_uring = io_uring;
        config
    })
}

/// The image in `path`; `None` where the file system has no direct I/O.
fn open(path: &Path, format: Format, cache: CacheMode) -> Option<Arc<ImageExport>> {
    match ring::open(path, format, cache) {
        Ok(image) => Some(Arc::new(ImageExport::new(image))),
        Err(error) if error.kind() == imgfmt::ErrorKind::Unsupported => {
            skip("this file system has no direct I/O");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Writes to places of any alignment, many at a time of which no two overlap, in place and, if the
/// image has clusters, to new ones.
fn write_many(client: &mut Client, content: &mut [u8], random: &mut Random) {
    let mut under_way: HashMap<Cookie, (u64, Vec<u8>)> = HashMap::new();
    for round in 0..200 {
        let longest = [1, 4096, 16 << 10, 65536][round % 4];
        let mut length = 1 + random.below(longest);
        // Each has its own part of the disk.
        let part = (round as u64 % 32) * (SIZE / 32);
        let mut offset = part + random.below(SIZE / 32 - 65536 - 4096);
        if round % 2 == 0 {
            offset = offset.next_multiple_of(4096);
            length = length.next_multiple_of(4096);
        }
        let data = random.bytes(length as usize);
        let durability = if round % 5 == 0 { Durability::Fua } else { Durability::Cached };
        let cookie = client.submit(offset, length, &Command::Write(durability), &data);
        under_way.insert(cookie, (offset, data));
        if under_way.len() == 32 || round == 199 {
            while !under_way.is_empty() {
                let (cookie, outcome) = client.next_finished();
                assert_eq!(outcome.result, Ok(()));
                let (offset, data) = under_way.remove(&cookie).unwrap();
                content[offset as usize..][..data.len()].copy_from_slice(&data);
            }
            let from = random.below(SIZE - 300_000);
            assert!(client.read(from, 300_000) == content[from as usize..][..300_000]);
        }
    }
}

/// Writes to the image in all ways, and compares what it holds then, also when it is opened again.
fn write_and_compare(path: &Path, format: Format, mut content: Vec<u8>) {
    let mut random = Random::new();
    for config in configs() {
        for cache in [CacheMode::None, CacheMode::DirectSync] {
            let Some(export) = open(path, format, cache) else { return };
            let server = TestServer::with(config.clone(), export);
            for mode in MODES {
                write_many(&mut Client::connect(&server, mode), &mut content, &mut random);
            }
            server.stop().unwrap();
            let export = open(path, format, CacheMode::Writeback).unwrap();
            let mut now = vec![0; content.len()];
            export.read_at(0, &mut now).unwrap();
            assert!(now == content);
        }
    }
}

#[test]
fn raw_images_hold_what_was_written_past_the_page_cache() {
    let content = Random::new().bytes(SIZE as usize);
    let file = disk_file(&content);
    write_and_compare(file.path(), Format::Raw, content);
}

#[test]
fn qcow2_images_hold_what_was_written_past_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    write_and_compare(&path, Format::Qcow2, vec![0; SIZE as usize]);
}

#[test]
fn a_client_that_waits_for_each_write_and_read_has_them_in_order() {
    let file = disk_file(&vec![0; SIZE as usize]);
    let mut random = Random::new();
    for config in configs() {
        let Some(export) = open(file.path(), Format::Raw, CacheMode::None) else { return };
        let server = TestServer::with(config, export);
        let mut client = Client::connect(&server, MODES[1]);
        // So many that the thread of the connection waits for the disk.
        for _ in 0..300 {
            let offset = random.below(64) * 4096;
            let data = random.bytes(4096);
            client.write(offset, &data).unwrap();
            assert!(client.read(offset, 4096) == data);
        }
    }
}

/// A disk that places writes in a file, or says so.
struct Placing {
    file: OwnedFd,
    /// The file that a place names when it is asked again.
    then: Option<OwnedFd>,
    offset: fn(u64) -> u64,
    is_writethrough: bool,
    is_durable_alone: bool,
    fails_to_flush: AtomicBool,
    /// The first flush waits until this is false, and fails.
    holds_first_flush: AtomicBool,
    /// Calls, and writes that the server has carried out by itself.
    writes: AtomicUsize,
    flushes: AtomicUsize,
    placed: Arc<AtomicUsize>,
    /// Writes whose place is still theirs.
    held: Arc<AtomicUsize>,
    /// Errors of durable writes.
    lost: Arc<AtomicUsize>,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

struct Place {
    file: OwnedFd,
    then: Option<OwnedFd>,
    was_asked: Cell<bool>,
    offset: u64,
    is_durable_alone: bool,
    lost: Arc<AtomicUsize>,
    placed: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
}

impl Placing {
    fn new(file: impl Into<OwnedFd>) -> Self {
        Self {
            file: file.into(),
            then: None,
            offset: |offset| offset,
            is_writethrough: false,
            is_durable_alone: false,
            fails_to_flush: AtomicBool::new(false),
            holds_first_flush: AtomicBool::new(false),
            writes: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            placed: Arc::default(),
            held: Arc::default(),
            lost: Arc::default(),
            written: Mutex::default(),
        }
    }
}

impl Export for Placing {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(SIZE);
        info.flags |= TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA;
        info
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        buffer.fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), ExportError> {
        self.writes.fetch_add(1, SeqCst);
        self.written.lock().unwrap().push((offset, data.to_vec()));
        Ok(())
    }

    fn flush(&self) -> Result<(), ExportError> {
        let is_first = self.flushes.fetch_add(1, SeqCst) == 0;
        let is_held = is_first && self.holds_first_flush.load(SeqCst);
        while is_first && self.holds_first_flush.load(SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        match is_held || self.fails_to_flush.load(SeqCst) {
            true => Err(ExportError::new(Errno::EIO, "the disk has lost it")),
            false => Ok(()),
        }
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for Placing {
    fn is_writethrough(&self) -> bool {
        self.is_writethrough
    }

    fn place_write(&self, offset: u64, _: usize) -> Option<Box<dyn PlacedWrite>> {
        self.held.fetch_add(1, SeqCst);
        let (placed, held) = (Arc::clone(&self.placed), Arc::clone(&self.held));
        let (file, offset) = (self.file.try_clone().unwrap(), (self.offset)(offset));
        let (is_durable_alone, lost) = (self.is_durable_alone, Arc::clone(&self.lost));
        let then = self.then.as_ref().map(|then| then.try_clone().unwrap());
        let was_asked = Cell::new(false);
        Some(Box::new(Place {
            file,
            then,
            was_asked,
            offset,
            is_durable_alone,
            lost,
            placed,
            held,
        }))
    }
}

impl PlacedWrite for Place {
    fn file(&self) -> Option<PlacedFile<'_>> {
        let then = self.then.as_ref().filter(|_| self.was_asked.replace(true));
        Some(PlacedFile::new(then.unwrap_or(&self.file).as_fd()))
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn is_durable_alone(&self) -> bool {
        self.is_durable_alone
    }

    fn failed(self: Box<Self>, _: &std::io::Error) {
        self.lost.fetch_add(1, SeqCst);
    }

    fn written(self: Box<Self>) -> Result<(), ExportError> {
        self.placed.fetch_add(1, SeqCst);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.held.fetch_sub(1, SeqCst);
    }
}

/// Whether the ring has carried writes out; if not, for want of one.
fn has_ring(disk: &Placing) -> bool {
    let has_ring = disk.placed.load(SeqCst) > 0;
    if !has_ring {
        skip_without_ring();
    }
    has_ring
}

/// Notes that a test of the ring could not run. Where the system should have one that is a failure,
/// unless these tests are run as without one.
fn skip_without_ring() {
    if std::env::var_os("NBD_AIO").is_some_and(|mode| mode == "threads") {
        println!("skipped: io_uring is not to be used");
    } else {
        skip("there is no io_uring");
    }
}

#[test]
fn a_write_that_the_ring_cannot_carry_out_is_the_exports() {
    let file = disk_file(&[0; 8192]);
    // It is open for reading only.
    let disk = Arc::new(Placing::new(File::open(file.path()).unwrap()));
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    for (round, mode) in MODES.into_iter().enumerate() {
        let mut client = Client::connect(&server, mode);
        assert_eq!(client.write(4096, &[round as u8; 4096]), Ok(()));
    }
    assert_eq!((disk.writes.load(SeqCst), disk.placed.load(SeqCst)), (3, 0));
    let expected: Vec<_> = (0..3).map(|round| (4096, vec![round; 4096])).collect();
    assert!(*disk.written.lock().unwrap() == expected);
    wait_until("the places are free", || disk.held.load(SeqCst) == 0);
}

/// Sixteen durable writes at once; how many failed.
fn failures_of_durable_writes(disk: &Arc<Placing>) -> usize {
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    let mut failures = 0;
    for _ in 0..20 {
        for place in 0..16 {
            client.submit(place * 4096, 512, &Command::Write(Durability::Fua), &[1; 512]);
        }
        failures += (0..16).filter(|_| client.next_finished().1.result.is_err()).count();
    }
    failures
}

#[test]
fn durable_writes_through_the_ring_share_flushes_and_their_failures() {
    for is_writethrough in [false, true] {
        let file = tempfile::tempfile().unwrap();
        let disk = Arc::new(Placing { is_writethrough, ..Placing::new(file) });
        assert_eq!(failures_of_durable_writes(&disk), 0);
        if !has_ring(&disk) {
            return;
        }
        let (placed, writes) = (disk.placed.load(SeqCst), disk.writes.load(SeqCst));
        let flushes = disk.flushes.load(SeqCst);
        assert_eq!(placed + writes, 320);
        assert!(flushes > 0 && flushes <= placed, "{flushes} flushes for {placed} writes");
        disk.fails_to_flush.store(true, SeqCst);
        assert!(failures_of_durable_writes(&disk) >= disk.placed.load(SeqCst) - placed);
    }
}

#[test]
fn a_durable_write_fails_if_a_flush_that_failed_meanwhile_may_have_taken_its_error() {
    for (is_writethrough, durability) in [(false, Durability::Fua), (true, Durability::Cached)] {
        let file = tempfile::tempfile().unwrap();
        let disk = Arc::new(Placing { is_writethrough, ..Placing::new(file) });
        disk.holds_first_flush.store(true, SeqCst);
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        let mut client = Client::connect(&server, MODES[1]);
        let submit = |client: &mut Client, places: std::ops::Range<u64>| {
            for place in places {
                client.submit(place * 4096, 512, &Command::Write(durability), &[1; 512]);
            }
        };
        let carried_out = || disk.placed.load(SeqCst) + disk.writes.load(SeqCst);
        submit(&mut client, 0..8);
        wait_until("the first are written", || carried_out() == 8);
        if !has_ring(&disk) {
            disk.holds_first_flush.store(false, SeqCst);
            return;
        }
        wait_until("a flush is under way", || disk.flushes.load(SeqCst) == 1);
        // They wait for the next flush, which succeeds: the first one may have taken their error.
        submit(&mut client, 8..16);
        wait_until("the others are written", || carried_out() == 16);
        disk.holds_first_flush.store(false, SeqCst);
        let failures = (0..16).filter(|_| client.next_finished().1.result.is_err()).count();
        assert!(failures >= disk.placed.load(SeqCst), "{failures} of {:?}", disk.placed);
        assert_eq!(client.write(0, &[2; 512]), Ok(()), "what comes later is durable");
    }
}

#[test]
fn a_write_that_is_durable_alone_needs_no_flush_unless_one_has_failed_meanwhile() {
    for (is_writethrough, durability) in [(false, Durability::Fua), (true, Durability::Cached)] {
        let file = tempfile::tempfile().unwrap();
        let disk = Placing { is_writethrough, is_durable_alone: true, ..Placing::new(file) };
        let disk = Arc::new(disk);
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        let mut client = Client::connect(&server, MODES[1]);
        for place in 0..16 {
            client.submit(place * 4096, 512, &Command::Write(durability), &[1; 512]);
        }
        let succeeded = (0..16).filter(|_| client.next_finished().1.result.is_ok()).count();
        assert_eq!(succeeded, 16);
        if !has_ring(&disk) {
            return;
        }
        assert_eq!(disk.flushes.load(SeqCst), 0);
        disk.fails_to_flush.store(true, SeqCst);
        let mut other = Client::connect(&server, MODES[1]);
        other.request(0, 0, &Command::Flush).result.unwrap_err();
        // The flush may have taken the error of what this client has written.
        assert!(write_one(&mut client, durability).is_err());
        assert_eq!(write_one(&mut client, durability), Ok(()), "it was told");
    }
}

fn write_one(client: &mut Client, durability: Durability) -> Result<(), Errno> {
    client.submit(0, 512, &Command::Write(durability), &[2; 512]);
    client.next_finished().1.result.map_err(|error| error.errno)
}

#[test]
fn a_durable_write_that_fails_in_the_ring_is_not_repeated_and_all_clients_are_told() {
    // The pipe has no reader: every write fails after it has begun, as one does whose data was
    // lost.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let offset = |_| u64::MAX;
    let disk = Placing { is_durable_alone: true, offset, ..Placing::new(writer) };
    let disk = Arc::new(disk);
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let [mut client, mut other] = [(); 2].map(|()| Client::connect(&server, MODES[1]));
    let result = write_one(&mut client, Durability::Fua);
    if disk.lost.load(SeqCst) == 0 {
        return skip_without_ring();
    }
    assert_eq!(result, Err(Errno::EIO));
    assert_eq!(disk.writes.load(SeqCst), 0, "it was repeated");
    wait_until("the places are free", || disk.held.load(SeqCst) == 0);
    // One that need not be durable is the export's.
    assert_eq!(write_one(&mut client, Durability::Cached), Ok(()));
    assert_eq!(disk.writes.load(SeqCst), 1);
    let flush = |client: &mut Client| client.request(0, 0, &Command::Flush).result.is_ok();
    assert!(!flush(&mut other), "its data may have been lost");
    assert!(flush(&mut other) && flush(&mut client), "both were told");
}

/// What the durable write of one of two clients says, and whether the next flush of the other
/// succeeds; `None` without a ring. The ring finds `disk` full.
fn full_in_the_ring(disk: Placing) -> Option<(Result<(), Errno>, bool)> {
    let disk = Arc::new(Placing { is_durable_alone: true, ..disk });
    let server = TestServer::with(ServerConfig::default(), disk.clone());
    let [mut client, mut other] = [(); 2].map(|()| Client::connect(&server, MODES[1]));
    let result = write_one(&mut client, Durability::Fua);
    if disk.writes.load(SeqCst) > 0 {
        skip_without_ring();
        return None;
    }
    wait_until("the place is free", || disk.held.load(SeqCst) == 0);
    let flush = |client: &mut Client| client.request(0, 0, &Command::Flush).result.is_ok();
    let is_flushed = flush(&mut other);
    assert_eq!(disk.lost.load(SeqCst), usize::from(!is_flushed));
    assert!(flush(&mut other) && flush(&mut client), "both were told");
    Some((result, is_flushed))
}

#[test]
fn a_durable_write_that_finds_no_space_in_the_ring_is_told_to_its_client_alone() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let Some(told) = full_in_the_ring(Placing::new(full)) else { return };
    assert_eq!(told, (Err(Errno::ENOSPC), true));
}

#[test]
fn a_durable_write_whose_sync_finds_no_space_in_the_ring_is_told_to_all_clients() {
    // Data whose place on the disk is chosen late is lost with this error, and the system says so
    // once: the bytes of the write itself have space.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let then = Some(tempfile::tempfile().unwrap().into());
    let Some(told) = full_in_the_ring(Placing { then, ..Placing::new(full) }) else { return };
    assert_eq!(told, (Err(Errno::EIO), false));
}

#[test]
fn a_write_keeps_its_place_until_the_system_is_done_with_it_even_if_its_client_leaves() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    // Nothing fits into it any more: a write to it waits.
    let room = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
    std::io::Write::write_all(&mut &writer, &vec![7; room]).unwrap();
    let disk = Arc::new(Placing { offset: |_| u64::MAX, ..Placing::new(writer) });
    let mut server = TestServer::with(ServerConfig::default(), disk.clone());
    let mut client = Client::connect(&server, MODES[1]);
    client.submit(0, 4096, &Command::Write(Durability::Cached), &[5; 4096]);
    wait_until("it is under way", || disk.held.load(SeqCst) == 1 || disk.writes.load(SeqCst) == 1);
    if disk.writes.load(SeqCst) == 1 {
        return skip_without_ring();
    }
    drop(client);
    wait_until("the client has gone", || server.handle().clients().is_empty());
    server.begin_stop();
    // Longer than reads are waited for would take too long; that it has not ended at once tells
    // enough.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(!server.has_ended() && disk.held.load(SeqCst) == 1);
    let mut bytes = vec![0; room + 4096];
    reader.read_exact(&mut bytes).unwrap();
    assert!(bytes[..room].iter().all(|byte| *byte == 7));
    assert!(bytes[room..].iter().all(|byte| *byte == 5));
    wait_until("the server ends", || server.has_ended());
    assert_eq!((disk.held.load(SeqCst), disk.placed.load(SeqCst)), (0, 1));
}
