//! The sources: from command line arguments to exports.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use imgfmt::Format;
use nbd_jobs::blockdev::{open_source, source_uri};
use nbd_jobs::control::server::{ServedDisk, ServedDisks};
use nbd_jobs::control::{ErrorKind, Failure};
use nbd_jobs::object::shown;
use nbd_jobs::serving::{OfferedBitmaps, ServeOptions, Writes, is_memory, split_name};
use nbd_jobs::size::ByteSize;
use nbd_jobs::tasks;
use nbd_server::ExportRegistry;
use nbd_server::export::ExportEntry;
use nbd_server::export::filters::{FilterOptions, Medium};

use super::args::ServeArgs;
use super::export::{ExportArgs, ExportSpec};
use crate::error::CommandError;
use crate::locking::ShareArgs;
use crate::output::printable;
use crate::serving::serve_options;

/// Time to wait for an image after a failed takeover.
const PATIENCE_AFTER_TAKEOVER: Duration = Duration::from_secs(10);

/// Returns the exports of a command line. The first one is the default export.
pub(super) fn exports(args: &ServeArgs) -> Result<Vec<ExportSpec>, CommandError> {
    let named: Vec<_> = args.sources.iter().map(|source| split_name(source)).collect();
    let uris =
        named.iter().filter_map(|(_, source)| source_uri(source)).collect::<Result<Vec<_>, _>>()?;
    let options = &args.export;
    options.upstream.check(&uris, args.control.is_some())?;
    let unnamed = named.iter().filter(|(name, _)| name.is_none()).count();
    if args.name.is_some() && unnamed != 1 {
        return Err(CommandError::new(
            "--name needs exactly one source without a name; write NAME=SOURCE instead",
        ));
    }
    if unnamed > 1 {
        return Err(CommandError::new(
            "only one source may be without a name; write the others as NAME=SOURCE",
        ));
    }
    if options.description.is_some() && named.len() != 1 {
        return Err(CommandError::new("--description is possible with one source only"));
    }
    let shared = Arc::new(options.clone());
    let exports = named.into_iter().map(|(name, source)| ExportSpec {
        name: name.or(args.name.as_deref()).unwrap_or_default().to_owned(),
        source: source.to_owned(),
        options: Arc::clone(&shared),
    });
    let exports: Vec<_> = exports.collect();
    let names: Vec<_> = exports.iter().map(|export| export.name.clone()).collect();
    if let Some(unknown) = args.tls.tls_only.iter().find(|only| !names.contains(only)) {
        return Err(CommandError::new(format!(
            "--tls-only '{unknown}' is not the name of an export"
        )));
    }
    options.access.settings().check(&names, args.control.is_some(), args.tls.has_credentials())?;
    Ok(exports)
}

/// Checks an export of a configuration file, without opening anything.
pub(super) fn check(export: &ExportSpec, has_tls: bool) -> Result<(), CommandError> {
    let uris = source_uri(&export.source).into_iter().collect::<Result<Vec<_>, _>>()?;
    export.options.upstream.check(&uris, false)?;
    export.options.trust.keys.refuse_descriptors()?;
    Ok(export.options.access.settings().check(
        std::slice::from_ref(&export.name),
        false,
        has_tls,
    )?)
}

/// Describes the opening of an export's source, for errors.
pub(super) fn opening(export: &ExportSpec) -> String {
    let (name, source) =
        (printable(&export.name), printable(&shown(&export.source.to_string_lossy())));
    format!("opening the source '{source}' of the export '{name}'")
}

/// Opens the source of an export without writing anything, even while other programs write to it.
pub(super) fn try_to_open(export: &ExportSpec) -> Result<(), CommandError> {
    let mut choices = choices(&export.options);
    choices.writes = Writes::Refused;
    choices.locking = ShareArgs { force_share: true }.locking(export.options.trust.locks);
    Ok(open_source(&choices, &export.source).map(drop)?)
}

/// An export whose source is open.
pub(super) enum OpenedExport {
    Plain(ExportEntry),
    /// The disk of a server with a control socket.
    Controlled(Box<ServedDisk>),
}

impl OpenedExport {
    pub(super) fn entry(&self) -> ExportEntry {
        match self {
            Self::Plain(entry) => entry.clone(),
            Self::Controlled(disk) => disk.entry(),
        }
    }
}

/// Opens the source of an export.
pub(super) fn open_export(
    export: &ExportSpec,
    tls_only: &[String],
    is_controlled: bool,
) -> Result<OpenedExport, CommandError> {
    let ExportSpec { source, options, .. } = export;
    let opened = open_source(&choices(options), source)?;
    if !is_controlled {
        return Ok(OpenedExport::Plain(entry(export, tls_only, ExportEntry::new(opened.export))));
    }
    let disk = opened.into_disk(source.to_string_lossy());
    let disk = disk.configured(|plain| entry(export, tls_only, plain));
    let is_lost = is_memory(source) || options.temporary;
    let (source, choices) = (source.clone(), choices(options));
    let disk = if is_lost { disk } else { reopened(disk, source, choices) };
    Ok(OpenedExport::Controlled(Box::new(disk)))
}

/// Opens every source and registers it.
pub(super) fn add_all(
    exports: &[ExportSpec],
    tls_only: &[String],
    registry: &ExportRegistry,
    mut controlled: Option<&mut ServedDisks>,
) -> Result<(), CommandError> {
    for export in exports {
        let source = open_export(export, tls_only, controlled.is_some())?;
        let added = registry.add(&*export.name, source.entry());
        added.map_err(|error| {
            let source = shown(&export.source.to_string_lossy());
            CommandError::new(format!("cannot export '{source}': {error}"))
        })?;
        if let (OpenedExport::Controlled(disk), Some(disks)) = (source, &mut controlled) {
            disks.insert(&*export.name, *disk);
        }
    }
    if let Some(first) = exports.first() {
        registry.set_default(first.name.clone());
    }
    Ok(())
}

/// Opens all sources, on a separate thread: opening a layer on another server blocks.
pub(super) async fn open_sources(
    args: &Arc<ServeArgs>,
    exports: &Arc<Vec<ExportSpec>>,
    registry: &ExportRegistry,
) -> Result<Option<ServedDisks>, CommandError> {
    let (args, exports, registry) = (Arc::clone(args), Arc::clone(exports), registry.clone());
    let opening = tasks::spawn_blocking(move || {
        // A program that takes over compares the disks with those of the other server.
        let is_controlled = args.control.is_some() || args.takeover.is_some();
        let mut disks = is_controlled.then(ServedDisks::default);
        add_all(&exports, &args.tls.tls_only, &registry, disks.as_mut()).map(|()| disks)
    });
    opening.await.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => Err(CommandError::new(format!("opening the images was cancelled: {error}"))),
    })
}

/// Sets the properties of an export that clients see.
pub(super) fn entry(
    export: &ExportSpec,
    tls_only: &[String],
    mut entry: ExportEntry,
) -> ExportEntry {
    let ExportSpec { name, options, .. } = export;
    if let Some(text) = &options.description {
        entry = entry.description(text.clone());
    }
    if tls_only.contains(name) {
        entry = entry.tls_required();
    }
    if options.hidden {
        entry = entry.hidden();
    }
    options.access.settings().apply(name, entry)
}

/// A disk that can be closed and opened again.
pub(super) fn reopened(disk: ServedDisk, source: OsString, choices: ServeOptions) -> ServedDisk {
    disk.reopened_by(move || {
        let mut choices = choices.clone();
        // The program that failed to take over may be slow to close it.
        choices.patience = Some(PATIENCE_AFTER_TAKEOVER);
        let opened = open_source(&choices, &source)
            .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))?;
        let disk = opened.into_disk(source.to_string_lossy());
        Ok(reopened(disk, source.clone(), choices))
    })
}

/// Returns the options that apply to every image.
pub(super) fn choices(args: &ExportArgs) -> ServeOptions {
    let mut options = serve_options(args.read_only, args.temporary);
    options.format = args.format.map(Format::from);
    options.snapshot = args.snapshot.clone();
    options.locking = ShareArgs { force_share: args.force_share }.locking(args.trust.locks);
    options.cache = args.cache.into();
    options.metadata_cache = args.metadata_cache.map(ByteSize::bytes);
    let upstream = args.upstream.choices();
    options.policy = args.trust.trust_image.then(|| args.trust.policy_with(&upstream));
    options.passphrases = args.trust.keys.passphrases();
    options.filter = filter(args);
    options.allocation_depth = args.allocation_depth;
    options.bitmap_durability = args.bitmap_durability.map(Into::into);
    options.bitmaps = match args.bitmap.iter().any(|name| name == "all") {
        true => OfferedBitmaps::All,
        false => OfferedBitmaps::Named(args.bitmap.clone()),
    };
    options.remotes = upstream.remotes();
    options
}

fn filter(args: &ExportArgs) -> FilterOptions {
    let mut options = args.filter.options();
    if args.rotational {
        options.medium = Medium::Rotational;
    }
    options
}
