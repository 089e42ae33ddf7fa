//! Commits overlays into their backing files, gives them other ones, and copies these into them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use imgfmt::jobs::{self, Clusters, JobErrorKind as Kind, Streamed, ToStream};
use imgfmt::storage::FileStorage;
use imgfmt::{Access, BackingFile, Format, Image, Locking, NameTarget, OpenOptions};

use crate::error::{JobError, JobErrorKind};
use crate::image_location::ImageLocation;
use crate::observer::JobContext;
use crate::remote::Remotes;

/// What an overlay has after a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// Nothing: everything comes from its backing file.
    Emptied,
    /// What it had before; for one that will be deleted.
    Kept,
}

/// The layer that a commit writes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitBase<'a> {
    /// The backing file.
    Backing,
    /// This file, which is one of the layers below. What all layers above it have is written, and
    /// they keep it; those between are corrupted.
    File(&'a Path),
}

/// Writes the contents of the overlay at `path` into its backing file, or into another layer. Other
/// overlays of that file are corrupted. After an interruption the overlay still shows the whole
/// disk. `options` open the overlay; all but the format apply to that layer too. Blocks, and must
/// not be called by asynchronous tasks.
///
/// # Errors
///
/// If it has no such layer, one of the two is in use or cannot be opened or written.
pub fn commit_overlay(
    path: &Path,
    base: CommitBase<'_>,
    options: &OpenOptions,
    committed: Committed,
    remotes: &Remotes,
    context: &JobContext,
) -> Result<(), JobError> {
    // Held until the end. The chain is opened without locks, because a read lock on the backing
    // file would prevent writing to it.
    let lock = FileStorage::open(path, Access::ReadWrite, options.locking);
    let lock = lock.map_err(|error| JobError::image(JobErrorKind::Destination, error))?;
    if lock.lacks_locks() {
        context.observer.unlocked(path);
    }
    let _lock = lock.into_lock();
    let unlocked = options.clone().locking(Locking::Off);
    let overlay = Image::open(path, &unlocked).map_err(opening)?;
    let (location, format, depth) = match base {
        CommitBase::Backing => backing_of(path, &overlay)?,
        CommitBase::File(file) => base_of(path, file, &overlay)?,
    };
    if committed == Committed::Emptied && depth != 2 {
        let why = "an overlay can only be emptied if its backing file gets its contents";
        return Err(JobError::invalid(why));
    }
    let (mut for_backing, given) = options_below(options, depth - 1)?;
    for_backing.access = Access::ReadWrite;
    for_backing.format = for_backing.format.or(format);
    // The overlay would show what the other file does not have.
    if let Some(given) = given
        && given.canonicalize().ok() != location.path().canonicalize().ok()
    {
        let (given, named) = (given.display(), location.name());
        return Err(JobError::invalid(format!(
            "cannot commit into '{given}': the overlay names '{named}'; rebase it first"
        )));
    }
    let mut backing = location.open(&for_backing, remotes)?;
    jobs::commit(&overlay, &mut backing, depth, &context.for_images()).map_err(
        |error| match error.kind() {
            Kind::DoesNotFit => error.into(),
            _ => JobError::destination(format!(
                "{error}; the overlay still shows the complete disk: commit it again"
            )),
        },
    )?;
    backing.close().map_err(|error| JobError::image(JobErrorKind::Destination, error))?;
    drop(overlay);
    if committed == Committed::Emptied {
        empty(path, &unlocked.access(Access::ReadWrite)).map_err(|error| {
            let name = path.display();
            JobError::destination(format!("'{name}' is committed, but cannot be emptied: {error}"))
        })?;
    }
    Ok(())
}

fn empty(path: &Path, options: &OpenOptions) -> imgfmt::Result<()> {
    let mut overlay = Image::open(path, options)?;
    overlay.clear_committed()?;
    overlay.close()
}

/// Returns the file or export to write into. The overlay could be opened, so the policy allows it.
fn backing_of(path: &Path, overlay: &Image) -> Result<LayerBelow, JobError> {
    let info = overlay.info().map_err(|error| JobError::image(JobErrorKind::Source, error))?;
    if info.qcow2.is_none() && info.backing_name.is_some() {
        let (name, format) = (path.display(), info.format);
        return Err(JobError::source(format!(
            "cannot commit '{name}': it is a {format} image, and only qcow2 images can be committed"
        )));
    }
    let Some((name, format)) =
        info.qcow2.and_then(|info| info.backing_name.zip(Some(info.backing_format)))
    else {
        let name = path.display();
        return Err(JobError::source(format!("cannot commit '{name}': it has no backing file")));
    };
    // The chain could be opened, so any other name is one of a raw image.
    let format = format.map(|name| Format::from_name(&name).unwrap_or(Format::Raw));
    Ok((ImageLocation::File(path.to_owned()).beside(&name)?, format, 2))
}

/// Returns the options of the layer that is `steps` below the one that `options` open, and its file
/// if they give one. They have no format where the options say nothing of that layer.
fn options_below(
    options: &OpenOptions,
    steps: u32,
) -> Result<(OpenOptions, Option<PathBuf>), JobError> {
    let mut options = options.clone();
    let mut file = None;
    for _ in 0..steps {
        options.format = None;
        let BackingFile::Given(given) = std::mem::take(&mut options.backing) else {
            return Ok((options, None));
        };
        file = match given.target {
            None => None,
            Some(NameTarget::File(path)) => Some(path),
            Some(_) => {
                let why = "a commit writes into the backing file that the overlay names, and into \
                           no other";
                return Err(JobError::invalid(why));
            }
        };
        options.format = given.format;
        options.locking = given.locking.unwrap_or(options.locking);
        options.cache = given.cache.unwrap_or(options.cache);
        options.metadata_cache_bytes = given.metadata_cache_bytes.or(options.metadata_cache_bytes);
        options.encryption = given.encryption;
        options.backing = given.backing;
    }
    Ok((options, file))
}

/// A layer to be written into: what it is, its format, and its depth.
type LayerBelow = (ImageLocation, Option<Format>, u32);

/// Returns the layer in a file.
fn base_of(path: &Path, file: &Path, overlay: &Image) -> Result<LayerBelow, JobError> {
    backing_of(path, overlay)?;
    match overlay.layer_in(file) {
        Some((depth, format)) => Ok((ImageLocation::File(file.to_owned()), Some(format), depth)),
        None => Err(JobError::invalid(format!(
            "cannot commit '{}' into '{}', which is not a layer below it",
            path.display(),
            file.display()
        ))),
    }
}

/// Copies into the overlay at `path` everything that the backing file `new` would show differently.
/// Then makes `new` its backing file, before the overlay is unlocked; with `None` it has none. The
/// disk does not change. What is copied is compressed if `clusters` says so. `options` open the
/// overlay, `for_backing` the new backing file. Blocks, and
/// must not be called by asynchronous tasks.
///
/// # Errors
///
/// If an image cannot be opened, or the overlay cannot be written.
pub fn rebase_overlay(
    path: &Path,
    options: &OpenOptions,
    new: Option<(&OsStr, Format)>,
    for_backing: &OpenOptions,
    clusters: Clusters,
    remotes: &Remotes,
    context: &JobContext,
) -> Result<(), JobError> {
    // Opened first: a missing file must not change anything.
    let backing = match new {
        None => None,
        Some((name, format)) => {
            let location = ImageLocation::File(path.to_owned()).beside(name)?;
            Some(location.open(&for_backing.clone().format(format), remotes)?)
        }
    };
    let image = Image::open(path, &options.clone().access(Access::ReadWrite)).map_err(opening)?;
    jobs::rebase(&image, backing.as_ref(), clusters, &context.for_images()).map_err(|error| {
        match error.kind() {
            Kind::InvalidArgument => error.into(),
            _ => JobError::destination(format!(
                "{error}; the disk and its backing file are unchanged: rebase it again"
            )),
        }
    })?;
    image.close_with_backing(new).map_err(|error| JobError::image(JobErrorKind::Destination, error))
}

/// The layers below an overlay after [`stream_overlay`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamBase<'a> {
    /// None: the overlay stands alone.
    Nothing,
    /// This file, which is one of the present layers. A relative name starts at the directory of
    /// the overlay.
    File(&'a Path),
}

/// Copies into the overlay at `path` what the layers above `base` provide, and then makes `base`
/// its backing file. The disk does not change, and its bitmaps stay valid. After an interruption
/// the overlay shows the same disk; the next call goes on. `options` open the overlay. Blocks, and
/// must not be called by asynchronous tasks.
///
/// # Errors
///
/// If the chain cannot be opened or read, if the overlay is not a qcow2 image, has internal
/// snapshots or is in use, if `base` is not a layer below it, or if space runs out.
pub fn stream_overlay(
    path: &Path,
    options: &OpenOptions,
    base: StreamBase<'_>,
    context: &JobContext,
) -> Result<Streamed, JobError> {
    let image = Image::open(path, &options.clone().access(Access::ReadWrite)).map_err(opening)?;
    let base = match base {
        StreamBase::Nothing if stands_alone(&image)? => return Ok(Streamed::default()),
        StreamBase::Nothing => None,
        StreamBase::File(name) => Some(find_layer(path, &image, name)?),
    };
    let depth = base.as_ref().map(|base| base.depth);
    let again = |error: &dyn std::fmt::Display| {
        JobError::destination(format!(
            "{error}; the disk is unchanged, and what was copied is kept: stream it again"
        ))
    };
    let streamed =
        jobs::stream(&image, depth, &context.for_images()).map_err(|error| match error.kind() {
            Kind::InvalidArgument | Kind::Interrupted => error.into(),
            _ => again(&error),
        })?;
    let closed = match (depth, base) {
        (Some(2), _) => image.close(),
        (_, base) => image.close_with_backing(base.map(|base| (base.name, base.format))),
    };
    closed.map_err(|error| again(&error))?;
    Ok(streamed)
}

/// Returns how much [`stream_overlay`] would copy. Nothing is changed.
///
/// # Errors
///
/// As [`stream_overlay`], but for those of reading and writing data.
pub fn measure_stream(
    path: &Path,
    options: &OpenOptions,
    base: StreamBase<'_>,
    context: &JobContext,
) -> Result<ToStream, JobError> {
    let image = Image::open(path, options).map_err(opening)?;
    let depth = match base {
        StreamBase::Nothing if stands_alone(&image)? => return Ok(ToStream::default()),
        StreamBase::Nothing => None,
        StreamBase::File(name) => Some(find_layer(path, &image, name)?.depth),
    };
    Ok(jobs::measure_stream(&image, depth, &context.for_images())?)
}

/// A layer of a chain, by the name that the overlay is to record.
struct NamedLayer<'a> {
    depth: u32,
    name: &'a OsStr,
    format: Format,
}

/// Returns whether the image is one that could have a backing file, and has none.
fn stands_alone(image: &Image) -> Result<bool, JobError> {
    let info = image.info().map_err(|error| JobError::image(JobErrorKind::Source, error))?;
    Ok(info.qcow2.is_some() && info.backing_name.is_none())
}

fn find_layer<'a>(path: &Path, image: &Image, name: &'a Path) -> Result<NamedLayer<'a>, JobError> {
    let file = path.parent().unwrap_or(Path::new("")).join(name);
    match image.layer_in(&file) {
        Some((depth, format)) => Ok(NamedLayer { depth, name: name.as_os_str(), format }),
        None => Err(JobError::invalid(format!(
            "cannot stream into '{}': '{}' is not a layer below it",
            path.display(),
            file.display()
        ))),
    }
}

fn opening(error: imgfmt::Error) -> JobError {
    JobError::opening(JobErrorKind::Source, error)
}

#[cfg(test)]
mod tests {
    use imgfmt::{BackingOptions, CreateOptions, Durability, GuestOffset};

    use super::*;

    #[test]
    fn a_disk_stays_the_same_when_it_is_rebased_and_committed() {
        let directory = tempfile::tempdir().unwrap();
        let [base, other, top] = ["base", "other", "top"].map(|name| directory.path().join(name));
        std::fs::write(&base, vec![1; 1 << 20]).unwrap();
        std::fs::write(&other, vec![2; 1 << 20]).unwrap();
        let image = Image::create(&top, &CreateOptions::overlay("base", Format::Raw)).unwrap();
        image.write_at(GuestOffset::new(0), &[3; 65536], Durability::Cached).unwrap();
        image.close().unwrap();
        let (options, remotes, context) =
            (OpenOptions::new(), Remotes::default(), JobContext::default());
        let new = Some((OsStr::new("other"), Format::Raw));
        let plain = Clusters::Plain;
        rebase_overlay(&top, &options, new, &options, plain, &remotes, &context).unwrap();
        for committed in [Committed::Kept, Committed::Emptied] {
            let backing = CommitBase::Backing;
            commit_overlay(&top, backing, &options, committed, &remotes, &context).unwrap();
            let mut content = vec![1; 1 << 20];
            content[..65536].fill(3);
            assert_eq!(std::fs::read(&other).unwrap(), content, "{committed:?}");
        }
        assert_eq!(std::fs::read(&base).unwrap(), vec![1; 1 << 20]);
        let (base, kept) = ((&*base, CommitBase::Backing), Committed::Kept);
        assert!(commit_overlay(base.0, base.1, &options, kept, &remotes, &context).is_err());
    }

    #[test]
    fn an_overlay_is_committed_into_the_file_that_it_names_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let [base, other, top] = ["base", "other", "top"].map(|name| directory.path().join(name));
        for (file, byte) in [(&base, 1), (&other, 2)] {
            std::fs::write(file, vec![byte; 1 << 20]).unwrap();
        }
        let image = Image::create(&top, &CreateOptions::overlay("base", Format::Raw)).unwrap();
        image.write_at(GuestOffset::new(0), &[3; 1 << 20], Durability::Cached).unwrap();
        image.close().unwrap();
        let commit = |given: &Path| {
            let mut below = BackingOptions::default();
            below.target = Some(NameTarget::File(given.to_owned()));
            let options = OpenOptions::new().backing(BackingFile::Given(Box::new(below)));
            let (emptied, backing) = (Committed::Emptied, CommitBase::Backing);
            let (remotes, context) = (Remotes::default(), JobContext::default());
            commit_overlay(&top, backing, &options, emptied, &remotes, &context)
        };
        let refused = commit(&other).unwrap_err().to_string();
        assert!(refused.contains("rebase it first"), "{refused}");
        assert_eq!(std::fs::read(&other).unwrap(), vec![2; 1 << 20]);
        commit(&base).unwrap();
        assert_eq!(std::fs::read(&base).unwrap(), vec![3; 1 << 20]);
    }
}
