//! Space for writes that follow.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{FileStorage, Kind};
use crate::storage::Storage as _;

/// The file system must have this many times the space that is taken ahead: other files need some
/// too.
const SPARE: u64 = 16;

/// The magic number of ext4 as `statfs` has it.
const EXT4: rustix::fs::FsWord = 0xef53;

/// Least write for which space is allocated before, in bytes: for smaller ones this call costs what
/// it saves.
const ALLOCATED_MIN: u64 = 256 << 10;

impl FileStorage {
    pub(super) fn is_on_ext4(&self) -> bool {
        let system = rustix::fs::fstatfs(&self.file);
        self.kind == Kind::Regular && system.is_ok_and(|system| system.f_type == EXT4)
    }

    /// Allocates the space of a write into the page cache, if the file is written once. ext4 then
    /// does not reserve it block by block, which is a fifth of the time of a copy.
    pub(super) fn allocate_for(&self, offset: u64, length: u64) {
        if length < ALLOCATED_MIN || self.lacks.allocation.load(Relaxed) {
            return;
        }
        // The write reports what is wrong.
        if rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, length).is_err() {
            self.lacks.allocation.store(true, Relaxed);
        }
    }

    /// Allocates space from the end of the file up to `length`.
    ///
    /// A write that bypasses the page cache and makes the file longer, or fills a hole, excludes
    /// all other writes of the file; the former until the disk has it. In allocated space, such
    /// writes are carried out at the same time, and a ring carries them out without a thread.
    pub(super) fn extend_direct(&self, length: u64) -> io::Result<()> {
        // Writes through the page cache wait for no disk.
        if self.direct.is_none() || self.kind != Kind::Regular {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Beyond its limit, the system would send this process a signal.
        if getrlimit(Resource::Fsize).current.is_some_and(|limit| length > limit) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let end = self.len()?;
        let Some(missing) = length.checked_sub(end).filter(|missing| *missing > 0) else {
            return Ok(());
        };
        let system = rustix::fs::fstatvfs(&self.file)?;
        if !is_to_spare(system.f_bavail.saturating_mul(system.f_frsize), missing) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), end, missing) {
                Err(Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }
}

/// Whether a file system with so many free bytes has so many to spare.
fn is_to_spare(free: u64, missing: u64) -> bool {
    missing <= free / SPARE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_taken_ahead_only_where_much_more_is_free() {
        const MIB: u64 = 1 << 20;
        assert!(is_to_spare(16 * MIB, MIB));
        assert!(!is_to_spare(16 * MIB - 1, MIB) && !is_to_spare(12 * MIB, 5 * MIB));
        assert!(!is_to_spare(0, 1) && !is_to_spare(u64::MAX, u64::MAX));
    }
}
