//! Finds the layer below an image: by the image's header, or by the caller's options.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::access::Access;
use crate::backing_file::{BackingFile, BackingOptions, NameTarget};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::open_policy::MissingFormat;
use crate::options::{IncompleteDisk, OpenOptions};
use crate::qcow2::{Purpose, Qcow2};
use crate::storage::{FileIdentity, FileStorage, Storage};

/// What is to be opened as one layer of a chain.
pub(super) struct Unopened {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) path: Option<PathBuf>,
    /// The path or the name of the layer, for errors.
    pub(super) shown: Option<PathBuf>,
    pub(super) options: OpenOptions,
}

/// The backing file of an image, from the options or else from the image.
pub(super) fn layer_below(
    image: &Qcow2,
    path: Option<&Path>,
    options: &OpenOptions,
    files_above: &[Option<FileIdentity>],
    purpose: Purpose,
) -> Result<Option<Unopened>> {
    let (name, recorded) = image.backing_name().unzip();
    let given = match &options.backing {
        BackingFile::Ignored => return Ok(None),
        BackingFile::AsNamed => BackingOptions::default(),
        BackingFile::Given(given) => BackingOptions::clone(given),
    };
    let (target, shown) = match (given.target, name) {
        (Some(target), _) => (target, PathBuf::from("the given backing file")),
        (None, Some(name)) => (options.policy.resolve(path, &name)?, name.into()),
        (None, None) if matches!(options.backing, BackingFile::AsNamed) => return Ok(None),
        (None, None) => {
            let detail = "options are given for its backing file, but no file, and it names none";
            return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
        }
    };
    let format = match given.format {
        Some(format) => Some(format),
        None => format_below(recorded.flatten().as_deref(), &shown, options, purpose)?,
    };
    let mut options = OpenOptions {
        format,
        access: Access::ReadOnly,
        snapshot: None,
        locking: given.locking.unwrap_or(options.locking),
        cache: given.cache.unwrap_or(options.cache),
        metadata_cache_bytes: given.metadata_cache_bytes.or(options.metadata_cache_bytes),
        backing: given.backing,
        incomplete: IncompleteDisk::Refused,
        ..options.clone()
    };
    let opened = open_target(target, &options, Access::ReadOnly, files_above)?;
    let OpenTarget { storage, path, backing } = opened;
    if let BackingFile::AsNamed = options.backing {
        options.backing = backing;
    }
    let shown = Some(path.clone().unwrap_or(shown));
    Ok(Some(Unopened { storage, path, shown, options }))
}

/// The format of a backing file of which the image records the format `recorded`.
fn format_below(
    recorded: Option<&str>,
    shown: &Path,
    options: &OpenOptions,
    purpose: Purpose,
) -> Result<Option<Format>> {
    match (recorded, options.policy.missing_format()) {
        // The names of QEMU's drivers for plain files, devices and exports mean raw images too.
        (Some("file" | "host_device" | "nbd"), _) => Ok(Some(Format::Raw)),
        (Some(name), _) => match Format::from_name(name) {
            Some(format) if format.is_supported() => Ok(Some(format)),
            Some(Format::Luks) if purpose == Purpose::Describe => Ok(Some(Format::Luks)),
            Some(format) => Err(unreadable_backing(shown, format)),
            None => Err(unknown_backing(shown, name)),
        },
        (None, MissingFormat::Probe) => Ok(None),
        (None, MissingFormat::Refuse) => {
            let detail = format!(
                "it does not say which format its backing file '{}' has; set it with \
                 'nbd-cli image rebase --unsafe -b FILE -F FORMAT', or allow probing",
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
    let mut backing = BackingFile::AsNamed;
    loop {
        match target {
            NameTarget::WithBacking(inner, treatment) => (target, backing) = (*inner, treatment),
            NameTarget::Storage(storage) => {
                return Ok(OpenTarget { storage, path: None, backing });
            }
            NameTarget::File(path) => {
                // Before locking: the lock of the image above would make it look busy.
                let identity = FileStorage::identity_of(&path);
                refuse_loop(identity, files_above).map_err(|error| error.with_path(&*path))?;
                let storage = Arc::new(options.open_file(&path, access)?);
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
    Err(Error::new(ErrorKind::InvalidFormat, "open", detail))
}
