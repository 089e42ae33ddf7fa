//! Conversions of disks of which parts cannot be read.

use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use imgfmt::jobs::{
    ConvertOptions, JobContext, JobError, JobErrorKind, Observer, Unreadable, convert,
};
use imgfmt::storage::{MemoryStorage, StorageExtent};
use imgfmt::{
    Access, Error, ExtentKind, Format, GuestRange, HostOffset, Image, OpenOptions, Storage,
};

const SIZE: u64 = 1 << 20;

/// A disk with a range that cannot be read.
#[derive(Debug)]
struct Disk {
    bytes: MemoryStorage,
    bad: std::ops::Range<u64>,
    error: fn() -> io::Error,
}

impl Storage for Disk {
    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let end = offset.bytes() + buffer.len() as u64;
        match offset.bytes() < self.bad.end && self.bad.start < end {
            true => Err((self.error)()),
            false => self.bytes.read_at(offset, buffer),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_extent(&self, _: HostOffset, length: u64) -> io::Result<StorageExtent> {
        Ok(StorageExtent { length, kind: ExtentKind::Data })
    }
}

#[derive(Default)]
struct Lost(Mutex<Vec<(u64, u64)>>);

impl Observer for Lost {
    fn unreadable(&self, range: GuestRange, _: &Error) {
        self.0.lock().unwrap().push((range.offset().bytes(), range.length()));
    }
}

/// The copy, and what was reported as lost.
type Salvaged = (Result<Vec<u8>, JobError>, Vec<(u64, u64)>);

/// Converts a disk of sevens with a bad range.
fn salvage(error: fn() -> io::Error) -> Salvaged {
    let bytes = MemoryStorage::from_bytes(&vec![7; SIZE as usize]);
    let disk = Arc::new(Disk { bytes, bad: 300_000..301_000, error });
    let options = OpenOptions::new().format(Format::Raw);
    let source = Image::from_storage(disk, &options).unwrap();
    let copy: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&vec![0; SIZE as usize]));
    let target = Image::from_storage(copy.clone(), &options.access(Access::ReadWrite)).unwrap();
    let lost = Arc::new(Lost::default());
    let context = JobContext { observer: lost.clone(), ..JobContext::default() };
    let mut options = ConvertOptions::default();
    options.threads = NonZeroUsize::new(4).unwrap();
    options.unreadable = Unreadable::Zeroed;
    let converted = convert(&source, &target, &options, &context);
    let reported = lost.0.lock().unwrap().clone();
    let mut found = vec![0; SIZE as usize];
    copy.read_at(HostOffset::new(0), &mut found).unwrap();
    (converted.map(|_| found), reported)
}

#[test]
fn sectors_that_the_system_cannot_read_are_zero_and_reported_once() {
    let (copy, reported) = salvage(|| io::Error::from_raw_os_error(5));
    let (start, end) = (300_000 / 512 * 512, 301_000_u64.next_multiple_of(512));
    assert_eq!(reported, [(start, end - start)]);
    let mut expected = vec![7; SIZE as usize];
    expected[start as usize..end as usize].fill(0);
    assert!(copy.unwrap() == expected);
}

#[test]
fn a_lost_connection_is_no_damage_and_ends_a_salvage() {
    let (copy, reported) = salvage(|| io::ErrorKind::ConnectionReset.into());
    assert_eq!(copy.unwrap_err().kind(), JobErrorKind::Source);
    assert!(reported.is_empty());
}
