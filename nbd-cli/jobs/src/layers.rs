//! The blocks that the files of a chain of backups hold.

use std::path::{Path, PathBuf};

use imgfmt::{
    Access, BackingFile, Backup, BackupBase, ContentSum, ExtentKind, Format, GuestOffset,
    GuestRange, Image, OpenOptions,
};

use crate::copy::block_sum::{self, BLOCK};
use crate::copy::sum::OfLayers;
use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;

/// Bytes that are read at a time: a multiple of a block.
const READ_LEN: u64 = 1 << 20;

/// Returns the sum of the blocks of data in parts of an image. `parts` returns those of an extent,
/// in their order; a block of which they have some bytes counts as a whole, and once. `range`
/// begins at a block.
pub(crate) fn sum_of(
    image: &Image,
    range: GuestRange,
    parts: impl Fn(GuestRange) -> Result<Vec<GuestRange>, JobError>,
    context: &JobContext,
) -> Result<ContentSum, JobError> {
    let mut sum = ContentSum::default();
    let mut buffer = Vec::new();
    let mut next = range.offset().bytes();
    for extent in image.extents(range) {
        let extent = extent.map_err(unreadable)?;
        if extent.kind != ExtentKind::Data {
            continue;
        }
        for part in parts(extent.range)? {
            // A copy with holes has parts of blocks, as have smaller clusters above.
            let start = part.offset().bytes();
            let mut at = next.max(start - start % BLOCK);
            let end = part.end().bytes().next_multiple_of(BLOCK).min(range.end().bytes());
            next = next.max(end);
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

/// Checks that the files of a chain hold what was put into them, each upon the one it was made
/// upon. `visible` has the sums of what was read through the chain; the rest is read here. Blocks,
/// so asynchronous tasks must not call it.
///
/// # Errors
///
/// [`JobErrorKind::Mismatch`] with the name of the first file that does not. A file that another
/// program has opened for writing or changed since, or that has no sum, is not checked.
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
    let warn = |text: &str| context.observer.warning(text);
    for path in image.unreadable_backups_of_chain() {
        warn(&format!(
            "what '{}' says about the backup that it is cannot be read (it is damaged, or of a newer \
             version), so that it is not checked",
            path.unwrap_or_default().display()
        ));
    }
    let layers = image.backups_of_chain();
    for index in 0..layers.len() {
        match check_layer(image, (&layers, index), Some(visible), options, context)? {
            true => checked.files += 1,
            false => checked.without_sum += 1,
        }
    }
    Ok(checked)
}

/// What the files of a chain are, from the top to the bottom.
type Layers = [(Option<PathBuf>, Option<Backup>)];

/// Checks one file of a chain: that it holds what was put into it, upon the one it was made upon.
/// `visible` is as in [`check_chain`]; without it the file is read as a whole. Returns whether it
/// could be checked. Blocks.
///
/// # Errors
///
/// As [`check_chain`].
pub(crate) fn check_layer(
    image: &Image,
    (layers, index): (&Layers, usize),
    visible: Option<&OfLayers>,
    options: &OpenOptions,
    context: &JobContext,
) -> Result<bool, JobError> {
    let Some((path, Some(backup))) = layers.get(index) else { return Ok(false) };
    let name = path.as_deref().unwrap_or_else(|| Path::new("")).display();
    let warn = |text: &str| context.observer.warning(text);
    if !backup.is_sealed {
        warn(&format!(
            "'{name}' was opened for writing after the backup was made, so that it cannot be checked"
        ));
        return Ok(false);
    }
    check_base(&name.to_string(), backup, layers.get(index + 1), context)?;
    // What has no path cannot be read by itself.
    let (Some(expected), Some(path)) = (backup.identity.content, path) else { return Ok(false) };
    let layer = (index, path.as_path(), backup);
    if found_in(image, visible, layer, expected, options, context)? {
        return Ok(true);
    }
    if !backup.was_modified {
        return Err(mismatch(format!(
            "'{name}' does not hold what the backup wrote into it: it is damaged, or was changed by a \
             program that does not know the format; use another backup"
        )));
    }
    warn(&format!(
        "'{name}' was changed after the backup was made, and does not hold what that wrote into it"
    ));
    Ok(false)
}

fn mismatch(text: String) -> JobError {
    JobError::new(JobErrorKind::Mismatch, text)
}

/// Checks that the file below a backup is the one upon which that was made.
fn check_base(
    name: &str,
    backup: &Backup,
    below: Option<&(Option<PathBuf>, Option<Backup>)>,
    context: &JobContext,
) -> Result<(), JobError> {
    let BackupBase::Backup(id) = backup.identity.base else { return Ok(()) };
    let Some((path, found)) = below else {
        context
            .observer
            .warning(&format!("'{name}' is opened without the backup upon which it was made"));
        return Ok(());
    };
    let path = path.as_deref().unwrap_or_else(|| Path::new("")).display();
    match found {
        Some(found) if found.identity.id == id => {}
        // What was committed into it may be the right one.
        Some(found) if found.is_sealed && !found.was_modified => {
            return Err(mismatch(format!(
                "'{name}' was made upon another backup than '{path}', which is below it; put the right \
                 one there"
            )));
        }
        _ => context.observer.warning(&format!(
            "'{path}' does not say that it is the backup upon which '{name}' was made"
        )),
    }
    Ok(())
}

/// Returns whether a layer has that sum.
fn found_in(
    image: &Image,
    visible: Option<&OfLayers>,
    (index, path, backup): (usize, &Path, &Backup),
    expected: ContentSum,
    options: &OpenOptions,
    context: &JobContext,
) -> Result<bool, JobError> {
    // In a disk of another size the last block is another one.
    let visible = visible.filter(|visible| backup.identity.disk_size == visible.size());
    let seen = visible.and_then(|visible| visible.of_layer(index));
    if seen == Some(expected) {
        return Ok(true);
    }
    let mut found = seen.unwrap_or_default();
    let unseen = if seen.is_some() { Unseen::Hidden } else { Unseen::All };
    found.add(unseen_part(image, (index, path, backup), unseen, options, context)?);
    Ok(found == expected)
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
    (index, path, backup): (usize, &Path, &Backup),
    unseen: Unseen,
    options: &OpenOptions,
    context: &JobContext,
) -> Result<ContentSum, JobError> {
    let alone = options.clone().format(Format::Qcow2).access(Access::ReadOnly);
    let alone = Image::open(path, &alone.backing(BackingFile::Ignored));
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
