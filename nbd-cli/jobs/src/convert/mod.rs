//! Copies the disk of an image into a new or an existing one, in a file, on a block device or on a
//! server.
//!
//! ```
//! use imgfmt::{CreateOptions, Format, Image, OpenOptions};
//! use nbd_jobs::JobContext;
//! use nbd_jobs::convert::{ConvertOptions, convert};
//! use nbd_jobs::image_location::ImageLocation;
//!
//! # let directory = tempfile::tempdir()?;
//! # let (disk, image) = (directory.path().join("disk.img"), directory.path().join("disk.qcow2"));
//! std::fs::write(&disk, vec![7; 1 << 20])?;
//! let options = ConvertOptions::new(CreateOptions::new(Format::Qcow2, 0));
//! let (from, to) = (ImageLocation::File(disk), ImageLocation::File(image.clone()));
//! convert(&from, &to, &options, &JobContext::default())?;
//! assert_eq!(Image::open(&image, &OpenOptions::new())?.size(), 1 << 20);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bitmaps;
mod job;
mod joined;
mod options;
mod output;
mod reader;

use std::sync::Arc;

use imgfmt::jobs::{SourceReader, Unreadable};
use imgfmt::storage::FileIdentity;
use imgfmt::{Format, Image};

use self::job::Conversion;
pub use self::options::{ConvertOptions, CopiedBitmaps, Destination};
use self::output::OutputStorage;
use self::reader::ExportReader;
use crate::connect::refuse_same_export;
use crate::error::JobError;
use crate::image_location::{ImageLocation, read_only};
use crate::observer::JobContext;
use crate::target::{self, Existing};

/// Converts `from` into `to`. A new file grows beside its path and is renamed when it is complete;
/// the contents of a block device are replaced. An export has to be large enough.
///
/// Blocks, and must not be called by asynchronous tasks.
///
/// # Errors
///
/// If the source cannot be read, the destination cannot be created or written to, or both are one
/// export. No new file remains then; the message says what an existing disk is like.
pub fn convert(
    from: &ImageLocation,
    to: &ImageLocation,
    options: &ConvertOptions,
    context: &JobContext,
) -> Result<(), JobError> {
    for from in std::iter::once(from).chain(&options.more) {
        refuse_same_export(from.uri(), to.uri())?;
    }
    if let ImageLocation::Described { .. } = to {
        return Err(JobError::invalid(
            "the new image is given by its name, and its format by --output-format",
        ));
    }
    if let ImageLocation::Object(url) = to {
        return Err(read_only(url));
    }
    let is_part = !options.write.part.is_whole();
    if is_part && options.destination != Destination::Existing {
        return Err(JobError::invalid(format!(
            "{to}: offset and size select a part of it, and only what exists has parts: add -n"
        )));
    }
    let (source, files, reader) = open_sources(from, options).map_err(JobError::advise_sharing)?;
    let bitmaps = bitmaps::of_source(&source, from, options.bitmaps, &*context.observer)?;
    let is_remote = is_remote(from, options) || to.is_remote();
    let source = &source;
    let copy = Conversion { options, source, files, reader, from, bitmaps, is_remote, context };
    let (format, exists) = (options.create.format, options.destination == Destination::Existing);
    match to {
        ImageLocation::File(path) => match (target::look(path)?, format) {
            _ if exists && !format.is_writable() => Err(JobError::invalid(format!(
                "{to}: an existing {} image is not written into; without -n (--no-create) a new one is \
                 made",
                format.description()
            ))),
            // The device is the disk.
            (Existing::BlockDevice, Format::Raw) if !is_part => copy.overwrite_device(path),
            _ if exists => copy.replace(to),
            (Existing::BlockDevice, _) => copy.make_on_device(path),
            _ => copy.make_new(path),
        },
        ImageLocation::Export { uri, .. } if format == Format::Raw && !is_part => {
            copy.to_server(to, uri)
        }
        ImageLocation::Export { .. } if !exists => copy.make_on_server(to),
        _ => copy.replace(to),
    }
}

/// A source, the files that it is in, and what reads it in place of the image.
type Opened = (Image, Vec<FileIdentity>, Option<Arc<dyn SourceReader>>);

/// Converts `from` into an image on standard output, which is written once from the start to the
/// end: a raw disk, a fixed VHD, or a VMDK of compressed grains. Of the options, those that concern
/// the destination have no effect, apart from `create`.
///
/// Blocks, and must not be called by asynchronous tasks.
///
/// # Errors
///
/// If the source cannot be read, the format cannot be written in order, or standard output fails;
/// `OutputClosed` if its reader has closed it. What was written is then incomplete, and a VMDK or
/// VHD is not one.
pub fn convert_to_output(
    from: &ImageLocation,
    options: &ConvertOptions,
    context: &JobContext,
) -> Result<(), JobError> {
    if options.bitmaps != CopiedBitmaps::None {
        return Err(JobError::invalid("only qcow2 images have bitmaps: leave --bitmaps out"));
    }
    let (source, files, reader) = open_sources(from, options).map_err(JobError::advise_sharing)?;
    let (source, bitmaps, is_remote) = (&source, Vec::new(), is_remote(from, options));
    let copy = Conversion { options, source, files, reader, from, bitmaps, is_remote, context };
    let output = Arc::new(OutputStorage::new(context.cancellation.clone())?);
    let copied = copy.to_output(&output);
    copied.map_err(|error| output.failure().unwrap_or(error))
}

fn is_remote(from: &ImageLocation, options: &ConvertOptions) -> bool {
    from.is_remote() || options.more.iter().any(ImageLocation::is_remote)
}

/// Opens the source, or parts or several of them as one disk; what reads it, if it is all of an
/// export.
fn open_sources(from: &ImageLocation, options: &ConvertOptions) -> Result<Opened, JobError> {
    if options.more.is_empty() && options.part == (0..u64::MAX) {
        let (source, export) = from.open_disk_or_image(&options.read, &options.reconnecting)?;
        // It gives up where a server cannot read.
        let export = export.filter(|_| options.unreadable == Unreadable::Refused);
        let reader =
            export.map(|export| Arc::new(ExportReader::new(export, from.to_string())) as _);
        let files = files_of(&source);
        return Ok((source, files, reader));
    }
    let all = std::iter::once(from).chain(&options.more);
    let opened =
        all.map(|from| Ok((from.clone(), from.open(&options.read, &options.reconnecting)?)));
    let opened = opened.collect::<Result<Vec<_>, JobError>>()?;
    // The joined disk has none.
    let files = opened.iter().flat_map(|(_, image)| files_of(image)).collect();
    Ok((joined::join(opened, &options.part)?, files, None))
}

fn files_of(image: &Image) -> Vec<FileIdentity> {
    image.files().into_iter().map(|(_, file)| file).collect()
}

#[cfg(test)]
mod tests {
    use imgfmt::CreateOptions;

    use super::*;

    #[test]
    fn an_image_in_an_export_is_not_converted_over_itself() {
        let disk = ImageLocation::parse("nbd+unix:///disk?socket=/nonexistent".as_ref()).unwrap();
        let options = ConvertOptions::new(CreateOptions::new(Format::Raw, 0));
        let error = convert(&disk, &disk, &options, &JobContext::default()).unwrap_err();
        assert!(error.to_string().contains("is the source and the destination"), "{error}");
    }
}
