//! Zeroes in files: through the file system, or else as data.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{FileStorage, Kind};
use crate::error::is_not_supported;
use crate::storage::{Durability, Storage as _, zero};
use crate::units::HostOffset;

impl FileStorage {
    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let mode = mode | FallocateFlags::KEEP_SIZE;
        let range = offset..offset.saturating_add(length);
        let _held = self.direct.as_deref().map(|direct| direct.hold(range));
        loop {
            match rustix::fs::fallocate(&self.file, mode, offset, length) {
                Err(Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    /// Applies a mode of fallocate that leaves zeroes, and records if the mode is not supported. On
    /// a device, the unaligned edges are written as data afterwards.
    pub(super) fn fallocate_zeroes(
        &self,
        mode: FallocateFlags,
        lacking: &AtomicBool,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        if lacking.load(Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        let (start_inner, end_inner) = match self.kind {
            Kind::Regular => (offset, end),
            Kind::BlockDevice { logical_block_size: block } => {
                (offset.div_ceil(block).saturating_mul(block), end / block * block)
            }
        };
        if start_inner >= end_inner {
            return self.write_zeroes_as_data(HostOffset::new(offset), length);
        }
        let zeroed = self.fallocate(mode, start_inner, end_inner - start_inner);
        // A failed call may also have been carried out in part.
        self.known_data.remove(start_inner, end_inner - start_inner);
        match zeroed {
            Err(error) if is_not_supported(&error) => {
                lacking.store(true, Relaxed);
                return Err(io::ErrorKind::Unsupported.into());
            }
            other => other?,
        }
        self.write_zeroes_as_data(HostOffset::new(offset), start_inner - offset)?;
        self.write_zeroes_as_data(HostOffset::new(end_inner), end - end_inner)
    }

    pub(super) fn write_zeroes_as_data(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        zero::write_zero_buffers(offset, length, |offset, zeroes| {
            self.write_at(offset, zeroes, Durability::Cached)
        })
    }
}
