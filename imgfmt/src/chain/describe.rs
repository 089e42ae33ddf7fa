//! Describes an image and the layers below it. None of the disks is opened, so that encrypted
//! layers can be described too.

use std::path::Path;
use std::sync::Arc;

use super::below::{Named, Unopened, layer_below, refuse_loop};
use super::open::{Files, named, of_layer, open_foreign, said_or_seen, supported, too_long};
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::formats::Opening;
use crate::info::ImageInfo;
use crate::layer::Layer;
use crate::luks::{self, Encryption};
use crate::open_policy::CHAIN_DEPTH_MAX;
use crate::options::OpenOptions;
use crate::qcow2::{Purpose, Qcow2};
use crate::raw::{FirstSector, Raw};
use crate::storage::Storage;

/// Information about one image; the files it names are not opened.
pub(crate) fn inspect(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<ImageInfo> {
    let file_length = Some(length(&*storage)?);
    let storage = options.part_of(storage)?;
    let path = path.map(Path::to_owned);
    let layer =
        Unopened { storage, name: None, shown: path.clone(), path, options: options.clone() };
    Ok(ImageInfo { file_length, ..describe(&layer)?.0 })
}

/// Information about an image and all layers below it, the image first.
pub(crate) fn inspect_chain(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
) -> Result<Vec<ImageInfo>> {
    let whole = length(&*storage)?;
    let storage = options.part_of(storage)?;
    let path = path.map(Path::to_owned);
    let layer =
        Unopened { storage, name: None, shown: path.clone(), path, options: options.clone() };
    let mut found = inspect_layers(layer, Files::default())?;
    if let Some(top) = found.first_mut() {
        top.file_length = Some(whole);
    }
    Ok(found)
}

/// Information about a layer and all layers below it; `files` are those above.
pub(super) fn inspect_layers(mut layer: Unopened, mut files: Files) -> Result<Vec<ImageInfo>> {
    let (mut found, mut overlay) = (Vec::new(), None);
    loop {
        let described = describe(&layer);
        let shown = layer.shown.as_deref();
        let (info, below) = described
            .map_err(|error| of_layer(error, shown, overlay.as_ref().map(Option::as_deref)))?;
        let length = length(&*layer.storage)?;
        found.push(ImageInfo { file_length: Some(length), ..info });
        let Some(below) = below else { return Ok(found) };
        let below = next(&layer, below, &mut files).map_err(|error| named(error, shown))?;
        let Some(below) = below else { return Ok(found) };
        if files.layers.len() >= CHAIN_DEPTH_MAX {
            return Err(too_long());
        }
        if let Some((name, info)) = below.name.clone().zip(found.last_mut()) {
            info.backing_name = Some(name);
        }
        overlay = Some(layer.shown.take());
        layer = below;
    }
}

fn length(storage: &dyn Storage) -> Result<u64> {
    storage.len().map_err(|error| Error::from_io("find the size of", error))
}

fn next(layer: &Unopened, below: BelowIt, files: &mut Files) -> Result<Option<Unopened>> {
    let identity = layer.storage.identity();
    refuse_loop(identity, &files.layers)?;
    files.layers.push(identity);
    let path = layer.path.as_deref();
    layer_below(below.0, path, &layer.options, &files.layers, Purpose::Describe)
}

/// What a layer that can have others below it says of them.
struct BelowIt(Option<Named>);

/// Information about a layer, and about the one below it if there can be one.
fn describe(layer: &Unopened) -> Result<(ImageInfo, Option<BelowIt>)> {
    let Unopened { storage, path, options, .. } = layer;
    let format = said_or_seen(&**storage, layer.shown.as_deref(), options)?;
    if format == Format::Luks {
        return Ok((luks_container(&**storage, options)?, None));
    }
    let format = supported(format, options)?;
    let storage = Arc::clone(storage);
    if format == Format::Raw {
        let raw = Raw::new(storage, FirstSector::Free)?;
        return Ok((ImageInfo::new(format, raw.size()), None));
    }
    if format != Format::Qcow2 {
        let opening = Opening { storage, path: path.as_deref(), files: None };
        let image = open_foreign(format, opening)?.image;
        let (block_size, details) = (image.block_size(), image.details());
        let mut info = ImageInfo { block_size, details, ..ImageInfo::new(format, image.size()) };
        let Some(parent) = image.parent() else { return Ok((info, None)) };
        (info.backing_name, info.backing_format) = parent.recorded();
        return Ok((info, Some(BelowIt(Some(Named::from(parent))))));
    }
    let options = OpenOptions { access: Access::ReadOnly, ..options.clone() };
    let image = Qcow2::open(storage, path.as_deref(), &options, Purpose::Describe)?;
    let recorded = image.backing_name();
    let info = ImageInfo {
        encryption: image.encryption()?,
        backing_name: recorded.as_ref().map(|(name, _)| name.clone()),
        backing_format: recorded.as_ref().and_then(|(_, format)| format.clone()),
        qcow2: Some(image.info()?),
        ..ImageInfo::new(format, image.size())
    };
    Ok((info, Some(BelowIt(recorded.map(Named::from)))))
}

/// Information about a LUKS container from its header, without its key.
fn luks_container(storage: &dyn Storage, options: &OpenOptions) -> Result<ImageInfo> {
    let error = |error| Error::from_io("read the header of", error);
    let luks = luks::read(storage, 0).map_err(error)?;
    if luks.is_none() && options.format.is_some() {
        let detail = "it has no LUKS header, though its format is said to be luks";
        return Err(Error::new(ErrorKind::InvalidFormat, "open", detail));
    }
    let payload = luks.as_ref().and_then(|luks| luks.payload_offset).unwrap_or(0);
    let size = storage.len().map_err(error)?.saturating_sub(payload);
    let encryption = Some(Encryption::Luks(luks));
    Ok(ImageInfo { encryption, ..ImageInfo::new(Format::Luks, size) })
}
