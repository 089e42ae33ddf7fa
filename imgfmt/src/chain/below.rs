//! Finds the layer below an image: by the image's header, or by the caller's options.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::access::Access;
use crate::backing_file::{BackingFile, BackingOptions, NameTarget};
use crate::driver::{BackingLayer, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::formats::Parent;
use crate::open_policy::MissingFormat;
use crate::options::{IncompleteDisk, OpenOptions};
use crate::qcow2::Purpose;
use crate::storage::{FileIdentity, FileStorage, Part, Storage};

/// What is to be opened as one layer of a chain.
pub(super) struct Unopened {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) path: Option<PathBuf>,
    /// The name by which the layer above has led to this one.
    pub(super) name: Option<OsString>,
    /// The path or the name of the layer, for errors.
    pub(super) shown: Option<PathBuf>,
    pub(super) options: OpenOptions,
}

/// What an image says of the layer below it.
pub(super) struct Named {
    /// The names under which it may be found, the most likely one first.
    names: Vec<OsString>,
    format: RecordedFormat,
}

/// What an image says of the format of the layer below it.
enum RecordedFormat {
    Missing,
    /// Images of its own format never say it.
    NeverSaid,
    /// In a word that may mean nothing.
    Word(String),
    Certain(Format),
}

impl From<(OsString, Option<String>)> for Named {
    fn from((name, format): (OsString, Option<String>)) -> Self {
        let format = format.map_or(RecordedFormat::Missing, RecordedFormat::Word);
        Self { names: vec![name], format }
    }
}

impl From<&Parent> for Named {
    fn from(parent: &Parent) -> Self {
        let format = parent.format.map_or(RecordedFormat::NeverSaid, RecordedFormat::Certain);
        Self { names: parent.names.clone(), format }
    }
}

/// The backing file of an image, as the options say or else the image, which is at `path`.
pub(super) fn layer_below(
    named: Option<Named>,
    path: Option<&Path>,
    options: &OpenOptions,
    files_above: &[Option<FileIdentity>],
    purpose: Purpose,
) -> Result<Option<Unopened>> {
    let (names, recorded) = named
        .map_or_else(|| (Vec::new(), RecordedFormat::Missing), |named| (named.names, named.format));
    let given = match &options.backing {
        BackingFile::Ignored => return Ok(None),
        BackingFile::AsNamed => BackingOptions::default(),
        BackingFile::Given(given) => BackingOptions::clone(given),
    };
    let (target, name) = match (given.target, names.first()) {
        (Some(target), _) => (target, None),
        (None, Some(_)) => {
            let (target, name) = first_that_exists(&names, path, options)?;
            (target, Some(name))
        }
        (None, None) if matches!(options.backing, BackingFile::AsNamed) => return Ok(None),
        (None, None) => {
            let detail = "options are given for its backing file, but no file, and it names none";
            return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
        }
    };
    let shown = name.clone().map_or_else(|| "the given backing file".into(), PathBuf::from);
    let format = match given.format {
        Some(format) => Some(format),
        None => format_below(&recorded, &shown, options, purpose)?,
    };
    let mut options = OpenOptions {
        format,
        access: Access::ReadOnly,
        snapshot: None,
        locking: given.locking.unwrap_or(options.locking),
        cache: given.cache.unwrap_or(options.cache),
        metadata_cache_bytes: given.metadata_cache_bytes.or(options.metadata_cache_bytes),
        backing: given.backing,
        encryption: given.encryption,
        known_as: None,
        part: Part::default(),
        incomplete: IncompleteDisk::Refused,
        ..options.clone()
    };
    let opened = open_target(target, &options, Access::ReadOnly, files_above)?;
    let OpenTarget { storage, path, backing } = opened;
    if let BackingFile::AsNamed = options.backing {
        options.backing = backing;
    }
    let shown = Some(path.clone().unwrap_or(shown));
    Ok(Some(Unopened { storage, path, name, shown, options }))
}

/// What the first name leads to that there is something for; if there is none, the error of the
/// first.
fn first_that_exists(
    names: &[OsString],
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<(NameTarget, OsString)> {
    let mut first_error = None;
    for name in names {
        let found = options.policy.resolve(path, name).and_then(|target| match &target {
            // With one name the error of opening it says all.
            NameTarget::File(file) if names.len() > 1 => {
                let found = std::fs::metadata(file).map(|_| target.clone());
                found.map_err(|error| Error::from_io("open", error).with_path(file))
            }
            _ => Ok(target),
        });
        match found {
            Ok(target) => return Ok((target, name.clone())),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    let nothing = || Error::new(ErrorKind::InvalidFormat, "open", "it does not name its parent");
    Err(first_error.unwrap_or_else(nothing))
}

/// Refuses a layer that is not the one that the image above it was made over.
pub(super) fn refuse_stranger(image: &Driver, below: &BackingLayer) -> Result<()> {
    let Some((wanted, found)) = image.parent_identity().zip(below.identity()) else {
        return Ok(());
    };
    if wanted == found {
        return Ok(());
    }
    let detail = "its parent is another image than the one it was made over, or was changed since; \
                  without the right one its disk cannot be read";
    Err(Error::new(ErrorKind::InvalidFormat, "open", detail))
}

/// The format of a backing file of which the image records the format `recorded`.
fn format_below(
    recorded: &RecordedFormat,
    shown: &Path,
    options: &OpenOptions,
    purpose: Purpose,
) -> Result<Option<Format>> {
    match (recorded, options.policy.missing_format()) {
        (RecordedFormat::Certain(format), _) => Ok(Some(*format)),
        (RecordedFormat::Word(name), _) => match Format::from_name(name) {
            // The names of QEMU's drivers for plain files, devices and exports mean raw images too.
            None if matches!(name.as_str(), "file" | "host_device" | "nbd") => {
                Ok(Some(Format::Raw))
            }
            Some(format) if format.is_supported() => Ok(Some(format)),
            Some(Format::Luks) if purpose == Purpose::Describe => Ok(Some(Format::Luks)),
            Some(format) => Err(unreadable_backing(shown, format)),
            None => Err(unknown_backing(shown, name)),
        },
        (_, MissingFormat::Probe) => Ok(None),
        (missing, MissingFormat::Refuse) => {
            let advice = match missing {
                RecordedFormat::NeverSaid => "allow probing",
                _ => {
                    "set it with 'nbd-cli image rebase --unsafe -b FILE -F FORMAT', or allow probing"
                }
            };
            let detail = format!(
                "it does not say which format its backing file '{}' has; {advice}",
                shown.to_string_lossy().escape_debug()
            );
            Err(Error::new(ErrorKind::PolicyDenied, "open", detail))
        }
    }
}

/// The error of a backing file whose format is recognised but not supported.
pub(super) fn unreadable_backing(shown: &Path, format: Format) -> Error {
    let advice = match format {
        Format::Luks => "open it with 'cryptsetup open', and set the device that this makes",
        _ => "convert it to qcow2, and set its new name",
    };
    refused_backing(shown, format.description(), advice)
}

fn unknown_backing(shown: &Path, name: &str) -> Error {
    let advice = "convert it to qcow2, and set its new name";
    refused_backing(shown, &format!("'{}'", name.escape_debug()), advice)
}

fn refused_backing(shown: &Path, format: &str, advice: &str) -> Error {
    let detail = format!(
        "its backing file '{}' is a {format} image, which cannot be read; {advice} with 'nbd-cli \
         image rebase --unsafe'",
        shown.to_string_lossy().escape_debug()
    );
    Error::new(ErrorKind::Unsupported, "open", detail)
}

/// The storage that a name or the caller's options led to.
pub(super) struct OpenTarget {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) path: Option<PathBuf>,
    pub(super) backing: BackingFile,
}

/// Opens a file that the policy allows or the caller has named.
pub(super) fn open_target(
    mut target: NameTarget,
    options: &OpenOptions,
    access: Access,
    files_above: &[Option<FileIdentity>],
) -> Result<OpenTarget> {
    let (mut backing, mut part) = (BackingFile::AsNamed, Part::default());
    loop {
        match target {
            NameTarget::WithBacking(inner, treatment) => (target, backing) = (*inner, treatment),
            NameTarget::Part(inner, of_inner) => {
                let inside = part.within(of_inner);
                part = inside.map_err(|why| Error::new(ErrorKind::InvalidInput, "open", why))?;
                target = *inner;
            }
            NameTarget::Storage(storage) => {
                let storage = part.of(storage).map_err(|error| Error::from_io("open", error))?;
                return Ok(OpenTarget { storage, path: None, backing });
            }
            NameTarget::File(path) => {
                // Before locking: the lock of the image above would make it look busy.
                let identity = FileStorage::identity_of(&path);
                if part.is_whole() {
                    refuse_loop(identity, files_above).map_err(|error| error.with_path(&*path))?;
                }
                let file = Arc::new(options.open_file(&path, access)?);
                let storage = part
                    .of(file)
                    .map_err(|error| Error::from_io("open", error).with_path(&*path))?;
                return Ok(OpenTarget { storage, path: Some(path), backing });
            }
            NameTarget::Denied => {
                let detail = "the backing file is not allowed";
                return Err(Error::new(ErrorKind::PolicyDenied, "open", detail));
            }
        }
    }
}

pub(super) fn refuse_loop(
    identity: Option<FileIdentity>,
    files_above: &[Option<FileIdentity>],
) -> Result<()> {
    if identity.is_none() || !files_above.contains(&identity) {
        return Ok(());
    }
    let detail = "its chain of backing files leads back to itself";
    Err(Error::new(ErrorKind::InvalidFormat, "open", detail).leads_back())
}
