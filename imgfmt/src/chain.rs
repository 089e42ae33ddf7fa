//! Opening an image and its backing chain.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::driver::{BackingLayer, Chain, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::info::ImageInfo;
use crate::layer::Layer;
use crate::luks::{self, Encryption};
use crate::open_policy::{CHAIN_DEPTH_MAX, MissingFormat, Resolved};
use crate::options::{Access, BackingFile, Locking, OpenOptions};
use crate::qcow2::{self, CheckReport, Purpose, Qcow2, Repair};
use crate::raw::{FirstSector, Raw};
use crate::storage::{FileIdentity, FileStorage, Storage};

/// Opens the image in `storage` and, as far as the policy allows, the files it names.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<Chain> {
    let path = path.map(Path::to_owned);
    let top = Unopened { storage, shown: path.clone(), path, options: options.clone() };
    open_layers(top, &mut Vec::new())
}

/// Checks a qcow2 image by itself, without the files it names.
pub(crate) fn check(path: &Path, options: &OpenOptions, repair: Repair) -> Result<CheckReport> {
    let access = match repair {
        Repair::None => Access::ReadOnly,
        Repair::Leaks | Repair::All => Access::ReadWrite,
    };
    let storage = Arc::new(options.open_file(path, access)?);
    check_storage(storage, Some(path), options, repair)
}

/// The same for any storage.
pub(crate) fn check_storage(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
    repair: Repair,
) -> Result<CheckReport> {
    let access = match repair {
        Repair::None => Access::ReadOnly,
        Repair::Leaks | Repair::All => Access::ReadWrite,
    };
    let format = format_of(&*storage, options)?;
    if format != Format::Qcow2 {
        let detail = "a raw image has nothing that could be checked";
        return Err(Error::new(ErrorKind::Unsupported, "check", detail));
    }
    let options = OpenOptions { access, snapshot: None, ..options.clone() };
    let mut image = Qcow2::open(storage, path, &options, Purpose::Check)?;
    let report = image.check(repair)?;
    if report.corruptions_repaired > 0 {
        image.break_seal()?;
    }
    Ok(report)
}

/// Facts about one image; what it names is not opened.
pub(crate) fn inspect(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<ImageInfo> {
    let format = match (options.format, format_of(&*storage, options)) {
        (None, Err(error)) if error.found_format() == Some(Format::Luks) => {
            return inspect_luks(&*storage);
        }
        (_, format) => format?,
    };
    let options = OpenOptions { access: Access::ReadOnly, ..options.clone() };
    Ok(match format {
        Format::Raw => {
            let raw = Raw::new(storage, FirstSector::Free)?;
            ImageInfo { format, size: raw.size(), encryption: None, qcow2: None }
        }
        // `format_of` yields no other.
        _ => {
            let image = Qcow2::open(storage, path, &options, Purpose::Describe)?;
            let (size, encryption) = (image.size(), image.encryption()?);
            ImageInfo { format, size, encryption, qcow2: Some(image.info()?) }
        }
    })
}

/// Facts about a LUKS container, which can be described though it cannot be opened.
fn inspect_luks(storage: &dyn Storage) -> Result<ImageInfo> {
    let error = |error| Error::from_io("read the header of", error);
    let luks = luks::read(storage, 0).map_err(error)?;
    let payload = luks.as_ref().and_then(|luks| luks.payload_offset).unwrap_or(0);
    let size = storage.len().map_err(error)?.saturating_sub(payload);
    let encryption = Some(Encryption::Luks(luks));
    Ok(ImageInfo { format: Format::Luks, size, encryption, qcow2: None })
}

/// Changes the name of the backing file in one file's header.
pub(crate) fn change_backing(
    path: &Path,
    options: &OpenOptions,
    backing: Option<(&OsStr, Format)>,
) -> Result<()> {
    if let Some((name, format)) = backing {
        check_depth(path, options, name, format)?;
    }
    let storage = options.open_file(path, Access::ReadWrite)?;
    match format_of(&storage, options)? {
        Format::Qcow2 => qcow2::change_backing(&storage, backing),
        _ => {
            let detail = "a raw image cannot have a backing file";
            Err(Error::new(ErrorKind::Unsupported, "change the backing file of", detail))
        }
    }
}

/// Refuses to amend images of other formats than qcow2.
pub(crate) fn refuse_to_amend(storage: &dyn Storage, options: &OpenOptions) -> Result<()> {
    match format_of(storage, options)? {
        Format::Qcow2 => Ok(()),
        _ => {
            let detail = "only qcow2 images have a header that can be amended";
            Err(Error::new(ErrorKind::Unsupported, "amend", detail))
        }
    }
}

/// The size of the disk in what `name` would stand for in a new image at `path`, if the new image
/// could be opened above it.
pub(crate) fn named_size(path: &Path, name: &OsStr, options: &OpenOptions) -> Result<u64> {
    let (storage, below) = open_named(Some(path), name, options, Access::ReadOnly, &[])?;
    let shown = Some(below.clone().unwrap_or_else(|| name.into()));
    let layer = Unopened { storage, path: below, shown: shown.clone(), options: options.clone() };
    // The new image is a layer too.
    let opened = open_layers(layer, &mut vec![None]);
    let chain = opened.map_err(|error| named(error, shown.as_deref()))?;
    Ok(chain.top.layer().size())
}

/// What is to be opened as one layer of a chain.
struct Unopened {
    storage: Arc<dyn Storage>,
    path: Option<PathBuf>,
    /// The path, or the name that leads to something else, for errors.
    shown: Option<PathBuf>,
    options: OpenOptions,
}

/// A layer that is open.
enum Opened {
    /// The last one.
    Bottom(Driver),
    /// One that is not joined to the next one yet.
    Overlay(Box<Qcow2>, Box<Unopened>),
}

/// Opens a layer and everything below it. `files` are those above, one for each layer. Not
/// recursive: what images name must not decide how much stack is needed.
fn open_layers(mut layer: Unopened, files: &mut Vec<Option<FileIdentity>>) -> Result<Chain> {
    let mut above: Vec<(Box<Qcow2>, Option<PathBuf>)> = Vec::new();
    let mut top = loop {
        let shown = layer.shown.clone();
        let opened = open_layer(layer, files);
        match opened.map_err(|error| match (error.found_format(), above.last()) {
            // No option of the user is about its format.
            (Some(format), Some((_, overlay))) => {
                named(unreadable_backing(format.description()), overlay.as_deref())
            }
            _ => named(error, shown.as_deref()),
        })? {
            Opened::Bottom(bottom) => break bottom,
            Opened::Overlay(image, below) => {
                above.push((image, shown));
                if files.len() >= CHAIN_DEPTH_MAX {
                    return Err(too_long());
                }
                layer = *below;
            }
        }
    };
    let mut below = Vec::new();
    while let Some((mut image, shown)) = above.pop() {
        let backing = BackingLayer::from(top);
        image.attach_backing(backing.layer());
        below.insert(0, backing);
        image.begin_writing().map_err(|error| named(error, shown.as_deref()))?;
        top = Driver::Qcow2(image);
    }
    Ok(Chain { top, below })
}

/// Refuses a backing file whose chain would be too long with the image at `path` above it. Whether it can
/// be opened otherwise does not matter.
pub(crate) fn check_depth(
    path: &Path,
    options: &OpenOptions,
    name: &OsStr,
    format: Format,
) -> Result<()> {
    let options = OpenOptions {
        format: Some(format),
        access: Access::ReadOnly,
        locking: Locking::Off,
        snapshot: None,
        ..options.clone()
    };
    match named_size(path, name, &options) {
        Err(error) if error.is_chain_too_long() => Err(error),
        _ => Ok(()),
    }
}

/// That a chain has too many layers; the caller names its top.
fn too_long() -> Error {
    let detail = format!(
        "its chain of backing files would have more than {CHAIN_DEPTH_MAX} layers; make it shorter \
         with 'nbd-cli image commit' or 'image rebase', or convert it to an image that stands alone"
    );
    Error::new(ErrorKind::Unsupported, "open", detail).chain_too_long()
}

fn named(error: Error, shown: Option<&Path>) -> Error {
    match shown {
        Some(path) => error.with_path(path),
        None => error,
    }
}

fn open_layer(layer: Unopened, files: &mut Vec<Option<FileIdentity>>) -> Result<Opened> {
    let Unopened { storage, path, options, .. } = layer;
    if format_of(&*storage, &options)? == Format::Raw {
        if options.snapshot.is_some() {
            let detail = "a raw image has no snapshots";
            return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
        }
        let first_sector = match options.format {
            Some(_) => FirstSector::Free,
            None => FirstSector::Guarded,
        };
        return Ok(Opened::Bottom(Driver::Raw(Raw::new(storage, first_sector)?)));
    }
    let identity = storage.identity();
    refuse_loop(identity, files)?;
    files.push(identity);
    let path = path.as_deref();
    let mut image = Box::new(Qcow2::open(storage, path, &options, Purpose::Use)?);
    if let Some(name) = image.data_file_name() {
        let (data, _) = open_named(path, &name, &options, options.access, files)?;
        image.attach_data_file(data);
    }
    if options.backing == BackingFile::AsNamed
        && let Some((name, format)) = image.backing_name()
    {
        let below = layer_below(path, &name, format.as_deref(), &options, files)?;
        return Ok(Opened::Overlay(image, Box::new(below)));
    }
    image.begin_writing()?;
    Ok(Opened::Bottom(Driver::Qcow2(image)))
}

/// What the name of a backing file leads to.
fn layer_below(
    image: Option<&Path>,
    name: &OsStr,
    format: Option<&str>,
    options: &OpenOptions,
    files_above: &[Option<FileIdentity>],
) -> Result<Unopened> {
    let format = match (format, options.policy.missing_format()) {
        // The names of QEMU's drivers for plain files, devices and exports mean raw images too.
        (Some("file" | "host_device" | "nbd"), _) => Some(Format::Raw),
        (Some(name), _) => Some(backing_format(name)?),
        (None, MissingFormat::Probe) => None,
        (None, MissingFormat::Refuse) => {
            let detail = format!(
                "it does not say which format its backing file '{}' has; set it with \
                 'nbd-cli image rebase --unsafe -b FILE -F FORMAT', or allow probing",
                name.to_string_lossy().escape_debug()
            );
            return Err(Error::new(ErrorKind::PolicyDenied, "open", detail));
        }
    };
    let (storage, path) = open_named(image, name, options, Access::ReadOnly, files_above)?;
    let shown = Some(path.clone().unwrap_or_else(|| name.into()));
    let options =
        OpenOptions { format, access: Access::ReadOnly, snapshot: None, ..options.clone() };
    Ok(Unopened { storage, path, shown, options })
}

/// What the name of a backing file's format stands for, if that can be read.
fn backing_format(name: &str) -> Result<Format> {
    match Format::from_name(name) {
        Some(format) if format.is_supported() => Ok(format),
        Some(format) => Err(unreadable_backing(format.description())),
        None => Err(unreadable_backing(&format!("'{}'", name.escape_debug()))),
    }
}

fn unreadable_backing(format: &str) -> Error {
    let detail = format!(
        "its backing file is a {format} image, which cannot be read; convert the backing file to \
         qcow2 and set its new name with 'nbd-cli image rebase --unsafe'"
    );
    Error::new(ErrorKind::Unsupported, "open", detail)
}

fn open_named(
    image: Option<&Path>,
    name: &OsStr,
    options: &OpenOptions,
    access: Access,
    files_above: &[Option<FileIdentity>],
) -> Result<(Arc<dyn Storage>, Option<PathBuf>)> {
    match options.policy.resolve(image, name)? {
        Resolved::Storage(storage) => Ok((storage, None)),
        Resolved::File(path) => {
            // Before it is locked: the lock of the image above would only say that it is busy.
            let identity = FileStorage::identity_of(&path);
            refuse_loop(identity, files_above).map_err(|error| error.with_path(&*path))?;
            Ok((Arc::new(options.open_file(&path, access)?), Some(path)))
        }
    }
}

fn refuse_loop(identity: Option<FileIdentity>, files_above: &[Option<FileIdentity>]) -> Result<()> {
    if identity.is_none() || !files_above.contains(&identity) {
        return Ok(());
    }
    let detail = "its chain of backing files leads back to itself";
    Err(Error::new(ErrorKind::InvalidFormat, "open", detail))
}

/// The format of what a storage holds, as the options say or as it looks: one that can be opened.
fn format_of(storage: &dyn Storage, options: &OpenOptions) -> Result<Format> {
    let (format, is_guess) = match options.format {
        Some(format) => (format, false),
        None => {
            let probed = Format::probe(storage);
            (probed.map_err(|error| Error::from_io("read the format of", error))?, true)
        }
    };
    match format.is_supported() {
        true => Ok(format),
        false => Err(Error::unsupported_format(format, is_guess)),
    }
}
