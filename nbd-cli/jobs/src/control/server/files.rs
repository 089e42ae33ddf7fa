//! The files of a disk, by which it is recognised when it is opened again.

use std::path::{Path, PathBuf};

use imgfmt::Image;
use imgfmt::storage::FileIdentity;

use crate::control::{ErrorKind, Failure};
use crate::text::printable;

/// A file that was opened by a name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskFile {
    /// The name, an absolute path.
    pub path: PathBuf,
    /// What was there.
    pub identity: FileIdentity,
}

impl DiskFile {
    /// A file at an absolute path.
    #[must_use]
    pub const fn new(path: PathBuf, identity: FileIdentity) -> Self {
        Self { path, identity }
    }
}

/// The files of an open image: its own, its data file and everything below. A disk that is none has
/// no files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskFiles(Vec<DiskFile>);

impl From<Vec<DiskFile>> for DiskFiles {
    fn from(files: Vec<DiskFile>) -> Self {
        Self(files)
    }
}

impl DiskFiles {
    /// Those of an image. Relative names begin in the current directory.
    #[must_use]
    pub fn of(image: &Image) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let files = image.files().map(|(path, identity)| DiskFile::new(absolute(path), identity));
        Self(files.collect())
    }

    /// Returns the files.
    #[must_use]
    pub fn as_slice(&self) -> &[DiskFile] {
        &self.0
    }

    /// Refuses names that lead to other files by now, or to none: the file was renamed, removed or
    /// replaced. Blocks.
    ///
    /// # Errors
    ///
    /// If there is such a name; `export` is the disk's.
    pub fn check_names(&self, export: &str) -> Result<(), Failure> {
        let is_displaced = |file: &&DiskFile| FileIdentity::of(&file.path) != Some(file.identity);
        let Some(file) = self.0.iter().find(is_displaced) else { return Ok(()) };
        let message = format!(
            "'{}' of the export '{export}' is not the file any more that is served: it was renamed, \
             removed or replaced; move it back, or stop the server",
            printable(&file.path.to_string_lossy())
        );
        Err(Failure::new(ErrorKind::InUse, message))
    }

    /// Refuses other files than these, whatever the names.
    ///
    /// # Errors
    ///
    /// If the image is another one; `export` is the disk's.
    pub fn check_same(&self, export: &str, opened: &Self) -> Result<(), Failure> {
        let is_in = |files: &Self, file: &DiskFile| {
            files.0.iter().any(|other| other.identity == file.identity)
        };
        let other = opened.0.iter().find(|file| !is_in(self, file));
        let missing = self.0.iter().find(|file| !is_in(opened, file));
        let message = match (other, missing) {
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
