//! [`mount()`]: disks as files, through FUSE.
//!
//! A directory shows each disk as a file `disk` and its partitions as `p1`, `p2` and so on, and
//! with [`MountOptions::files`] the files inside ext4 and FAT file systems, read-only, below
//! `files`. The kernel's page cache keeps what is read from disks that cannot change; writes go to
//! the image before they return.

mod disk;
mod ext4;
mod fat;
mod file_system;
mod kernel;
mod nodes;
mod part_reader;
mod partitions;
mod requests;
mod session;
mod tree;
mod volume;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use imgfmt::{GuestOffset, Image};

use self::disk::MountedDisk;
use self::nodes::Nodes;
use self::partitions::partitions;
use self::requests::MountedFiles;
pub use self::session::Mounted;
use self::tree::{Kind, ROOT, Tree};
use self::volume::Volume;
use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;
use crate::text::printable;

/// A disk to mount.
#[derive(Debug)]
#[non_exhaustive]
pub struct MountSource {
    /// The name of its directory where there are several, and in messages.
    pub name: String,
    /// The disk. It is written to if it was opened for that.
    pub image: Image,
}

impl MountSource {
    /// Creates a source.
    pub fn new(name: impl Into<String>, image: Image) -> Self {
        Self { name: name.into(), image }
    }
}

/// Options of [`mount()`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MountOptions {
    /// Whether the files inside ext4 and FAT file systems are shown.
    pub files: bool,
}

/// Mounts disks on a directory: one directly, several in a directory each. The disks are used until
/// the returned value is ended or the directory is unmounted.
///
/// # Errors
///
/// If a disk cannot be read, or the system refuses; the sentence names the remedy.
pub fn mount(
    sources: Vec<MountSource>,
    directory: &Path,
    options: &MountOptions,
    context: &JobContext,
) -> Result<Mounted, JobError> {
    session::check(directory)?;
    let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let tree = Tree::new(SystemTime::now());
    let (disks, volumes, nodes) = (Vec::new(), Vec::new(), Nodes::default());
    let mut files = MountedFiles { disks, volumes, tree, nodes, owner };
    let are_several = sources.len() > 1;
    let mut names = HashSet::new();
    for source in sources {
        let parent = match are_several {
            false => ROOT,
            true => {
                let name = unused(&source.name, &mut names);
                files.tree.add(ROOT, name, Kind::Directory, SystemTime::now())
            }
        };
        add(&mut files, parent, source, options, context)?;
    }
    Mounted::start(files, directory)
}

/// Returns a name of a directory that no other source has.
fn unused(name: &str, names: &mut HashSet<String>) -> String {
    let name = name.replace(['/', '\0'], "_");
    let name = if ["", ".", ".."].contains(&name.as_str()) { "disk".to_owned() } else { name };
    let numbered = (2_u32..).map(|number| format!("{name}-{number}"));
    let mut free = std::iter::once(name.clone()).chain(numbered);
    free.find(|name| names.insert(name.clone())).unwrap_or(name)
}

/// Adds the files of one disk to a directory.
fn add(
    files: &mut MountedFiles,
    parent: u64,
    source: MountSource,
    options: &MountOptions,
    context: &JobContext,
) -> Result<(), JobError> {
    let MountSource { name, image } = source;
    let size = image.size();
    let changed = image.path().and_then(|path| path.metadata().ok()?.modified().ok());
    let modified = changed.unwrap_or_else(SystemTime::now);
    let read = |offset: u64, buffer: &mut [u8]| image.read_at(GuestOffset::new(offset), buffer);
    let found =
        partitions(&read, size).map_err(|error| JobError::image(JobErrorKind::Source, error))?;
    let disk = Arc::new(MountedDisk::new(name.clone(), image, context.observer.clone()));
    let index = files.disks.len();
    files.disks.push(Arc::clone(&disk));
    let whole = std::iter::once(("disk".to_owned(), 0..size));
    let parts = found.into_iter().map(|part| (format!("p{}", part.number), part.range));
    let parts: Vec<_> = whole.chain(parts).collect();
    for (name, range) in &parts {
        let kind = Kind::Part { disk: index, range: range.clone() };
        files.tree.add(parent, name, kind, modified);
    }
    if !options.files {
        return Ok(());
    }
    if disk.is_writable() {
        return Err(JobError::invalid(
            "the files in a disk that is written to would be read while they change; leave out \
             --files or --writable",
        ));
    }
    let directory = files.tree.add(parent, "files", Kind::Directory, modified);
    let before = files.volumes.len();
    for (name, range) in parts {
        if let Some(volume) = Volume::find(&disk, range) {
            files.tree.add(directory, name, Kind::Volume(files.volumes.len()), modified);
            files.volumes.push(volume);
        }
    }
    if files.volumes.len() == before {
        context.observer.warning(&format!(
            "no ext2, ext3, ext4 or FAT file system was found in '{}'",
            printable(&name)
        ));
    }
    Ok(())
}
