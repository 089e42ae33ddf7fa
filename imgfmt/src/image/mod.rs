//! [`Image`]: a virtual disk of any format.

mod bitmaps;
mod create;
mod extents;
mod inspect;
mod on_device;
mod overwrite;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

pub use self::extents::Extents;
pub use self::on_device::NewOnDevice;
use crate::access::Access;
use crate::cache_mode::CacheMode;
use crate::chain;
use crate::driver::{BackingLayer, Chain};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::info::ImageInfo;
use crate::layer::{Layer, WritableLayer};
use crate::mapping::{Holes, Lookup, Mapped, Mapping, ReadMap};
use crate::options::OpenOptions;
use crate::qcow2::{Changed, CheckReport, Qcow2, Repair};
use crate::read;
use crate::storage::{
    Capabilities, DirectAlignment, Durability, Speed, Storage, TryRead, TryWrite, ZeroMode,
};
use crate::units::{GuestOffset, GuestRange};

/// Whether a disk may become smaller, which loses what is at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shrink {
    /// A smaller size is an error.
    #[default]
    Refuse,
    /// The end of the disk may be lost.
    Allow,
}

/// An open virtual disk.
///
/// All methods take `&self` and may be called from several threads at once. Requests may have any
/// alignment and length. A request of no bytes does nothing and succeeds if its offset is not
/// beyond the end. Requests that overlap and run at the same time leave a mix of both.
#[derive(Debug)]
pub struct Image {
    chain: Chain,
    path: Option<Box<Path>>,
    access: Access,
    cache: CacheMode,
    /// Of the file of the image itself, if its data passes the page cache by.
    direct: Option<DirectAlignment>,
}

impl Image {
    /// Opens the image in a file or block device.
    ///
    /// If no format is given it is found by looking at the first bytes of the file. Those bytes
    /// belong to the guest when the image is raw, so a writable raw image found this way refuses
    /// writes to its first sector that would make it look like another format; give the format to
    /// write anything.
    ///
    /// # Errors
    ///
    /// `NotFound` and `PermissionDenied`; `PolicyDenied` if the image names a file that the policy
    /// does not allow; `InvalidFormat` for a directory, a pipe or anything else
    /// that is not an image; `Unsupported` for formats and features that this crate does not have;
    /// `Busy` if another program uses the file in a way that contradicts `options`; `Io`.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let storage = options.open_file(path, options.access)?;
        Self::open_named(Arc::new(storage), Some(path), options)
            .map_err(|error| error.with_path(path))
    }

    /// Opens the image in any storage. Locks are the storage's own matter.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn from_storage(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        Self::open_named(storage, None, options)
    }

    pub(crate) fn open_named(
        storage: Arc<dyn Storage>,
        path: Option<&Path>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let direct = storage.direct_alignment();
        let chain = chain::open(storage, path, options)?;
        let (path, access, cache) = (path.map(Into::into), options.access, options.cache);
        Ok(Self { chain, path, access, cache, direct })
    }

    /// The size of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        self.layer().size()
    }

    fn layer(&self) -> &dyn Layer {
        self.chain.top.layer()
    }

    fn writable(&self) -> &dyn WritableLayer {
        self.chain.top.writable()
    }

    /// The sizes of the disks of all layers in bytes, from the image itself to the last backing file. A
    /// layer may be shorter than those above it.
    pub fn layer_sizes(&self) -> Vec<u64> {
        let below = self.chain.below.iter().map(BackingLayer::size);
        std::iter::once(self.size()).chain(below).collect()
    }

    /// The image's format.
    pub fn format(&self) -> Format {
        self.chain.top.format()
    }

    /// Whether the image may be changed.
    pub fn access(&self) -> Access {
        self.access
    }

    /// How the page cache is used, and when changes are durable.
    pub fn cache_mode(&self) -> CacheMode {
        self.cache
    }

    /// The alignment of transfers from and to the image's file, if they pass the page cache by.
    pub fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.direct
    }

    /// What the caller asks for, or more where the cache mode does.
    fn durability(&self, wanted: Durability) -> Durability {
        if self.cache.is_writethrough() { Durability::Fua } else { wanted }
    }

    /// The file the image was opened from, if it was one.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// What the image can do and which request sizes suit it.
    pub fn capabilities(&self) -> Capabilities {
        let capabilities = self.writable().capabilities();
        match self.access {
            Access::ReadWrite => capabilities,
            Access::ReadOnly => Capabilities { fast_zero: false, discard: false, ..capabilities },
        }
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    ///
    /// `OutOfBounds` if that goes beyond the end of the disk, `Corrupt`, `Io`.
    pub fn read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let range = self.check("read", offset, buffer.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let _lease = self.layer().lease();
        read::read_at(self.layer(), offset, buffer).map_err(|error| self.name(error))
    }

    /// Fills `buffer` from `offset` on if that needs no waiting for a disk.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at).
    pub fn try_read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<TryRead> {
        self.try_read(offset, buffer, Holes::AsData)
    }

    /// As [`try_read_at`](Self::try_read_at), for data only: where metadata says that a part of the
    /// range reads as zero, the answer is [`TryRead::Sparse`], and [`map`](Self::map) tells which
    /// part. One look at the metadata serves both.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at).
    pub fn try_read_data_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<TryRead> {
        self.try_read(offset, buffer, Holes::Told)
    }

    fn try_read(&self, offset: GuestOffset, buffer: &mut [u8], holes: Holes) -> Result<TryRead> {
        let range = self.check("read", offset, buffer.len() as u64)?;
        if range.is_empty() {
            return Ok(TryRead::Complete);
        }
        let _lease = self.layer().lease();
        let read = read::try_read_at(self.layer(), offset, buffer, holes);
        read.map_err(|error| self.name(error))
    }

    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    ///
    /// `ReadOnly`; `OutOfBounds` if that goes beyond the end of the disk; `NoSpace`; `PolicyDenied`
    /// if the first sector is guarded (see [`open`](Self::open)); `Io`. After an error the range
    /// may have been written in part.
    pub fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        let range = self.check_change("write to", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let durability = self.durability(durability);
        self.writable().write_at(offset, data, durability).map_err(|error| self.name(error))
    }

    /// Writes `data` from `offset` on, into the page cache, if that needs nothing from the disk:
    /// neither metadata nor, for a cluster that gets a new place, old content that is not in the
    /// page cache. A raw image always does it. Where the cache mode passes the page cache by, or has
    /// every write durable when it returns, the answer is [`TryWrite::WouldBlock`].
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite> {
        let range = self.check_change("write to", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(TryWrite::Complete);
        }
        if self.cache.is_writethrough() || self.direct.is_some() {
            return Ok(TryWrite::WouldBlock);
        }
        self.writable().try_write_at(offset, data).map_err(|error| self.name(error))
    }

    /// Writes whole clusters in compressed form where the format has one and it saves space; a raw
    /// image takes them as [`write_at`](Self::write_at) does. Meant for filling a new image, from
    /// as many threads as there are cores. A cluster of a qcow2 image is
    /// [`Qcow2Info::cluster_size`](crate::Qcow2Info) bytes; only the last may be cut by the end of
    /// the disk.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at); and `InvalidInput` if the data does not start and end with
    /// clusters.
    pub fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        let range = self.check_change("write to", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        self.writable().write_compressed(offset, data).map_err(|error| self.name(error))?;
        match self.durability(Durability::Cached) {
            Durability::Cached => Ok(()),
            Durability::Fua => self.flush(),
        }
    }

    /// Sets a range to zero.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at); and `NotFast`, with nothing changed, if only a fast way was
    /// allowed and there is none.
    pub fn write_zeroes(
        &self,
        range: GuestRange,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()> {
        let range = self.check_change("write zeroes to", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let durability = self.durability(durability);
        let result = self.writable().write_zeroes(range, mode, speed, durability);
        result.map_err(|error| self.name(error))
    }

    /// Says that the content of a range is of no more interest, so that its space can be given
    /// back. The range then reads as its old content or as zero. Where nothing can be given back,
    /// nothing happens.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        let range = self.check_change("discard", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let durability = self.durability(durability);
        self.writable().discard(range, durability).map_err(|error| self.name(error))
    }

    /// Waits until everything whose write returned before is on stable storage.
    ///
    /// # Errors
    ///
    /// `Io`. Nothing is known then about writes since the last flush that succeeded.
    pub fn flush(&self) -> Result<()> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.writable().flush().map_err(|error| self.name(error)),
        }
    }

    /// Makes the disk larger or smaller. What is added reads as zero.
    ///
    /// # Errors
    ///
    /// `ReadOnly`; `InvalidInput` if it would become smaller and `shrink` does not allow that, or
    /// for a size that the format does not have; `Unsupported` where the file or the image's
    /// features do not allow it; `NoSpace`, `Io`.
    pub fn resize(&mut self, size: u64, shrink: Shrink) -> Result<()> {
        self.check_change("resize", GuestOffset::new(0), 0)?;
        let present = self.size();
        if size < present && shrink == Shrink::Refuse {
            let detail = format!(
                "it has {present} bytes and would lose all beyond {size}; say that it may shrink"
            );
            return Err(self.name(Error::new(ErrorKind::InvalidInput, "resize", detail)));
        }
        let result = self.chain.top.writable_mut().resize(size);
        result.map_err(|error| self.name(error))
    }

    /// Allocates all clusters of a new, empty image.
    pub(crate) fn preallocate(&self) -> Result<()> {
        let result = self.qcow2().map_or(Ok(()), Qcow2::preallocate);
        result.map_err(|error| self.name(error))
    }

    /// Changes the width of refcounts, 2 to this power bits. Only closing the image is possible afterwards.
    pub(crate) fn change_refcount_width(&mut self, order: u32) -> Result<()> {
        let image = self.chain.top.qcow2_mut();
        image.map_or(Ok(()), |image| image.change_refcount_width(order))
    }

    /// Facts about the image.
    ///
    /// # Errors
    ///
    /// `Corrupt`, `Io`.
    pub fn info(&self) -> Result<ImageInfo> {
        let qcow2 = self.qcow2().map(Qcow2::info).transpose();
        let qcow2 = qcow2.map_err(|error| self.name(error))?;
        Ok(ImageInfo { format: self.format(), size: self.size(), encryption: None, qcow2 })
    }

    /// Checks the qcow2 image in a file and, if asked to, repairs it. Nobody else may use it
    /// meanwhile. The files it names are not looked at.
    ///
    /// # Errors
    ///
    /// `Unsupported` for formats that cannot be checked; otherwise as [`open`](Self::open).
    pub fn check_file(
        path: impl AsRef<Path>,
        options: &OpenOptions,
        repair: Repair,
    ) -> Result<CheckReport> {
        let path = path.as_ref();
        chain::check(path, options, repair).map_err(|error| error.with_path(path))
    }

    /// Checks the qcow2 image in any storage, as [`check_file`](Self::check_file) does.
    ///
    /// # Errors
    ///
    /// As [`check_file`](Self::check_file).
    pub fn check_storage(
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        repair: Repair,
    ) -> Result<CheckReport> {
        chain::check_storage(storage, None, options, repair)
    }

    /// Keeps the present state of the disk as an internal snapshot of this name.
    ///
    /// # Errors
    ///
    /// `ReadOnly`; `Unsupported` for raw images and where refcounts are too narrow; `InvalidInput`
    /// if there is one of that name; `Busy` while a [`ReadMap`] is held; `NoSpace`, `Corrupt`, `Io`.
    pub fn create_snapshot(&mut self, name: &str) -> Result<()> {
        self.change_snapshots(|image| image.create_snapshot(name))
    }

    /// Makes the disk what it was when an internal snapshot, given by id or name, was made, and as
    /// large. What was written since is lost. Bitmaps that record have every bit set then.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot); `NotFound`; and `Unsupported` if the size
    /// differs and there are snapshots that do not say theirs, as in images of version 2.
    pub fn apply_snapshot(&mut self, name: &str) -> Result<()> {
        self.change_snapshots(|image| image.apply_snapshot(name))
    }

    /// Deletes an internal snapshot, given by id or name.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot), and `NotFound`.
    pub fn delete_snapshot(&mut self, name: &str) -> Result<()> {
        self.change_snapshots(|image| image.delete_snapshot(name))
    }

    /// Gives up everything that the image itself has, so that its backing file shows (or zeroes, if
    /// it has none). Snapshots stay. All bitmaps that record changes become dirty as a whole.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot).
    pub fn clear(&mut self) -> Result<()> {
        self.change_snapshots(|image| image.clear(Changed::Everything))
    }

    /// Like [`clear`](Self::clear), after everything was written into the backing file (see
    /// [`jobs::commit`](crate::jobs::commit)): the disk reads as before, so its bitmaps stay as they
    /// are. If that is not so, they lack changes.
    ///
    /// # Errors
    ///
    /// As [`create_snapshot`](Self::create_snapshot).
    pub fn clear_committed(&mut self) -> Result<()> {
        self.change_snapshots(|image| image.clear(Changed::Nothing))
    }

    fn change_snapshots(&mut self, change: impl FnOnce(&mut Qcow2) -> Result<()>) -> Result<()> {
        self.check_change("change", GuestOffset::new(0), 0)?;
        let result = match self.chain.top.qcow2_mut() {
            Some(image) => change(image),
            None => {
                let detail = "a raw image has neither snapshots nor layers; convert it to qcow2";
                Err(Error::new(ErrorKind::Unsupported, "change", detail))
            }
        };
        result.map_err(|error| self.name(error))
    }

    /// Flushes and leaves the image in the state in which others should find it. Dropping an image
    /// does the same but cannot report a failure.
    ///
    /// # Errors
    ///
    /// `NoSpace`, `Io`. The image is closed all the same; it is consistent, but what was written
    /// since the last flush that succeeded may be lost.
    pub fn close(self) -> Result<()> {
        self.flush()?;
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.writable().close().map_err(|error| self.name(error)),
        }
    }

    /// Starts to bring a range into memory, without waiting for it.
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Io`.
    pub fn cache(&self, range: GuestRange) -> Result<()> {
        let range = self.check("read ahead in", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let _lease = self.layer().lease();
        read::readahead(self.layer(), range).map_err(|error| self.name(error))
    }

    /// Finds where the bytes of a range are, so that the caller can move them.
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Corrupt`, `Io`.
    pub fn map_read(&self, range: GuestRange) -> Result<ReadMap> {
        let mut map = ReadMap::new(self.layer().lease());
        // Everything may be read that it takes, so it is complete.
        let _complete = self.map(range, Holes::AsData, Lookup::MayRead, |mapping| {
            map.push(mapping);
            true
        })?;
        Ok(map)
    }

    /// As [`map_read`](Self::map_read), from what is in memory; `None` if that does not tell.
    ///
    /// # Errors
    ///
    /// As [`map_read`](Self::map_read).
    pub fn map_read_cached(&self, range: GuestRange, holes: Holes) -> Result<Option<ReadMap>> {
        let mut map = ReadMap::new(self.layer().lease());
        let mapped = self.map(range, holes, Lookup::CachedOnly, |mapping| {
            map.push(mapping);
            true
        })?;
        Ok((mapped == Mapped::Complete).then_some(map))
    }

    /// Calls `each` with the mappings of a range in turn, from its start on and without gaps, until
    /// it returns false. What it is told is true at that moment; to move the bytes later take
    /// [`map_read`](Self::map_read).
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Corrupt`, `Io`.
    pub fn map(
        &self,
        range: GuestRange,
        holes: Holes,
        lookup: Lookup,
        each: impl FnMut(Mapping<'_>) -> bool,
    ) -> Result<Mapped> {
        let range = self.check("map", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(Mapped::Complete);
        }
        let _lease = self.layer().lease();
        read::map(self.layer(), range, (holes, lookup), each).map_err(|error| self.name(error))
    }

    /// The file whose bytes are the disk's, one to one, if the image is raw, lies in a file, and its
    /// data goes through the page cache.
    pub fn raw_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.direct.is_some() {
            return None;
        }
        self.chain.top.raw_storage()?.as_fd()
    }

    /// The image, if it is a qcow2 image.
    pub(crate) fn qcow2(&self) -> Option<&Qcow2> {
        self.chain.top.qcow2()
    }

    /// Checks that a request lies within the disk.
    pub(crate) fn check(
        &self,
        operation: &'static str,
        offset: GuestOffset,
        length: u64,
    ) -> Result<GuestRange> {
        let size = self.size();
        match GuestRange::new(offset, length) {
            Some(range) if range.end().bytes() <= size => Ok(range),
            _ => Err(self.name(
                Error::new(
                    ErrorKind::OutOfBounds,
                    operation,
                    format!("{length} bytes from there go beyond the end of the disk ({size})"),
                )
                .at(offset.bytes()),
            )),
        }
    }

    /// As [`check`](Self::check), and that the image may be changed.
    pub(crate) fn check_change(
        &self,
        operation: &'static str,
        offset: GuestOffset,
        length: u64,
    ) -> Result<GuestRange> {
        match self.access {
            Access::ReadWrite => self.check(operation, offset, length),
            Access::ReadOnly => Err(self.name(Error::new(
                ErrorKind::ReadOnly,
                operation,
                "the image was opened read-only",
            ))),
        }
    }

    pub(crate) fn name(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.with_path(&**path),
            None => error,
        }
    }
}
