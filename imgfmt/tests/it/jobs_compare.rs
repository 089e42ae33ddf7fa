//! Comparing two disks: the first difference, what is not read, errors.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use imgfmt::jobs::{CompareOptions, JobContext, Observer, Progress, compare};
use imgfmt::storage::{MemoryStorage, StorageExtent};
use imgfmt::{ExtentKind, Format, HostOffset, Image, OpenOptions, Storage};

const SIZE: usize = 200_000;
const PIECE: usize = 4096;

/// A disk that counts what is read of it; a part of it is a hole, another part cannot be read.
#[derive(Debug)]
struct Disk {
    bytes: MemoryStorage,
    hole: std::ops::Range<u64>,
    bad: std::ops::Range<u64>,
    read: AtomicUsize,
}

impl Disk {
    fn new(bytes: &[u8], hole: std::ops::Range<u64>, bad: std::ops::Range<u64>) -> Arc<Self> {
        let bytes = MemoryStorage::from_bytes(bytes);
        Arc::new(Self { bytes, hole, bad, read: AtomicUsize::new(0) })
    }

    fn image(self: &Arc<Self>) -> Image {
        let options = OpenOptions::new().format(Format::Raw);
        Image::from_storage(self.clone(), &options).unwrap()
    }
}

impl Storage for Disk {
    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let end = offset.bytes() + buffer.len() as u64;
        if offset.bytes() < self.bad.end && self.bad.start < end {
            return Err(io::Error::other("a bad sector"));
        }
        self.read.fetch_add(buffer.len(), Ordering::Relaxed);
        self.bytes.read_at(offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let offset = offset.bytes();
        let (kind, end) = match offset {
            _ if offset < self.hole.start => (ExtentKind::Data, self.hole.start),
            _ if offset < self.hole.end => (ExtentKind::Hole, self.hole.end),
            _ => (ExtentKind::Data, u64::MAX),
        };
        Ok(StorageExtent { length: length.min(end - offset), kind })
    }
}

/// Remembers how much was done.
#[derive(Default)]
struct Done(Mutex<u64>);

impl Observer for Done {
    fn progress(&self, progress: &Progress) {
        *self.0.lock().unwrap() = progress.done;
    }
}

/// What is found, and how many bytes were said to be the same.
fn found(first: &Arc<Disk>, second: &Arc<Disk>) -> (Result<Option<u64>, String>, u64) {
    let (first, second) = (first.image(), second.image());
    let mut options = CompareOptions::default();
    (options.request_size, options.threads) =
        (NonZeroUsize::new(PIECE).unwrap(), NonZeroUsize::new(8).unwrap());
    let done = Arc::new(Done::default());
    let context = JobContext { observer: done.clone(), ..JobContext::default() };
    let compared = compare(&first, &second, &options, &context);
    if let Ok(compared) = &compared {
        assert_eq!(compared.sizes, [first.size(), second.size()]);
    }
    let difference = compared.map(|compared| compared.first_difference);
    let done = *done.0.lock().unwrap();
    (difference.map_err(|error| error.to_string()), done)
}

fn content() -> Vec<u8> {
    (0..SIZE).map(|index| (index % 251) as u8 + 1).collect()
}

#[test]
fn of_many_differences_the_first_is_found() {
    let bytes = content();
    let whole = Disk::new(&bytes, 0..0, 0..0);
    assert_eq!(found(&whole, &whole), (Ok(None), SIZE as u64));
    for first in [0, 1, 4095, 4096, 100_000, SIZE - 1] {
        let mut changed = bytes.clone();
        for byte in changed[first..].iter_mut().step_by(997) {
            *byte ^= 0x80;
        }
        let changed = Disk::new(&changed, 0..0, 0..0);
        assert_eq!(found(&whole, &changed).0, Ok(Some(first as u64)));
        assert_eq!(found(&changed, &whole).0, Ok(Some(first as u64)));
    }
}

#[test]
fn an_error_counts_in_front_of_the_first_difference_only() {
    let bytes = content();
    let mut changed = bytes.clone();
    changed[100_000] = 0;
    let changed = Disk::new(&changed, 0..0, 0..0);
    let early = found(&Disk::new(&bytes, 0..0, 50_000..50_001), &changed).0;
    assert!(early.as_ref().is_err_and(|error| error.contains("a bad sector")), "{early:?}");
    assert_eq!(found(&changed, &Disk::new(&bytes, 0..0, 150_000..150_001)).0, Ok(Some(100_000)));
}

#[test]
fn what_is_zero_is_not_read_and_what_is_missing_is_zero() {
    let mut bytes = content();
    let hole = 10_000..150_000;
    bytes[10_000..150_000].fill(0);
    let sparse = Disk::new(&bytes, 10_000..150_000, hole.clone());
    let full = Disk::new(&bytes, 0..0, 0..0);
    assert_eq!(found(&sparse, &full), (Ok(None), SIZE as u64));
    assert_eq!(sparse.read.load(Ordering::Relaxed), SIZE - 140_000);
    assert_eq!(found(&sparse, &sparse), (Ok(None), SIZE as u64), "neither is read there");
    let mut changed = bytes.clone();
    changed[140_001] = 1;
    assert_eq!(found(&Disk::new(&changed, 0..0, 0..0), &sparse).0, Ok(Some(140_001)));

    let mut longer = bytes.clone();
    longer.resize(SIZE + 10_000, 0);
    assert_eq!(found(&full, &Disk::new(&longer, 0..0, 0..0)).0, Ok(None));
    longer[SIZE + 5000] = 1;
    let longer = Disk::new(&longer, 0..0, 0..0);
    assert_eq!(found(&full, &longer).0, Ok(Some(SIZE as u64 + 5000)));
    assert_eq!(found(&longer, &full).0, Ok(Some(SIZE as u64 + 5000)));
}
