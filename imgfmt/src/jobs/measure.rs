//! Measures the size of a new image.

use std::path::Path;

use super::error::{JobError, JobErrorKind};
use super::observer::{JobContext, Meter};
use crate::bitmap::BitmapState;
use crate::create_options::{CreateOptions, L2Entries, Qcow2Version};
use crate::extent::ExtentKind;
use crate::format::Format;
use crate::formats;
use crate::image::{Image, plan_foreign};
use crate::luks::NEW_HEADER_LENGTH;
use crate::qcow2;

/// The disk whose copy is measured.
#[derive(Clone, Copy, Debug)]
pub enum MeasuredDisk<'a> {
    /// The disk in an image.
    Image(&'a Image),
    /// An empty disk of this size in bytes.
    Empty(u64),
}

/// The size of the file of an image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measurement {
    /// The initial size.
    pub required: u64,
    /// The size after the guest has written everywhere.
    pub fully_allocated: u64,
    /// The additional size of copies of the dirty bitmaps, if both images can have bitmaps.
    pub bitmaps: Option<u64>,
}

/// Returns the size of the file of a new image with a copy of `disk`, without compression. The size
/// in `create` has no effect, and no file is created.
///
/// # Errors
///
/// `InvalidArgument` if such an image cannot be created; `Source`, `Interrupted`.
///
/// ```
/// use imgfmt::jobs::{JobContext, MeasuredDisk, measure};
/// use imgfmt::{CreateOptions, Format};
///
/// let create = CreateOptions::new(Format::Qcow2, 0);
/// let measured = measure(MeasuredDisk::Empty(1 << 40), &create, &JobContext::default())?;
/// assert!(measured.required < 1 << 28 && measured.fully_allocated > 1 << 40);
/// # Ok::<(), imgfmt::jobs::JobError>(())
/// ```
pub fn measure(
    disk: MeasuredDisk<'_>,
    create: &CreateOptions,
    context: &JobContext,
) -> Result<Measurement, JobError> {
    let size = match disk {
        MeasuredDisk::Image(image) => image.size(),
        MeasuredDisk::Empty(size) => size,
    };
    if formats::entry(create.format).is_some() {
        return foreign(disk, size, create, context);
    }
    if create.format != Format::Qcow2 {
        let header = if create.format == Format::Luks { NEW_HEADER_LENGTH } else { 0 };
        let size = size.saturating_add(header);
        return Ok(Measurement { required: size, fully_allocated: size, bitmaps: None });
    }
    qcow2::check_sizes(create)
        .map_err(|error| JobError::image(JobErrorKind::InvalidArgument, error))?;
    let (data, bitmaps) = match disk {
        MeasuredDisk::Image(image) => {
            (data_clusters(image, create.cluster_size, context)?, bitmaps(image, create)?)
        }
        MeasuredDisk::Empty(_) => (0, None),
    };
    let measurement = qcow2_file(size, data, create).ok_or_else(|| {
        JobError::invalid(format!("a disk of {size} bytes is too large for qcow2"))
    })?;
    Ok(Measurement { bitmaps, ..measurement })
}

/// The sizes of a file of another program's format.
fn foreign(
    disk: MeasuredDisk<'_>,
    size: u64,
    create: &CreateOptions,
    context: &JobContext,
) -> Result<Measurement, JobError> {
    let create = CreateOptions { size: Some(size), ..create.clone() };
    let planned = plan_foreign(Path::new("disk"), &create, None)
        .map_err(|error| JobError::image(JobErrorKind::InvalidArgument, error))?;
    let blocks = match disk {
        MeasuredDisk::Image(image) => data_clusters(image, planned.block_size, context)?,
        MeasuredDisk::Empty(_) => 0,
    };
    let all = planned.size.div_ceil(planned.block_size);
    let (required, fully_allocated) = ((planned.length)(blocks), (planned.length)(all));
    Ok(Measurement { required, fully_allocated, bitmaps: None })
}

/// The number of clusters of a copy that would hold data.
fn data_clusters(image: &Image, cluster: u64, context: &JobContext) -> Result<u64, JobError> {
    let meter = Meter::begin(context, image.size());
    let (mut count, mut counted_to) = (0, 0);
    for extent in image.extents(image.whole()) {
        context.cancellation.check()?;
        let extent = extent.map_err(JobError::source)?;
        if extent.kind == ExtentKind::Data {
            let first = (extent.range.offset().bytes() / cluster).max(counted_to);
            let end = extent.range.end().bytes().div_ceil(cluster);
            count += end.saturating_sub(first);
            counted_to = counted_to.max(end);
        }
        meter.add(extent.range.length());
    }
    Ok(count)
}

/// The bytes that the image's dirty bitmaps would take up in a new image, with all their clusters
/// allocated; `None` if one of the two images cannot have any. Unreliable bitmaps are not copied.
fn bitmaps(image: &Image, create: &CreateOptions) -> Result<Option<u64>, JobError> {
    let has_version_3 = |version| version == Qcow2Version::V3;
    let source = image.info().map_err(JobError::source)?.qcow2;
    if !has_version_3(create.version) || !source.is_some_and(|it| has_version_3(it.version)) {
        return Ok(None);
    }
    let cluster = create.cluster_size;
    let (mut total, mut directory) = (0_u64, 0_u64);
    for bitmap in image.bitmaps() {
        if matches!(bitmap.state, BitmapState::Consistent { .. }) {
            let bytes = image.size().div_ceil(bitmap.granularity).div_ceil(8);
            let clusters = bytes.div_ceil(cluster);
            // The bits, and the table that lists their clusters.
            total += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
            directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
        }
    }
    Ok(Some(total + directory.next_multiple_of(cluster)))
}

/// The sizes of a qcow2 file with space for all tables, of whose clusters `data` hold data.
fn qcow2_file(size: u64, data: u64, create: &CreateOptions) -> Option<Measurement> {
    let cluster = create.cluster_size;
    let entry = if create.l2_entries == L2Entries::Extended { 16 } else { 8 };
    let clusters = size.div_ceil(cluster);
    let l2_tables = clusters.div_ceil(cluster / entry);
    let l1 = l2_tables.div_ceil(cluster / 8);
    let luks = create.encryption.as_ref().map_or(0, |_| NEW_HEADER_LENGTH.div_ceil(cluster));
    // One cluster is the header.
    let others = l1 + 1 + luks;
    let counted = clusters.checked_add(l2_tables + others)?;
    let per_block = cluster * 8 / u64::from(create.refcount_bits);
    // The blocks count themselves and the table that lists them: repeat until nothing changes.
    let (mut blocks, mut table) = (0, 0);
    loop {
        let needed = (counted + blocks + table).div_ceil(per_block);
        let listed = needed.div_ceil(cluster / 8);
        if (needed, listed) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed, listed);
    }
    let tables = (l2_tables + others + blocks + table).checked_mul(cluster)?;
    Some(Measurement {
        bitmaps: None,
        required: tables.checked_add(data.checked_mul(cluster)?)?,
        fully_allocated: tables.checked_add(clusters.checked_mul(cluster)?)?,
    })
}
