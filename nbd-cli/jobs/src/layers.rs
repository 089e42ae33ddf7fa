//! The blocks that the files of a chain of backups hold.

use std::path::PathBuf;

use imgfmt::{
    Access, BackingFile, Backup, ContentSum, ExtentKind, Format, GuestOffset, GuestRange, Image,
    OpenOptions,
};

use crate::copy::block_sum;
use crate::copy::sum::OfLayers;
use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;

/// Bytes that are read at a time: a multiple of a block.
const READ_LEN: u64 = 1 << 20;

/// Returns the sum of the blocks of data in parts of an image, which begin at blocks. `parts` returns
/// those of an extent.
pub(crate) fn sum_of(
    image: &Image,
    range: GuestRange,
    parts: impl Fn(GuestRange) -> Result<Vec<GuestRange>, JobError>,
    context: &JobContext,
) -> Result<ContentSum, JobError> {
    let mut sum = ContentSum::default();
    let mut buffer = Vec::new();
    for extent in image.extents(range) {
        let extent = extent.map_err(unreadable)?;
        if extent.kind != ExtentKind::Data {
            continue;
        }
        for part in parts(extent.range)? {
            let (mut at, end) = (part.offset().bytes(), part.end().bytes());
            while at < end {
                check(context)?;
                let length = (READ_LEN - at % READ_LEN).min(end - at);
                // At most `READ_LEN`.
                buffer.resize(length as usize, 0);
                image.read_at(GuestOffset::new(at), &mut buffer).map_err(unreadable)?;
                sum.add(block_sum::of(at, &buffer));
                at += length;
            }
        }
    }
    Ok(sum)
}

/// Checks that the files of a chain hold what was put into them. `visible` has the sums of what was
/// read through the chain; the rest is read here. Blocks, so asynchronous tasks must not call it.
///
/// # Errors
///
/// [`JobErrorKind::Mismatch`] with the name of the first file that does not. A file that another
/// program has opened for writing since, or that has no sum, is not checked.
pub(crate) fn check_chain(
    image: &Image,
    visible: &OfLayers,
    options: &OpenOptions,
    context: &JobContext,
) -> Result<Checked, JobError> {
    let mut checked = Checked::default();
    if options.snapshot.is_some() {
        // The sums are of the active state.
        return Ok(checked);
    }
    for (index, (path, backup)) in image.backups_of_chain().into_iter().enumerate() {
        let Some((expected, backup)) = backup.and_then(|b| Some((b.identity.content?, b))) else {
            checked.without_sum += 1;
            continue;
        };
        if !backup.is_sealed {
            let name = path.unwrap_or_default();
            context.observer.warning(&format!(
                "'{}' was opened for writing after the backup was made, so that it cannot be checked",
                name.display()
            ));
            checked.without_sum += 1;
            continue;
        }
        let found = match visible.of_layer(index) {
            Some(found) if found == expected => found,
            seen => {
                let mut found = seen.unwrap_or_default();
                let unseen = if seen.is_some() { Unseen::Hidden } else { Unseen::All };
                let layer = (index, path.clone(), &backup);
                found.add(unseen_part(image, layer, unseen, options, context)?);
                found
            }
        };
        if found != expected {
            let name = path.unwrap_or_default();
            return Err(JobError::new(
                JobErrorKind::Mismatch,
                format!(
                    "'{}' does not hold what the backup wrote into it: it is damaged, or was \
                     changed by a program that does not know the format; use another backup, or add \
                     --no-check to restore what there is",
                    name.display()
                ),
            ));
        }
        checked.files += 1;
    }
    Ok(checked)
}

/// The result of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checked {
    /// Files that hold what was put into them.
    pub(crate) files: usize,
    /// Files about which that is not known.
    pub(crate) without_sum: usize,
}

/// The blocks of a layer that are read by themselves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unseen {
    /// Those that the layers above it hide.
    Hidden,
    /// All of them.
    All,
}

/// Returns the sum of blocks of a layer that were not read through the chain.
fn unseen_part(
    image: &Image,
    (index, path, backup): (usize, Option<PathBuf>, &Backup),
    unseen: Unseen,
    options: &OpenOptions,
    context: &JobContext,
) -> Result<ContentSum, JobError> {
    let Some(path) = path else { return Ok(ContentSum::default()) };
    let alone = options.clone().format(Format::Qcow2).access(Access::ReadOnly);
    let alone = Image::open(&path, &alone.backing(BackingFile::Ignored));
    let alone = alone.map_err(|error| JobError::opening(JobErrorKind::Source, error))?;
    let own = u32::try_from(index + 1).unwrap_or(u32::MAX);
    let parts = |range: GuestRange| {
        if unseen == Unseen::All {
            return Ok(vec![range]);
        }
        let of_others = image.extents(range).filter_map(|extent| match extent {
            Ok(extent) if extent.depth == own => None,
            other => Some(other.map(|extent| extent.range).map_err(unreadable)),
        });
        of_others.collect()
    };
    sum_of(&alone, disk(&alone, backup.identity.disk_size), parts, context)
}

/// Returns the range of a disk of that size in bytes: that of the image may be rounded up.
pub(crate) fn disk(image: &Image, size: u64) -> GuestRange {
    let end = GuestOffset::new(size.min(image.size()));
    GuestRange::between(GuestOffset::new(0), end).unwrap_or_default()
}

fn check(context: &JobContext) -> Result<(), JobError> {
    let cancelled = context.cancellation.of_image_jobs().check();
    cancelled.map_err(|error| JobError::new(JobErrorKind::Interrupted, error.to_string()))
}

#[allow(clippy::needless_pass_by_value)] // For map_err.
fn unreadable(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Source, error)
}
