//! The storage of an image: the [`Storage`] trait and its implementations.
//!
//! A storage is a flat array of bytes with positional, synchronous I/O through `&self`, independent
//! of image formats. Three methods are required. The others have correct defaults: changes are
//! refused, and [`FileStorage`] replaces the rest with faster operations of the operating system. A
//! storage above another one has to forward them; the module `tests` lists who does not.

mod alignment;
mod bounce;
mod direct;
mod durable;
mod file;
mod known_data;
mod lock;
mod memory;
mod null;
mod opening;
mod padded;
mod range_locks;
#[cfg(test)]
mod tests;
mod tracked;
mod window;
mod write_behind;
mod writers;
mod zero;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use crate::extent::ExtentKind;
use crate::units::HostOffset;

pub use alignment::DirectAlignment;
#[cfg(feature = "encryption")]
pub(crate) use bounce::{BouncePool, LARGE as TRANSFER_MAX};
pub use file::{FileLock, FileStorage};
pub use memory::MemoryStorage;
pub use null::NullStorage;
pub use padded::in_whole_blocks;
#[cfg(feature = "encryption")]
pub(crate) use range_locks::RangeLocks;
pub(crate) use tracked::Tracked;
pub use window::{Part, StorageWindow};
pub use write_behind::Backlog;

/// Whether a write must be on stable storage when it returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The write may stay in caches until the next flush.
    #[default]
    Cached,
    /// The write is on stable storage when the call returns (force unit access).
    Fua,
}

/// The permitted treatment of the space of a range that is set to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroMode {
    /// The space may be freed; later writes may have to allocate it again.
    MayUnmap,
    /// The space stays allocated, so that later writes do not run out of it.
    KeepAllocated,
}

/// Whether an operation may be slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Speed {
    /// Any method is allowed, at worst writing zeroes.
    Any,
    /// Only a method that is considerably faster than writing; otherwise the operation fails and
    /// changes nothing.
    FastOnly,
}

/// The result of a read that must not block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TryRead {
    /// The complete buffer is filled.
    Complete,
    /// The data is not in memory; the content of the buffer is undefined. Use the blocking read.
    WouldBlock,
    /// At least a part of the range is known to read as zero, and the caller asked for holes; the
    /// content of the buffer is undefined. Storages never return it.
    Sparse,
}

/// The result of a write that must wait for nothing but the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TryWrite {
    /// Everything is written.
    Complete,
    /// Nothing is written: something from the disk, a lock or much work may be needed. Use the
    /// blocking write.
    WouldBlock,
}

/// The identity of a file, independent of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device number of the file system.
    pub device: u64,
    /// Inode number of the file.
    pub inode: u64,
}

/// The capabilities and preferred sizes of a storage. All sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Whether zeroes can be written considerably faster than data.
    pub fast_zero: bool,
    /// Whether space can be freed.
    pub discard: bool,
    /// Smallest unit that is written without reading and writing back more.
    pub minimum_size: u32,
    /// Preferred alignment of requests.
    pub preferred_size: u32,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { fast_zero: false, discard: false, minimum_size: 1, preferred_size: 4096 }
    }
}

/// A part of a storage of one kind, from a given offset on.
///
/// This plain value, which every [`Storage`] returns, has these fields and will have no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// Bytes of this kind from the requested offset on; at least 1.
    pub length: u64,
    /// [`ExtentKind::Data`] or [`ExtentKind::Hole`].
    pub kind: ExtentKind,
}

/// An array of bytes with positional I/O.
///
/// All methods may be called from several threads at once. They block unless they say otherwise.
/// Concurrent overlapping writes leave a mix of both in the overlap; writes that do not overlap
/// never affect each other.
#[allow(clippy::len_without_is_empty)] // An empty storage is nothing anyone asks for.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Returns the current length in bytes.
    ///
    /// # Errors
    ///
    /// Any error of the medium.
    fn len(&self) -> io::Result<u64>;

    /// Reads until `buffer` is full or the storage ends; returns the number of bytes read.
    ///
    /// # Errors
    ///
    /// Any error of the medium.
    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `data`, growing the storage if it ends before the end of the write.
    ///
    /// # Errors
    ///
    /// Any error of the medium; a part of the data may have been written then. By default
    /// `ReadOnlyFilesystem`, for storages that are only read.
    fn write_at(
        &self,
        _offset: HostOffset,
        _data: &[u8],
        _durability: Durability,
    ) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    /// Changes the length; new bytes read as zero.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the length is fixed, as by default, otherwise any error of the medium.
    fn set_len(&self, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Allocates space from the end of the storage up to `length`, so that writes there do not have
    /// to wait for each other. New bytes read as zero. The storage never becomes shorter by this,
    /// even beside other writers. Call it only where this helps: it takes space that may not be
    /// needed.
    ///
    /// # Errors
    ///
    /// `Unsupported` if this does not help writes here, otherwise any error of the medium. A part
    /// may have been allocated then.
    fn extend(&self, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Frees the space of a range. The range then reads as zero, and the length is unchanged.
    ///
    /// # Errors
    ///
    /// `Unsupported` if this is not possible, as by default (nothing has changed then), otherwise
    /// any error of the medium.
    fn punch_hole(&self, _offset: HostOffset, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Waits until all earlier writes are on stable storage.
    ///
    /// # Errors
    ///
    /// Any error of the medium. After a failure the state of earlier writes is unknown.
    fn sync(&self) -> io::Result<()>;

    /// Returns the capabilities of the storage.
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

    /// Fills `buffer` if that is possible without waiting for a medium.
    ///
    /// # Errors
    ///
    /// See [`read_at`](Self::read_at).
    fn try_read_at(&self, _offset: HostOffset, _buffer: &mut [u8]) -> io::Result<TryRead> {
        Ok(TryRead::WouldBlock)
    }

    /// Writes all of `data` if that waits for nothing but the page cache. [`TryWrite::WouldBlock`]
    /// means that nothing is written, as by default: callers that know a file write to it anyway.
    ///
    /// # Errors
    ///
    /// See [`write_at`](Self::write_at).
    fn try_write_at(&self, _offset: HostOffset, _data: &[u8]) -> io::Result<TryWrite> {
        Ok(TryWrite::WouldBlock)
    }

    /// Sets a range, which must be within the current length, to zero.
    ///
    /// # Errors
    ///
    /// `Unsupported` if only a fast operation was allowed and there is none: nothing has changed
    /// then. Otherwise any error of the medium.
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
            Speed::Any => zero::write_zero_buffers(offset, length, |offset, zeroes| {
                self.write_at(offset, zeroes, Durability::Cached)
            }),
        }
    }

    /// Returns the kind of bytes at `offset` and their number, examining at most `length` bytes.
    /// "All data" is always a correct answer.
    ///
    /// # Errors
    ///
    /// Any error of the medium.
    fn next_extent(&self, _offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        Ok(StorageExtent { length, kind: ExtentKind::Data })
    }

    /// Returns whether a range is known to have no holes, without blocking. If false,
    /// [`next_extent`](Self::next_extent) finds out. The default is true, because the default
    /// `next_extent` never reports holes: override both or neither.
    fn is_known_data(&self, _offset: HostOffset, _length: u64) -> bool {
        true
    }

    /// Starts to read a range into memory, without waiting for it.
    ///
    /// # Errors
    ///
    /// Any error of the medium.
    fn readahead(&self, _offset: HostOffset, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// Returns the allocated space in bytes, if it is known.
    ///
    /// # Errors
    ///
    /// Any error of the medium.
    fn allocated_len(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// Returns the alignment of transfers, if those of this storage bypass the page cache. Requests
    /// may have any alignment nevertheless. With an alignment, every transfer waits for the medium,
    /// so callers that must not wait use a thread for it, and bytes must not be sent from
    /// [`as_fd`](Self::as_fd).
    fn direct_alignment(&self) -> Option<DirectAlignment> {
        None
    }

    /// Returns the descriptor of the underlying file, if there is one. Bytes may be sent from it
    /// unless there is a [`direct_alignment`](Self::direct_alignment).
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the descriptor through which this storage reads, if it reads from one file at the
    /// same offsets. Callers may then read through it too, with the storage's
    /// [alignment](Self::direct_alignment).
    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Begins a write of `length` bytes that the caller carries out itself, through
    /// [`read_fd`](Self::read_fd) and with the storage's [alignment](Self::direct_alignment). The
    /// write need not be durable. Returns `None` if this is not supported or would have to wait.
    fn begin_write(&self, _offset: HostOffset, _length: u64) -> Option<Box<dyn BegunWrite>> {
        None
    }

    /// Returns the identity of the file, if it is one.
    fn identity(&self) -> Option<FileIdentity> {
        None
    }
}

/// A write that the caller of [`Storage::begin_write`] carries out. Drop it when no part of the
/// write is in flight any more.
pub trait BegunWrite: Send + Sync + fmt::Debug {
    /// Records that all bytes were written.
    fn written(self: Box<Self>);
}
