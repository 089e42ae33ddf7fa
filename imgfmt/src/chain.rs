//! Opening an image and everything below it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::driver::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::info::ImageInfo;
use crate::open_policy::{CHAIN_DEPTH_MAX, MissingFormat, Resolved};
use crate::options::{Access, OpenOptions};
use crate::qcow2::{self, CheckReport, Purpose, Qcow2, Repair};
use crate::raw::{FirstSector, Raw};
use crate::storage::{FileIdentity, FileStorage, Storage};

/// Opens the image in `storage` and, as far as the policy allows, the files it names.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<(Box<dyn Driver>, Format)> {
    let mut files_above = Vec::new();
    open_layer(storage, path, options, &mut files_above)
}

/// Checks a qcow2 image by itself, without the files it names.
pub(crate) fn check(path: &Path, options: &OpenOptions, repair: Repair) -> Result<CheckReport> {
    let access = match repair {
        Repair::None => Access::ReadOnly,
        Repair::Leaks | Repair::All => Access::ReadWrite,
    };
    let storage = Arc::new(FileStorage::open(path, access, options.locking)?);
    let format = format_of(&*storage, options)?;
    if format != Format::Qcow2 {
        let detail = "a raw image has nothing that could be checked";
        return Err(Error::new(ErrorKind::Unsupported, "check", detail));
    }
    let options = OpenOptions { access, snapshot: None, ..options.clone() };
    Qcow2::open(storage, Some(path), &options, Purpose::Check)?.check(repair)
}

/// Facts about one image; what it names is not opened.
pub(crate) fn inspect(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<ImageInfo> {
    let format = format_of(&*storage, options)?;
    let options = OpenOptions { access: Access::ReadOnly, ..options.clone() };
    Ok(match format {
        Format::Raw => {
            let raw = Raw::new(storage, FirstSector::Free)?;
            ImageInfo { format, size: raw.size(), qcow2: None }
        }
        // `format_of` yields no other.
        _ => {
            let image = Qcow2::open(storage, path, &options, Purpose::Check)?;
            ImageInfo { format, size: image.size(), qcow2: Some(image.info()?) }
        }
    })
}

/// Changes the name of the backing file in one file's header.
pub(crate) fn change_backing(
    path: &Path,
    options: &OpenOptions,
    backing: Option<(&str, Format)>,
) -> Result<()> {
    let storage = FileStorage::open(path, Access::ReadWrite, options.locking)?;
    match format_of(&storage, options)? {
        Format::Qcow2 => qcow2::change_backing(&storage, backing),
        _ => {
            let detail = "a raw image cannot have a backing file";
            Err(Error::new(ErrorKind::Unsupported, "change the backing file of", detail))
        }
    }
}

/// The size of the disk in what `name` would stand for in the image at `path`.
pub(crate) fn named_size(path: &Path, name: &str, options: &OpenOptions) -> Result<u64> {
    let (storage, below) = open_named(Some(path), name, options, Access::ReadOnly, &[])?;
    let opened = open(storage, below.as_deref(), options);
    let (driver, _) =
        opened.map_err(|error| error.with_path(below.unwrap_or_else(|| name.into())))?;
    Ok(driver.size())
}

fn open_layer(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
    files_above: &mut Vec<Option<FileIdentity>>,
) -> Result<(Box<dyn Driver>, Format)> {
    let format = format_of(&*storage, options)?;
    if format == Format::Raw {
        if options.snapshot.is_some() {
            let detail = "a raw image has no snapshots";
            return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
        }
        let first_sector = match options.format {
            Some(_) => FirstSector::Free,
            None => FirstSector::Guarded,
        };
        return Ok((Box::new(Raw::new(storage, first_sector)?), format));
    }
    let identity = storage.identity();
    refuse_loop(identity, files_above)?;
    if files_above.len() >= CHAIN_DEPTH_MAX {
        let detail = format!("its chain of backing files has more than {CHAIN_DEPTH_MAX} layers");
        return Err(Error::new(ErrorKind::Unsupported, "open", detail));
    }
    files_above.push(identity);
    let mut image = Qcow2::open(storage, path, options, Purpose::Use)?;
    if let Some(name) = image.data_file_name()? {
        let (data, _) = open_named(path, name, options, options.access, files_above)?;
        image.attach_data_file(data);
    }
    if let Some((name, format)) = image.backing_name() {
        let backing = open_backing(path, name, format, options, files_above)?;
        image.attach_backing(backing);
    }
    image.begin_writing()?;
    Ok((Box::new(image), format))
}

fn open_backing(
    image: Option<&Path>,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
    files_above: &mut Vec<Option<FileIdentity>>,
) -> Result<Box<dyn Driver>> {
    let format = match (format, options.policy.missing_format()) {
        // The names of QEMU's drivers for plain files, devices and exports mean raw images too.
        (Some("file" | "host_device" | "nbd"), _) => Some(Format::Raw),
        (Some(name), _) => Some(backing_format(name)?),
        (None, MissingFormat::Probe) => None,
        (None, MissingFormat::Refuse) => {
            let detail = format!(
                "it does not say which format its backing file '{}' has; set it with \
                 'nbd-cli image rebase --unsafe -b FILE -F FORMAT', or allow probing",
                name.escape_debug()
            );
            return Err(Error::new(ErrorKind::PolicyDenied, "open", detail));
        }
    };
    let (storage, path) = open_named(image, name, options, Access::ReadOnly, files_above)?;
    let below = OpenOptions { format, access: Access::ReadOnly, snapshot: None, ..options.clone() };
    let result = open_layer(storage, path.as_deref(), &below, files_above);
    let (driver, _) = result.map_err(|error| match error.found_format() {
        Some(format) => unreadable_backing(format.description()),
        None => error.with_path(path.unwrap_or_else(|| name.into())),
    })?;
    Ok(driver)
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
    name: &str,
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
            let storage =
                FileStorage::open(&path, access, options.locking)?.with_syncing(options.syncing);
            Ok((Arc::new(storage), Some(path)))
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
