//! Writes the contents of an overlay into its backing file.

use super::error::{JobError, JobErrorKind};
use super::observer::{JobContext, Meter};
use super::snapshots;
use crate::extent::ExtentKind;
use crate::image::{Image, Shrink};
use crate::storage::{Durability, Speed, ZeroMode};
use crate::units::span;

/// Size of a copy step, in bytes.
const STEP: u64 = 1 << 20;

/// The result of a commit. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Committed {
    /// Bytes copied.
    pub data: u64,
    /// Bytes made zero.
    pub zeroes: u64,
}

/// Writes all data of the image `overlay` itself, and of the layers below it, into `backing`, its
/// layer of depth `depth`, opened for writing: 2 is its backing file. That is a second time,
/// because the overlay reads through it as well, so the overlay needs
/// [`Locking::Off`](crate::Locking); the caller locks its file. `backing` first grows to the size
/// of the overlay, if it is smaller.
///
/// Afterwards `backing` has the contents of the disk; [close](Image::close) it, and the overlay can
/// be deleted or, if `depth` is 2, [emptied](Image::clear_committed). Other overlays of the same
/// backing file are corrupted, the layers between included. If a commit is interrupted, the overlay
/// still shows the complete disk, and can be committed again.
///
/// # Errors
///
/// `InvalidArgument` if `overlay` has internal snapshots, which show the backing file too;
/// `DoesNotFit` if `backing` cannot grow enough; `Source`, `Destination`, `Interrupted`.
///
/// ```
/// use imgfmt::jobs::{JobContext, commit};
/// use imgfmt::{Access, CreateOptions, Durability, Format, Image, Locking, OpenOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
/// Image::create(&base, &CreateOptions::new(Format::Raw, 1 << 20))?;
/// let disk = Image::create(&top, &CreateOptions::overlay("base.img", Format::Raw))?;
/// disk.write_at(0.into(), b"hello", Durability::Cached)?;
/// disk.close()?;
///
/// let writable = OpenOptions::new().access(Access::ReadWrite);
/// let overlay = Image::open(&top, &OpenOptions::new().locking(Locking::Off))?;
/// let mut backing = Image::open(&base, &writable.clone().format(Format::Raw))?;
/// commit(&overlay, &mut backing, 2, &JobContext::default())?;
/// backing.close()?;
/// drop(overlay);
/// let mut overlay = Image::open(&top, &writable)?;
/// overlay.clear_committed()?;
/// overlay.close()?;
/// assert!(std::fs::read(&base)?.starts_with(b"hello"));
/// # Ok(())
/// # }
/// ```
pub fn commit(
    overlay: &Image,
    backing: &mut Image,
    depth: u32,
    context: &JobContext,
) -> Result<Committed, JobError> {
    snapshots::refuse(overlay, "commit")?;
    if backing.size() < overlay.size() {
        let resized = backing.resize(overlay.size(), Shrink::Refuse);
        resized.map_err(|error| JobError::image(JobErrorKind::DoesNotFit, error))?;
    }
    let meter = Meter::begin(context, overlay.size());
    let mut committed = Committed::default();
    let mut buffer = vec![0; STEP as usize];
    for extent in overlay.extents(overlay.whole()) {
        context.cancellation.check()?;
        let extent = extent.map_err(JobError::source)?;
        // Only the content of the layers above: that layer and those below are being changed.
        let is_above = (1..depth).contains(&extent.depth);
        if is_above && extent.kind == ExtentKind::Data {
            let mut position = extent.range.offset();
            while position < extent.range.end() {
                context.cancellation.check()?;
                let rest = span(position, extent.range.end());
                let data = &mut buffer[..rest.length().min(STEP) as usize];
                context.keep_rate(data.len() as u64, || false)?;
                overlay.read_at(position, data).map_err(JobError::source)?;
                let written = backing.write_at(position, data, Durability::Cached);
                written.map_err(JobError::destination)?;
                position = (position.bytes() + data.len() as u64).into();
            }
            committed.data += extent.range.length();
        } else if is_above {
            let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
            let zeroed = backing.write_zeroes(extent.range, mode, speed, Durability::Cached);
            zeroed.map_err(JobError::destination)?;
            committed.zeroes += extent.range.length();
        }
        meter.add(extent.range.length());
    }
    Ok(committed)
}
