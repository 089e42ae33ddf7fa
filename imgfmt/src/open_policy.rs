//! The files that an image may name.
//!
//! A qcow2 image can name a backing file and a data file. The creator of the image chose those
//! names. Following them blindly lets a hostile image read any file of the host and, with a data
//! file, write it. Every such name is checked against an [`OpenPolicy`].

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backing_file::{BackingFile, NameTarget};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// The maximum number of layers of a chain, the image itself included. Each holds a file open, and
/// reading through all of them has to fit on the stack of a thread (2 MiB).
pub(crate) const CHAIN_DEPTH_MAX: usize = 500;

/// The scheme of names of files.
const FILE_SCHEME: &str = "file";

/// Opens the storage for a name such as `nbd://host/export`.
pub type SchemeOpener = dyn Fn(&str) -> io::Result<Arc<dyn Storage>> + Send + Sync;

/// Resolves a name such as `json:{"driver":"file",…}`.
pub type NameReader = dyn Fn(&str) -> io::Result<NameTarget> + Send + Sync;

/// The files that an image may name as its backing file or data file.
///
/// By default, these are the files in or below the directory of the image that names them, after
/// resolving links. Names with a scheme (`nbd:…`, `json:…`) are refused unless
/// [`allow_scheme`](Self::allow_scheme) sets a function that opens them.
#[derive(Clone, Default)]
pub struct OpenPolicy {
    files: FileRule,
    missing_format: MissingFormat,
    schemes: Vec<(String, Arc<NameReader>)>,
    /// Files that are allowed in any directory.
    named: Vec<PathBuf>,
}

#[derive(Clone, Debug, Default)]
enum FileRule {
    #[default]
    DirectoryOfImage,
    Beneath(PathBuf),
    Any,
    None,
    /// The image is in an archive, which names nothing outside.
    InArchive,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MissingFormat {
    #[default]
    Refuse,
    Probe,
}

impl OpenPolicy {
    /// Allows files in the directory of the image that names them, or below it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows no other file: only images without backing and data files can be opened.
    pub fn deny() -> Self {
        Self { files: FileRule::None, ..Self::default() }
    }

    /// Allows nothing, because the image is in an archive.
    pub(crate) fn in_archive() -> Self {
        Self { files: FileRule::InArchive, ..Self::default() }
    }

    /// Allows any file of the host: only for images whose creator is trusted as much as the user.
    pub fn any_file() -> Self {
        Self { files: FileRule::Any, ..Self::default() }
    }

    /// Allows any file, of any format, and the same names with a scheme.
    pub(crate) fn of_any_file(self) -> Self {
        match self.files {
            FileRule::InArchive => self,
            _ => Self { files: FileRule::Any, missing_format: MissingFormat::Probe, ..self },
        }
    }

    /// Allows files in this directory or below it.
    pub fn beneath(directory: impl Into<PathBuf>) -> Self {
        Self { files: FileRule::Beneath(directory.into()), ..Self::default() }
    }

    /// Detects the format of a backing file from its first bytes if the image does not record it,
    /// as QEMU does. Use it only for images whose guests are trusted: a guest may have written
    /// those bytes, and with them the name of a file to read. By default such an image is refused.
    #[must_use]
    pub fn allow_format_probe(mut self) -> Self {
        self.missing_format = MissingFormat::Probe;
        self
    }

    /// Allows names of a scheme, such as `nbd`, and sets the function that opens them.
    #[must_use]
    pub fn allow_scheme(self, scheme: impl Into<String>, opener: Arc<SchemeOpener>) -> Self {
        self.read_scheme(scheme, Arc::new(move |name| opener(name).map(NameTarget::Storage)))
    }

    /// Sets the function that resolves names of a scheme, such as `json`. If a name resolves to a
    /// file, the rules for files apply.
    #[must_use]
    pub fn read_scheme(mut self, scheme: impl Into<String>, reader: Arc<NameReader>) -> Self {
        self.schemes.push((scheme.into(), reader));
        self
    }

    /// Allows this file as well, wherever it is: one that the user has named.
    #[must_use]
    pub fn allow_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.named.push(file.into());
        self
    }

    pub(crate) fn missing_format(&self) -> MissingFormat {
        self.missing_format
    }

    /// Resolves `name`, which the image at `image` contains, if it may be opened.
    pub(crate) fn resolve(&self, image: Option<&Path>, name: &OsStr) -> Result<NameTarget> {
        if matches!(self.files, FileRule::InArchive) {
            let name = name.to_string_lossy();
            let detail = format!(
                "the image refers to '{name}', but images in an archive stand alone: unpack the archive \
                 first"
            );
            return Err(Error::new(ErrorKind::PolicyDenied, "open", detail));
        }
        let directory =
            image.and_then(Path::parent).map(|directory| match directory.as_os_str().len() {
                0 => Path::new("."),
                _ => directory,
            });
        let target = match scheme_of(name) {
            // As in QEMU, a relative path starts at the working directory.
            Some(scheme) if scheme == FILE_SCHEME.as_bytes() => {
                NameTarget::File(OsStr::from_bytes(&name.as_bytes()[scheme.len() + 1..]).into())
            }
            Some(scheme) => self.read_name(scheme, name)?,
            None => NameTarget::File(match (Path::new(name).is_absolute(), directory) {
                (false, Some(directory)) => directory.join(name),
                (true, _) => PathBuf::from(name),
                (false, None) => {
                    let why = "the image is not a file, so the name cannot be resolved";
                    return Err(denied(why.into(), name));
                }
            }),
        };
        self.allowed(target, directory, name)
    }

    /// Returns the target with the resolved paths of its files, if all of them may be opened.
    fn allowed(
        &self,
        target: NameTarget,
        directory: Option<&Path>,
        name: &OsStr,
    ) -> Result<NameTarget> {
        Ok(match target {
            NameTarget::File(path) => NameTarget::File(self.allowed_file(path, directory, name)?),
            NameTarget::Storage(_) => target,
            NameTarget::Part(target, part) => {
                NameTarget::Part(Box::new(self.allowed(*target, directory, name)?), part)
            }
            NameTarget::WithBacking(target, backing) => {
                let target = Box::new(self.allowed(*target, directory, name)?);
                NameTarget::WithBacking(target, self.allowed_backing(backing, directory, name)?)
            }
            // Names of disks in archives look like those of a kind.
            NameTarget::Denied if is_in_archive(name) => {
                let name = name.to_string_lossy();
                let detail = format!(
                    "the image refers to '{name}', but a disk in an archive cannot be below an image: \
                     convert it to a file"
                );
                return Err(Error::new(ErrorKind::PolicyDenied, "open", detail));
            }
            NameTarget::Denied => {
                let scheme = String::from_utf8_lossy(scheme_of(name).unwrap_or_default());
                let why = format!("names of the kind '{scheme}:' are not allowed");
                return Err(denied(why, name));
            }
        })
    }

    fn allowed_backing(
        &self,
        mut backing: BackingFile,
        directory: Option<&Path>,
        name: &OsStr,
    ) -> Result<BackingFile> {
        let mut layer = &mut backing;
        while let BackingFile::Given(given) = layer {
            if let Some(target) = given.target.take() {
                given.target = Some(self.allowed(target, directory, name)?);
            }
            layer = &mut given.backing;
        }
        Ok(backing)
    }

    fn allowed_file(
        &self,
        path: PathBuf,
        directory: Option<&Path>,
        name: &OsStr,
    ) -> Result<PathBuf> {
        if self.is_named(&path) {
            return Ok(path);
        }
        let root = match &self.files {
            FileRule::Any => return Ok(path),
            FileRule::None | FileRule::InArchive => {
                return Err(denied("no other file may be opened".into(), name));
            }
            FileRule::Beneath(root) => root.as_path(),
            FileRule::DirectoryOfImage => match directory {
                Some(directory) => directory,
                None => return Err(denied("the image is in no directory".into(), name)),
            },
        };
        let open_error = |path: &Path| {
            let path = path.to_owned();
            move |error| Error::from_io("open the backing file", error).with_path(path)
        };
        let root = root.canonicalize().map_err(open_error(root))?;
        let path = path.canonicalize().map_err(open_error(&path))?;
        if path.starts_with(&root) {
            Ok(path)
        } else {
            let why = format!("only files below '{}' may be opened", root.display());
            Err(denied(why, name))
        }
    }

    /// Whether a path leads to a file that is allowed by its name.
    fn is_named(&self, path: &Path) -> bool {
        let leads_to = |named: &PathBuf| match (named.canonicalize(), path.canonicalize()) {
            (Ok(named), Ok(path)) => named == path,
            _ => false,
        };
        self.named.iter().any(leads_to)
    }

    fn read_name(&self, scheme: &[u8], name: &OsStr) -> Result<NameTarget> {
        match self.schemes.iter().find(|(allowed, _)| allowed.as_bytes() == scheme) {
            Some((_, reader)) => name
                .to_str()
                .ok_or_else(|| io::Error::other("only names of files need not be valid UTF-8"))
                .and_then(|name| reader(name))
                .map_err(|error| Error::from_io("open the backing file", error).with_path(name)),
            None => Ok(NameTarget::Denied),
        }
    }
}

impl fmt::Debug for OpenPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let schemes: Vec<_> = self.schemes.iter().map(|(scheme, _)| scheme).collect();
        f.debug_struct("OpenPolicy")
            .field("files", &self.files)
            .field("missing_format", &self.missing_format)
            .field("schemes", &schemes)
            .field("named", &self.named)
            .finish()
    }
}

/// The scheme of a name, which QEMU would take for a protocol: letters before a colon, unless a
/// slash comes first.
fn scheme_of(name: &OsStr) -> Option<&[u8]> {
    let end = name.as_bytes().iter().position(|byte| matches!(byte, b':' | b'/'))?;
    let (scheme, rest) = name.as_bytes().split_at(end);
    (rest[0] == b':').then_some(scheme)
}

fn is_in_archive(name: &OsStr) -> bool {
    scheme_of(name).is_some_and(|scheme| scheme.to_ascii_lowercase().ends_with(b".ova"))
}

fn denied(why: String, name: &OsStr) -> Error {
    let name = name.to_string_lossy();
    let detail = format!("the image refers to '{name}', but {why}");
    Error::new(ErrorKind::PolicyDenied, "open", detail).by_policy()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_denied(policy: &OpenPolicy, image: &Path, name: &str) -> bool {
        match policy.resolve(Some(image), name.as_ref()) {
            Ok(_) => false,
            Err(error) => error.kind() == ErrorKind::PolicyDenied,
        }
    }

    #[test]
    fn by_default_only_files_beside_the_image_are_allowed() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let image = inner.join("image");
        std::fs::write(inner.join("base"), "").unwrap();
        std::fs::write(directory.path().join("outer"), "").unwrap();
        std::os::unix::fs::symlink("../outer", inner.join("link")).unwrap();
        let policy = OpenPolicy::new();
        assert!(!is_denied(&policy, &image, "base"));
        assert!(is_denied(&policy, &image, "../outer"));
        assert!(is_denied(&policy, &image, "link"));
        assert!(is_denied(&policy, &image, "/etc/passwd"));
        assert!(is_denied(&policy, &image, "json:{}"));
        assert!(is_denied(&policy, &image, "nbd://host"));
        assert!(is_denied(&OpenPolicy::deny(), &image, "base"));
        let named = |path: &Path| format!("file:{}", path.display());
        assert!(!is_denied(&policy, &image, &named(&inner.join("base"))));
        assert!(is_denied(&policy, &image, &named(&inner.join("link"))));
        assert!(is_denied(&policy, &image, "file:/etc/passwd"));
        assert!(is_denied(&OpenPolicy::deny(), &image, &named(&inner.join("base"))));
        let read = |name: &str| Ok(NameTarget::File(name["json:".len()..].into()));
        let policy = policy.read_scheme("json", Arc::new(read));
        assert!(!is_denied(&policy, &image, &format!("json:{}", inner.join("base").display())));
        assert!(is_denied(&policy, &image, "json:/etc/passwd"));
        assert!(!is_denied(&OpenPolicy::any_file(), &image, "/etc/passwd"));
        assert!(is_denied(&OpenPolicy::any_file(), &image, "json:{}"));
        assert!(!is_denied(&OpenPolicy::beneath(directory.path()), &image, "link"));
        let named = OpenPolicy::new().allow_file(inner.join("../outer"));
        assert!(!is_denied(&named, &image, "../outer"));
        assert!(!is_denied(&named, &image, "link"), "it leads to the file that was named");
        assert!(is_denied(&named, &image, "/etc/passwd"));
    }
}
