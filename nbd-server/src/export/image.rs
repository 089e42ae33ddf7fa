//! Disk images as exports. Only this module uses `imgfmt`.

mod computing;
mod fast;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use imgfmt::{Access, ErrorKind, ExtentKind, GuestOffset, GuestRange, Image};
use nbd_proto::limits::MAX_PAYLOAD;
use nbd_proto::wire::{
    AllocationFlags, BlockDescriptor, BlockSizes, DirtyFlags, Errno, MetaContextName,
    TransmissionFlags,
};

use super::{
    Descriptors, Durability, Export, ExportError, ExportInfo, FastExport, Speed, ZeroMode,
};
use crate::log_limit::may_warn;

/// Maximum number of queries for extents to answer one block status request.
const STEPS_MAX: usize = 4;

/// A disk image as an export.
#[derive(Debug)]
pub struct ImageExport {
    image: Image,
    /// `None` if the context `qemu:allocation-depth` is not offered.
    depth: Option<CountedLayers>,
    /// The file whose bytes are the disk's, at the same offsets, if the image is raw.
    file: Option<Arc<OwnedFd>>,
    info: ExportInfo,
    /// The contexts of bitmaps, in order. Never held while the image is used, which may hang.
    bitmaps: RwLock<Vec<MetaContextName>>,
    /// Held for reading while a bitmap is examined.
    in_use: RwLock<()>,
    /// Called if closing the image fails.
    close_failed: CloseFailed,
    /// The last field: it is dropped when the image is closed.
    open: Arc<()>,
}

/// The owner's part in a close that fails.
struct CloseFailed(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for CloseFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CloseFailed")
    }
}

/// The layers that `qemu:allocation-depth` counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CountedLayers {
    /// Layers above the image that have no data: each adds 1 to the depth.
    pub empty_above: u32,
    /// The maximum depth. Data that only deeper layers have counts as absent.
    pub deepest: u32,
}

impl Default for CountedLayers {
    /// All layers of the image, and no others.
    fn default() -> Self {
        Self { empty_above: 0, deepest: u32::MAX }
    }
}

impl CountedLayers {
    /// The reported depth for a depth of the image.
    fn shown(self, depth: u32) -> u64 {
        match depth.saturating_add(self.empty_above) {
            shown if depth > 0 && shown <= self.deepest => u64::from(shown),
            _ => 0,
        }
    }
}

impl ImageExport {
    /// Creates an export of `image`, which is writable if it was opened for writing.
    #[must_use]
    pub fn new(image: Image) -> Self {
        let file = raw_file(&image);
        let info = describe(&image);
        let (bitmaps, in_use) = (RwLock::default(), RwLock::default());
        let (close_failed, open) = (CloseFailed(Box::new(|| {})), Arc::default());
        Self { image, depth: None, file, info, bitmaps, in_use, close_failed, open }
    }

    /// Calls `failed` if closing the image fails, so that something of it, such as its bitmaps, is
    /// not stored; the log says why. The image is closed where it is used last, which may be in any
    /// thread.
    #[must_use]
    pub fn on_close_failure(mut self, failed: impl Fn() + Send + Sync + 'static) -> Self {
        self.close_failed = CloseFailed(Box::new(failed));
        self
    }

    /// Offers the context `qemu:allocation-depth` as well.
    #[must_use]
    pub fn with_allocation_depth(self) -> Self {
        self.with_allocation_depth_of(CountedLayers::default())
    }

    /// Offers the context `qemu:allocation-depth`, counting layers in this way.
    #[must_use]
    pub fn with_allocation_depth_of(mut self, layers: CountedLayers) -> Self {
        if self.depth.replace(layers).is_none() {
            self.info.meta_contexts.push(MetaContextName::qemu_allocation_depth());
        }
        self
    }

    /// Offers the context `qemu:dirty-bitmap:NAME` of a bitmap as well. The name is looked up in
    /// the image and then in its backing files. A recording bitmap continues to record changes.
    /// Blocks: reads the bits.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Corrupt`, with the reason, if the bitmap is unreliable; `InvalidInput` if no
    /// context can have its name.
    pub fn with_bitmap(self, name: &str) -> imgfmt::Result<Self> {
        self.offer_bitmap(name)?;
        Ok(self)
    }

    /// Like [`with_bitmap`](Self::with_bitmap), while the export is served: connections that are
    /// negotiated from now on can select the context.
    ///
    /// # Errors
    ///
    /// As [`with_bitmap`](Self::with_bitmap).
    pub fn offer_bitmap(&self, name: &str) -> imgfmt::Result<()> {
        // Read the bits now, to find later errors.
        self.image.dirty_extents(name, GuestRange::default(), 1)?;
        let context = MetaContextName::qemu_dirty_bitmap(name).map_err(|error| {
            let detail = format!("the bitmap '{}': {error}", name.escape_debug());
            imgfmt::Error::new(ErrorKind::InvalidInput, "export a bitmap of", detail)
        })?;
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        if !bitmaps.contains(&context) {
            bitmaps.push(context);
        }
        Ok(())
    }

    /// Withdraws the context of a bitmap, and returns whether it was offered. Connections that have
    /// selected it get errors from now on; when this returns, no request uses the bitmap.
    pub fn withdraw_bitmap(&self, name: &str) -> bool {
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        let count = bitmaps.len();
        bitmaps.retain(|context| context.dirty_bitmap() != Some(name));
        let was_offered = bitmaps.len() < count;
        drop(bitmaps);
        drop(self.in_use.write());
        was_offered
    }

    fn dirty_status(
        &self,
        bitmap: &str,
        range: GuestRange,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        let _in_use = self.in_use.read().unwrap_or_else(PoisonError::into_inner);
        let offered = self.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        let is_offered = offered.iter().any(|context| context.dirty_bitmap() == Some(bitmap));
        drop(offered);
        if !is_offered {
            let why =
                "the bitmap is not offered any more, or not while a checkpoint is in progress";
            return Err(ExportError::new(Errno::EIO, why));
        }
        let found = self.image.dirty_extents(bitmap, range, max_count);
        let mut status = Descriptors::new(max_count);
        for extent in found.map_err(|error| translate(&error))? {
            let flags = if extent.is_dirty { DirtyFlags::STATE_DIRTY } else { DirtyFlags::empty() };
            if !status.push(extent.range.length(), flags.bits()) {
                break;
            }
        }
        Ok(status.into_vec())
    }

    /// Returns what is [alive](Weak::strong_count) until the image is closed, which is later than
    /// the end of the last use of the export: closing may take long.
    #[must_use]
    pub fn open(&self) -> Weak<()> {
        Arc::downgrade(&self.open)
    }

    /// Returns the exported image.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    fn range(offset: u64, length: u64) -> Result<GuestRange, ExportError> {
        GuestRange::new(GuestOffset::new(offset), length)
            .ok_or_else(|| ExportError::new(Errno::EINVAL, "offset and length overflow"))
    }
}

impl Drop for ImageExport {
    fn drop(&mut self) {
        if let Err(error) = self.image.close_in_place() {
            tracing::error!(%error, "an image could not be closed properly");
            (self.close_failed.0)();
        }
    }
}

impl Export for ImageExport {
    fn info(&self) -> ExportInfo {
        let mut info = self.info.clone();
        let bitmaps = self.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        info.meta_contexts.extend(bitmaps.iter().cloned());
        info
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        imgfmt::before_decompression(computing::begin);
        self.image.read_at(GuestOffset::new(offset), buffer).map_err(|error| translate(&error))
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        imgfmt::before_decompression(computing::begin);
        self.image
            .write_at(GuestOffset::new(offset), data, durable(durability))
            .map_err(|error| translate(&error))
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.image.flush().map_err(|error| translate(&error))
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        self.image
            .discard(Self::range(offset, length)?, durable(durability))
            .map_err(|error| translate(&error))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        let mode = match mode {
            ZeroMode::MayUnmap => imgfmt::ZeroMode::MayUnmap,
            ZeroMode::KeepAllocated => imgfmt::ZeroMode::KeepAllocated,
        };
        let speed = match speed {
            Speed::Any => imgfmt::Speed::Any,
            Speed::FastOnly => imgfmt::Speed::FastOnly,
        };
        self.image
            .write_zeroes(Self::range(offset, length)?, mode, speed, durable(durability))
            .map_err(|error| translate(&error))
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.image.cache(Self::range(offset, length)?).map_err(|error| translate(&error))
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        if let Some(bitmap) = context.dirty_bitmap() {
            return self.dirty_status(bitmap, Self::range(offset, length)?, max_count);
        }
        let layers = self.depth.unwrap_or_default();
        let of_depth = |extent: &imgfmt::Extent| layers.shown(extent.depth);
        let flags_of: &dyn Fn(&imgfmt::Extent) -> u64 = match context.as_str() {
            MetaContextName::BASE_ALLOCATION => &|extent| allocation(extent.kind).bits(),
            MetaContextName::QEMU_ALLOCATION_DEPTH => &of_depth,
            _ => return Err(ExportError::new(Errno::EINVAL, "the export has no such context")),
        };
        let mut status = Descriptors::new(max_count);
        // Extents that are equal in this context are joined, so one step may yield fewer
        // descriptors than may be sent. The number of steps is bounded, because a step over a
        // hostile image may cover little: a short answer is legal.
        let extents =
            self.image.extents(Self::range(offset, length)?).bounded(STEPS_MAX, max_count);
        for extent in extents {
            let extent = extent.map_err(|error| translate(&error))?;
            if !status.push(extent.range.length(), flags_of(&extent)) {
                break;
            }
        }
        Ok(status.into_vec())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

fn describe(image: &Image) -> ExportInfo {
    let capabilities = image.capabilities();
    let mut info = ExportInfo::new(image.size());
    info.flags |= TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE
        // One image object serves every connection, so they are coherent.
        | TransmissionFlags::CAN_MULTI_CONN;
    match image.access() {
        Access::ReadOnly => info.flags |= TransmissionFlags::READ_ONLY,
        Access::ReadWrite => {
            info.flags |= TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_WRITE_ZEROES;
            // Always offered: where it cannot be fast, it fails at once with ENOTSUP, as the flag
            // requires.
            info.flags |= TransmissionFlags::SEND_FAST_ZERO;
        }
    }
    let preferred = capabilities.preferred_size.max(4096).next_power_of_two();
    // Any alignment is accepted; `preferred` is only the cheapest.
    info.block_sizes = BlockSizes::new(1, preferred, MAX_PAYLOAD).unwrap_or_default();
    info.meta_contexts.push(MetaContextName::base_allocation());
    info
}

/// The file of a raw image, if its bytes are the disk's, at the same offsets. Only such a file may
/// be sent from without a copy: the clusters of other formats can move while the socket still
/// refers to them.
fn raw_file(image: &Image) -> Option<Arc<OwnedFd>> {
    image.raw_fd()?.try_clone_to_owned().ok().map(Arc::new)
}

fn allocation(kind: ExtentKind) -> AllocationFlags {
    match kind {
        ExtentKind::Data => AllocationFlags::empty(),
        ExtentKind::Zero => AllocationFlags::STATE_ZERO,
        ExtentKind::Hole => AllocationFlags::STATE_HOLE | AllocationFlags::STATE_ZERO,
    }
}

const fn durable(durability: Durability) -> imgfmt::Durability {
    match durability {
        Durability::Cached => imgfmt::Durability::Cached,
        Durability::Fua => imgfmt::Durability::Fua,
    }
}

/// Translates image errors to wire errors. The client gets the kind of failure; names of files stay
/// in the server's log.
fn translate(error: &imgfmt::Error) -> ExportError {
    // "Not fast" is an answer, not a failure.
    if error.kind() != ErrorKind::NotFast && may_warn() {
        tracing::warn!(%error, "a request failed");
    }
    let (errno, message) = match error.kind() {
        ErrorKind::NoSpace => (Errno::ENOSPC, "no space is left where the image is stored"),
        ErrorKind::ReadOnly => (Errno::EPERM, "the image is read-only"),
        ErrorKind::PolicyDenied => (Errno::EPERM, "the server's policy forbids this"),
        ErrorKind::NotFast => (Errno::ENOTSUP, "this cannot be done fast"),
        ErrorKind::Unsupported => (Errno::ENOTSUP, "the image cannot do this"),
        ErrorKind::OutOfBounds => (Errno::EINVAL, "the range is outside the image"),
        ErrorKind::Corrupt => (Errno::EIO, "the image's metadata is damaged"),
        _ if error.raw_os_error() == Some(Errno::ENOMEM.0 as i32) => {
            (Errno::ENOMEM, "the server is out of memory")
        }
        _ => (Errno::EIO, "the image cannot be read or written here"),
    };
    ExportError::new(errno, message)
}
