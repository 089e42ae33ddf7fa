//! The sources of exports: files, disks in memory, and exports of other servers.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Format, Image, OpenOptions};
use nbd_proto::NbdUri;
use nbd_server::export::{Export, ImageExport, MemoryExport};

use super::error::OpenError;
use super::options::{OpenedExport, ServeOptions, Writes};
use crate::control::server::ServedDisk;
use crate::error::{JobError, JobErrorKind};
use crate::object::{ObjectUrl, shown};
use crate::qemu_name::{self, NameInImage, NamedImage};
use crate::size::ByteSize;

impl ServeOptions {
    /// Opens the source of an export: a path, `memory:SIZE`, the URI of an export of another
    /// server, or one of QEMU's names of it. Blocks, and must not be called by asynchronous tasks.
    ///
    /// ```
    /// use nbd_jobs::serving::{ServeOptions, Writes};
    ///
    /// let mut options = ServeOptions::default();
    /// options.writes = Writes::ToImage;
    /// let opened = options.open_source("memory:1M".as_ref())?;
    /// assert_eq!(opened.export.info().size, 1 << 20);
    /// # Ok::<(), nbd_jobs::JobError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the source is malformed, or cannot be opened with these options. Options that would help
    /// have their names in `nbd-cli serve`.
    pub fn open_source(&self, source: &OsStr) -> Result<OpenedExport, JobError> {
        if let Some(size) = memory_size(source) {
            return Ok(OpenedExport::without_image(memory(source, size, self)?));
        }
        if source.is_empty() {
            return Err(JobError::invalid("a source is empty; give a path, a URI or memory:SIZE"));
        }
        if let Some(url) = source.to_str().and_then(ObjectUrl::of) {
            return self.open_object(&url).map_err(|error| explained(error, self));
        }
        if let Some(uri) = source_uri(source) {
            return self.open_export(&uri?).map_err(|error| explained(error, self));
        }
        self.open(qemu_name::path_in(source)).map_err(|error| explained(error, self))
    }

    /// Makes an export of the image in an object of a store. Blocks, and must not be called by
    /// asynchronous tasks.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if it cannot be read, or is to be written to.
    pub fn open_object(&self, url: &ObjectUrl) -> Result<OpenedExport, OpenError> {
        if self.writes == Writes::ToImage && self.snapshot.is_none() {
            let why = format!(
                "cannot write to {url}: objects of a store are read-only; add --read-only or --temporary"
            );
            return Err(JobError::invalid(why).into());
        }
        let format = url.format_or(self.format);
        let own = Self { format, known_as: Some(url.to_string().into()), ..self.clone() };
        let image = own.open_storage(self.remotes.open_object(url)?)?;
        Ok(own.exported(image)?)
    }
}

impl OpenedExport {
    /// Returns the disk for a server with a control socket; `source` is what it calls the disk.
    #[must_use]
    pub fn into_disk(self, source: impl Into<String>) -> ServedDisk {
        let source = shown(&source.into());
        let uri = source_uri(source.as_ref()).and_then(Result::ok);
        let identity = uri.map_or_else(|| source.clone(), |uri| uri.to_string());
        let disk = ServedDisk::new(source, self.export).identified_by(identity, self.view);
        match self.image {
            Some(image) => disk.with_image(image),
            None => disk,
        }
    }
}

/// Returns the export of another server that a source names, if it does.
///
/// # Errors
///
/// If the name is malformed.
pub fn source_uri(source: &OsStr) -> Option<Result<NbdUri, JobError>> {
    let text = source.to_str().filter(|text| qemu_name::is_name_of_server(text))?;
    let uri = qemu_name::from_name(text);
    Some(uri.map_err(|error| JobError::source(format!("cannot use the source '{text}': {error}"))))
}

/// Splits `NAME=SOURCE`; without a name all of it is the source. The text before the `=` is not a
/// name if it is a path or a URI.
pub fn split_name(source: &OsStr) -> (Option<&str>, &OsStr) {
    let is_name = |text: &str| {
        qemu_name::is_name_of_server(text)
            || qemu_name::json_in(text).is_some()
            || ObjectUrl::of(text).is_some()
    };
    if source.to_str().is_some_and(is_name) {
        return (None, source);
    }
    let bytes = source.as_bytes();
    let found = bytes.iter().position(|byte| *byte == b'=').map(|at| bytes.split_at(at));
    match found.map(|(name, rest)| (std::str::from_utf8(name), &rest[1..])) {
        Some((Ok(name), rest)) if !name.is_empty() && !name.contains('/') => {
            (Some(name), OsStr::from_bytes(rest))
        }
        _ => (None, source),
    }
}

/// Returns whether a source is a disk in memory.
pub fn is_memory(source: &OsStr) -> bool {
    memory_size(source).is_some()
}

/// Returns whether two sources are the same disk, also under two names of a file. Each disk in
/// memory is one of its own.
pub fn same_source(one: &OsStr, other: &OsStr) -> bool {
    if is_memory(one) {
        return false;
    }
    let file = |source: &OsStr| {
        let described = source.to_str().and_then(qemu_name::json_in);
        match described.map(qemu_name::from_json) {
            None => std::fs::canonicalize(qemu_name::path_in(source)).ok(),
            Some(Ok(NamedImage { name: NameInImage::File(path), .. })) => {
                std::fs::canonicalize(path).ok()
            }
            Some(_) => None,
        }
    };
    one == other || file(one).is_some_and(|one| file(other) == Some(one))
}

fn cannot_export(source: &OsStr, why: impl std::fmt::Display) -> JobError {
    JobError::source(format!("cannot export '{}': {why}", source.display()))
}

fn memory_size(source: &OsStr) -> Option<&str> {
    source.to_str()?.strip_prefix("memory:")
}

/// Returns the error with the options of `nbd-cli serve` that would help.
pub(crate) fn explained(error: OpenError, choices: &ServeOptions) -> JobError {
    if error.may_be_readable() && choices.writes != Writes::Refused {
        return JobError::source(format!("{error}; to serve it without writing, add --read-only"));
    }
    match error {
        OpenError::Image(error) if error.could_be_shared() => {
            JobError::source(format!("{error}, or add --force-share to serve it anyway"))
        }
        OpenError::Image(error) => JobError::opening(JobErrorKind::Source, error),
        OpenError::Other(error) => error,
    }
}

fn memory(source: &OsStr, size: &str, choices: &ServeOptions) -> Result<Arc<dyn Export>, JobError> {
    let size: ByteSize = size.parse().map_err(|error| cannot_export(source, error))?;
    if choices.snapshot.is_some() || choices.writes == Writes::ToTemporaryFile {
        let why = "a disk in memory has no snapshots and is temporary as it is; leave out \
                   --snapshot and --temporary";
        return Err(cannot_export(source, why));
    }
    if choices.writes != Writes::Refused {
        let export = Arc::new(MemoryExport::new(size.bytes()));
        return Ok(choices.filter.apply(export));
    }
    let storage = Arc::new(MemoryStorage::new(size.bytes()));
    let options = OpenOptions::new().format(Format::Raw);
    let image = Image::from_storage(storage, &options)
        .map_err(|error| JobError::image(JobErrorKind::Source, error))?;
    let export = Arc::new(ImageExport::new(image));
    Ok(choices.filter.apply(export))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    fn split_name(source: &str) -> (Option<&str>, &str) {
        let (name, rest) = super::split_name(source.as_ref());
        (name, rest.to_str().unwrap())
    }

    #[test]
    fn a_name_stands_before_the_first_equals_sign() {
        assert_eq!(split_name("disk.img"), (None, "disk.img"));
        assert_eq!(split_name("vm=disk.img"), (Some("vm"), "disk.img"));
        assert_eq!(split_name("vm=a=b.img"), (Some("vm"), "a=b.img"));
        assert_eq!(split_name("scratch=memory:1G"), (Some("scratch"), "memory:1G"));
        assert_eq!(split_name("vm=nbd://host/a=b"), (Some("vm"), "nbd://host/a=b"));
        assert_eq!(split_name("vm=s3://b/a=b"), (Some("vm"), "s3://b/a=b"));
        assert_eq!(split_name("https://h/a?s=b"), (None, "https://h/a?s=b"));
    }

    #[test]
    fn a_path_with_an_equals_sign_is_a_path() {
        assert_eq!(split_name("./a=b.img"), (None, "./a=b.img"));
        assert_eq!(split_name("/srv/a=b.img"), (None, "/srv/a=b.img"));
        assert_eq!(split_name("=x"), (None, "=x"));
        for server in [
            "nbd+unix:///?socket=/run/s",
            "nbd:host:10809:exportname=disk",
            r#"json:{"driver":"file","filename":"a=b"}"#,
        ] {
            assert_eq!(split_name(server), (None, server));
        }
    }

    #[test]
    fn paths_need_not_be_text() {
        let path = |bytes: &'static [u8]| OsStr::from_bytes(bytes);
        assert_eq!(super::split_name(path(b"vm=\xff=")), (Some("vm"), path(b"\xff=")));
        assert_eq!(super::split_name(path(b"\xff=a")), (None, path(b"\xff=a")));
    }

    #[test]
    fn one_disk_may_have_two_names_and_disks_in_memory_are_all_different() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link] = ["disk", "link"].map(|name| directory.path().join(name));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("disk", &link).unwrap();
        assert!(super::same_source(file.as_ref(), link.as_ref()));
        let named = format!(r#"json:{{"driver":"file","filename":"{}"}}"#, link.display());
        assert!(super::same_source(file.as_ref(), named.as_ref()));
        assert!(!super::same_source(file.as_ref(), "nowhere".as_ref()));
        assert!(!super::same_source("memory:1M".as_ref(), "memory:1M".as_ref()));
    }

    #[test]
    fn a_source_that_cannot_be_exported_is_refused_with_the_reason() {
        let options = super::ServeOptions::default();
        for (source, why) in [
            ("", "a source is empty"),
            ("memory:1Q", "cannot export 'memory:1Q': '1Q' has the unknown size suffix 'Q'"),
            ("nbd:", "cannot use the source 'nbd:': "),
        ] {
            let refused = options.open_source(source.as_ref()).map(|_| ()).unwrap_err();
            assert!(refused.to_string().starts_with(why), "{source}: {refused}");
        }
    }
}
