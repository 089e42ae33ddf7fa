//! `qemu-img create`.

use std::ffi::OsStr;
use std::path::Path;

use imgfmt::storage::FileStorage;
use imgfmt::{
    Access, BackingFile, CreateOptions, DataFile, Durability, Format, GuestOffset, Image, Locking,
    Storage as _,
};
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::target::{self, Durable, Existing, NewFile, device};

use super::arguments::Arguments;
use super::known::Opt;
use super::options::{NewImage, SECTOR, help, size_argument};
use super::place::{Place, remotes};
use super::progress::Percentage;
use super::refusal::Refusal;
use super::text;
use crate::signals;

/// The part of a new raw disk that is not a hole, in bytes.
const FIRST_BLOCK: u64 = 4096;

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let format = arguments.format(Opt::Format)?;
    let format = format.unwrap_or(Format::Raw);
    let lists = arguments.lists()?;
    if let Some(text) = help(format, &lists, arguments.operands.first()) {
        return text::print(&text);
    }
    let (name, size) = match &arguments.operands[..] {
        [] => return Err(Refusal::usage("Expecting image file name")),
        [name] => (name, None),
        [name, size] => (name, Some(size_argument("image size", &size.to_string_lossy())?)),
        [_, _, more, ..] => {
            return Err(Refusal::usage(format!("Unexpected argument: {}", more.display())));
        }
    };
    let shown = name.to_string_lossy();
    if !format.can_be_made() {
        return Err(Refusal::new(format!(
            "{shown}: new images of the format '{format}' are not supported; make a qcow2 image"
        )));
    }
    let place = Place::parse(arguments, name, false)?;
    let path = match &place.location {
        ImageLocation::File(path) => path.as_path(),
        // Names in it do not start at a directory.
        ImageLocation::Export { .. } => Path::new(""),
        _ => {
            return Err(Refusal::new(format!(
                "{shown}: only files, devices and exports can be made"
            )));
        }
    };
    let new = described(arguments, format, &lists, size).map_err(|error| error.about(&shown))?;
    refuse_impossible(path, &new.create).map_err(|error| error.about(&shown))?;
    let size = size_of(&new.create, path).map_err(|error| error.about(&shown))?;
    if !arguments.has(Opt::Quiet) {
        // Before the image is created: callers wait for this line.
        text::print(&format!("{}\n", new.report(&shown, size)))?;
    }
    let mut create = new.create;
    create.size = Some(size.next_multiple_of(SECTOR));
    if create.format == Format::Qcow2 && !place.location.is_remote() {
        // It was looked at, and a virtual machine that writes to it may have locked it. In an
        // export, a relative name must be found out to lead nowhere.
        create.open.backing = BackingFile::Ignored;
    }
    create.foreign.final_name = target::final_name(path);
    let made = match &place.location {
        ImageLocation::Export { .. } => make_on_server(&place, &create),
        _ => make(path, &create),
    };
    made.map_err(|error| error.about(&shown))?;
    Ok(0)
}

/// The properties of the new image.
fn described(
    arguments: &Arguments,
    format: Format,
    lists: &[String],
    size: Option<u64>,
) -> Result<NewImage, Refusal> {
    let mut new = NewImage::new(format, lists, &arguments.secrets)?;
    new.set_backing(arguments.text(Opt::Backing)?, arguments.text(Opt::BackingFormat)?)?;
    if size.is_some() && new.create.size.is_some() {
        return Err(Refusal::new("The image size must be specified only once"));
    }
    new.create.size = size.or(new.create.size);
    if arguments.has(Opt::Unsafe) {
        new.create.open.backing = BackingFile::Ignored;
    }
    let can_ask = new.create.backing.is_some() && !arguments.has(Opt::Unsafe);
    match new.create.size {
        None if !can_ask => Err(Refusal::new("Image creation needs a size parameter")),
        _ => Ok(new),
    }
}

/// Refuses what would destroy a file that is needed, or be found elsewhere later.
///
/// # Errors
///
/// If there is such a file.
pub(super) fn refuse_impossible(path: &Path, create: &CreateOptions) -> Result<(), Refusal> {
    let directory = path.parent().unwrap_or(Path::new(""));
    if let Some((name, _)) = &create.backing {
        let backing = directory.join(name);
        if let (Ok(new), Ok(old)) = (path.canonicalize(), backing.canonicalize())
            && new == old
        {
            return Err(Refusal::new(
                "Trying to create an image with the same filename as the backing file",
            ));
        }
    }
    if let Some((name, DataFile::Plain | DataFile::Raw)) = &create.data_file
        && Path::new(name).is_relative()
        && !directory.as_os_str().is_empty()
    {
        return Err(Refusal::new(format!(
            "data_file={} is relative, and the image is in another directory; give an absolute name",
            Path::new(name).display()
        )));
    }
    Ok(())
}

/// The size of the new disk: its own, or that of its backing file, which has to exist.
fn size_of(create: &CreateOptions, path: &Path) -> Result<u64, Refusal> {
    let is_ignored = matches!(create.open.backing, BackingFile::Ignored);
    let Some((name, format)) = create.backing.as_ref().filter(|_| !is_ignored) else {
        let missing = || Refusal::new("Image creation needs a size parameter");
        return create.size.ok_or_else(missing);
    };
    let location = ImageLocation::File(path.to_owned()).beside(OsStr::new(name))?;
    // As in QEMU, a virtual machine may use it, which goes on with the new image.
    let options = create.open.clone().format(*format).locking(Locking::Shared);
    let place = Place { location, options, remotes: remotes(), can_share: false };
    // Without keys, and with all layers: what fails here is not announced.
    let layers = place.location.inspect_chain(&place.options, &place.remotes);
    let layers = layers.map_err(|error| place.failed(&error))?;
    // A raw disk need not consist of whole sectors.
    let below = layers.first().map_or(0, |layer| layer.size.next_multiple_of(SECTOR));
    Ok(create.size.unwrap_or(below))
}

/// Makes the image, in the place of an existing one if there is one.
fn make(path: &Path, create: &CreateOptions) -> Result<(), Refusal> {
    let observer = Percentage::begin(false)?.context().observer;
    let make = |path: &Path| {
        Image::create(path, create).map_err(|error| match signals::stop_if_interrupted() {
            Err(interrupted) => {
                Refusal::new(format!("{interrupted}; its incomplete files were removed"))
            }
            Ok(()) => error.into(),
        })
    };
    match target::look(path)? {
        Existing::BlockDevice if create.format == Format::Raw => check_device(path, create),
        Existing::BlockDevice => {
            let new = device::begin_image(path, create, &*observer)?;
            Ok(device::complete_image(path, new)?)
        }
        _ => {
            let (mut new, image) = NewFile::begin_or_replace(path, Locking::Auto, &observer, make)?;
            new.add_extents(&image, Locking::Auto)?;
            if create.format == Format::Raw {
                // As in QEMU: direct I/O tells the size of a disk's sectors where there is data.
                let first = vec![0; image.size().min(FIRST_BLOCK) as usize];
                image.write_at(GuestOffset::new(0), &first, Durability::Cached)?;
            }
            image.close()?;
            Ok(new.complete(Durable::Later)?)
        }
    }
}

/// Makes the image in the export of a server. A raw disk is the export itself, without its old
/// signatures.
fn make_on_server(place: &Place, create: &CreateOptions) -> Result<(), Refusal> {
    let export = place.location.open_export_to_write(&place.remotes)?;
    let new = Image::create_in_storage(export, create)?;
    let made = new.preallocate().and_then(|()| new.complete());
    made.map_err(|error| {
        Refusal::new(format!("{error}; the previous data is lost: run the command again"))
    })
}

/// A raw image on a device is the device itself, if it is large enough.
fn check_device(path: &Path, create: &CreateOptions) -> Result<(), Refusal> {
    let device = FileStorage::open(path, Access::ReadWrite, Locking::Auto)?;
    let length = device.len().map_err(|error| Refusal::new(error.to_string()))?;
    match create.size {
        Some(size) if size > length => Err(Refusal::new(format!(
            "Device is too small: it has {length} bytes, and the disk would have {size}"
        ))),
        _ => Ok(()),
    }
}
