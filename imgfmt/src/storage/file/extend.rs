//! Space for writes that bypass the page cache.

use std::io;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{FileStorage, Kind};
use crate::storage::Storage as _;

impl FileStorage {
    /// Allocates space from the end of the file up to `length`.
    ///
    /// A write that bypasses the page cache and makes the file longer, or fills a hole, excludes all
    /// other writes of the file; the former until the disk has it. In allocated space, such writes are
    /// carried out at the same time, and a ring carries them out without a thread.
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
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), end, missing) {
                Err(Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }
}
