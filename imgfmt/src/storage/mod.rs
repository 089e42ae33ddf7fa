//! The storage of an image: the [`Storage`] trait and its implementations.
//!
//! A storage is a flat array of bytes with positional, synchronous I/O through `&self`, independent of
//! image formats. Six methods are required; the others have correct defaults, which [`FileStorage`]
//! replaces with faster operations of the operating system.

#[cfg(any(test, feature = "test-util"))]
pub mod fault;
mod file;
mod known_data;
mod lock;
mod memory;
mod zero;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use crate::extent::ExtentKind;
use crate::units::HostOffset;

pub use file::FileStorage;
pub use memory::MemoryStorage;

/// Whether a write must be on stable storage when it returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The write may stay in caches until the next flush.
    #[default]
    Cached,
    /// The write is on stable storage when the call returns (force unit access).
    Fua,
}

/// What may become of the space behind a range that is set to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroMode {
    /// The space may be given back; later writes may have to allocate it again.
    MayUnmap,
    /// The space stays allocated, so that later writes do not run out of it.
    KeepAllocated,
}

/// Whether an operation may be carried out the slow way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Speed {
    /// Whatever works, at worst writing zeroes.
    Any,
    /// Only if it is considerably faster than writing; otherwise it fails and changes nothing.
    FastOnly,
}

/// What a read that must not block achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TryRead {
    /// The whole buffer is filled.
    Complete,
    /// The data is not in memory; the buffer's content is undefined. Read it the blocking way.
    WouldBlock,
    /// A part of the range, or all of it, is known to read as zero, and the caller wants to know; the
    /// buffer's content is undefined. Storages never say it.
    Sparse,
}

/// What a write that must not wait for metadata achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TryWrite {
    /// Everything is written.
    Complete,
    /// Nothing is written: it may need something from the disk. Write it the usual way.
    WouldBlock,
}

/// What tells one file from another, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Number of the device the file system is on.
    pub device: u64,
    /// Inode number of the file there.
    pub inode: u64,
}

/// What a storage can do and likes best. All sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Whether zeroes can be written considerably faster than data.
    pub fast_zero: bool,
    /// Whether space can be given back.
    pub discard: bool,
    /// Smallest unit that is not read, changed and written back as a whole.
    pub minimum_size: u32,
    /// Unit in which requests are handled without extra cost.
    pub preferred_size: u32,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { fast_zero: false, discard: false, minimum_size: 1, preferred_size: 4096 }
    }
}

/// A piece of storage of one kind, from a given offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// How many bytes from the asked offset on are of this kind; at least 1.
    pub length: u64,
    /// [`ExtentKind::Data`] or [`ExtentKind::Hole`].
    pub kind: ExtentKind,
}

/// A flat row of bytes with positional I/O.
///
/// All methods may be called from several threads at once. Writes of ranges that overlap and run at
/// the same time leave a mix of both in the overlap; writes that do not overlap never disturb each
/// other.
#[allow(clippy::len_without_is_empty)] // An empty storage is nothing anyone asks for.
pub trait Storage: Send + Sync + fmt::Debug {
    /// The present length in bytes.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports.
    fn len(&self) -> io::Result<u64>;

    /// Reads until `buffer` is full or the storage ends; returns how many bytes were read.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports.
    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `data`, growing the storage if it ends before the end of the write.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports; part of the data may have been written then.
    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()>;

    /// Changes the length; new bytes read as zero.
    ///
    /// # Errors
    ///
    /// `Unsupported` where the length is fixed, otherwise whatever the medium reports.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Gives the space of a range back. The range then reads as zero, and the length stays.
    ///
    /// # Errors
    ///
    /// `Unsupported` if this cannot be done here (nothing has changed then), otherwise whatever the
    /// medium reports.
    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()>;

    /// Waits until everything written before is on stable storage.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports. After a failure nothing is known about earlier writes.
    fn sync(&self) -> io::Result<()>;

    /// What this storage can do.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// Fills `buffer`, or fails with `UnexpectedEof` if the storage ends before that.
    ///
    /// # Errors
    ///
    /// See [`read_at`](Self::read_at).
    fn read_exact_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<()> {
        let wanted = buffer.len();
        if self.read_at(offset, buffer)? == wanted {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Fills `buffer` if that needs no waiting for a medium.
    ///
    /// # Errors
    ///
    /// See [`read_at`](Self::read_at).
    fn try_read_at(&self, _offset: HostOffset, _buffer: &mut [u8]) -> io::Result<TryRead> {
        Ok(TryRead::WouldBlock)
    }

    /// Sets a range, which must lie within the present length, to zero.
    ///
    /// # Errors
    ///
    /// `Unsupported` if only the fast way was allowed and there is none: nothing has changed then.
    /// Otherwise whatever the medium reports.
    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        if mode == ZeroMode::MayUnmap {
            match self.punch_hole(offset, length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => return other,
            }
        }
        match speed {
            Speed::FastOnly => Err(io::ErrorKind::Unsupported.into()),
            Speed::Any => zero::write_zero_buffers(self, offset, length),
        }
    }

    /// What kind of bytes are found at `offset` and how far that goes, looking no further than
    /// `length` bytes. "All data" is always a correct answer.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports.
    fn next_extent(&self, _offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        Ok(StorageExtent { length, kind: ExtentKind::Data })
    }

    /// Whether a range is known to have no holes, found out without waiting. Where it is not,
    /// [`next_extent`](Self::next_extent) tells. True where that never tells of holes; a storage that
    /// overrides one should override the other.
    fn is_known_data(&self, _offset: HostOffset, _length: u64) -> bool {
        true
    }

    /// Starts to bring a range into memory, without waiting for it.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports.
    fn readahead(&self, _offset: HostOffset, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// How much space the bytes take up, if that is known.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports.
    fn allocated_len(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// The descriptor of the file behind this storage, if bytes may be moved from it directly.
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What tells this file from others, if it is one.
    fn identity(&self) -> Option<FileIdentity> {
        None
    }
}
