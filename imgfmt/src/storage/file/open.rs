//! Opening files and devices.

use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::OFlags;

use super::{FileStorage, Kind, Lacks};
use crate::access::{Access, Locking};
use crate::cache_mode::CacheMode;
use crate::error::Result;
use crate::storage::direct::Direct;
use crate::storage::lock::lock_file;
use crate::storage::opening::{
    clear_non_blocking, device_can_discard, identity_from, open_error, refuse_what_is_no_image,
};
use crate::storage::writers::OnlyWriter;

impl FileStorage {
    /// Opens an existing file.
    ///
    /// # Errors
    ///
    /// `NotFound`, `PermissionDenied`, `ReadOnly` (file system), `InvalidFormat` for a directory,
    /// pipe, socket or character device, `Busy` if the locks of another program forbid it or,
    /// whether there are locks or not, if this process writes to the file already and shall do so
    /// again, `Unsupported` if locks are required and the file system does not support them,
    /// `InvalidInput` for [`Locking::Shared`] with write access.
    pub fn open(path: &Path, access: Access, locking: Locking) -> Result<Self> {
        Self::open_with(path, access, locking, OFlags::empty())
    }

    /// As [`open`](Self::open), with a cache mode. In modes that make every change durable,
    /// [`Image`](crate::Image) requests that with each write; this storage alone does not.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and `Unsupported` if data is to bypass the page cache and the file
    /// system does not support that.
    pub fn open_cached(
        path: &Path,
        access: Access,
        locking: Locking,
        cache: CacheMode,
    ) -> Result<Self> {
        Self::open(path, access, locking)?.with_cache(path, access, cache)
    }

    fn with_cache(mut self, path: &Path, access: Access, cache: CacheMode) -> Result<Self> {
        self.cache = cache;
        if cache.is_direct() {
            let device_block = match self.kind {
                Kind::Regular => None,
                Kind::BlockDevice { logical_block_size } => Some(logical_block_size),
            };
            let direct = Direct::open(path, access, self.identity, device_block)?;
            self.direct = Some(Box::new(direct));
        }
        Ok(self)
    }

    /// Opens a block device for writing, exclusively: it fails if the device is mounted or a part
    /// of another one (RAID, LVM), and prevents both while it is open. For a program that
    /// overwrites a complete device; see [`Unfinished`](crate::Unfinished).
    ///
    /// # Errors
    ///
    /// `Busy` if it is in use in this way, otherwise as [`open`](Self::open).
    pub fn open_device(path: &Path, locking: Locking) -> Result<Self> {
        // Through the writing descriptor: the kernel refuses some requests of other descriptors
        // meanwhile.
        Self::open_with(path, Access::ReadWrite, locking, OFlags::EXCL)
    }

    /// As [`open_device`](Self::open_device), with a cache mode, as
    /// [`open_cached`](Self::open_cached).
    ///
    /// # Errors
    ///
    /// As both.
    pub fn open_device_cached(path: &Path, locking: Locking, cache: CacheMode) -> Result<Self> {
        Self::open_device(path, locking)?.with_cache(path, Access::ReadWrite, cache)
    }

    fn open_with(path: &Path, access: Access, locking: Locking, flags: OFlags) -> Result<Self> {
        // A pipe or a socket is refused before it is opened, because opening may hang or disturb
        // the process at the other end; the opened file is examined again below.
        let metadata = std::fs::metadata(path).map_err(open_error(path))?;
        refuse_what_is_no_image(path, metadata.file_type())?;
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags((OFlags::NONBLOCK | flags).bits() as i32)
            .open(path)
            .map_err(open_error(path))?;
        let metadata = file.metadata().map_err(open_error(path))?;
        refuse_what_is_no_image(path, metadata.file_type())?;
        clear_non_blocking(&file).map_err(open_error(path))?;
        let identity = identity_from(&metadata);
        let lacks_locks = !lock_file(&file, identity, path, access, locking)?;
        // After the locks, whose refusal says more about other programs.
        let only_writer = OnlyWriter::of(identity, path, access)?;
        let mut storage = Self::from_file(file, &metadata);
        storage.only_writer = only_writer;
        storage.lacks_locks = lacks_locks;
        Ok(storage)
    }

    fn from_file(file: File, metadata: &Metadata) -> Self {
        let is_device = metadata.file_type().is_block_device();
        let kind = if is_device {
            let size = rustix::fs::ioctl_blksszget(&file).map_or(512, u64::from);
            Kind::BlockDevice { logical_block_size: size.max(1) }
        } else {
            Kind::Regular
        };
        let identity = identity_from(metadata);
        let block_size = u32::try_from(metadata.blksize()).unwrap_or(4096);
        let lacks = Lacks::default();
        // A file system's missing operations show when they are tried; a device reports its own
        // beforehand.
        lacks.allocation.store(true, Relaxed);
        let cannot_discard = is_device && !device_can_discard(identity.device);
        lacks.punch_hole.store(cannot_discard, Relaxed);
        Self {
            file,
            kind,
            identity,
            preferred_size: block_size.clamp(4096, 1 << 20).next_power_of_two(),
            cache: CacheMode::default(),
            direct: None,
            lacks_locks: false,
            lacks,
            known_data: Arc::default(),
            only_writer: None,
            write_behind: None,
        }
    }
}
