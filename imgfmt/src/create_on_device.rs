//! A new image on a block device: nothing that was there before is believed or shown.

use std::fs::OpenOptions as FileOptions;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;

use crate::create::{CreateOptions, Preallocation, invalid};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::image::Image;
use crate::open_policy::OpenPolicy;
use crate::options::{Access, Locking, OpenOptions};
use crate::storage::{Durability, FileStorage, Speed, Storage, ZeroMode};
use crate::units::HostOffset;

/// So much at the start of a device tells what is on it, in bytes.
const SIGNATURE_LENGTH: usize = 4096;

/// Whether there is a block device of that name.
pub(crate) fn is_block_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Makes an image with a disk of `size` bytes; `parts` are the metadata, each at its offset, the
/// header first.
pub(crate) fn create_on_device(
    path: &Path,
    options: &CreateOptions,
    size: u64,
    parts: &[(u64, Vec<u8>)],
) -> Result<()> {
    if matches!(options.preallocation, Preallocation::Metadata | Preallocation::Falloc) {
        let detail =
            "a block device has its space already; leave preallocation out, or choose full";
        return Err(invalid(detail).with_path(path));
    }
    if options.data_file.is_some() {
        let detail = "an image on a block device cannot have a data file beside it";
        return Err(invalid(detail).with_path(path));
    }
    // The kernel refuses this while the device is mounted or a part of another one.
    let excluded = FileOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path);
    let _excluded = excluded.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => {
            let detail = "the device is mounted or in use by the kernel; stop it first";
            Error::new(ErrorKind::Busy, "create an image on", detail).with_path(path)
        }
        _ => Error::from_io("open", error).with_path(path),
    })?;
    let storage = FileStorage::open(path, Access::ReadWrite, Locking::On)?;
    let made = lay_out(&storage, options, size, parts).map_err(|error| error.with_path(path));
    drop(storage);
    let made = made.and_then(|()| preallocate(path, options));
    made.inspect_err(|_| {
        // Half an image must not look like one; the first error is the one to tell.
        let _ = erase_signature(path);
    })
}

/// Clears the start of a block device, so that nobody takes it for an image.
pub(crate) fn erase_signature(path: &Path) -> Result<()> {
    let storage = FileStorage::open(path, Access::ReadWrite, Locking::On)?;
    clear_signature(&storage)
}

fn clear_signature(storage: &dyn Storage) -> Result<()> {
    let io = |operation| move |error| Error::from_io(operation, error);
    let length = storage.len().map_err(io("look at"))?.min(SIGNATURE_LENGTH as u64);
    let zeroes = [0; SIGNATURE_LENGTH];
    storage
        .write_at(HostOffset::new(0), &zeroes[..length as usize], Durability::Cached)
        .map_err(io("write to"))?;
    storage.sync().map_err(io("flush"))
}

/// Writes the metadata, the header last: a crash before leaves nothing that looks like an image.
fn lay_out(
    storage: &dyn Storage,
    options: &CreateOptions,
    size: u64,
    parts: &[(u64, Vec<u8>)],
) -> Result<()> {
    let io = |operation| move |error| Error::from_io(operation, error);
    let room = storage.len().map_err(io("look at"))?;
    let needed = match options.format {
        Format::Raw => size,
        _ => parts.iter().map(|(offset, bytes)| offset + bytes.len() as u64).max().unwrap_or(0),
    };
    if needed.max(SIGNATURE_LENGTH as u64) > room {
        let what = if options.format == Format::Raw { "the disk" } else { "an empty image of it" };
        let detail = format!("{what} takes up {needed} bytes, and the device has {room}");
        return Err(Error::new(ErrorKind::NoSpace, "create an image on", detail));
    }
    clear_signature(storage)?;
    if options.preallocation == Preallocation::Full {
        // Clusters that have a place from the start show what is there.
        let (mode, start) = (ZeroMode::KeepAllocated, HostOffset::new(0));
        storage.write_zeroes(start, room, mode, Speed::Any).map_err(io("write zeroes to"))?;
    }
    let Some(((_, header), tables)) = parts.split_first() else { return Ok(()) };
    for (offset, bytes) in tables {
        let offset = HostOffset::new(*offset);
        storage.write_at(offset, bytes, Durability::Cached).map_err(io("write to"))?;
    }
    storage.sync().map_err(io("flush"))?;
    // Up to the end of its cluster: old bytes behind it could be taken for extensions.
    let cluster = tables.first().map_or(header.len(), |(offset, _)| *offset as usize);
    let mut first = header.clone();
    first.resize(cluster.max(header.len()), 0);
    storage.write_at(HostOffset::new(0), &first, Durability::Cached).map_err(io("write to"))?;
    storage.sync().map_err(io("flush"))
}

fn preallocate(path: &Path, options: &CreateOptions) -> Result<()> {
    if options.format == Format::Raw || options.preallocation != Preallocation::Full {
        return Ok(());
    }
    let open = OpenOptions::new()
        .format(options.format)
        .access(Access::ReadWrite)
        .policy(OpenPolicy::deny());
    let image = Image::open(path, &open)?;
    image.preallocate()?;
    image.close()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn old_content_is_neither_shown_nor_believed() {
        for version in [crate::Qcow2Version::V2, crate::Qcow2Version::V3] {
            let storage = MemoryStorage::from_bytes(&vec![0xaa; 4 << 20]);
            let mut options = CreateOptions::new(Format::Qcow2, 64 << 20);
            options.version = version;
            let parts = crate::qcow2::layout(64 << 20, &options).unwrap();
            lay_out(&storage, &options, 64 << 20, &parts).unwrap();
            let open = OpenOptions::new().format(Format::Qcow2);
            let image = Image::from_storage(std::sync::Arc::new(storage), &open).unwrap();
            let mut content = vec![1; 1 << 20];
            image.read_at(0.into(), &mut content).unwrap();
            assert!(content.iter().all(|byte| *byte == 0), "{version:?}");
        }
    }

    #[test]
    fn a_device_that_is_too_small_stays_as_it_was() {
        for (format, length) in [(Format::Qcow2, 64 << 10), (Format::Raw, 1 << 20)] {
            let storage = MemoryStorage::from_bytes(&vec![0xaa; length]);
            let options = CreateOptions::new(format, 8 << 20);
            let parts = match format {
                Format::Raw => Vec::new(),
                _ => crate::qcow2::layout(8 << 20, &options).unwrap(),
            };
            let error = lay_out(&storage, &options, 8 << 20, &parts).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            let mut content = vec![0; length];
            storage.read_at(HostOffset::new(0), &mut content).unwrap();
            assert!(content.iter().all(|byte| *byte == 0xaa));
        }
    }

    #[test]
    fn what_was_there_is_no_image_any_more() {
        let storage = MemoryStorage::from_bytes(&vec![0xaa; 1 << 20]);
        lay_out(&storage, &CreateOptions::new(Format::Raw, 1 << 20), 1 << 20, &[]).unwrap();
        let mut start = vec![1; SIGNATURE_LENGTH];
        storage.read_at(HostOffset::new(0), &mut start).unwrap();
        assert!(start.iter().all(|byte| *byte == 0));
    }
}
