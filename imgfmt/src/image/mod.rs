//! [`Image`]: a virtual disk of any format.

mod bitmaps;
mod create;
mod create_foreign;
mod create_in_order;
mod detach;
mod extents;
mod inspect;
mod keys;
mod layers;
mod new_files;
mod on_device;
mod overwrite;
mod read;
mod snapshots;
mod write;

use std::path::Path;
use std::sync::Arc;

pub(crate) use self::create_foreign::plan_foreign;
pub use self::detach::NewBase;
pub use self::extents::Extents;
pub use self::on_device::NewOnDevice;
use crate::access::Access;
use crate::archive;
use crate::cache_mode::CacheMode;
use crate::chain;
use crate::driver::{Chain, NamedFile};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::info::ImageInfo;
use crate::layer::{FilledInOrder, Layer, WritableLayer};
use crate::options::OpenOptions;
use crate::qcow2::{Below, CheckReport, Populated, Qcow2, Repair};
use crate::storage::{Capabilities, DirectAlignment, Storage};
use crate::units::{GuestOffset, GuestRange, span};
use crate::wanted::Asking;

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
/// Methods that read, write or change bitmaps take `&self` and may be called from several threads
/// at once; those that change the whole disk (its size, its snapshots, its layer) take `&mut self`.
/// Methods block unless they say otherwise. Requests may have any alignment and length. A request
/// of zero bytes succeeds if its offset is not beyond the end. Writes that overlap and run at the
/// same time can leave a mix of both.
///
/// # Example
///
/// A bitmap records what is written, and a snapshot keeps the disk as it was:
///
/// ```
/// use imgfmt::{BITMAP_GRANULARITY_DEFAULT, CreateOptions, Durability, Format, Image, Recording};
///
/// # fn main() -> imgfmt::Result<()> {
/// # let directory = tempfile::tempdir().expect("a directory for the example");
/// # let path = directory.path().join("disk.qcow2");
/// let mut disk = Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 30))?;
/// disk.write_at(0.into(), b"before", Durability::Cached)?;
/// disk.create_snapshot("monday")?;
/// disk.add_bitmap("since-monday", BITMAP_GRANULARITY_DEFAULT, Recording::Enabled)?;
///
/// disk.write_at((1 << 20).into(), b"after", Durability::Cached)?;
/// let changed = disk.dirty_extents("since-monday", disk.whole(), usize::MAX)?;
/// let dirty: Vec<_> = changed.iter().filter(|extent| extent.is_dirty).collect();
/// assert_eq!(dirty.len(), 1);
/// assert_eq!(dirty[0].range.offset().bytes(), 1 << 20);
///
/// disk.apply_snapshot("monday")?;
/// let mut found = [1; 5];
/// disk.read_at((1 << 20).into(), &mut found)?;
/// assert_eq!(found, [0; 5]);
/// disk.close()
/// # }
/// ```
#[derive(Debug)]
pub struct Image {
    chain: Chain,
    path: Option<Box<Path>>,
    access: Access,
    cache: CacheMode,
    /// The alignment for the image's own file, if its data bypasses the page cache.
    direct: Option<DirectAlignment>,
}

impl Image {
    /// Opens the image in a file or block device.
    ///
    /// A disk in an archive of a virtual machine (OVA) is opened for reading without unpacking it:
    /// `machine.ova` is its first disk, `machine.ova:2` the second, `machine.ova:disk.vmdk` that of
    /// this name. A file of the whole name comes first. With the format raw, an archive itself is
    /// the disk. An image in an archive names no other file.
    ///
    /// If no format is given, it is detected from the first bytes of the file; a fixed VHD, which
    /// has its header at the end, also by the ending of its name, `.vhd` or `.vpc`. In a raw image,
    /// the guest controls these bytes. A raw image that was detected therefore refuses writes to
    /// its first sector that would make it look like another format or an archive. To allow all
    /// writes, give the format.
    ///
    /// # Errors
    ///
    /// `NotFound` and `PermissionDenied`; `PolicyDenied` if the image names a file that the policy
    /// does not allow; `InvalidFormat` for a directory, a pipe or anything else
    /// that is not an image; `Unsupported` for formats and features that this crate does not have;
    /// `Busy` if another program uses the file in a way that contradicts `options`; `Io`.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        if let Some(disk) = archive::open(path, options, options.access)? {
            let options = archive::options(options, &disk);
            let opened = Self::open_named(disk.storage, Some(path), &options);
            let mut image = opened.map_err(|error| error.with_path(path))?;
            if let Some(identity) = disk.identity {
                // Its file has another name than the disk.
                if let Some(layers) = image.chain.layers_mut() {
                    layers.others.retain(|(_, other)| other != path);
                    layers.files.insert(0, NamedFile { layer: 0, path: disk.path, identity });
                }
            }
            return Ok(image);
        }
        let storage = options.open_file(path, options.access)?;
        Self::open_named(Arc::new(storage), Some(path), options)
            .map_err(|error| error.with_path(path))
    }

    /// Opens the image in any storage. The storage itself is responsible for locks.
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

    /// Returns the size of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        self.layer().size()
    }

    /// Returns the range of the whole disk.
    pub fn whole(&self) -> GuestRange {
        span(0, self.size())
    }

    fn layer(&self) -> &dyn Layer {
        self.chain.top.layer()
    }

    fn writable(&self) -> Result<&dyn WritableLayer> {
        self.chain.top.writable().ok_or_else(|| self.name(cannot_be_changed()))
    }

    /// Returns the image's format.
    pub fn format(&self) -> Format {
        self.chain.top.format()
    }

    /// Returns whether the image may be changed.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Returns the cache mode.
    pub fn cache_mode(&self) -> CacheMode {
        self.cache
    }

    /// Returns the alignment of transfers from and to the image's file, if they bypass the page
    /// cache.
    pub fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.direct
    }

    /// Returns the path from which the image was opened, if there was one.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns the capabilities of the image, and the sizes of requests that suit it.
    pub fn capabilities(&self) -> Capabilities {
        let writable = self.chain.top.writable();
        let capabilities = writable.map_or_else(Capabilities::default, |it| it.capabilities());
        match self.access {
            Access::ReadWrite => capabilities,
            Access::ReadOnly => Capabilities { fast_zero: false, discard: false, ..capabilities },
        }
    }

    /// Changes the size of the disk, in bytes. The added part reads as zero.
    ///
    /// # Errors
    ///
    /// `ReadOnly`; `InvalidInput` if it would become smaller and `shrink` does not allow that, or
    /// for a size that the format cannot represent; `Unsupported` where the file or the image's
    /// features do not allow it; `NoSpace`, `Io`.
    pub fn resize(&mut self, size: u64, shrink: Shrink) -> Result<()> {
        self.check_change("resize", GuestOffset::new(0), 0)?;
        let present = self.size();
        if size < present && shrink == Shrink::Refuse {
            let detail = format!(
                "it has {present} bytes and would lose all beyond {size}; allow it to shrink"
            );
            return Err(self.name(Error::new(ErrorKind::InvalidInput, "resize", detail)));
        }
        let resized = match self.chain.top.writable_mut() {
            Some(image) => image.resize(size),
            None => Err(cannot_be_changed()),
        };
        resized.map_err(|error| self.name(error))
    }

    /// The image as one that is filled in order, if it has to be. Its errors do not
    /// [name](Self::name) the image.
    pub(crate) fn filled_in_order(&self) -> Option<&dyn FilledInOrder> {
        self.chain.top.writable()?.filled_in_order()
    }

    /// The size in bytes of the parts of the disk that a qcow2 image has or has not.
    pub(crate) fn subcluster_size(&self) -> Option<u64> {
        self.qcow2().map(Qcow2::subcluster_size)
    }

    /// Asks readers of a qcow2 image where they have found the layers below it.
    pub(crate) fn ask_readers(&self) -> Option<Asking<'_>> {
        self.qcow2().map(|image| image.wanted().ask())
    }

    /// Gives a qcow2 image content of its own where it has none; see [`Qcow2::populate`].
    pub(crate) fn populate(
        &self,
        range: GuestRange,
        below: Below<'_>,
        keeps_zeroes: bool,
    ) -> Result<Populated> {
        let range = self.check_change("write to", range.offset(), range.length())?;
        let populated = self.qcow2().map(|image| image.populate(range, below, keeps_zeroes));
        populated.unwrap_or_else(|| Ok(Populated::default())).map_err(|error| self.name(error))
    }

    /// Allocates all clusters of a new, empty image.
    pub(crate) fn preallocate(&self) -> Result<()> {
        let result = self.qcow2().map_or(Ok(()), Qcow2::preallocate);
        result.map_err(|error| self.name(error))
    }

    /// Changes the width of refcounts to 2^`order` bits. Afterwards, the image can only be closed.
    pub(crate) fn change_refcount_width(&mut self, order: u32) -> Result<()> {
        let image = self.chain.top.qcow2_mut();
        image.map_or(Ok(()), |image| image.change_refcount_width(order))
    }

    /// Returns information about the image.
    ///
    /// # Errors
    ///
    /// `Corrupt`, `Io`.
    pub fn info(&self) -> Result<ImageInfo> {
        let qcow2 = self.qcow2().map(Qcow2::info).transpose();
        let qcow2 = qcow2.map_err(|error| self.name(error))?;
        let mut info = ImageInfo::new(self.format(), self.size());
        (info.backing_name, info.backing_format) = self.chain.top.recorded_backing();
        (info.block_size, info.details) = self.chain.top.foreign_facts();
        info.qcow2 = qcow2;
        Ok(info)
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

    /// Flushes, stores the bitmaps, and marks the image as closed properly. Dropping an image does
    /// the same but cannot report a failure.
    ///
    /// # Errors
    ///
    /// `NoSpace`, `Io`. The image is closed nevertheless. It is consistent, but data written since
    /// the last successful flush may be lost.
    pub fn close(self) -> Result<()> {
        self.close_in_place()
    }

    /// As [`close`](Self::close), for an image that is shared and therefore closed when it is
    /// dropped: call it just before, to learn of a failure.
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close).
    pub fn close_in_place(&self) -> Result<()> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.writable()?.close().map_err(|error| self.name(error)),
        }
    }

    /// The image, if it is a qcow2 image.
    pub(crate) fn qcow2(&self) -> Option<&Qcow2> {
        self.chain.top.qcow2()
    }

    /// Checks that a request is within the disk.
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

    /// Like [`check`](Self::check); also checks that the image may be changed.
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

/// That the image is of a format that is only read. Such images are not opened for writing.
fn cannot_be_changed() -> Error {
    Error::new(ErrorKind::ReadOnly, "change", "images of its format can only be read")
}
