//! The files of a disk, by which it is recognised when it is opened again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use imgfmt::Image;
use imgfmt::storage::FileIdentity;
use rustix::fs::{Mode, OFlags};

use crate::control::{ErrorKind, Failure};
use crate::text::printable;

/// A file that was opened by a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskFile {
    /// The name, an absolute path.
    pub(crate) path: PathBuf,
    /// What was there.
    pub(crate) identity: FileIdentity,
}

impl DiskFile {
    /// A file at an absolute path.
    pub(crate) const fn new(path: PathBuf, identity: FileIdentity) -> Self {
        Self { path, identity }
    }
}

/// What a disk consists of: the files of its image, which are its own, its data file and everything
/// below, and what the source tells where that is not enough.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DiskFiles {
    pub(crate) files: Vec<DiskFile>,
    /// Whether nothing but these files is served.
    pub(crate) is_all: bool,
    /// The source, in one notation.
    pub(crate) source: String,
    /// What is served of them, in words.
    pub(crate) view: String,
}

impl DiskFiles {
    /// Those of an image. Relative names begin in the current directory.
    pub(crate) fn of(image: &Image) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let files = image.files().into_iter();
        let files = files.map(|(path, identity)| DiskFile::new(absolute(&path), identity));
        let files: Vec<_> = files.collect();
        let is_all = !files.is_empty() && image.other_layers().is_empty();
        Self { files, is_all, ..Self::default() }
    }

    /// Holds the files, without opening or locking them: until this is dropped, no new file gets
    /// the inode number of one that is removed.
    pub(super) fn pins(&self) -> Vec<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let pin = |file: &DiskFile| rustix::fs::open(&file.path, flags, Mode::empty()).ok();
        self.files.iter().filter_map(pin).collect()
    }

    /// Refuses names that lead to other files by now, or to none: the file was renamed, removed or
    /// replaced. Blocks.
    ///
    /// # Errors
    ///
    /// If there is such a name; `export` is the disk's.
    pub(crate) fn check_names(&self, export: &str) -> Result<(), Failure> {
        let is_displaced = |file: &&DiskFile| FileIdentity::of(&file.path) != Some(file.identity);
        let Some(file) = self.files.iter().find(is_displaced) else { return Ok(()) };
        let message = format!(
            "'{}' of the export '{export}' is not the file any more that is served: it was renamed, \
             removed or replaced; move it back, or stop the server",
            printable(&file.path.to_string_lossy())
        );
        Err(Failure::new(ErrorKind::InUse, message))
    }

    /// Refuses other files than these, whatever the names, and another source if there are not only
    /// files. Refuses another part, snapshot or format, too.
    ///
    /// # Errors
    ///
    /// If the image is another one; `export` is the disk's.
    pub(crate) fn check_same(&self, export: &str, opened: &Self) -> Result<(), Failure> {
        let is_in = |files: &Self, file: &DiskFile| {
            files.files.iter().any(|other| other.identity == file.identity)
        };
        let other = opened.files.iter().find(|file| !is_in(self, file));
        let missing = self.files.iter().find(|file| !is_in(opened, file));
        let message = match (other, missing) {
            (None, None) if !(self.is_all && opened.is_all) && self.source != opened.source => {
                format!(
                    "the export '{export}' would be another disk: its source was '{}', and is '{}'; \
                     give another disk another name, or stop the server before",
                    printable(&self.source),
                    printable(&opened.source)
                )
            }
            (None, None) if self.view != opened.view => format!(
                "the export '{export}' would be another disk: of its source {} was served, and {} \
                 would be; stop the server before such a change",
                printable(&self.view),
                printable(&opened.view)
            ),
            (None, None) => return Ok(()),
            (Some(file), _) => format!(
                "the export '{export}' would be another disk: '{}' is not a file that was served \
                 under this name; give another disk another name, or stop the server before",
                printable(&file.path.to_string_lossy())
            ),
            (None, Some(file)) => format!(
                "the export '{export}' would be another disk: it does not use '{}' any more; stop \
                 the server before such a change",
                printable(&file.path.to_string_lossy())
            ),
        };
        Err(Failure::new(ErrorKind::InUse, message))
    }
}

/// Refuses such names of any of these disks. Blocks.
pub(super) fn check_names(disks: &[(String, DiskFiles)]) -> Result<(), Failure> {
    disks.iter().try_for_each(|(export, files)| files.check_names(export))
}
