//! The served image.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use imgfmt::{BackingFile, CacheMode, FileNames, Format, Locking, OpenPolicy, Passphrase};
use nbd_server::export::filters::{
    AdvisedMinimum, Blocking, Discard, FilterOptions, MultiConn, PreferredSize, Window, ZeroUnit,
};
use nbd_server::export::{CountedLayers, Export};

use super::error::CommandLineError;
use super::options::Options;
use crate::blockdev::{DescribedBacking, DiskDescription, DiskSource, OpenedDisk, image_format};
use crate::key_values::KeyValues;
use crate::observer::JobContext;
use crate::qemu_name::{check_aio, check_protocol, path_in};
use crate::remote::{Remotes, allow_exports};
use crate::serving::{OfferedBitmaps, OpenError, ServeOptions, Writes};

/// The image of a command line.
#[non_exhaustive]
pub struct OpenedSource {
    /// The image as an export.
    pub export: Arc<dyn Export>,
    /// Whether the image is writable and was found to be raw because it looks like no other format.
    /// Writes that would make it look like one are refused.
    pub is_guessed_raw: bool,
}

impl std::fmt::Debug for OpenedSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let guessed = &self.is_guessed_raw;
        f.debug_struct("OpenedSource").field("is_guessed_raw", guessed).finish_non_exhaustive()
    }
}

impl Options {
    /// Returns whether there are secrets (`--object secret`), which [`open`](Self::open) may read.
    pub fn has_secrets(&self) -> bool {
        self.objects.has_secrets()
    }

    /// Opens the image as an export. Temporary files go to `temporary_directory`, or to the
    /// system's. Blocks, and must not be called by asynchronous tasks.
    ///
    /// # Errors
    ///
    /// If the options contradict each other or the image cannot be opened.
    pub fn open(
        &self,
        context: &JobContext,
        temporary_directory: Option<PathBuf>,
        remotes: &Remotes,
    ) -> Result<OpenedSource, CommandLineError> {
        let Some(file) = self.files.first() else {
            return Err(CommandLineError::usage("Invalid number of arguments"));
        };
        let shown = file.display();
        let failed =
            |why: String| CommandLineError::new(format!("Failed to open '{shown}': {why}"));
        let disk = describe(self, file).map_err(failed)?;
        let mut choices = choices(self, &disk, context, remotes).map_err(failed)?;
        choices.temporary_directory = temporary_directory;
        let opened = disk.open(&mut choices).map_err(|error| failed(explained(&error)))?;
        let OpenedDisk { image, remote, .. } = opened;
        let is_detected = choices.format.is_none() && image.format() == Format::Raw;
        if is_detected && choices.window == Window::default() {
            // QEMU's guard of the first sector of a raw image that was detected works on sectors. A
            // part of the disk is served by another driver, which takes any alignment.
            choices.filter.advised_minimum = AdvisedMinimum::Sector;
        }
        let is_guessed_raw = is_detected && choices.writes == Writes::ToImage;
        let export = choices.export_of(image, remote).map_err(|error| failed(error.to_string()))?;
        Ok(OpenedSource { export, is_guessed_raw })
    }
}

/// Returns the disk that the operand describes.
fn describe(options: &Options, file: &OsStr) -> Result<DiskDescription, String> {
    if !options.image_options {
        check_protocol(file)?;
    }
    let disk = match (options.image_options, file.to_str()) {
        (true, Some(text)) => DiskDescription::from_options(KeyValues::parse(text, None)?),
        (true, None) => return Err("the options are not valid UTF-8".to_owned()),
        (false, Some(text)) => DiskDescription::from_name(text),
        (false, None) => Ok(DiskDescription::of_file(path_in(file))),
    };
    let mut disk = disk.map_err(|error| error.to_string())?;
    if let Some(name) = &options.format {
        disk.format = Some(image_format(name).map_err(|error| error.to_string())?);
    }
    Ok(disk)
}

/// Adds the option that helps.
fn explained(error: &OpenError) -> String {
    match error {
        OpenError::Image(image) if image.found_format().is_some() => format!("{error} (-f raw)"),
        _ => error.to_string(),
    }
}

fn choices(
    options: &Options,
    disk: &DiskDescription,
    context: &JobContext,
    remotes: &Remotes,
) -> Result<ServeOptions, String> {
    let window = Window { offset: options.offset, size: None }.within(disk.window);
    let window = window.map_err(|error| error.to_string())?;
    let writes = match (options.read_only, options.temporary) {
        (true, _) => Writes::Refused,
        (false, true) => Writes::ToTemporaryFile,
        (false, false) => Writes::ToImage,
    };
    let given = options.cache.unwrap_or_default();
    disk.settings.check(writes.access(), given)?;
    let cache = disk.settings.cache.applied_to(given);
    if let DiskSource::File(_) = disk.source {
        check_aio(disk.settings.aio.or(options.aio), cache)?;
    }
    let policy = allow_exports(OpenPolicy::any_file().allow_format_probe(), remotes);
    Ok(ServeOptions {
        passphrases: passphrases(options, disk)?,
        encryption: disk.settings.encryption,
        context: context.clone(),
        temporary_directory: None,
        format: disk.format,
        names: FileNames::AsInQemu,
        known_as: None,
        snapshot: match &options.snapshot {
            Some(name) => Some(disk.snapshot_id(name, remotes).map_err(|error| error.to_string())?),
            None => None,
        },
        writes,
        policy: Some(policy),
        locking: disk.settings.locking_or(Locking::Auto),
        patience: None,
        cache,
        metadata_cache: disk.settings.metadata_cache,
        backing: BackingFile::AsNamed,
        remotes: remotes.clone(),
        // QEMU lists the last one first, in an order that clients see.
        bitmaps: OfferedBitmaps::Named(options.bitmaps.iter().rev().cloned().collect()),
        filter: filter(options, disk, cache),
        window,
        bitmap_durability: None,
        allocation_depth: options.allocation_depth,
        counted_layers: counted_layers(options, disk, writes),
    })
}

/// The secrets of a disk and of the described layers below it.
fn passphrases(options: &Options, disk: &DiskDescription) -> Result<Vec<Passphrase>, String> {
    let layers = std::iter::successors(Some(disk), |disk| match &disk.backing {
        DescribedBacking::Given(below) => Some(&**below),
        DescribedBacking::AsNamed | DescribedBacking::Ignored => None,
    });
    let ids = layers.filter_map(|layer| layer.settings.key_secret.as_deref());
    ids.map(|id| options.objects.passphrase(id)).collect()
}

/// The layers that the depth counts. As in QEMU, a driver `raw` above an image, which `--offset` is
/// too, reports only the contents of the layer right below it.
fn counted_layers(options: &Options, disk: &DiskDescription, writes: Writes) -> CountedLayers {
    // The temporary layer of an export that is read-only stays empty: it is not made.
    let is_above = options.temporary && writes == Writes::Refused;
    let deepest = match (options.offset > 0, disk.is_below_raw, options.temporary) {
        (true, ..) | (false, true, false) => 1,
        (false, true, true) => 2,
        (false, false, _) => u32::MAX,
    };
    CountedLayers { empty_above: u32::from(is_above), deepest }
}

fn filter(options: &Options, disk: &DiskDescription, cache: CacheMode) -> FilterOptions {
    let mut filter = FilterOptions::default();
    filter.discard = options.discard.or(disk.settings.discard).unwrap_or(Discard::Ignore);
    filter.detect_zeroes = disk.settings.detect_zeroes.unwrap_or(options.detect_zeroes);
    filter.preferred_size = PreferredSize::Page;
    if cache.is_direct() {
        filter.zero_unit = ZeroUnit::Page;
    }
    if options.shared == 1 {
        filter.multi_conn = MultiConn::Hidden;
    }
    if let DiskSource::Export(_) = disk.source {
        filter.blocking = Blocking::Always;
    }
    filter
}
