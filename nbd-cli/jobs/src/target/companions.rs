//! Files that are useless without another one: they are made, named and removed with it.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use imgfmt::storage::FileStorage;

use super::publish;
use crate::files::directory_of;

/// What temporary names end with.
pub(super) const SUFFIX: &str = ".partial";

/// A file that was made with another one.
#[derive(Debug)]
pub(super) struct Companion {
    pub(super) made: PathBuf,
    /// The name that it gets with the other one; the same if it has it already.
    pub(super) name: PathBuf,
    /// The file that has this name until then. Held for its lock.
    pub(super) old: Option<FileStorage>,
}

impl Companion {
    /// A file that keeps its name.
    pub(super) fn named(path: PathBuf) -> Self {
        Self { name: path.clone(), made: path, old: None }
    }

    /// A part of an image, whose name is a temporary one if it ends so.
    pub(super) fn part(made: PathBuf) -> Self {
        let name = made.as_os_str().as_bytes().strip_suffix(SUFFIX.as_bytes());
        let name = name.map(|name| Path::new(OsStr::from_bytes(name)).to_owned());
        Self { name: name.unwrap_or_else(|| made.clone()), made, old: None }
    }
}

/// Names the files. If some take the place of others, the file `whole` is removed first, which
/// `old` says is the one to be replaced: it would show parts of two disks in between.
///
/// # Errors
///
/// `AlreadyExists` if a name is used, and those of the system.
pub(super) fn name_all(
    companions: &[Companion],
    whole: &Path,
    old: Option<&Metadata>,
) -> io::Result<()> {
    if companions.iter().any(|companion| companion.old.is_some()) {
        let now = whole.symlink_metadata()?;
        if old.is_none_or(|old| (now.dev(), now.ino()) != (old.dev(), old.ino())) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        fs::remove_file(whole)?;
        File::open(directory_of(whole))?.sync_all()?;
    }
    let mut renamed = companions.iter().filter(|companion| companion.made != companion.name);
    renamed.try_for_each(|Companion { made, name, old }| match old {
        Some(_) => fs::rename(made, name),
        None => publish::as_new(made, name),
    })
}
