//! A disk that is written completely and becomes valid atomically at the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::extent::ExtentKind;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::qcow2::incomplete_header;
use crate::storage::{
    Capabilities, Durability, FileIdentity, Speed, Storage, StorageExtent, TryRead, ZeroMode,
};
use crate::units::HostOffset;

/// The first sector identifies the content of a disk: an image's header, or a partition table. A
/// write of this many bytes is atomic.
const SECTOR: usize = 512;

/// Nothing has changed yet.
const UNTOUCHED: u8 = 0;
/// The first sector marks the rest as incomplete; its final content is in memory.
const MARKED: u8 = 1;
/// Everything is written.
const COMPLETE: u8 = 2;

/// A storage, usually a block device, whose first sector is written last.
///
/// Before the first change it gets the header of a qcow2 image that is marked as incomplete, which
/// this crate and QEMU refuse to open; [`complete`](Self::complete) replaces it by the data written
/// there. If the writer ends in between, an incomplete disk is never taken for a complete one.
/// Reads return the written data.
///
/// Its contents are useless before it is complete, so until then [`sync`](Storage::sync) does
/// nothing.
///
/// A raw disk is written to a device in this way:
///
/// ```no_run
/// use std::sync::Arc;
///
/// use imgfmt::storage::FileStorage;
/// use imgfmt::{Access, Durability, Format, Image, Locking, OpenOptions, Unfinished};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = FileStorage::open_device("/dev/vg/disk".as_ref(), Locking::Auto)?;
/// let unfinished = Arc::new(Unfinished::new(Arc::new(device))?);
/// let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
/// let disk = Image::from_storage(unfinished.clone(), &options)?;
/// disk.write_at(0.into(), &[1; 1 << 20], Durability::Cached)?;
/// disk.close()?;
/// unfinished.complete()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Unfinished {
    inner: Arc<dyn Storage>,
    state: AtomicU8,
    /// The contents of the first sector.
    first: OrderedMutex<{ rank::UNFINISHED }, [u8; SECTOR]>,
}

impl Unfinished {
    /// Creates the storage without writing anything. A storage of less than 512 bytes is written
    /// without protection.
    ///
    /// # Errors
    ///
    /// Any error of the medium.
    pub fn new(inner: Arc<dyn Storage>) -> io::Result<Self> {
        let mut first = [0; SECTOR];
        let read = inner.read_at(HostOffset::new(0), &mut first)?;
        let state = AtomicU8::new(if read < SECTOR { COMPLETE } else { UNTOUCHED });
        Ok(Self { inner, state, first: OrderedMutex::new(first) })
    }

    /// Puts everything on stable storage, then the first sector. No other call may be in progress.
    ///
    /// # Errors
    ///
    /// Any error of the medium. The first sector then marks the rest as incomplete, unless only its
    /// own write failed.
    pub fn complete(&self) -> io::Result<()> {
        let first = self.first.lock();
        if self.state.load(Acquire) == MARKED {
            self.inner.sync()?;
            self.inner.write_at(HostOffset::new(0), &*first, Durability::Cached)?;
            self.inner.sync()?;
        }
        self.state.store(COMPLETE, Release);
        Ok(())
    }

    /// Returns whether data was written and [`complete`](Self::complete) was not called, so that
    /// the previous data is lost.
    pub fn is_incomplete(&self) -> bool {
        self.state.load(Acquire) == MARKED
    }

    /// The number of bytes, from `offset` on, that are in the first sector and not on the medium.
    fn held(&self, offset: HostOffset, length: u64) -> usize {
        if self.state.load(Acquire) == COMPLETE {
            return 0;
        }
        let length = (SECTOR as u64).saturating_sub(offset.bytes()).min(length);
        length as usize // At most 512.
    }

    /// Durably marks the disk as incomplete: the change may reach the medium at any time.
    fn before_change(&self) -> io::Result<()> {
        if self.state.load(Acquire) != UNTOUCHED {
            return Ok(());
        }
        let first = self.first.lock();
        if self.state.load(Acquire) == UNTOUCHED {
            let start = HostOffset::new(0);
            let marked = self.inner.write_at(start, &incomplete_header(), Durability::Cached);
            marked.and_then(|()| self.inner.sync()).inspect_err(|_| {
                // Callers say that nothing has changed; the first error is reported.
                let _ = self.inner.write_at(start, &*first, Durability::Cached);
            })?;
            self.state.store(MARKED, Release);
        }
        Ok(())
    }

    /// Changes the part of a range that is in the first sector; returns where the rest begins, and
    /// its length.
    fn change_first(
        &self,
        offset: HostOffset,
        length: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> (HostOffset, u64) {
        let held = self.held(offset, length);
        if held > 0 {
            let start = offset.bytes() as usize;
            change(&mut self.first.lock()[start..start + held]);
        }
        (HostOffset::new(offset.bytes() + held as u64), length - held as u64)
    }
}

impl Storage for Unfinished {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read_at(offset, buffer)?;
        let held = self.held(offset, read as u64);
        if held > 0 {
            let start = offset.bytes() as usize;
            buffer[..held].copy_from_slice(&self.first.lock()[start..start + held]);
        }
        Ok(read)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.before_change()?;
        let length = data.len() as u64;
        let fill = |part: &mut [u8]| part.copy_from_slice(&data[..part.len()]);
        let (rest, left) = self.change_first(offset, length, fill);
        match left {
            0 => Ok(()),
            _ => self.inner.write_at(rest, &data[(length - left) as usize..], durability),
        }
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.before_change()?;
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.before_change()?;
        let held = self.held(offset, length) as u64;
        if length > held {
            self.inner.punch_hole(HostOffset::new(offset.bytes() + held), length - held)?;
        }
        self.change_first(offset, held, |part| part.fill(0));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match self.state.load(Acquire) {
            COMPLETE => self.inner.sync(),
            _ => Ok(()),
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        match self.held(offset, buffer.len() as u64) {
            0 => self.inner.try_read_at(offset, buffer),
            _ => Ok(TryRead::WouldBlock),
        }
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        self.before_change()?;
        let held = self.held(offset, length) as u64;
        if length > held {
            let rest = HostOffset::new(offset.bytes() + held);
            self.inner.write_zeroes(rest, length - held, mode, speed)?;
        }
        self.change_first(offset, held, |part| part.fill(0));
        Ok(())
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        match self.held(offset, length) as u64 {
            0 => self.inner.next_extent(offset, length),
            length => Ok(StorageExtent { length, kind: ExtentKind::Data }),
        }
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        self.inner.is_known_data(offset, length)
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.readahead(offset, length)
    }

    fn allocated_len(&self) -> io::Result<Option<u64>> {
        self.inner.allocated_len()
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.inner.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use crate::{Format, Image, OpenOptions};

    fn filled() -> (Arc<MemoryStorage>, Unfinished) {
        let inner = Arc::new(MemoryStorage::from_bytes(&vec![0xaa; 64 << 10]));
        let unfinished = Unfinished::new(Arc::clone(&inner) as Arc<dyn Storage>).unwrap();
        (inner, unfinished)
    }

    /// Changes a storage, and what is expected in it.
    type Change = fn(&Unfinished, &mut [u8]) -> io::Result<()>;

    fn content(storage: &dyn Storage) -> Vec<u8> {
        let mut content = vec![0; storage.len().unwrap() as usize];
        storage.read_exact_at(HostOffset::new(0), &mut content).unwrap();
        content
    }

    #[test]
    fn nothing_changes_before_the_first_write() {
        let (inner, unfinished) = filled();
        assert!(content(&unfinished).iter().all(|byte| *byte == 0xaa));
        assert!(!unfinished.is_incomplete());
        unfinished.complete().unwrap();
        assert!(content(&*inner).iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn what_is_not_complete_is_refused_and_then_reads_as_written() {
        let changes: [Change; 4] = [
            |storage, expected| {
                expected[..2000].fill(1);
                storage.write_at(HostOffset::new(0), &[1; 2000], Durability::Cached)
            },
            |storage, expected| {
                expected[100..103].fill(2);
                storage.write_at(HostOffset::new(100), &[2; 3], Durability::Fua)
            },
            |storage, expected| {
                expected[300..5000].fill(0);
                storage.write_zeroes(HostOffset::new(300), 4700, ZeroMode::MayUnmap, Speed::Any)
            },
            |storage, expected| {
                expected[40000..40001].fill(3);
                storage.write_at(HostOffset::new(40000), &[3], Durability::Cached)
            },
        ];
        for change in changes {
            let (inner, unfinished) = filled();
            let mut expected = vec![0xaa; 64 << 10];
            change(&unfinished, &mut expected).unwrap();
            assert!(unfinished.is_incomplete());
            assert!(content(&unfinished) == expected);
            let inner_too: Arc<dyn Storage> = Arc::clone(&inner) as _;
            let error = Image::from_storage(inner_too, &OpenOptions::new()).unwrap_err();
            assert!(error.to_string().contains("incomplete"), "{error}");
            unfinished.complete().unwrap();
            assert!(content(&*inner) == expected && content(&unfinished) == expected);
            change(&unfinished, &mut expected).unwrap();
            assert!(content(&*inner) == expected);
            let options = OpenOptions::new().format(Format::Raw);
            Image::from_storage(inner, &options).unwrap();
        }
    }
}
