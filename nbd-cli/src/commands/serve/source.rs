//! The sources: from command line arguments to exports.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::Duration;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Format, Image, OpenOptions};
use nbd_jobs::control::server::{ServedDisk, ServedDisks};
use nbd_jobs::control::{ErrorKind, Failure};
use nbd_jobs::serving::{OfferedBitmaps, OpenError, OpenedExport, ServeOptions, Writes};
use nbd_jobs::size::ByteSize;
use nbd_jobs::{JobContext, qemu_name};
use nbd_proto::NbdUri;
use nbd_server::ExportRegistry;
use nbd_server::export::filters::{FilterOptions, Medium};
use nbd_server::export::{CountedLayers, Export, ExportEntry, ImageExport, MemoryExport};

use super::args::ServeArgs;
use super::export::{ExportArgs, ExportSpec};
use crate::commands::image::open::explained as explained_image;
use crate::error::CommandError;
use crate::locking::ShareArgs;
use crate::serving::temporary_directory;
use crate::shown::warnings;

/// How long an image is waited for that another program was to take over.
const PATIENCE_AFTER_TAKEOVER: Duration = Duration::from_secs(10);

/// Returns the exports of a command line. The first one is the default export.
pub(super) fn exports(args: &ServeArgs) -> Result<Vec<ExportSpec>, CommandError> {
    let named: Vec<_> = args.sources.iter().map(|source| split_name(source)).collect();
    let uris = named.iter().filter_map(|(_, source)| uri(source)).collect::<Result<Vec<_>, _>>()?;
    let options = &args.export;
    options.upstream.check(&uris, args.control.is_some())?;
    let unnamed = named.iter().filter(|(name, _)| name.is_none()).count();
    if args.name.is_some() && unnamed != 1 {
        return Err(CommandError::new(
            "--name needs exactly one source without a name of its own; write NAME=SOURCE instead",
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
    options.access.check(&names, args.control.is_some(), args.tls.has_credentials())?;
    Ok(exports)
}

/// Checks an export of a configuration file, without opening anything.
pub(super) fn check(export: &ExportSpec, has_tls: bool) -> Result<(), CommandError> {
    let uris = uri(&export.source).into_iter().collect::<Result<Vec<_>, _>>()?;
    export.options.upstream.check(&uris, false)?;
    export.options.access.check(std::slice::from_ref(&export.name), false, has_tls)
}

/// Opens the source of an export without writing anything, also while others write it.
pub(super) fn try_to_open(export: &ExportSpec) -> Result<(), CommandError> {
    let mut choices = choices(&export.options);
    choices.writes = Writes::Refused;
    choices.locking = ShareArgs { force_share: true }.locking(export.options.trust.locks);
    open(&export.source, &choices).map(drop)
}

/// An open source.
pub(super) enum Source {
    Plain(ExportEntry),
    /// Of a server with a control socket.
    Controlled(ServedDisk),
}

impl Source {
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
) -> Result<Source, CommandError> {
    let ExportSpec { source, options, .. } = export;
    let opened = open(source, &choices(options))?;
    if !is_controlled {
        return Ok(Source::Plain(entry(export, tls_only, ExportEntry::new(opened.export))));
    }
    let disk = served_disk(source.to_string_lossy().into_owned(), opened);
    let disk = disk.configured(|plain| entry(export, tls_only, plain));
    let is_lost = is_memory(source) || options.temporary;
    let (source, choices) = (source.clone(), choices(options));
    Ok(Source::Controlled(if is_lost { disk } else { reopened(disk, source, choices) }))
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
        added.map_err(|error| cannot_export(&export.source, error))?;
        if let (Source::Controlled(disk), Some(disks)) = (source, &mut controlled) {
            disks.insert(&*export.name, disk);
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
    let opening = tokio::task::spawn_blocking(move || {
        let mut disks = args.control.as_ref().map(|_| ServedDisks::default());
        add_all(&exports, &args.tls.tls_only, &registry, disks.as_mut()).map(|()| disks)
    });
    opening.await.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => Err(CommandError::new(format!("opening the images was given up: {error}"))),
    })
}

/// Gives an export the properties that clients see.
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
    options.access.apply(name, entry)
}

/// A disk that can be closed and opened again.
pub(super) fn reopened(disk: ServedDisk, source: OsString, choices: ServeOptions) -> ServedDisk {
    disk.reopened_by(move || {
        let mut choices = choices.clone();
        // The program that was to take over may be slow to close it.
        choices.patience = Some(PATIENCE_AFTER_TAKEOVER);
        let opened = open(&source, &choices)
            .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))?;
        let name = source.to_string_lossy().into_owned();
        Ok(reopened(served_disk(name, opened), source.clone(), choices))
    })
}

/// Returns the disk of a control socket.
pub(super) fn served_disk(source: String, opened: OpenedExport) -> ServedDisk {
    let disk = ServedDisk::new(source, opened.export);
    match opened.image {
        Some(image) => disk.with_image(image),
        None => disk,
    }
}

/// Returns the export of another server that a source names, if it does.
fn uri(source: &OsStr) -> Option<Result<NbdUri, CommandError>> {
    let text = source.to_str().filter(|text| qemu_name::is_name_of_server(text))?;
    Some(qemu_name::from_name(text).map_err(|error| cannot_export(source, error)))
}

fn cannot_export(source: &OsStr, why: impl std::fmt::Display) -> CommandError {
    CommandError::new(format!("cannot export '{}': {why}", source.display()))
}

/// Splits `NAME=SOURCE`. The text before the `=` is not a name if it is a path or a URI.
fn split_name(source: &OsStr) -> (Option<&str>, &OsStr) {
    if source.to_str().is_some_and(qemu_name::is_name_of_server) {
        return (None, source);
    }
    let bytes = source.as_bytes();
    let found = bytes.iter().position(|byte| *byte == b'=').map(|at| bytes.split_at(at));
    match found.map(|(name, rest)| (std::str::from_utf8(name), &rest[1..])) {
        Some((Ok(name), rest)) if !name.is_empty() && !name.contains('/') => {
            (Some(name), OsStr::from_bytes(rest))
        }
        _ => (None, source),
    }
}

/// Whether a source is a disk in memory.
pub(in crate::commands) fn is_memory(source: &OsStr) -> bool {
    memory_size(source).is_some()
}

fn memory_size(source: &OsStr) -> Option<&str> {
    source.to_str()?.strip_prefix("memory:")
}

/// Opens the source of an export.
pub(in crate::commands) fn open(
    source: &OsStr,
    choices: &ServeOptions,
) -> Result<OpenedExport, CommandError> {
    if let Some(size) = memory_size(source) {
        return Ok(OpenedExport { export: memory(source, size, choices)?, image: None });
    }
    if source.is_empty() {
        return Err(CommandError::new("a source is empty; give a path, a URI or memory:SIZE"));
    }
    if let Some(uri) = uri(source) {
        return choices.open_export(&uri?).map_err(|error| explained(error, choices));
    }
    choices.open(qemu_name::path_in(source)).map_err(|error| explained(error, choices))
}

/// Returns the options that apply to every image.
pub(super) fn choices(args: &ExportArgs) -> ServeOptions {
    ServeOptions {
        context: JobContext { observer: warnings(), ..JobContext::default() },
        temporary_directory: temporary_directory(),
        format: args.format.map(Format::from),
        snapshot: args.snapshot.clone(),
        writes: match (args.temporary, args.read_only) {
            (true, _) => Writes::ToTemporaryFile,
            (false, true) => Writes::Refused,
            (false, false) => Writes::ToImage,
        },
        locking: ShareArgs { force_share: args.force_share }.locking(args.trust.locks),
        cache: args.cache.into(),
        metadata_cache: args.metadata_cache.map(ByteSize::bytes),
        policy: args.trust.trust_image.then(|| args.trust.policy()),
        filter: filter(args),
        allocation_depth: args.allocation_depth,
        counted_layers: CountedLayers::default(),
        bitmap_durability: args.bitmap_durability.map(Into::into),
        bitmaps: match args.bitmap.iter().any(|name| name == "all") {
            true => OfferedBitmaps::All,
            false => OfferedBitmaps::Named(args.bitmap.clone()),
        },
        remotes: args.upstream.choices().remotes(),
        ..ServeOptions::default()
    }
}

fn filter(args: &ExportArgs) -> FilterOptions {
    let mut options = FilterOptions::default();
    options.discard = args.discard.into();
    options.detect_zeroes = args.detect_zeroes.into();
    if args.rotational {
        options.medium = Medium::Rotational;
    }
    options
}

fn explained(error: OpenError, choices: &ServeOptions) -> CommandError {
    if error.may_be_readable() && choices.writes != Writes::Refused {
        CommandError::new(format!("{error}; to serve it without writing, add --read-only"))
    } else {
        match error {
            OpenError::Image(error) if error.could_be_shared() => {
                CommandError::new(format!("{error}, or add --force-share to serve it anyway"))
            }
            OpenError::Image(error) => explained_image(error),
            error => CommandError::new(error.to_string()),
        }
    }
}

fn memory(
    source: &OsStr,
    size: &str,
    choices: &ServeOptions,
) -> Result<Arc<dyn Export>, CommandError> {
    let size: ByteSize = size.parse().map_err(|error| cannot_export(source, error))?;
    if choices.snapshot.is_some() || choices.writes == Writes::ToTemporaryFile {
        let why = "a disk in memory has no snapshots and is temporary as it is; leave out \
                   --snapshot and --temporary";
        return Err(cannot_export(source, why));
    }
    if choices.writes != Writes::Refused {
        let export = Arc::new(MemoryExport::new(size.bytes()));
        return Ok(choices.filter.apply(export));
    }
    let storage = Arc::new(MemoryStorage::new(size.bytes()));
    let options = OpenOptions::new().format(Format::Raw);
    let export = Arc::new(ImageExport::new(Image::from_storage(storage, &options)?));
    Ok(choices.filter.apply(export))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    fn split_name(source: &str) -> (Option<&str>, &str) {
        let (name, rest) = super::split_name(source.as_ref());
        (name, rest.to_str().unwrap())
    }

    #[test]
    fn a_name_stands_before_the_first_equals_sign() {
        assert_eq!(split_name("disk.img"), (None, "disk.img"));
        assert_eq!(split_name("vm=disk.img"), (Some("vm"), "disk.img"));
        assert_eq!(split_name("vm=a=b.img"), (Some("vm"), "a=b.img"));
        assert_eq!(split_name("scratch=memory:1G"), (Some("scratch"), "memory:1G"));
        assert_eq!(split_name("vm=nbd://host/a=b"), (Some("vm"), "nbd://host/a=b"));
    }

    #[test]
    fn a_path_with_an_equals_sign_is_a_path() {
        assert_eq!(split_name("./a=b.img"), (None, "./a=b.img"));
        assert_eq!(split_name("/srv/a=b.img"), (None, "/srv/a=b.img"));
        assert_eq!(split_name("=x"), (None, "=x"));
        for server in ["nbd+unix:///?socket=/run/s", "nbd:host:10809:exportname=disk"] {
            assert_eq!(split_name(server), (None, server));
        }
    }

    #[test]
    fn paths_need_not_be_text() {
        let path = |bytes: &'static [u8]| OsStr::from_bytes(bytes);
        assert_eq!(super::split_name(path(b"vm=\xff=")), (Some("vm"), path(b"\xff=")));
        assert_eq!(super::split_name(path(b"\xff=a")), (None, path(b"\xff=a")));
    }
}
