//! Sources of exports that are described by options.

use std::ffi::OsStr;

use nbd_proto::NbdUri;
use nbd_server::export::filters::{Blocking, Window};

use super::description::{DescribedBacking, DiskDescription, DiskSource};
use super::open::backing_file;
use crate::error::JobError;
use crate::qemu_name::json_in;
use crate::serving::{self, OpenedExport, ServeOptions, Writes, explained};

/// Opens the source of an export, as [`ServeOptions::open_source`] does, or the disk that
/// `json:OBJECT` describes by the options of QEMU's block drivers. What these say of the disk, such
/// as its cache, is stronger than `options`, except that they cannot make a read-only export
/// writable, and that `options.locking` is stronger unless it is automatic. Blocks, and must not be
/// called by asynchronous tasks.
///
/// ```
/// use imgfmt::{CreateOptions, Format, Image};
/// use nbd_jobs::blockdev::open_source;
/// use nbd_jobs::serving::ServeOptions;
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("disk.qcow2");
/// Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
/// let path = path.display();
/// let source =
///     format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{path}"}}}}"#);
/// let opened = open_source(&ServeOptions::default(), source.as_ref())?;
/// assert_eq!(opened.export.info().size, 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// As [`ServeOptions::open_source`]; if an option is unknown, is not supported or contradicts
/// `options`.
pub fn open_source(options: &ServeOptions, source: &OsStr) -> Result<OpenedExport, JobError> {
    let Some(disk) = described(source) else { return options.open_source(source) };
    let disk = disk?;
    let mut options = adapted(options, source, &disk)?;
    if let DiskSource::Export(uri) = &disk.source {
        let is_whole = disk.storage_window == Window::default();
        if is_whole && disk.backing == DescribedBacking::AsNamed {
            return options.open_export(uri).map_err(|error| explained(error, &options));
        }
        options.filter.blocking = Blocking::Always;
    }
    let whole = Window::default();
    let image = match &disk.source {
        // Not in whole sectors, as qemu-nbd has it: the size of a file is that of the export.
        DiskSource::File(path) if disk.storage_window == whole && options.window == whole => {
            let backing = backing_file(&options, &disk.backing);
            options.backing = backing.map_err(|error| explained(error, &options))?;
            options.open_image(path)
        }
        _ => disk.open(&mut options).map(|opened| opened.image),
    };
    options.exported(image.map_err(|error| explained(error, &options))?)
}

/// Returns the export of another server that a source is, if it is one.
///
/// # Errors
///
/// If the name is malformed.
pub fn source_uri(source: &OsStr) -> Option<Result<NbdUri, JobError>> {
    match described(source) {
        None => serving::source_uri(source),
        Some(Err(error)) => Some(Err(error)),
        Some(Ok(DiskDescription { source: DiskSource::Export(uri), .. })) => Some(Ok(*uri)),
        Some(Ok(_)) => None,
    }
}

fn described(source: &OsStr) -> Option<Result<DiskDescription, JobError>> {
    let text = source.to_str().filter(|text| json_in(text).is_some())?;
    let disk = DiskDescription::from_name(text);
    Some(disk.map_err(|error| JobError::invalid(format!("cannot export '{text}': {error}"))))
}

/// The options for a disk with what its description says.
fn adapted(
    options: &ServeOptions,
    source: &OsStr,
    disk: &DiskDescription,
) -> Result<ServeOptions, JobError> {
    let settings = &disk.settings;
    let mut options = options.clone();
    if let (Some(given), Some(said)) = (options.format, disk.format)
        && given != said
    {
        return Err(JobError::invalid(format!(
            "'{}' says that it is a {said} image, and the option for its format says {given}; leave \
             one of them out",
            source.display()
        )));
    }
    options.format = disk.format.or(options.format);
    if settings.read_only && options.writes == Writes::ToImage {
        options.writes = Writes::Refused;
    }
    settings
        .check(options.writes.access(), options.cache)
        .map_err(|why| JobError::invalid(format!("cannot export '{}': {why}", source.display())))?;
    options.locking = settings.locking_or(options.locking);
    options.cache = settings.cache.applied_to(options.cache);
    options.metadata_cache = settings.metadata_cache.or(options.metadata_cache);
    if let Some(discard) = settings.discard {
        options.filter.discard = discard;
    }
    if let Some(detect_zeroes) = settings.detect_zeroes {
        options.filter.detect_zeroes = detect_zeroes;
    }
    let window = options.window.within(disk.window);
    options.window = window.map_err(|error| JobError::invalid(error.to_string()))?;
    Ok(options)
}
