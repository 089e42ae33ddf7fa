//! Copies into an overlay everything that another backing file would show differently.

use super::convert::Clusters;
use super::error::{JobError, JobErrorKind};
use super::observer::{JobContext, Meter};
use super::snapshots;
use crate::create_options::Qcow2Version;
use crate::error::{Error, ErrorKind};
use crate::image::Image;
use crate::storage::{Durability, Speed, ZeroMode};
use crate::units::{GuestOffset, span};
use crate::zero::is_zero;

/// Size of a comparison step, in bytes.
const STEP: u64 = 1 << 20;

/// The result of a rebase. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rebased {
    /// Bytes of the old backing file that were copied into the overlay.
    pub copied: u64,
}

/// Copies into the qcow2 image `overlay`, opened for writing, every cluster in which its current
/// backing files and `new_backing` differ; without a new one (`None`) the disk there reads as zero.
/// Whole clusters are compressed if `clusters` says so. The contents of the disk do not change.
/// [Close](Image::close) the overlay afterwards; then [`Image::change_backing_file`] can set the
/// new backing file.
///
/// # Errors
///
/// `InvalidArgument` if `overlay` is a raw image or has internal snapshots, which show the backing
/// file too; `Source`, `Destination`, `Interrupted`. The contents of the disk are unchanged then.
///
/// ```
/// use imgfmt::jobs::{Clusters, JobContext, rebase};
/// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
/// std::fs::write(&base, vec![7; 1 << 20])?;
/// let overlay = Image::create(&top, &CreateOptions::overlay("base.img", Format::Raw))?;
///
/// let rebased = rebase(&overlay, None, Clusters::Plain, &JobContext::default())?;
/// assert_eq!(rebased.copied, 1 << 20);
/// overlay.close()?;
/// Image::change_backing_file(&top, &OpenOptions::new(), None)?;
/// # Ok(())
/// # }
/// ```
pub fn rebase(
    overlay: &Image,
    new_backing: Option<&Image>,
    clusters: Clusters,
    context: &JobContext,
) -> Result<Rebased, JobError> {
    let qcow2 = overlay.info().map_err(JobError::destination)?.qcow2;
    let Some(qcow2) = qcow2 else {
        let detail = "a raw image cannot have a backing file";
        let error = overlay.name(Error::new(ErrorKind::Unsupported, "rebase", detail));
        return Err(JobError::image(JobErrorKind::InvalidArgument, error));
    };
    let (cluster, marks_zeroes) = (qcow2.cluster_size, qcow2.version != Qcow2Version::V2);
    snapshots::refuse(overlay, "rebase")?;
    let step = STEP.max(cluster);
    let meter = Meter::begin(context, overlay.size());
    let mut rebased = Rebased::default();
    let (mut old, mut new) = (vec![0; step as usize], vec![0; step as usize]);
    for extent in overlay.extents(overlay.whole()) {
        context.cancellation.check()?;
        let extent = extent.map_err(JobError::destination)?;
        let end = extent.range.end().bytes();
        let mut position = extent.range.offset().bytes();
        while extent.depth != 1 && position < end {
            context.cancellation.check()?;
            // Pieces end where clusters end.
            let stop = ((position / step + 1) * step).min(end);
            let length = (stop - position) as usize;
            let (old, new) = (&mut old[..length], &mut new[..length]);
            let offset = GuestOffset::new(position);
            overlay.read_at(offset, old).map_err(JobError::destination)?;
            match new_backing {
                Some(backing) => backing.read_padded(offset, new).map_err(JobError::source)?,
                None => new.fill(0),
            }
            let changed = Changed { overlay, cluster, marks_zeroes, clusters };
            rebased.copied += changed.write(position, old, new)?;
            position = stop;
        }
        meter.add(extent.range.length());
    }
    Ok(rebased)
}

/// The image that gets what another backing file would show differently.
struct Changed<'a> {
    overlay: &'a Image,
    /// The size of its clusters in bytes.
    cluster: u64,
    /// Whether an entry can say that a cluster reads as zero, whatever is below.
    marks_zeroes: bool,
    clusters: Clusters,
}

impl Changed<'_> {
    /// Writes the clusters of `old` that differ from `new`; returns their number of bytes.
    fn write(&self, offset: u64, old: &[u8], new: &[u8]) -> Result<u64, JobError> {
        let (mut start, mut written) = (0, 0);
        while start < old.len() {
            let in_cluster = (offset + start as u64) % self.cluster;
            let end = old.len().min(start + (self.cluster - in_cluster) as usize);
            if old[start..end] != new[start..end] {
                let position = GuestOffset::new(offset + start as u64);
                self.write_cluster(position, &old[start..end]).map_err(JobError::destination)?;
                written += (end - start) as u64;
            }
            start = end;
        }
        Ok(written)
    }

    /// Writes a cluster, or the part of one in which the overlay has nothing. Zeroes are data where
    /// no entry can mark them: the image may skip zeroes of which nothing is below it now, and the
    /// new backing file would show.
    fn write_cluster(&self, position: GuestOffset, data: &[u8]) -> crate::error::Result<()> {
        let whole = self.cluster.min(self.overlay.size() - position.bytes());
        let starts = position.bytes().is_multiple_of(self.cluster);
        let is_whole = starts && data.len() as u64 == whole;
        match self.clusters {
            _ if is_whole && self.marks_zeroes && is_zero(data) => {
                let range = span(position, position + whole);
                let mode = ZeroMode::MayUnmap;
                self.overlay.write_zeroes(range, mode, Speed::Any, Durability::Cached)
            }
            Clusters::Compressed if is_whole => self.overlay.write_compressed(position, data),
            _ => self.overlay.write_at(position, data, Durability::Cached),
        }
    }
}
