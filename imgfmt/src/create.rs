//! Making new images.

use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::open_policy::OpenPolicy;
use crate::options::{Format, OpenOptions};
use crate::qcow2;

/// How the clusters of a new qcow2 image are compressed, if any ever are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// Understood by every reader.
    #[default]
    Zlib,
    /// Faster; QEMU 5.1 and later.
    Zstd,
}

/// Which version of the qcow2 format a new image has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Qcow2Version {
    /// Without zero clusters and feature bits; QEMU before 1.1 needs it.
    V2,
    /// The present one.
    #[default]
    V3,
}

/// Whether clusters of a new qcow2 image have subclusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum L2Entries {
    /// A cluster is allocated as a whole.
    #[default]
    Standard,
    /// Each 32nd part of a cluster is allocated by itself; QEMU 5.2 and later.
    Extended,
}

/// What a new image is to be like; made with [`CreateOptions::new`], changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateOptions {
    /// The image's format.
    pub format: Format,
    /// Size of the disk in bytes; `None` takes the backing file's.
    pub size: Option<u64>,
    /// Name of the backing file as it is to stand in the image (a relative one starts at the
    /// image's folder), and its format.
    pub backing: Option<(String, Format)>,
    /// Version of the qcow2 format.
    pub version: Qcow2Version,
    /// Size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// How clusters are compressed.
    pub compression: CompressionType,
    /// Whether there are subclusters.
    pub l2_entries: L2Entries,
}

impl CreateOptions {
    /// An image of this format with a disk of `size` bytes, and otherwise what QEMU makes.
    pub fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size: Some(size),
            backing: None,
            version: Qcow2Version::default(),
            cluster_size: 65536,
            refcount_bits: 16,
            compression: CompressionType::default(),
            l2_entries: L2Entries::default(),
        }
    }

    /// A qcow2 image over a backing file, of the same size.
    pub fn overlay(backing: impl Into<String>, format: Format) -> Self {
        let backing = Some((backing.into(), format));
        Self { size: None, backing, ..Self::new(Format::Qcow2, 0) }
    }
}

/// Makes a new file of the image's kind. An existing one is never touched.
pub(crate) fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let named = |error: Error| error.with_path(path);
    let size = match (options.size, &options.backing) {
        (Some(size), _) => size,
        (None, Some((name, format))) => backing_size(path, name, *format).map_err(named)?,
        (None, None) => {
            return Err(named(invalid("a size is needed where no backing file has one")));
        }
    };
    if let (Some(_), Some((name, format))) = (options.size, &options.backing) {
        backing_size(path, name, *format).map_err(named)?;
    }
    let content = match options.format {
        Format::Raw if options.backing.is_some() => {
            return Err(named(invalid("a raw image cannot have a backing file")));
        }
        Format::Raw => Vec::new(),
        Format::Qcow2 => qcow2::layout(size, options).map_err(named)?,
    };
    if size > i64::MAX as u64 {
        return Err(named(invalid("a disk of 2^63 bytes or more is not possible")));
    }
    let io_error = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::new(
            ErrorKind::AlreadyExists,
            "create",
            "there is a file of that name; remove it first or choose another name",
        )
        .with_path(path),
        _ => Error::from_io("create", error).with_path(path),
    };
    let file =
        FileOptions::new().read(true).write(true).create_new(true).open(path).map_err(io_error)?;
    let result = fill(&file, options.format, size, &content);
    result.map_err(|error| {
        // Half an image is of no use to anyone; the first error is the one to tell.
        let _ = std::fs::remove_file(path);
        io_error(error)
    })
}

/// Writes parts of a new file, each at its offset.
fn fill(file: &File, format: Format, size: u64, content: &[(u64, Vec<u8>)]) -> io::Result<()> {
    if format == Format::Raw {
        file.set_len(size)?;
    }
    for (offset, bytes) in content {
        file.write_all_at(bytes, *offset)?;
    }
    file.sync_all()
}

/// Opens the backing file to see that it is one, and for its size.
fn backing_size(path: &Path, name: &str, format: Format) -> Result<u64> {
    let folder = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    let options = OpenOptions::new().format(format).policy(OpenPolicy::any_file());
    Ok(Image::open(folder.join(name), &options)?.size())
}

pub(crate) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, "create", detail)
}
