//! Opening an image and its backing chain.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::below::{
    Named, OpenTarget, Unopened, layer_below, open_target, refuse_loop, refuse_stranger,
    unreadable_backing,
};
use crate::access::Access;
use crate::backing_file::{BackingFile, NameTarget};
#[cfg(feature = "encryption")]
use crate::crypto;
use crate::driver::{BackingLayer, Chain, Driver, Foreign, LayerFile, Layers, NamedFile};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::formats::{self, Opening};
use crate::open_policy::CHAIN_DEPTH_MAX;
use crate::options::OpenOptions;
use crate::probe::probe_named;
use crate::qcow2::{Purpose, Qcow2};
use crate::raw::{FirstSector, Raw};
use crate::storage::{FileIdentity, Storage};

/// Opens the image in `storage` and, as far as the policy allows, the files it names.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<Chain> {
    let storage = options.part_of(storage)?;
    let path = path.map(Path::to_owned);
    let top = Unopened { storage, name: None, shown: path.clone(), path, options: options.clone() };
    open_layers(top, &mut Files::default())
}

/// Opens what the backing file name `name` would refer to in a new image at `path`, if the new
/// image could be opened above it.
pub(crate) fn open_named(path: &Path, name: &OsStr, options: &OpenOptions) -> Result<Chain> {
    let target = options.policy.resolve(Some(path), name)?;
    let opened = open_target(target, options, Access::ReadOnly, &[])?;
    let OpenTarget { storage, path: below, backing } = opened;
    let shown = Some(below.clone().unwrap_or_else(|| name.into()));
    let options = OpenOptions { backing, ..options.clone() };
    let layer = Unopened { storage, path: below, name: None, shown: shown.clone(), options };
    // The new image is a layer too.
    let mut files = Files::below(None);
    let opened = open_layers(layer, &mut files);
    opened.map_err(|error| named(error, shown.as_deref()))
}

/// A layer that is open.
enum Opened {
    /// The last one.
    Bottom(Driver),
    /// One that is not joined to the next one yet.
    Overlay(Driver, Box<Unopened>),
}

/// The files that were opened so far.
#[derive(Default)]
pub(super) struct Files {
    /// Those of the layers above, one for each.
    pub(super) layers: Vec<Option<FileIdentity>>,
    /// Those that have names, also data files.
    named: Vec<NamedFile>,
    /// The others, as they are called where they are named, with the numbers of their layers.
    others: Vec<(usize, PathBuf)>,
    /// Those of the layers that were opened.
    opened: Vec<LayerFile>,
}

impl Files {
    /// Those above a layer that is to be below the image in this file.
    pub(super) fn below(image: Option<FileIdentity>) -> Self {
        Self { layers: vec![image], ..Self::default() }
    }

    /// Notes a file of the last layer; `shown` is what a file without a path is called.
    pub(super) fn note(
        &mut self,
        path: Option<&Path>,
        identity: Option<FileIdentity>,
        shown: &Path,
    ) {
        let layer = self.opened.len().saturating_sub(1);
        if let (Some(path), Some(identity)) = (path, identity) {
            self.named.push(NamedFile { layer, path: path.to_owned(), identity });
        } else {
            self.others.push((layer, path.unwrap_or(shown).to_owned()));
        }
    }
}

/// Opens a layer and everything below it. `files` are those above. Not recursive, so that untrusted
/// images cannot exhaust the stack.
fn open_layers(mut layer: Unopened, files: &mut Files) -> Result<Chain> {
    let mut above: Vec<(Driver, Option<PathBuf>)> = Vec::new();
    let mut top = loop {
        let shown = layer.shown.clone();
        let opened = open_layer(layer, files);
        let overlay = above.last().map(|(_, shown)| shown.as_deref());
        match opened.map_err(|error| of_layer(error, shown.as_deref(), overlay))? {
            Opened::Bottom(bottom) => break bottom,
            Opened::Overlay(image, below) => {
                above.push((image, shown));
                if files.layers.len() >= CHAIN_DEPTH_MAX {
                    return Err(too_long());
                }
                layer = *below;
            }
        }
    };
    let mut layers = Layers {
        below: Vec::new(),
        files: std::mem::take(&mut files.named),
        others: std::mem::take(&mut files.others),
        opened: std::mem::take(&mut files.opened),
    };
    while let Some((mut image, shown)) = above.pop() {
        let backing = BackingLayer::from(top);
        let joined = refuse_stranger(&image, &backing).and_then(|()| {
            layers.below.insert(0, backing);
            match above.is_empty() {
                true => image.attach_backing(&layers.below),
                false => image.fix_backing(&layers.below[0]),
            }
            image.begin_writing()
        });
        joined.map_err(|error| named(error, shown.as_deref()))?;
        top = image;
    }
    Ok(Chain::new(top, layers))
}

/// The error of a chain with too many layers; the caller adds the path of its top.
pub(super) fn too_long() -> Error {
    let detail = format!(
        "its chain of backing files would have more than {CHAIN_DEPTH_MAX} layers; make it shorter \
         with 'nbd-cli image commit' or 'image rebase', or convert it to an image that stands alone"
    );
    Error::new(ErrorKind::Unsupported, "open", detail).chain_too_long()
}

/// The error of the layer that is named `shown`, below an image that is named `overlay`.
pub(super) fn of_layer(
    error: Error,
    shown: Option<&Path>,
    overlay: Option<Option<&Path>>,
) -> Error {
    match (error.found_format(), overlay) {
        // No option of the user is about its format.
        (Some(format), Some(overlay)) => {
            named(unreadable_backing(shown.unwrap_or(Path::new("")), format), overlay)
        }
        _ => named(error, shown),
    }
}

pub(super) fn named(error: Error, shown: Option<&Path>) -> Error {
    match shown {
        Some(path) => error.with_path(path),
        None => error,
    }
}

fn open_layer(layer: Unopened, files: &mut Files) -> Result<Opened> {
    let Unopened { storage, path, options, shown, .. } = layer;
    let identity = storage.identity();
    let format = format_of(&*storage, shown.as_deref(), &options)?;
    files.opened.push(LayerFile { identity, format });
    files.note(path.as_deref(), identity, shown.as_deref().unwrap_or(Path::new("")));
    refuse_options(format, &options)?;
    if format == Format::Raw {
        let first_sector = match options.format {
            Some(_) => FirstSector::Free,
            None => FirstSector::Guarded,
        };
        return Ok(Opened::Bottom(Driver::Raw(Raw::new(storage, first_sector)?)));
    }
    refuse_loop(identity, &files.layers)?;
    files.layers.push(identity);
    if format == Format::Luks {
        return open_luks(storage, &options).map(Opened::Bottom);
    }
    let path = path.as_deref();
    let (mut image, name) = match format {
        Format::Qcow2 => open_qcow2(storage, path, &options, files)?,
        _ => {
            let mut open = |name: &OsStr| {
                let target = options.policy.resolve(path, name)?;
                refuse_device(&target)?;
                open_beside(target, Path::new(name), &options, files)
            };
            let opening = Opening { storage, path, files: Some(&mut open) };
            let foreign = open_foreign(format, opening)?;
            let name = foreign.image.parent().map(Named::from);
            if let (None, BackingFile::Given(_)) = (&name, &options.backing) {
                let detail = "it is an image that has nothing below it";
                return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
            }
            (Driver::Foreign(foreign), name)
        }
    };
    if let Some(below) = layer_below(name, path, &options, &files.layers, Purpose::Use)? {
        return Ok(Opened::Overlay(image, Box::new(below)));
    }
    image.begin_writing()?;
    Ok(Opened::Bottom(image))
}

/// Opens an encrypted volume.
#[cfg(feature = "encryption")]
fn open_luks(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Driver> {
    let volume = crypto::luks::unlock(&*storage, &options.passphrases)?;
    Ok(Driver::Raw(Raw::decrypted(crypto::Encrypted::new(storage, volume))?))
}

#[cfg(not(feature = "encryption"))]
fn open_luks(_: Arc<dyn Storage>, options: &OpenOptions) -> Result<Driver> {
    Err(Error::unsupported_format(Format::Luks, options.format.is_none()))
}

/// The path beside which an image keeps bits of its bitmaps: none if the file may contain others.
pub(super) fn sidecar_path<'a>(path: Option<&'a Path>, options: &OpenOptions) -> Option<&'a Path> {
    path.filter(|_| options.part.is_whole())
}

/// Opens a qcow2 image with its data file.
fn open_qcow2(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
    files: &mut Files,
) -> Result<(Driver, Option<Named>)> {
    let own_path = sidecar_path(path, options);
    let mut image = Box::new(Qcow2::open(storage, own_path, options, Purpose::Use)?);
    if let Some(name) = image.data_file_name() {
        let target = options.policy.resolve(path, &name)?;
        let data = open_beside(target, Path::new(&name), options, files)?;
        image.attach_data_file(data, options.is_synced);
    }
    let name = image.backing_name().map(Named::from);
    Ok((Driver::Qcow2(image), name))
}

/// Opens a file with a part of an image's data, which the image names.
fn open_beside(
    target: NameTarget,
    name: &Path,
    options: &OpenOptions,
    files: &mut Files,
) -> Result<Arc<dyn Storage>> {
    let opened = open_target(target, options, options.access, &files.layers)?;
    files.note(opened.path.as_deref(), opened.storage.identity(), name);
    Ok(opened.storage)
}

/// Refuses a target that exists and is not a regular file: an image of a format that is only read
/// can name a complete disk of the host, and its author does not decide that the disk is read.
fn refuse_device(target: &NameTarget) -> Result<()> {
    let file = match target {
        NameTarget::File(file) => file,
        NameTarget::Part(whole, _) => return refuse_device(whole),
        NameTarget::WithBacking(..) => {
            let detail = "the image names an image with another one below it as a part of its disk";
            return Err(Error::new(ErrorKind::PolicyDenied, "open", detail));
        }
        NameTarget::Storage(_) | NameTarget::Denied => return Ok(()),
    };
    match std::fs::metadata(file) {
        Ok(metadata) if !metadata.is_file() => {
            let detail = "the image names it as a part of its disk, but it is not a regular file";
            Err(Error::new(ErrorKind::PolicyDenied, "open", detail).with_path(file))
        }
        // Opening says what is wrong.
        _ => Ok(()),
    }
}

/// Opens an image of a format that is only read.
pub(super) fn open_foreign(format: Format, opening: Opening<'_>) -> Result<Foreign> {
    match formats::entry(format) {
        Some(entry) => Ok(Foreign { format, image: (entry.open)(opening)? }),
        None => Err(Error::unsupported_format(format, false)),
    }
}

/// Refuses options that images of a format do not have.
fn refuse_options(format: Format, options: &OpenOptions) -> Result<()> {
    let error = |kind, detail: String| Err(Error::new(kind, "open", detail));
    let what = format.description();
    if format != Format::Qcow2 && options.snapshot.is_some() {
        return error(ErrorKind::InvalidInput, format!("a {what} image has no snapshots"));
    }
    if matches!(format, Format::Raw | Format::Luks)
        && let BackingFile::Given(_) = options.backing
    {
        let detail = format!("it is a {what} image, which cannot have a backing file");
        return error(ErrorKind::InvalidInput, detail);
    }
    if !format.is_writable() && options.access == Access::ReadWrite {
        let detail = format!(
            "it is a {what} image, which can only be read: open it read-only, or make a qcow2 image of \
             it with 'nbd-cli image convert -O qcow2'"
        );
        return error(ErrorKind::ReadOnly, detail);
    }
    Ok(())
}

/// The format of an image, given by the options or detected: one that can be opened.
pub(super) fn format_of(
    storage: &dyn Storage,
    name: Option<&Path>,
    options: &OpenOptions,
) -> Result<Format> {
    supported(said_or_seen(storage, name, options)?, options)
}

/// A format that was given by the options or detected, if images of it can be opened.
pub(super) fn supported(format: Format, options: &OpenOptions) -> Result<Format> {
    match format.is_supported() {
        true => Ok(format),
        false => Err(Error::unsupported_format(format, options.format.is_none())),
    }
}

/// The format that the options give, or that an image of this name seems to have.
pub(super) fn said_or_seen(
    storage: &dyn Storage,
    name: Option<&Path>,
    options: &OpenOptions,
) -> Result<Format> {
    let name = options.known_as.as_deref().or(name);
    match options.format {
        Some(format) => Ok(format),
        None => probe_named(storage, name, options.names)
            .map_err(|error| Error::from_io("read the format of", error)),
    }
}
