//! Creating images.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Image;
use super::create_foreign::create_foreign;
use super::new_files::{
    NewFiles, check_below, open_below, open_to_write, refuse_contradicting_encryption,
};
use super::on_device::{NewOnDevice, is_block_device};
use crate::access::Access;
use crate::backing_file::BackingFile;
use crate::cache_mode::CacheMode;
use crate::create_options::{CreateOptions, DataFile, Preallocation, invalid};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::formats;
use crate::luks::{NEW_HEADER_LENGTH, SECTOR};
use crate::options::OpenOptions;
use crate::passphrase::NewKey;
use crate::qcow2;
use crate::storage::{Durability, FileStorage, Storage};
use crate::units::GuestOffset;

impl Image {
    /// Creates an image in a new file, or on a block device, and opens it for writing as
    /// [`CreateOptions::open`] says. The previous content of a device is lost and is not visible in
    /// the image.
    ///
    /// The new image is on stable storage on return, except with
    /// [`CacheMode::Unsafe`](crate::CacheMode::Unsafe). Dropping it without a change syncs nothing.
    /// An image of [compressed grains](crate::Subformat::StreamOptimized) is complete, and on
    /// stable storage, only when it is [closed](Self::close).
    ///
    /// # Errors
    ///
    /// `Busy` if the device is in use; `AlreadyExists` if there is a file of that name, which is
    /// not changed; `InvalidInput` for options that contradict each other or the format; the errors
    /// of [opening](Self::open) the image and its backing file; `NoSpace`, `Io`. No file remains
    /// after an error. A device is then unchanged or marked as incomplete, or it has the complete
    /// image, if only opening it failed.
    pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<Self> {
        create(path.as_ref(), options)
    }

    /// Starts a new image on a block device. The image can be
    /// [preallocated](NewOnDevice::preallocate) and filled, and becomes valid when it is
    /// [complete](NewOnDevice::complete).
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create), and `InvalidInput` if it is not a block device. If the device
    /// is too small or in use, nothing has changed.
    pub fn create_on_device(
        path: impl AsRef<Path>,
        options: &CreateOptions,
    ) -> Result<NewOnDevice> {
        let options = with_read_key(options).map_err(|error| error.with_path(path.as_ref()))?;
        create_on_device(path.as_ref(), &options)
    }

    /// Starts a new image in a storage that has its final size, such as the export of a server.
    /// What is in the storage is lost. As on a device, the image becomes valid when it is
    /// [complete](NewOnDevice::complete); until then it is marked as incomplete.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use imgfmt::storage::MemoryStorage;
    /// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
    ///
    /// # fn main() -> imgfmt::Result<()> {
    /// let storage = Arc::new(MemoryStorage::from_bytes(&vec![0xaa; 1 << 20]));
    /// let new = Image::create_in_storage(storage.clone(), &CreateOptions::new(Format::Qcow2, 1 << 30))?;
    /// assert!(Image::from_storage(storage.clone(), &OpenOptions::new()).is_err());
    /// new.complete()?;
    /// assert_eq!(Image::from_storage(storage, &OpenOptions::new())?.size(), 1 << 30);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`create_on_device`](Self::create_on_device). A relative name of a backing file is an
    /// error, because it leads nowhere.
    pub fn create_in_storage(
        storage: Arc<dyn Storage>,
        options: &CreateOptions,
    ) -> Result<NewOnDevice> {
        let options = with_read_key(options)?;
        let (size, content) = plan(Path::new(""), &options)?;
        NewOnDevice::begin_in(storage, &options, size, &content)
    }
}

/// Makes a new file of the image's kind, or an image on a block device, and opens it. An existing
/// file is never touched.
fn create(path: &Path, options: &CreateOptions) -> Result<Image> {
    let options = &with_read_key(options).map_err(|error| error.with_path(path))?;
    let mut open = writable(path, options);
    if is_block_device(path) {
        let new = create_on_device(path, options)?;
        new.preallocate()?;
        new.complete()?;
        open.is_synced = true;
        return Image::open(path, &open);
    }
    let syncs = open.cache != CacheMode::Unsafe;
    if formats::entry(options.format).is_some() {
        return create_foreign(path, options, &open);
    }
    let mut made = NewFiles::new(syncs);
    let (size, content) = plan(path, options)?;
    if let Some(data_path) = data_file(path, options) {
        made.create(&data_path, |file| file.set_len(size))?;
    }
    made.create(path, |file| fill(file, steps(options, size, &content, syncs)))?;
    preallocate(path, options, &open)?;
    // Preallocation is not synced.
    open.is_synced = syncs && options.preallocation != Preallocation::Falloc;
    let image = Image::open(path, &open)?;
    if syncs {
        made.sync_names()?;
    }
    made.keep();
    Ok(image)
}

/// The path of the data file of a new image, if it gets one.
fn data_file(path: &Path, options: &CreateOptions) -> Option<PathBuf> {
    let (name, _) = options.data_file.as_ref()?;
    Some(path.parent().map_or_else(|| name.into(), |directory| directory.join(name)))
}

/// Begins an image on a block device.
fn create_on_device(path: &Path, options: &CreateOptions) -> Result<NewOnDevice> {
    if !is_block_device(path) {
        return Err(invalid("it is not a block device").with_path(path));
    }
    if let Some((name, _)) = &options.backing {
        let backing = path.parent().map_or_else(|| name.into(), |directory| directory.join(name));
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

/// The size of the disk and the metadata of a new image, if the options do not contradict each
/// other.
fn plan(path: &Path, options: &CreateOptions) -> Result<(u64, Parts)> {
    let named = |error: Error| match path.as_os_str().is_empty() {
        // It is in a storage.
        true => error,
        false => error.with_path(path),
    };
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
        if matches!(options.open.backing, BackingFile::Ignored) {
            // It need not exist; but where it does, the new image must be one that can be opened.
            check_below(path, name, *format, options).map_err(named)?;
        } else {
            backing_size(path, name, *format, options).map_err(named)?;
        }
    }
    refuse_contradicting_encryption(options).map_err(named)?;
    let mut content = match options.format {
        Format::Luks if options.backing.is_some() || options.data_file.is_some() => {
            return Err(named(invalid(
                "an encrypted volume has neither a backing file nor a data file",
            )));
        }
        Format::Luks if !size.is_multiple_of(SECTOR) => {
            let detail = "the size of an encrypted volume has to be a multiple of 512 bytes";
            return Err(named(invalid(detail)));
        }
        Format::Luks => vec![(0, vec![0; NEW_HEADER_LENGTH as usize])],
        Format::Raw if options.backing.is_some() => {
            return Err(named(invalid("a raw image cannot have a backing file")));
        }
        Format::Raw => Vec::new(),
        Format::Qcow2 => qcow2::layout(size, options).map_err(named)?,
        other => {
            let advice = match other.can_be_made() {
                true => {
                    "are made in files only; make the image in a file and copy it to the device"
                }
                false => "cannot be made; make a qcow2 image",
            };
            let detail = format!("{} images {advice}", other.description());
            return Err(named(Error::new(ErrorKind::Unsupported, "create", detail)));
        }
    };
    if size > i64::MAX as u64 - NEW_HEADER_LENGTH {
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
    if let (Some(key), Some((_, place))) = (&options.encryption, content.last_mut()) {
        // The expensive step.
        let header = new_luks_header(key).map_err(named)?;
        place[..header.len()].copy_from_slice(&header);
    }
    Ok((size, content))
}

/// The options with a key that does not change any more.
#[cfg(feature = "encryption")]
fn with_read_key(options: &CreateOptions) -> Result<CreateOptions> {
    let encryption = options.encryption.as_ref().map(NewKey::read).transpose()?;
    Ok(CreateOptions { encryption, ..options.clone() })
}

#[cfg(not(feature = "encryption"))]
fn with_read_key(options: &CreateOptions) -> Result<CreateOptions> {
    Ok(options.clone())
}

#[cfg(feature = "encryption")]
fn new_luks_header(key: &NewKey) -> Result<Vec<u8>> {
    crate::crypto::luks::new_header(key)
}

#[cfg(not(feature = "encryption"))]
fn new_luks_header(_: &NewKey) -> Result<Vec<u8>> {
    let detail = "this program was built without encryption";
    Err(Error::new(ErrorKind::Unsupported, "encrypt", detail))
}

/// Preallocates as the options say.
fn preallocate(path: &Path, options: &CreateOptions, open: &OpenOptions) -> Result<()> {
    let is_raw_data = matches!(options.data_file, Some((_, DataFile::Raw)));
    // Other programs may fill a raw data file, so every cluster must be mapped to it.
    if options.format == Format::Qcow2
        && (options.preallocation != Preallocation::Off || is_raw_data)
    {
        let image = Image::open(path, open)?;
        image.preallocate()?;
        image.close()?;
    }
    match options.preallocation {
        Preallocation::Full => write_zeroes(path, options, open),
        Preallocation::Falloc => {
            let data_path = data_file(path, options).unwrap_or_else(|| path.to_owned());
            set_space_aside(&data_path).map_err(|error| {
                Error::from_io("set space aside for", error.into()).with_path(data_path)
            })
        }
        Preallocation::Off | Preallocation::Metadata => Ok(()),
    }
}

/// Makes the file system allocate the space of a complete file.
fn set_space_aside(path: &Path) -> rustix::io::Result<()> {
    let file = open_to_write(path)?;
    let length = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
    match length {
        0 => Ok(()),
        _ => rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length),
    }
}

/// The options for opening the new image. Its data file is the caller's choice.
fn writable(path: &Path, options: &CreateOptions) -> OpenOptions {
    let mut open = options.open.clone().format(options.format).access(Access::ReadWrite);
    open.snapshot = None;
    if let Some(key) = &options.encryption {
        // The first that is tried.
        open.passphrases.insert(0, key.passphrase.clone());
    }
    if let Some(data_path) = data_file(path, options) {
        open.policy = open.policy.allow_file(data_path);
    }
    open
}

fn write_zeroes(path: &Path, options: &CreateOptions, open: &OpenOptions) -> Result<()> {
    let image = Image::open(path, open)?;
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

/// What is done to fill a new file.
#[derive(Debug)]
enum Step<'a> {
    SetLength(u64),
    Write(u64, &'a [u8]),
    Sync,
}

/// How parts of a new file are written, each at its offset.
fn steps<'a>(
    options: &CreateOptions,
    size: u64,
    content: &'a [(u64, Vec<u8>)],
    syncs: bool,
) -> Vec<Step<'a>> {
    let mut steps = match options.format {
        Format::Raw => vec![Step::SetLength(size)],
        Format::Luks => vec![Step::SetLength(size + NEW_HEADER_LENGTH)],
        _ => Vec::new(),
    };
    let is_encrypted = options.encryption.is_some();
    for (offset, bytes) in content {
        // The file is an image when all keys are in it.
        let held_back = if is_encrypted && *offset == 0 { SECTOR as usize } else { 0 };
        steps.push(Step::Write(offset + held_back as u64, &bytes[held_back..]));
    }
    if let (true, Some((0, bytes))) = (is_encrypted, content.first()) {
        if syncs {
            steps.push(Step::Sync);
        }
        steps.push(Step::Write(0, &bytes[..SECTOR as usize]));
    }
    steps
}

fn fill(file: &File, steps: Vec<Step<'_>>) -> io::Result<()> {
    steps.into_iter().try_for_each(|step| match step {
        Step::SetLength(length) => file.set_len(length),
        Step::Write(offset, bytes) => file.write_all_at(bytes, offset),
        Step::Sync => file.sync_all(),
    })
}

/// Opens the backing file to verify it, and returns the size of its disk.
fn backing_size(path: &Path, name: &OsStr, format: Format, create: &CreateOptions) -> Result<u64> {
    Ok(open_below(path, name, format, create)?.top.layer().size())
}

#[cfg(test)]
#[cfg(feature = "encryption")]
mod tests;
