//! Creating images.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Image;
use super::on_device::{NewOnDevice, is_block_device};
use crate::access::Access;
use crate::backing_file::BackingFile;
use crate::cache_mode::CacheMode;
use crate::chain;
use crate::create_options::{CreateOptions, DataFile, Preallocation, invalid};
use crate::driver::{Chain, Driver, Layers, NamedFile, NewImage};
use crate::error::{Error, ErrorKind, Result};
use crate::foreign_options::Subformat;
use crate::format::Format;
use crate::formats::{self, NewForeign, Planned};
use crate::luks::{NEW_HEADER_LENGTH, SECTOR};
use crate::options::OpenOptions;
use crate::passphrase::NewKey;
use crate::qcow2;
use crate::storage::{Durability, FileStorage, Storage as _};
use crate::units::GuestOffset;

impl Image {
    /// Creates an image in a new file, or on a block device, and opens it for writing as
    /// [`CreateOptions::open`] says. The previous content of a device is lost and is not visible in
    /// the image.
    ///
    /// The new image is on stable storage on return, except with
    /// [`CacheMode::Unsafe`](crate::CacheMode::Unsafe). Dropping it without a change syncs nothing.
    /// An image of [compressed grains](crate::Subformat::StreamOptimized) is complete, and on stable
    /// storage, only when it is [closed](Self::close).
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
        return create_foreign(path, options, &open, syncs);
    }
    let mut made = NewFiles { paths: Vec::new(), syncs };
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

/// Makes a new file of another program's format, which is complete when it is closed.
fn create_foreign(
    path: &Path,
    options: &CreateOptions,
    open: &OpenOptions,
    syncs: bool,
) -> Result<Image> {
    let named = |error: Error| error.with_path(path);
    let planned = plan_foreign(path, options).map_err(named)?;
    let length = (planned.length)(0);
    // The contents are put on stable storage when there are any.
    let mut made = NewFiles { paths: Vec::new(), syncs: false };
    made.create(path, |_| Ok(()))?;
    let storage = Arc::new(open.open_file(path, Access::ReadWrite)?);
    let direct = storage.direct_alignment();
    let file =
        storage.identity().map(|identity| NamedFile { layer: 0, path: path.to_owned(), identity });
    let image = (planned.begin)(storage, options.give_up).map_err(named)?;
    if options.preallocation != Preallocation::Off {
        set_space_aside_for(path, length)?;
    }
    // Others are complete, and readable, only when they are closed.
    if syncs && image.filled_in_order().is_none() {
        image.flush().map_err(named)?;
    }
    let top = Driver::New(NewImage { format: options.format, image });
    let files = file.into_iter().collect();
    let (below, others, opened) = Default::default();
    let chain = Chain::new(top, Layers { below, files, others, opened });
    let cache = open.cache;
    let image = Image { chain, path: Some(path.into()), access: Access::ReadWrite, cache, direct };
    if (options.give_up)() {
        return Err(Error::new(ErrorKind::Io, "create", "it was given up").with_path(path));
    }
    if syncs {
        made.sync_names()?;
    }
    made.keep();
    Ok(image)
}

/// Plans a new image of another program's format, as far as that is possible with these options.
pub(crate) fn plan_foreign(path: &Path, options: &CreateOptions) -> Result<Planned> {
    let what = options.format.description();
    let Some(plan) = formats::entry(options.format).and_then(|entry| entry.plan) else {
        let detail = format!("{what} images cannot be made; make a qcow2 image");
        return Err(Error::new(ErrorKind::Unsupported, "create", detail));
    };
    if options.backing.is_some() || options.data_file.is_some() {
        let detail = format!("a new {what} image has neither a backing file nor a data file");
        return Err(invalid(detail));
    }
    refuse_contradicting_encryption(options)?;
    let Some(size) = options.size else {
        return Err(invalid("a size is needed where no backing file has one"));
    };
    let is_fixed = options.foreign.subformat == Subformat::Fixed;
    match options.preallocation {
        Preallocation::Off => {}
        Preallocation::Falloc if is_fixed => {}
        Preallocation::Falloc => {
            let detail = format!("space can be set aside for fixed {what} images only");
            return Err(invalid(detail));
        }
        Preallocation::Metadata | Preallocation::Full => {
            let detail = format!(
                "this preallocation is not possible for {what} images; make a fixed one, for which \
                 space can be set aside (falloc)"
            );
            return Err(invalid(detail));
        }
    }
    let name = path.file_name().unwrap_or_default().to_owned();
    plan(&NewForeign { size, name, options: &options.foreign })
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
        if matches!(options.open.backing, BackingFile::Ignored) {
            // It need not exist; but where it does, the new image must not be one too many.
            let open = options.open.clone().backing(BackingFile::AsNamed);
            chain::check_depth(path, &open, name, *format).map_err(named)?;
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

/// Refuses encryption where it is not possible, and preallocation that would show noise.
fn refuse_contradicting_encryption(options: &CreateOptions) -> Result<()> {
    if options.encryption.is_none() {
        return match options.format {
            Format::Luks => {
                let detail = "an encrypted volume needs a passphrase";
                Err(Error::new(ErrorKind::KeyRequired, "create", detail))
            }
            _ => Ok(()),
        };
    }
    Err(invalid(match (options.format, options.preallocation) {
        (Format::Luks, Preallocation::Metadata) => {
            "an encrypted volume has no metadata to preallocate; set its space aside (falloc) or write \
             zeroes (full)"
        }
        (Format::Qcow2, _) if options.data_file.is_some() => "an encrypted image has no data file",
        (Format::Qcow2, Preallocation::Metadata | Preallocation::Falloc) => {
            "the clusters of an encrypted image would read as noise with this preallocation; leave it out, \
             or let zeroes be written (full)"
        }
        (Format::Luks | Format::Qcow2, _) => return Ok(()),
        _ => "only qcow2 images and LUKS volumes are encrypted",
    }))
}

/// New files that are removed again unless everything succeeds.
struct NewFiles {
    paths: Vec<PathBuf>,
    /// Whether the content of each is put on stable storage.
    syncs: bool,
}

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
        self.paths.push(path.to_owned());
        let sync = |()| if self.syncs { file.sync_all() } else { Ok(()) };
        fill(&file).and_then(sync).map_err(io_error)
    }

    /// Puts the names of the files on stable storage.
    fn sync_names(&self) -> Result<()> {
        for path in &self.paths {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let directory = File::open(directory.unwrap_or(Path::new(".")));
            let synced = directory.and_then(|directory| directory.sync_all());
            synced.map_err(|error| Error::from_io("create", error).with_path(path))?;
        }
        Ok(())
    }

    fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            // An incomplete image is useless. The error that led here is reported, not this one.
            let _ = std::fs::remove_file(path);
        }
    }
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

/// The same for a file that will have this length.
fn set_space_aside_for(path: &Path, length: u64) -> Result<()> {
    let set_aside = open_to_write(path).and_then(|file| {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length.max(1))
    });
    set_aside.map_err(|error| Error::from_io("set space aside for", error.into()).with_path(path))
}

fn open_to_write(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
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
    let options = OpenOptions::new()
        .format(format)
        .locking(create.open.locking)
        .policy(create.open.policy.clone());
    let options = OpenOptions { passphrases: create.open.passphrases.clone(), ..options };
    chain::named_size(path, name, &options)
}

#[cfg(test)]
#[cfg(feature = "encryption")]
mod tests;
