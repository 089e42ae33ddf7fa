//! Finds the first difference of two disks with several threads: both disks are read at the same
//! time, and the latencies of a server's answers overlap.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{JobError, JobErrorKind};
use super::observer::{JobContext, Meter};
use crate::extent::{Extent, ExtentKind};
use crate::image::{Extents, Image};
use crate::ordered_lock::{OrderedMutex, rank};
use crate::zero::is_zero;

/// Default number of bytes of each disk that a thread reads at a time: both parts stay in the
/// processor's cache.
const REQUEST_SIZE: NonZeroUsize = NonZeroUsize::new(256 << 10).expect("it is not zero");
/// Largest request, in bytes.
const REQUEST_SIZE_MAX: usize = 64 << 20;

/// Options of a comparison; created by [`Default`], changed field by field.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CompareOptions {
    /// Bytes of each disk that a thread reads at a time: 64 MiB at most, 256 KiB by default.
    pub request_size: NonZeroUsize,
    /// Number of threads: by default the number of cores.
    pub threads: NonZeroUsize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { request_size: REQUEST_SIZE, threads: cores }
    }
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compared {
    /// Offset of the first difference, in bytes, if there is one.
    pub first_difference: Option<u64>,
    /// The sizes of both disks, in bytes. The missing end of the shorter one counts as zero.
    pub sizes: [u64; 2],
}

/// Compares two disks as seen by a guest, including backing files. A disk reads as zero beyond its
/// end. Ranges that are known to be zero on both are not read.
///
/// # Errors
///
/// `Source` if anything before the first difference cannot be read; `Interrupted`, `Internal`.
///
/// ```
/// use imgfmt::jobs::{CompareOptions, JobContext, compare};
/// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let (raw, qcow2) = (directory.path().join("disk.img"), directory.path().join("disk.qcow2"));
/// let second = Image::create(&qcow2, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
/// let mut bytes = vec![0; 1 << 20];
/// bytes[70_000] = 1;
/// std::fs::write(&raw, bytes)?;
///
/// let first = Image::open(&raw, &OpenOptions::new().format(Format::Raw))?;
/// let compared =
///     compare(&first, &second, &CompareOptions::default(), &JobContext::default())?;
/// assert_eq!(compared.first_difference, Some(70_000));
/// # Ok(())
/// # }
/// ```
pub fn compare(
    first: &Image,
    second: &Image,
    options: &CompareOptions,
    context: &JobContext,
) -> Result<Compared, JobError> {
    let sizes = [first.size(), second.size()];
    let search = &Search::new([first, second], options, context);
    let ended = std::thread::scope(|scope| {
        let spawn = |_| scope.spawn(move || search.work());
        let workers: Vec<_> = (0..options.threads.get()).map(spawn).collect();
        // All of them have to be joined here, or the scope panics.
        workers.into_iter().map(std::thread::ScopedJoinHandle::join).filter(Result::is_err).count()
    });
    if ended > 0 {
        let message = "a thread that compared has ended unexpectedly";
        return Err(JobError::new(JobErrorKind::Internal, message));
    }
    let first_difference = match search.end.lock().take() {
        None => None,
        Some(End { offset, why: Why::Difference }) => Some(offset),
        Some(End { why: Why::Error(error), .. }) => return Err(error),
    };
    Ok(Compared { first_difference, sizes })
}

/// What the threads share.
struct Search<'a> {
    disks: [&'a Image; 2],
    /// The bytes of each that are read at a time.
    request_size: u64,
    context: &'a JobContext,
    meter: Meter<'a>,
    agenda: OrderedMutex<{ rank::AGENDA }, Agenda<'a>>,
    end: OrderedMutex<{ rank::JOB_RESULT }, Option<End>>,
    /// Nothing from this offset on matters any more.
    limit: AtomicU64,
}

/// The result of the search, unless another one is at a lower offset.
struct End {
    offset: u64,
    why: Why,
}

enum Why {
    Difference,
    Error(JobError),
}

/// A part of the disks that is data on one of them at least.
struct DataRange {
    offset: u64,
    length: usize,
    kinds: [ExtentKind; 2],
}

impl<'a> Search<'a> {
    fn new(disks: [&'a Image; 2], options: &CompareOptions, context: &'a JobContext) -> Self {
        let size = disks[0].size().max(disks[1].size());
        Self {
            disks,
            request_size: options.request_size.get().min(REQUEST_SIZE_MAX) as u64,
            context,
            meter: Meter::begin(context, size),
            agenda: OrderedMutex::new(Agenda { disks: disks.map(Cursor::new), position: 0 }),
            end: OrderedMutex::new(None),
            limit: AtomicU64::new(size),
        }
    }

    /// Compares one range after the other until no relevant one is left.
    fn work(&self) {
        let mut buffers = [(); 2].map(|()| vec![0; self.request_size as usize]);
        loop {
            if let Err(error) = self.context.cancellation.check() {
                return self.end_at(0, Why::Error(error));
            }
            let mut agenda = self.agenda.lock();
            let next =
                agenda.next(self.limit.load(Ordering::Relaxed), self.request_size, &self.meter);
            let range = match next {
                Ok(Some(range)) => range,
                Ok(None) => return,
                // The other threads look for the reason here.
                Err(error) => return self.end_at(agenda.position, Why::Error(error)),
            };
            drop(agenda);
            match self.compare(&range, &mut buffers) {
                Ok(None) => self.meter.add(range.length as u64),
                Ok(Some(distance)) => {
                    self.end_at(range.offset + distance as u64, Why::Difference);
                }
                Err(error) => self.end_at(range.offset, Why::Error(error)),
            }
        }
    }

    /// The offset of the first difference from the start of the range.
    fn compare(
        &self,
        range: &DataRange,
        [first, second]: &mut [Vec<u8>; 2],
    ) -> Result<Option<usize>, JobError> {
        let (first, second) = (&mut first[..range.length], &mut second[..range.length]);
        let read = |disk: usize, buffer: &mut [u8]| {
            self.disks[disk].read_padded(range.offset.into(), buffer).map_err(JobError::source)
        };
        match range.kinds {
            [ExtentKind::Data, ExtentKind::Data] => {
                read(0, first)?;
                read(1, second)?;
                let differ = || first.iter().zip(&*second).position(|(a, b)| a != b);
                Ok(if first == second { None } else { differ() })
            }
            [kind, _] => {
                // The other one is zero and need not be read.
                read(if kind == ExtentKind::Data { 0 } else { 1 }, first)?;
                let differs = || first.iter().position(|&byte| byte != 0);
                Ok(if is_zero(first) { None } else { differs() })
            }
        }
    }

    fn end_at(&self, offset: u64, why: Why) {
        let mut end = self.end.lock();
        if end.as_ref().is_none_or(|end| offset < end.offset) {
            *end = Some(End { offset, why });
            self.limit.fetch_min(offset, Ordering::Relaxed);
        }
    }
}

/// The ranges still to be compared, in order.
struct Agenda<'a> {
    disks: [Cursor<'a>; 2],
    position: u64,
}

impl Agenda<'_> {
    /// The next range, of at most this many bytes, that begins before `limit`.
    fn next(
        &mut self,
        limit: u64,
        most: u64,
        meter: &Meter<'_>,
    ) -> Result<Option<DataRange>, JobError> {
        while self.position < limit {
            let start = self.position;
            let [(first, first_end), (second, second_end)] =
                [self.disks[0].at(start)?, self.disks[1].at(start)?];
            let same_until = first_end.min(second_end).min(limit);
            if first != ExtentKind::Data && second != ExtentKind::Data {
                meter.add(same_until - start);
                self.position = same_until;
                continue;
            }
            self.position = same_until.min((start / most + 1) * most);
            let length = (self.position - start) as usize;
            return Ok(Some(DataRange { offset: start, length, kinds: [first, second] }));
        }
        Ok(None)
    }
}

/// Finds step by step where a disk holds data.
#[derive(Debug)]
struct Cursor<'a> {
    extents: Extents<&'a Image>,
    current: Option<Extent>,
    size: u64,
    /// The walk failed: the end of the extents is not the end of the disk.
    has_failed: bool,
}

impl<'a> Cursor<'a> {
    fn new(image: &'a Image) -> Self {
        let (extents, size) = (image.extents(image.whole()), image.size());
        Self { extents, current: None, size, has_failed: false }
    }

    /// The kind of the extent at `offset`, and its end. `offset` never decreases. Beyond the disk
    /// it is zero.
    fn at(&mut self, offset: u64) -> Result<(ExtentKind, u64), JobError> {
        if offset >= self.size {
            return Ok((ExtentKind::Hole, u64::MAX));
        }
        loop {
            match self.current {
                Some(extent) if extent.range.end().bytes() > offset => {
                    return Ok((extent.kind, extent.range.end().bytes()));
                }
                // Another thread has the reason.
                _ if self.has_failed => {
                    let message = "the extents of a disk could not be found";
                    return Err(JobError::new(JobErrorKind::Source, message));
                }
                _ => {
                    let next = self.extents.next().transpose();
                    self.has_failed = next.is_err();
                    self.current = next.map_err(JobError::source)?;
                }
            }
            if self.current.is_none() {
                return Ok((ExtentKind::Hole, u64::MAX));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::storage::MemoryStorage;
    use crate::testing::{FailingStorage, Fault};
    use crate::{CreateOptions, Format, OpenOptions};

    #[test]
    fn a_disk_whose_map_cannot_be_read_is_empty_for_no_thread() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let image = Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
        image
            .write_at(crate::GuestOffset::new(0), &[1; 4096], crate::storage::Durability::Cached)
            .unwrap();
        image.close().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let storage = FailingStorage::new(Arc::new(MemoryStorage::from_bytes(&bytes)));
        let unreadable =
            Image::from_storage(Arc::clone(&storage) as _, &OpenOptions::new()).unwrap();
        let readable = Image::open(&path, &OpenOptions::new()).unwrap();
        storage.set_fault(Some(Fault { calls: storage.calls()..u64::MAX, code: 5 }));
        let (options, context) = (CompareOptions::default(), JobContext::default());
        let search = Search::new([&unreadable, &readable], &options, &context);
        for thread in 0..3 {
            let next = search.agenda.lock().next(1 << 20, 65536, &search.meter);
            assert!(next.is_err(), "thread {thread} compares what is not known");
        }
        let error = compare(&unreadable, &readable, &options, &context).unwrap_err();
        assert_eq!(error.kind(), JobErrorKind::Source);
    }
}
