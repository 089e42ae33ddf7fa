//! The served image.

use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::{NullStorage, StorageWindow, in_whole_blocks};
use imgfmt::{
    Access, BackingFile, BackingOptions, CacheMode, Format, Image, Locking, NameTarget,
    OpenOptions, OpenPolicy, Storage,
};
use nbd_client::{Connector, ExportStorage};
use nbd_jobs::JobContext;
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::qemu_name::path_in;
use nbd_jobs::remote::{Remotes, allow_exports};
use nbd_jobs::serving::{OfferedBitmaps, OpenError, ServeOptions, Writes};
use nbd_proto::NbdUri;
use nbd_server::export::filters::{
    AdvisedMinimum, Blocking, Discard, FilterOptions, MultiConn, PreferredSize, Window, ZeroUnit,
};
use nbd_server::export::{CountedLayers, Export};

use super::image_options::{Backing, Described, DiskSource, unknown_driver};
use super::options::{AioMode, Options, SnapshotName};
use super::refusal::{Refusal, complain};
use crate::connect::ServerArgs;
use crate::serving::temporary_directory;
use crate::shown::warnings;

/// QEMU's block devices consist of these, in bytes.
const SECTOR: u64 = 512;

/// Opens it according to the options.
///
/// # Errors
///
/// If the options contradict each other or the image cannot be opened.
pub(super) fn open(options: &Options) -> Result<Arc<dyn Export>, Refusal> {
    let Some(file) = options.files.first() else {
        return Err(Refusal::usage("Invalid number of arguments"));
    };
    let shown = file.display();
    let failed = |why: String| Refusal::new(format!("Failed to open '{shown}': {why}"));
    check_aio(options).map_err(failed)?;
    let disk = match (options.image_options, file.to_str()) {
        (true, Some(text)) => KeyValues::parse(text, None).and_then(Described::from_options),
        (true, None) => Err("the options are not valid UTF-8".to_owned()),
        (false, Some(text)) => named(text),
        (false, None) => {
            Ok(Described { place: DiskSource::File(path_in(file).into()), ..Described::default() })
        }
    };
    let mut disk = disk.map_err(failed)?;
    if let Some(name) = &options.format {
        let format = Format::from_name(name).filter(|format| format.is_supported());
        disk.format = Some(format.ok_or_else(|| failed(unknown_driver(name)))?);
    }
    let mut choices = choices(options, &disk).map_err(failed)?;
    choices.backing = backing_file(&choices, &disk.backing).map_err(failed)?;
    let (image, remote) = open_image(&mut choices, &disk).map_err(failed)?;
    warn_of_guess(&choices, &image, &shown.to_string());
    let is_detected = choices.format.is_none() && image.format() == Format::Raw;
    if is_detected && choices.window == Window::default() {
        // QEMU's guard of the first sector of a raw image that was detected works on sectors. A
        // part of the disk is served by another driver, which takes any alignment.
        choices.filter.advised_minimum = AdvisedMinimum::Sector;
    }
    choices.export_of(image, remote).map_err(|error| failed(error.to_string()))
}

/// Parses the name of a file.
fn named(text: &str) -> Result<Described, String> {
    if let Some(json) = text.strip_prefix("json:") {
        return KeyValues::from_json(json).and_then(Described::from_options);
    }
    Ok(Described { place: DiskSource::named(text)?, ..Described::default() })
}

/// Opens the described disk, and returns the other server's export beside it if the disk is all of
/// that export. Neither this nor dropping the image may happen in asynchronous tasks, because the
/// image may be on another server.
fn open_image(
    choices: &mut ServeOptions,
    disk: &Described,
) -> Result<(Image, Option<Arc<ExportStorage>>), String> {
    if let DiskSource::File(path) = &disk.place
        && disk.part == Window::default()
    {
        let image = choices.open_image(path).map_err(|error| explained(&error))?;
        let is_whole =
            image.size().is_multiple_of(SECTOR) && choices.window.offset.is_multiple_of(SECTOR);
        if is_whole || !is_raw(path, disk).map_err(|error| error.to_string())? {
            return Ok((image, None));
        }
        // Its locks would exclude us.
        drop(image);
    }
    let (place, remote) = open_place(choices, &disk.place)?;
    let length = place.len().map_err(|error| error.to_string())?;
    let is_whole = disk.part == Window::default()
        && choices.window == Window::default()
        && length.is_multiple_of(SECTOR);
    let storage = in_whole_blocks(place, SECTOR);
    let mut storage = part_of(storage.map_err(|error| error.to_string())?, disk.part)?;
    if choices.format == Some(Format::Raw) {
        // Here, and not as a part of the disk: that could not end in the middle of a sector.
        storage = part_of(storage, std::mem::take(&mut choices.window))?;
    }
    let image = choices.open_storage(storage).map_err(|error| explained(&error))?;
    Ok((image, remote.filter(|_| is_whole)))
}

/// Adds the option that helps.
fn explained(error: &OpenError) -> String {
    match error {
        OpenError::Image(image) if image.found_format().is_some() => format!("{error} (-f raw)"),
        _ => error.to_string(),
    }
}

/// Returns whether a file is a raw image, regardless of the overlay above it.
fn is_raw(path: &Path, disk: &Described) -> imgfmt::Result<bool> {
    // This process holds the locks.
    let mut options = OpenOptions::new().locking(Locking::Off);
    options.format = disk.format;
    Ok(Image::inspect_file(path, &options)?.format == Format::Raw)
}

fn part_of(storage: Arc<dyn Storage>, window: Window) -> Result<Arc<dyn Storage>, String> {
    if window == Window::default() {
        return Ok(storage);
    }
    let whole = storage.len().map_err(|error| error.to_string())?;
    window.check(whole).map_err(|error| error.to_string())?;
    let part = StorageWindow::new(storage, window.offset, window.size);
    let part = part.and_then(|part| in_whole_blocks(Arc::new(part), SECTOR));
    part.map_err(|error| error.to_string())
}

type OpenSource = (Arc<dyn Storage>, Option<Arc<ExportStorage>>);

fn open_place(choices: &ServeOptions, place: &DiskSource) -> Result<OpenSource, String> {
    Ok(match place {
        DiskSource::File(path) => {
            let file = choices.open_file(path).map_err(|error| error.to_string())?;
            (Arc::new(file), None)
        }
        DiskSource::NamedAbove => return Err("the image above has to be open".to_owned()),
        DiskSource::Null(size, latency) => (Arc::new(NullStorage::new(*size, *latency)), None),
        DiskSource::Export(uri) => {
            let storage = choices.remotes.open_with(Connector::new(NbdUri::clone(uri)));
            let storage = storage.map_err(|error| error.to_string())?;
            if choices.writes == Writes::ToImage && !storage.is_writable() {
                return Err(format!("{uri} is exported read-only; add -r"));
            }
            let storage = Arc::new(storage);
            (storage.clone(), Some(storage))
        }
    })
}

/// Opens what the options of a backing file describe.
fn backing_file(choices: &ServeOptions, backing: &Backing) -> Result<BackingFile, String> {
    let disk = match backing {
        Backing::AsNamed => return Ok(BackingFile::AsNamed),
        Backing::Ignored => return Ok(BackingFile::Ignored),
        Backing::Given(disk) => disk,
    };
    // A part of a raw disk is a part of its file.
    let part = match disk.format {
        Some(Format::Raw) => disk.window,
        _ => disk.part,
    };
    let whole = Window::default();
    let mut options = BackingOptions::default();
    options.target = match &disk.place {
        DiskSource::NamedAbove if part == whole => None,
        DiskSource::NamedAbove => {
            return Err("a part of a backing file needs its name too (file.filename)".to_owned());
        }
        DiskSource::File(path) if part == whole => Some(NameTarget::File(path.clone())),
        place => {
            let reading = ServeOptions {
                writes: Writes::Refused,
                locking: disk.locking,
                cache: disk.cache.applied_to(choices.cache),
                ..choices.clone()
            };
            let (storage, _) = open_place(&reading, place)?;
            let storage = in_whole_blocks(storage, SECTOR).map_err(|error| error.to_string())?;
            Some(NameTarget::Storage(part_of(storage, part)?))
        }
    };
    options.format = disk.format;
    options.locking = Some(disk.locking).filter(|locking| *locking != Locking::Auto);
    options.cache = Some(disk.cache.applied_to(choices.cache));
    options.metadata_cache_bytes = disk.metadata_cache;
    options.backing = backing_file(choices, &disk.backing)?;
    Ok(BackingFile::Given(Box::new(options)))
}

fn check_aio(options: &Options) -> Result<(), String> {
    let direct = options.cache.is_some_and(CacheMode::is_direct);
    match options.aio {
        Some(AioMode::Native) if !direct => {
            Err("aio=native requires cache=none or cache=directsync".to_owned())
        }
        _ => Ok(()),
    }
}

fn choices(options: &Options, disk: &Described) -> Result<ServeOptions, String> {
    let window = Window { offset: options.offset, size: None }.within(disk.window);
    let window = window.map_err(|error| error.to_string())?;
    let writes = match (options.read_only || disk.read_only, options.temporary) {
        (true, _) => Writes::Refused,
        (false, true) => Writes::ToTemporaryFile,
        (false, false) => Writes::ToImage,
    };
    let cache = disk.cache.applied_to(options.cache.unwrap_or_default());
    let remotes = ServerArgs::default().remotes();
    let policy = allow_exports(OpenPolicy::any_file().allow_format_probe(), &remotes);
    Ok(ServeOptions {
        context: JobContext { observer: warnings(), ..JobContext::default() },
        temporary_directory: temporary_directory(),
        format: disk.format,
        snapshot: match &options.snapshot {
            Some(name) => Some(find_snapshot(disk, name, &remotes)?),
            None => None,
        },
        writes,
        policy: Some(policy),
        locking: disk.locking,
        cache,
        metadata_cache: disk.metadata_cache,
        backing: BackingFile::AsNamed,
        remotes,
        // QEMU lists the last one first, in an order that clients see.
        bitmaps: OfferedBitmaps::Named(options.bitmaps.iter().rev().cloned().collect()),
        filter: filter(options, disk, cache),
        window,
        bitmap_durability: None,
        allocation_depth: options.allocation_depth,
        counted_layers: counted_layers(options, disk, writes),
    })
}

/// The layers that the depth counts. As in QEMU, a driver `raw` above an image, which `--offset` is
/// too, tells only what the layer below it has itself.
fn counted_layers(options: &Options, disk: &Described, writes: Writes) -> CountedLayers {
    // The temporary layer of an export that is read-only stays empty: it is not made.
    let is_above = options.temporary && writes == Writes::Refused;
    let deepest = match (options.offset > 0, disk.is_below_raw, options.temporary) {
        (true, ..) | (false, true, false) => 1,
        (false, true, true) => 2,
        (false, false, _) => u32::MAX,
    };
    CountedLayers { empty_above: u32::from(is_above), deepest }
}

fn filter(options: &Options, disk: &Described, cache: CacheMode) -> FilterOptions {
    let mut filter = FilterOptions::default();
    filter.discard = options.discard.or(disk.discard).unwrap_or(Discard::Ignore);
    filter.detect_zeroes = disk.detect_zeroes.unwrap_or(options.detect_zeroes);
    filter.preferred_size = PreferredSize::Page;
    if cache.is_direct() {
        filter.zero_unit = ZeroUnit::Page;
    }
    if options.shared == 1 {
        filter.multi_conn = MultiConn::Hidden;
    }
    if let DiskSource::Export(_) = disk.place {
        filter.blocking = Blocking::Always;
    }
    filter
}

/// Returns the id of the selected snapshot.
fn find_snapshot(
    disk: &Described,
    wanted: &SnapshotName,
    remotes: &Remotes,
) -> Result<String, String> {
    let mut options = OpenOptions::new().access(Access::ReadOnly).locking(disk.locking);
    options.format = disk.format;
    let info = match (&disk.place, disk.part == Window::default()) {
        (DiskSource::File(path), true) => Image::inspect_file(path, &options),
        (DiskSource::Export(uri), true) => {
            let storage = remotes.open_with(Connector::new(NbdUri::clone(uri)));
            let storage = storage.map_err(|error| error.to_string())?;
            Image::inspect_storage(Arc::new(storage), &options)
        }
        _ => {
            let why = "-l (--load-snapshot) is supported for images that fill a file or an export";
            return Err(why.to_owned());
        }
    };
    let info = info.map_err(|error| error.to_string())?;
    let Some(qcow2) = info.qcow2 else {
        return Err(format!("Failed to load snapshot: a {} image has none", info.format));
    };
    let all = &qcow2.snapshots;
    let found = match wanted {
        SnapshotName::IdOrName(wanted) => all
            .iter()
            .find(|snapshot| snapshot.id == *wanted)
            .or_else(|| all.iter().find(|snapshot| snapshot.name == *wanted)),
        SnapshotName::Parts { id, name } => all.iter().find(|snapshot| {
            id.as_ref().is_none_or(|id| snapshot.id == *id)
                && name.as_ref().is_none_or(|name| snapshot.name == *name)
        }),
    };
    let found = found.ok_or("Failed to load snapshot: there is no such snapshot")?;
    Ok(found.id.clone())
}

/// A guest with write access to the first sector could make its raw image look like another format.
fn warn_of_guess(choices: &ServeOptions, image: &Image, name: &str) {
    let is_guess = choices.format.is_none() && image.format() == Format::Raw;
    if is_guess && choices.writes == Writes::ToImage {
        complain(&format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw; writes \
             to the first sector that would make it look like another format are refused. Specify \
             the format with -f raw to allow them."
        ));
    }
}
