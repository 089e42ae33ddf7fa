//! A new image on a block device, or in another storage of fixed size. The previous content is
//! neither trusted nor shown, and the new image becomes valid only when it is complete.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Image;
use crate::access::{Access, Locking};
use crate::backup::BackupIdentity;
use crate::create_options::{CreateOptions, Preallocation, invalid};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::open_policy::OpenPolicy;
use crate::options::OpenOptions;
use crate::passphrase::NewKey;
use crate::qcow2;
use crate::storage::{Backlog, Durability, FileStorage, Speed, Storage, ZeroMode};
use crate::unfinished::Unfinished;
use crate::units::HostOffset;

/// The first bytes of a device, which identify its content.
const SIGNATURE_LENGTH: usize = 4096;

/// Whether there is a block device of that name.
pub(crate) fn is_block_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// A new image on a block device, created with [`Image::create_on_device`], or in another storage,
/// with [`Image::create_in_storage`]. Until it is [complete](Self::complete), the device is marked
/// as incomplete, so that an incomplete disk is never taken for a complete one, however this
/// process ends. The previous content of the device is lost.
#[derive(Debug)]
pub struct NewOnDevice {
    storage: Arc<Unfinished>,
    /// `None` in a storage without a name.
    path: Option<PathBuf>,
    format: Format,
    /// The space after the metadata: offset and length in bytes.
    unused: (u64, u64),
    preallocation: Preallocation,
    /// The key of an encrypted image.
    key: Option<NewKey>,
}

impl NewOnDevice {
    /// Makes an image with a disk of `size` bytes on a device; `parts` are the metadata, each at
    /// its offset, the header first.
    pub(crate) fn begin(
        path: &Path,
        options: &CreateOptions,
        size: u64,
        parts: &[(u64, Vec<u8>)],
    ) -> Result<Self> {
        let begin = || {
            refuse_what_devices_lack(options)?;
            // Without syncs, the mark would not protect the device until the image is complete.
            let cache = Some(options.open.cache).filter(|cache| cache.syncs()).unwrap_or_default();
            let device = FileStorage::open_device_cached(path, Locking::On, cache)?;
            Self::begin_in(Arc::new(device.written_once(Backlog::OfSystem)), options, size, parts)
        };
        let new = begin().map_err(|error| error.with_path(path))?;
        Ok(Self { path: Some(path.to_owned()), ..new })
    }

    /// As [`begin`](Self::begin), in any storage.
    pub(crate) fn begin_in(
        storage: Arc<dyn Storage>,
        options: &CreateOptions,
        size: u64,
        parts: &[(u64, Vec<u8>)],
    ) -> Result<Self> {
        refuse_what_devices_lack(options)?;
        let storage = Unfinished::new(storage).map_err(|error| Error::from_io("read", error))?;
        let unused = lay_out(&storage, options, size, parts)?;
        Ok(Self {
            storage: Arc::new(storage),
            path: None,
            format: options.format,
            unused,
            preallocation: options.preallocation,
            key: options.encryption.clone(),
        })
    }

    fn named(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.with_path(path),
            None => error,
        }
    }

    /// Writes the zeroes that [`Preallocation::Full`] requires, and nothing for other options. Call
    /// it before filling the image. It may take long.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn preallocate(&self) -> Result<()> {
        if self.preallocation != Preallocation::Full {
            return Ok(());
        }
        // Preallocated clusters show the previous content of the device.
        let (start, length) = self.unused;
        let start = HostOffset::new(start);
        let zeroed = self.storage.write_zeroes(start, length, ZeroMode::KeepAllocated, Speed::Any);
        zeroed.map_err(|error| self.named(Error::from_io("write zeroes to", error)))?;
        if self.format == Format::Raw {
            return Ok(());
        }
        let options = OpenOptions::new().access(Access::ReadWrite).policy(OpenPolicy::deny());
        let image = self.open(&options)?;
        image.preallocate()?;
        image.close()
    }

    /// Opens the image, to fill it or to inspect it. The format and the key are those with which it
    /// was created, regardless of the options.
    ///
    /// # Errors
    ///
    /// As [`Image::open`].
    pub fn open(&self, options: &OpenOptions) -> Result<Image> {
        let mut options = options.clone().format(self.format);
        if let Some(key) = &self.key {
            options.passphrases.insert(0, key.passphrase.clone());
        }
        let storage = Arc::clone(&self.storage) as Arc<dyn Storage>;
        Image::open_named(storage, self.path.as_deref(), &options)
            .map_err(|error| self.named(error))
    }

    /// Writes the identity of a backup into the image, like [`Image::seal_backup`].
    ///
    /// # Errors
    ///
    /// As [`Image::seal_backup`].
    pub fn seal_backup(&self, identity: &BackupIdentity) -> Result<()> {
        qcow2::seal(&*self.storage, identity).map_err(|error| self.named(error))
    }

    /// Puts everything on stable storage, and then makes the image valid. The image must have been
    /// closed.
    ///
    /// # Errors
    ///
    /// `Io`; the device is then marked as incomplete, or has the complete image.
    pub fn complete(self) -> Result<()> {
        let completed = self.storage.complete();
        completed.map_err(|error| self.named(Error::from_io("flush", error)))
    }
}

fn refuse_what_devices_lack(options: &CreateOptions) -> Result<()> {
    if matches!(options.preallocation, Preallocation::Metadata | Preallocation::Falloc) {
        let detail =
            "a device or an export has its space already; leave preallocation out, or choose full";
        return Err(invalid(detail));
    }
    if options.data_file.is_some() {
        return Err(invalid(
            "an image on a device or in an export cannot have a data file beside it",
        ));
    }
    if options.encryption.is_some() && options.preallocation != Preallocation::Off {
        let detail = "an encrypted image on a device or in an export cannot be preallocated";
        return Err(invalid(detail));
    }
    Ok(())
}

/// Writes the metadata, if there is space; returns the offset and the length of the space after it.
pub(super) fn lay_out(
    storage: &dyn Storage,
    options: &CreateOptions,
    size: u64,
    parts: &[(u64, Vec<u8>)],
) -> Result<(u64, u64)> {
    let io = |operation| move |error| Error::from_io(operation, error);
    let room = storage.len().map_err(io("look at"))?;
    // Each part fills whole clusters, so that old bytes after it are not taken for a part of it.
    let cluster = if options.format == Format::Qcow2 { options.cluster_size } else { 1 };
    let padded_len = |bytes: &[u8]| (bytes.len() as u64).next_multiple_of(cluster);
    let ends = parts.iter().map(|(offset, bytes)| offset + padded_len(bytes));
    let metadata_end = ends.max().unwrap_or(0);
    let needed = match options.format {
        Format::Raw => size,
        Format::Luks => size + metadata_end,
        _ => metadata_end,
    };
    if needed.max(SIGNATURE_LENGTH as u64) > room {
        let is_whole = matches!(options.format, Format::Raw | Format::Luks);
        let what = if is_whole { "the disk" } else { "an empty image of it" };
        let detail = format!("{what} takes up {needed} bytes, and there are {room}");
        return Err(Error::new(ErrorKind::NoSpace, "create an image on", detail));
    }
    let write = |offset: u64, bytes: &[u8]| {
        storage.write_at(HostOffset::new(offset), bytes, Durability::Cached).map_err(io("write to"))
    };
    // Erase the signatures of the previous content.
    write(0, &[0; SIGNATURE_LENGTH])?;
    for (offset, bytes) in parts {
        write(*offset, bytes)?;
        let rest = padded_len(bytes) - bytes.len() as u64;
        if rest > 0 {
            write(offset + bytes.len() as u64, &vec![0; rest as usize])?;
        }
    }
    Ok((metadata_end, room - metadata_end))
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
            let parts = qcow2::layout(64 << 20, &options).unwrap();
            let (end, _) = lay_out(&storage, &options, 64 << 20, &parts).unwrap();
            let mut metadata = vec![0xaa; end as usize];
            storage.read_at(HostOffset::new(0), &mut metadata).unwrap();
            assert!(!metadata.contains(&0xaa), "{version:?}: old bytes beside the metadata");
            assert_eq!(end % options.cluster_size, 0);
            let open = OpenOptions::new().format(Format::Qcow2);
            let image = Image::from_storage(Arc::new(storage), &open).unwrap();
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
                _ => qcow2::layout(8 << 20, &options).unwrap(),
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
