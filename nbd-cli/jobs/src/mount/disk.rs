//! A mounted disk: its image, which can be closed while requests still arrive.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use fuser::Errno;
use imgfmt::{
    Access, Durability, ErrorKind, ExtentKind, GuestOffset, GuestRange, Image, Speed, ZeroMode,
};

use crate::observer::Observer;
use crate::text::printable;

/// Errors of the disk that are reported in words: a caller gets only their number.
const MAX_REPORTS: usize = 20;
/// Steps of a search for data or a hole, and the extents of each.
const SEARCH: (usize, usize) = (64, 1024);

/// The image of a mounted disk. It is closed while other threads use it: they get errors then.
pub(super) struct MountedDisk {
    name: String,
    access: Access,
    image: RwLock<Option<Image>>,
    observer: Arc<dyn Observer>,
    reported: Mutex<Vec<String>>,
}

impl MountedDisk {
    pub(super) fn new(name: String, image: Image, observer: Arc<dyn Observer>) -> Self {
        let access = image.access();
        let reported = Mutex::default();
        Self { name, access, image: RwLock::new(Some(image)), observer, reported }
    }

    pub(super) fn is_writable(&self) -> bool {
        self.access == Access::ReadWrite
    }

    /// Fills the buffer; it must lie inside the disk.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.with(|image| image.read_at(GuestOffset::new(offset), buffer))
    }

    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), Errno> {
        self.with(|image| image.write_at(GuestOffset::new(offset), data, durability))
    }

    pub(super) fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Result<(), Errno> {
        let range = guest_range(range)?;
        self.with(|image| image.write_zeroes(range, mode, Speed::Any, Durability::Cached))
    }

    pub(super) fn flush(&self) -> Result<(), Errno> {
        self.with(Image::flush)
    }

    /// Finds the first byte in the range that is data, or that is in a hole. One call looks only at
    /// so many extents that it takes no noticeable time: what is beyond them counts as data.
    pub(super) fn seek(&self, range: Range<u64>, wanted: Wanted) -> Result<Option<u64>, Errno> {
        let (start, range) = (range.start, guest_range(range)?);
        self.with(|image| {
            let mut reached = start;
            for extent in image.extents(range).bounded(SEARCH.0, SEARCH.1) {
                let extent = extent?;
                let is_data = extent.kind == ExtentKind::Data;
                if is_data == (wanted == Wanted::Data) {
                    return Ok(Some(extent.range.offset().bytes()));
                }
                reached = extent.range.end().bytes();
            }
            let is_whole = reached >= range.end().bytes();
            Ok((!is_whole && wanted == Wanted::Data).then_some(reached))
        })
    }

    /// Closes the image when the requests in flight are complete. What arrives later fails.
    ///
    /// # Errors
    ///
    /// If what was written cannot be made durable.
    pub(super) fn close(&self) -> imgfmt::Result<()> {
        let image = self.image.write().unwrap_or_else(PoisonError::into_inner).take();
        image.map_or(Ok(()), Image::close)
    }

    fn with<T>(&self, act: impl FnOnce(&Image) -> imgfmt::Result<T>) -> Result<T, Errno> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = &*image else { return Err(Errno::EIO) };
        act(image).map_err(|error| {
            self.report(&error);
            number(error.kind())
        })
    }

    /// Says what happened, each kind of failure once.
    fn report(&self, error: &imgfmt::Error) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        // Without the place, which differs from request to request.
        let kind = format!("{:?}", error.kind());
        if reported.len() < MAX_REPORTS && !reported.contains(&kind) {
            reported.push(kind);
            self.observer.warning(&format!("the disk '{}': {error}", printable(&self.name)));
        }
    }
}

/// What is looked for in a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Data,
    Hole,
}

fn guest_range(range: Range<u64>) -> Result<GuestRange, Errno> {
    let length = range.end.saturating_sub(range.start);
    GuestRange::new(GuestOffset::new(range.start), length).ok_or(Errno::EINVAL)
}

/// The error number of a failure.
fn number(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::NoSpace => Errno::ENOSPC,
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::PolicyDenied | ErrorKind::PermissionDenied => Errno::EPERM,
        ErrorKind::OutOfBounds | ErrorKind::InvalidInput => Errno::EINVAL,
        ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    }
}
