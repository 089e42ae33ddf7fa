//! Copies a disk into another image.

mod agenda;
mod bitmaps;
mod copier;
mod options;
mod salvage;
mod turns;

pub use self::bitmaps::copy_bitmaps;
pub use self::options::{Background, Clusters, ConvertOptions, SourceReader, Unreadable, Zeroes};

use self::copier::{Copy, InOrder};
use self::turns::Turns;
use super::error::{JobError, JobErrorKind};
use super::observer::{JobContext, Meter};
use crate::image::Image;

/// Unit of zero detection in a raw image, in bytes.
const RAW_UNIT: u64 = 4096;
/// Most threads of one conversion.
const THREADS_MAX: usize = 256;

/// The result of a conversion. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Converted {
    /// The size of the disk.
    pub size: u64,
    /// Bytes that were known to be zero, and not read.
    pub holes: u64,
}

/// Copies the disk of `source`, as seen by a guest, into `destination`, which is open for writing
/// and at least as large. Zeroes become holes, in units of the destination's clusters (4 KiB in a
/// raw image). Data of the destination beyond the end of the source is unchanged.
///
/// Nothing is flushed: [close](Image::close) the destination, or flush it. After an error it
/// contains a part of the disk.
///
/// # Errors
///
/// `DoesNotFit` if `destination` is smaller; `Source`, `Destination`, `Interrupted`, `Internal`.
///
/// ```
/// use imgfmt::jobs::{Background, Clusters, ConvertOptions, JobContext, convert};
/// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let (raw, qcow2) = (directory.path().join("disk.img"), directory.path().join("disk.qcow2"));
/// std::fs::write(&raw, vec![7; 1 << 20])?;
/// let source = Image::open(&raw, &OpenOptions::new().format(Format::Raw))?;
/// let destination =
///     Image::create(&qcow2, &CreateOptions::new(Format::Qcow2, source.size()))?;
///
/// let mut options = ConvertOptions::default();
/// options.background = Background::Zero;
/// options.clusters = Clusters::Compressed;
/// convert(&source, &destination, &options, &JobContext::default())?;
/// destination.close()?;
/// assert!(std::fs::metadata(&qcow2)?.len() < 1 << 20);
/// # Ok(())
/// # }
/// ```
pub fn convert(
    source: &Image,
    destination: &Image,
    options: &ConvertOptions,
    context: &JobContext,
) -> Result<Converted, JobError> {
    let (room, size) = (destination.size(), source.size());
    if room < size {
        let message =
            format!("the source has {size} bytes and does not fit into the destination of {room}");
        return Err(JobError::new(JobErrorKind::DoesNotFit, message));
    }
    let qcow2 = destination.info().map_err(JobError::destination)?.qcow2;
    let meter = Meter::begin(context, size);
    let in_order = destination.filled_in_order();
    let unit = match in_order {
        Some(image) => image.unit(),
        None => qcow2.map_or(RAW_UNIT, |qcow2| qcow2.cluster_size),
    };
    let copy = Copy {
        source,
        reader: options.reader.as_deref(),
        destination,
        background: options.background,
        unit,
        in_order: in_order.map(|image| InOrder { image, turns: Turns::default() }),
        clusters: options.clusters,
        zeroes: options.zeroes,
        unreadable: options.unreadable,
        context,
        meter: &meter,
    };
    copy.run(options.threads.get().min(THREADS_MAX))?;
    Ok(Converted { size, holes: meter.progress().holes })
}
