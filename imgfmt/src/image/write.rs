//! Changing a disk.

use super::Image;
use crate::access::Access;
use crate::error::Result;
use crate::storage::{Durability, Speed, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange};
use crate::write_map::WriteMap;

impl Image {
    /// Writes `data` from `offset` on.
    ///
    /// # Errors
    ///
    /// `ReadOnly`; `OutOfBounds` if that goes beyond the end of the disk; `NoSpace`; `PolicyDenied`
    /// if the first sector is guarded (see [`open`](Self::open)); `Io`. After an error the range
    /// may have been written in part.
    pub fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        let range = self.check_change("write to", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let durability = self.durability(durability);
        self.writable().write_at(offset, data, durability).map_err(|error| self.name(error))
    }

    /// Writes `data` from `offset` on, into the page cache, if that needs nothing from the disk:
    /// neither metadata nor, for a cluster that gets a new place, old content that is not in the
    /// page cache. A raw image always does it. Where the cache mode bypasses the page cache, or has
    /// every write durable when it returns, the answer is [`TryWrite::WouldBlock`].
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite> {
        let range = self.check_change("write to", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(TryWrite::Complete);
        }
        if self.cache.is_writethrough() || self.direct.is_some() {
            return Ok(TryWrite::WouldBlock);
        }
        self.writable().try_write_at(offset, data).map_err(|error| self.name(error))
    }

    /// Finds where `length` bytes from `offset` on go, so that the caller can write them: past the page
    /// cache, to one place of one file. `None` if [`write_at`](Self::write_at) has to do it, because the
    /// bytes are for several places or for new ones, or because it takes waiting. What is written so is
    /// durable after a [`flush`](Self::flush), in all cache modes.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn map_write(&self, offset: GuestOffset, length: u64) -> Result<Option<WriteMap>> {
        let range = self.check_change("write to", offset, length)?;
        if range.is_empty() {
            return Ok(None);
        }
        self.writable().map_write(offset, length).map_err(|error| self.name(error))
    }

    /// Writes whole clusters in compressed form where the format has one and it saves space; a raw
    /// image takes them as [`write_at`](Self::write_at) does. Meant for filling a new image, from
    /// as many threads as there are cores. A cluster of a qcow2 image is
    /// [`Qcow2Info::cluster_size`](crate::Qcow2Info) bytes; only the last may be cut by the end of
    /// the disk.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at); and `InvalidInput` if the data does not start and end with
    /// clusters.
    pub fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        let range = self.check_change("write to", offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        self.writable().write_compressed(offset, data).map_err(|error| self.name(error))?;
        match self.durability(Durability::Cached) {
            Durability::Cached => Ok(()),
            Durability::Fua => self.flush(),
        }
    }

    /// Sets a range to zero.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at); and `NotFast`, with nothing changed, if only a fast way was
    /// allowed and there is none.
    pub fn write_zeroes(
        &self,
        range: GuestRange,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()> {
        let range = self.check_change("write zeroes to", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let durability = self.durability(durability);
        let result = self.writable().write_zeroes(range, mode, speed, durability);
        result.map_err(|error| self.name(error))
    }

    /// Says that the content of a range is of no more interest, so that its space can be given
    /// back. The range then reads as its old content or as zero. Where nothing can be given back,
    /// nothing happens.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        let range = self.check_change("discard", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let durability = self.durability(durability);
        self.writable().discard(range, durability).map_err(|error| self.name(error))
    }

    /// Waits until everything whose write returned before is on stable storage.
    ///
    /// # Errors
    ///
    /// `Io`. Nothing is known then about writes since the last flush that succeeded.
    pub fn flush(&self) -> Result<()> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.writable().flush().map_err(|error| self.name(error)),
        }
    }

    /// What the caller asks for, or more where the cache mode does.
    fn durability(&self, wanted: Durability) -> Durability {
        if self.cache.is_writethrough() { Durability::Fua } else { wanted }
    }
}
