//! [`Image`]: a virtual disk of any format.

mod bitmaps;
mod create;
mod create_foreign;
mod create_in_order;
mod detach;
mod extents;
mod inspect;
mod keys;
mod new_files;
mod on_device;
mod overwrite;
mod read;
mod snapshots;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use self::create_foreign::plan_foreign;
pub use self::detach::NewBase;
pub use self::extents::Extents;
pub use self::on_device::NewOnDevice;
use crate::access::Access;
use crate::archive;
use crate::cache_mode::CacheMode;
use crate::chain;
use crate::driver::{BackingLayer, Chain, NamedFile};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::info::ImageInfo;
use crate::layer::{FilledInOrder, Layer, WritableLayer};
use crate::options::OpenOptions;
use crate::qcow2::{Below, CheckReport, Populated, Qcow2, Repair};
use crate::storage::{Capabilities, DirectAlignment, FileIdentity, Storage};
use crate::units::{GuestOffset, GuestRange};
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
/// All methods take `&self` and may be called from several threads at once. Methods block unless
/// they say otherwise. Requests may have any alignment and length. A request of zero bytes succeeds
/// if its offset is not beyond the end. Writes that overlap and run at the same time can leave a
/// mix of both.
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

    fn layer(&self) -> &dyn Layer {
        self.chain.top.layer()
    }

    fn writable(&self) -> Result<&dyn WritableLayer> {
        self.chain.top.writable().ok_or_else(|| self.name(cannot_be_changed()))
    }

    /// Returns the sizes of the disks of all layers in bytes, from the image itself to the last
    /// backing file. [`Extent::depth`](crate::Extent::depth) 1 is the first of them. A layer may be
    /// shorter than those above it; it reads as zero beyond its end.
    ///
    /// ```
    /// use imgfmt::{CreateOptions, Format, Image};
    ///
    /// # fn main() -> imgfmt::Result<()> {
    /// # let directory = tempfile::tempdir().expect("a directory for the example");
    /// # let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
    /// Image::create(&base, &CreateOptions::new(Format::Raw, 1 << 20))?;
    /// let mut larger = CreateOptions::overlay("base.img", Format::Raw);
    /// larger.size = Some(3 << 20);
    /// assert_eq!(Image::create(&top, &larger)?.layer_sizes(), [3 << 20, 1 << 20]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn layer_sizes(&self) -> Vec<u64> {
        let layers = self.chain.layers();
        let below = layers.below.iter().map(BackingLayer::size);
        std::iter::once(self.size()).chain(below).collect()
    }

    /// Returns the depth of the layer below the image that is stored in the file at `path`, and the
    /// format of that layer: the backing file has depth 2. `None` if no layer is; layers on servers
    /// have no file. Blocks.
    pub fn layer_in(&self, path: &Path) -> Option<(u32, Format)> {
        let identity = FileIdentity::of(path)?;
        let layers = self.chain.layers();
        let mut below = layers.opened.iter().zip(1..).skip(1);
        let found = below.find(|(layer, _)| layer.identity == Some(identity));
        found.map(|(layer, depth)| (depth, layer.format))
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

    /// Returns the paths of the files that were opened, each with the identity of the opened file:
    /// the image, its data file and all layers below.
    pub fn files(&self) -> Vec<(PathBuf, FileIdentity)> {
        let layers = self.chain.layers();
        layers.files.iter().map(|file| (file.path.clone(), file.identity)).collect()
    }

    /// Returns the paths of the files of the image itself: its own, and then its data file or
    /// extents.
    pub fn own_files(&self) -> Vec<PathBuf> {
        let layers = self.chain.layers();
        let own = layers.files.iter().filter(|file| file.layer == 0);
        own.map(|file| file.path.clone()).collect()
    }

    /// Returns what else than named files the image consists of, from the top to the bottom, as it
    /// is called in the image above: the URI of a layer on a server. A storage that the caller has
    /// opened has the path that it was given with, or an empty one.
    pub fn other_layers(&self) -> Vec<PathBuf> {
        self.chain.layers().others.iter().map(|(_, path)| path.clone()).collect()
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
