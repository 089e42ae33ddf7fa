//! Creating images.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::chain;
use crate::create_on_device::{NewOnDevice, is_block_device};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::image::Image;
use crate::open_policy::OpenPolicy;
use crate::options::{Access, Locking, OpenOptions};
use crate::qcow2;
use crate::storage::{Durability, FileStorage};
use crate::units::GuestOffset;

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

/// Which clusters of a new qcow2 image have a place in the file from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preallocation {
    /// None: the file grows with what is written.
    #[default]
    Off,
    /// All have one, and it is a hole of the file.
    Metadata,
    /// All have one, and the file system has set the space aside.
    Falloc,
    /// All have one, and zeroes are written there.
    Full,
}

/// Whether other programs may leave the refcounts of an image wrong while they have it open, and
/// repair them after a crash. This crate never does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LazyRefcounts {
    /// They may not.
    #[default]
    Off,
    /// They may.
    On,
}

/// What is to change in a qcow2 image that exists, see [`Image::amend`](crate::Image::amend); `None` leaves it
/// as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Amendment {
    /// Its version. Version 2 is possible without bitmaps, snapshots and features that it does not have;
    /// clusters that are noted as zero get other forms then, zeroes as data where a backing file would show.
    pub version: Option<Qcow2Version>,
    /// Whether other programs may be late with refcounts.
    pub lazy_refcounts: Option<LazyRefcounts>,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: Option<u32>,
    /// Size of the disk in bytes; not smaller than it is.
    pub size: Option<u64>,
}

/// How data is kept in a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataFile {
    /// Only together with the image does it mean anything.
    Plain,
    /// By itself it is a raw image of the disk.
    Raw,
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
    pub backing: Option<(OsString, Format)>,
    /// What the backing file may be: it is looked at, and its size is taken. By default any file.
    pub backing_policy: OpenPolicy,
    /// How the backing file, and a new file that is filled, are locked meanwhile. Devices always are.
    pub locking: Locking,
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
    /// Whether other programs may be late with refcounts.
    pub lazy_refcounts: LazyRefcounts,
    /// Which clusters have a place from the start. Not with a backing file.
    pub preallocation: Preallocation,
    /// Name of a new file that is to hold the data. A relative one starts at the image's folder;
    /// QEMU would look for it in its own working folder, so better give an absolute one. Not with
    /// a backing file.
    pub data_file: Option<(OsString, DataFile)>,
    /// Asked again and again while zeroes are written for [`Preallocation::Full`], which may take long: `true`
    /// gives the creation up, and nothing of it stays.
    pub give_up: fn() -> bool,
}

impl CreateOptions {
    /// An image of this format with a disk of `size` bytes, and otherwise what QEMU makes.
    pub fn new(format: Format, size: u64) -> Self {
        Self {
            format,
            size: Some(size),
            backing: None,
            backing_policy: OpenPolicy::any_file(),
            locking: Locking::default(),
            version: Qcow2Version::default(),
            cluster_size: 65536,
            refcount_bits: 16,
            compression: CompressionType::default(),
            l2_entries: L2Entries::default(),
            lazy_refcounts: LazyRefcounts::default(),
            preallocation: Preallocation::default(),
            data_file: None,
            give_up: || false,
        }
    }

    /// A qcow2 image over a backing file, of the same size.
    pub fn overlay(backing: impl Into<OsString>, format: Format) -> Self {
        let backing = Some((backing.into(), format));
        Self { size: None, backing, ..Self::new(Format::Qcow2, 0) }
    }
}

/// Makes a new file of the image's kind, or an image on a block device. An existing file is never touched.
pub(crate) fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    if is_block_device(path) {
        let new = create_on_device(path, options)?;
        new.preallocate()?;
        return new.complete();
    }
    let (size, content) = plan(path, options)?;
    let mut made = NewFiles::default();
    if let Some((name, _)) = &options.data_file {
        let data_path = path.parent().map_or_else(|| name.into(), |folder| folder.join(name));
        made.create(&data_path, |file| file.set_len(size))?;
    }
    made.create(path, |file| fill(file, options.format, size, &content))?;
    preallocate(path, options)?;
    made.keep();
    Ok(())
}

/// Begins an image on a block device.
pub(crate) fn create_on_device(path: &Path, options: &CreateOptions) -> Result<NewOnDevice> {
    if !is_block_device(path) {
        return Err(invalid("it is not a block device").with_path(path));
    }
    if let Some((name, _)) = &options.backing {
        let backing = path.parent().map_or_else(|| name.into(), |folder| folder.join(name));
        let identity = FileStorage::identity_of(&backing);
        if identity.is_some() && identity == FileStorage::identity_of(path) {
            let detail = "the device cannot be the backing file of the image on it";
            return Err(invalid(detail).with_path(path));
        }
    }
    let (size, content) = plan(path, options)?;
    NewOnDevice::begin(path, options, size, &content)
}

/// The metadata of a new image, each part with its offset.
type Parts = Vec<(u64, Vec<u8>)>;

/// The size of the disk and the metadata of a new image, if the options fit together.
fn plan(path: &Path, options: &CreateOptions) -> Result<(u64, Parts)> {
    let named = |error: Error| error.with_path(path);
    let size = match (options.size, &options.backing) {
        (Some(size), _) => size,
        (None, Some((name, format))) => {
            backing_size(path, name, *format, options).map_err(named)?
        }
        (None, None) => {
            return Err(named(invalid("a size is needed where no backing file has one")));
        }
    };
    if let (Some(_), Some((name, format))) = (options.size, &options.backing) {
        backing_size(path, name, *format, options).map_err(named)?;
    }
    let content = match options.format {
        Format::Raw if options.backing.is_some() => {
            return Err(named(invalid("a raw image cannot have a backing file")));
        }
        Format::Raw => Vec::new(),
        Format::Qcow2 => qcow2::layout(size, options).map_err(named)?,
        other => {
            let detail =
                format!("{} images cannot be made; make a qcow2 image", other.description());
            return Err(named(Error::new(ErrorKind::Unsupported, "create", detail)));
        }
    };
    if size > i64::MAX as u64 {
        return Err(named(invalid("a disk of 2^63 bytes or more is not possible")));
    }
    if options.format == Format::Raw && options.data_file.is_some() {
        return Err(named(invalid("a raw image has no data file")));
    }
    let preallocates = options.preallocation != Preallocation::Off;
    if options.backing.is_some() && (preallocates || options.data_file.is_some()) {
        let detail = "an image with a backing file has neither a data file nor preallocation";
        return Err(named(invalid(detail)));
    }
    Ok((size, content))
}

/// New files that are removed again unless everything succeeds.
#[derive(Default)]
struct NewFiles(Vec<PathBuf>);

impl NewFiles {
    fn create(&mut self, path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
        let io_error = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::new(
                ErrorKind::AlreadyExists,
                "create",
                "there is a file of that name; remove it first or choose another name",
            )
            .with_path(path),
            _ => Error::from_io("create", error).with_path(path),
        };
        let mut new = FileOptions::new();
        let file = new.read(true).write(true).create_new(true).open(path).map_err(io_error)?;
        self.0.push(path.to_owned());
        fill(&file).and_then(|()| file.sync_all()).map_err(io_error)
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            // Half an image is of no use to anyone; the error that led here is the one to tell.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Allocates what is to be allocated from the start.
fn preallocate(path: &Path, options: &CreateOptions) -> Result<()> {
    let is_raw_data = matches!(options.data_file, Some((_, DataFile::Raw)));
    // A raw data file may be filled by others: then every cluster must be looked up there.
    if options.format == Format::Qcow2
        && (options.preallocation != Preallocation::Off || is_raw_data)
    {
        let image = Image::open(path, &writable(options))?;
        image.preallocate()?;
        image.close()?;
    }
    match options.preallocation {
        Preallocation::Full => write_zeroes(path, options),
        Preallocation::Falloc => {
            let data_path = match (&options.data_file, path.parent()) {
                (Some((name, _)), Some(folder)) => folder.join(name),
                (Some((name, _)), None) => name.into(),
                (None, _) => path.to_owned(),
            };
            set_space_aside(&data_path).map_err(|error| {
                Error::from_io("set space aside for", error.into()).with_path(data_path)
            })
        }
        Preallocation::Off | Preallocation::Metadata => Ok(()),
    }
}

/// Makes sure that the file system has space for the whole of a file.
fn set_space_aside(path: &Path) -> rustix::io::Result<()> {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
    let length = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
    match length {
        0 => Ok(()),
        _ => rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length),
    }
}

fn writable(options: &CreateOptions) -> OpenOptions {
    OpenOptions::new()
        .format(options.format)
        .access(Access::ReadWrite)
        .locking(options.locking)
        .policy(OpenPolicy::any_file())
}

fn write_zeroes(path: &Path, options: &CreateOptions) -> Result<()> {
    let image = Image::open(path, &writable(options))?;
    let zeroes = vec![0; 1 << 20];
    let mut position = 0;
    while position < image.size() {
        if (options.give_up)() {
            return Err(Error::new(ErrorKind::Io, "create", "it was given up").with_path(path));
        }
        let length = (image.size() - position).min(zeroes.len() as u64);
        let offset = GuestOffset::new(position);
        image.write_at(offset, &zeroes[..length as usize], Durability::Cached)?;
        position += length;
    }
    image.close()
}

/// Writes parts of a new file, each at its offset.
fn fill(file: &File, format: Format, size: u64, content: &[(u64, Vec<u8>)]) -> io::Result<()> {
    if format == Format::Raw {
        file.set_len(size)?;
    }
    for (offset, bytes) in content {
        file.write_all_at(bytes, *offset)?;
    }
    Ok(())
}

/// Opens the backing file to see that it is one, and for its size.
fn backing_size(path: &Path, name: &OsStr, format: Format, create: &CreateOptions) -> Result<u64> {
    let options = OpenOptions::new()
        .format(format)
        .locking(create.locking)
        .policy(create.backing_policy.clone());
    chain::named_size(path, name, &options)
}

pub(crate) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, "create", detail)
}
