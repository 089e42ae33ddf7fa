//! Changing a disk.

use super::Image;
use crate::access::Access;
use crate::error::Result;
use crate::storage::{Durability, Speed, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange};
use crate::write_map::WriteMap;

impl Image {
    /// Writes `data` at `offset`.
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
        self.writable()?.write_at(offset, data, durability).map_err(|error| self.name(error))
    }

    /// Writes `data` at `offset` into the page cache, if that reads nothing from the disk: neither
    /// metadata nor old content of a cluster that is copied. A write to a raw image in a file never
    /// reads; one to an encrypted image is tried for whole sectors, up to 64 KiB, that allocate
    /// nothing. If the cache mode bypasses the page cache or makes every write durable, the result
    /// is [`TryWrite::WouldBlock`].
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
        self.writable()?.try_write_at(offset, data).map_err(|error| self.name(error))
    }

    /// Finds where `length` bytes at `offset` are stored, so that the caller can write them itself,
    /// bypassing the page cache, to one range of one file. Does not block. `None` if
    /// [`write_at`](Self::write_at) has to write them: they are in several places, need new
    /// clusters, or the lookup would block. In all cache modes, such a write is durable after a
    /// [`flush`](Self::flush), and if [`WriteMap::is_durable_alone`] says so, once its own bytes
    /// are on stable storage.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn map_write(&self, offset: GuestOffset, length: u64) -> Result<Option<WriteMap>> {
        let range = self.check_change("write to", offset, length)?;
        if range.is_empty() {
            return Ok(None);
        }
        self.writable()?.map_write(offset, length).map_err(|error| self.name(error))
    }

    /// Writes complete clusters in compressed form, if the format supports that and it saves space;
    /// otherwise it is [`write_at`](Self::write_at). Meant for filling a new image, from as many
    /// threads as there are cores. A cluster of a qcow2 image is
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
        self.writable()?.write_compressed(offset, data).map_err(|error| self.name(error))?;
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
        let image = self.writable()?;
        let zeroed = image.write_zeroes(range, mode, speed);
        let durable = zeroed.and_then(|()| image.flush_if(self.durability(durability)));
        durable.map_err(|error| self.name(error))
    }

    /// Declares the content of a range unneeded, so that its space can be freed. The range then
    /// reads as its old content or as zero. Where no space can be freed, nothing happens.
    ///
    /// # Errors
    ///
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        let range = self.check_change("discard", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let image = self.writable()?;
        let discarded = image.discard(range);
        let durable = discarded.and_then(|()| image.flush_if(self.durability(durability)));
        durable.map_err(|error| self.name(error))
    }

    /// Waits until the data of all writes that returned before is on stable storage.
    ///
    /// # Errors
    ///
    /// `Io`, also if a sync finds no space: writes since the last successful flush may then be
    /// lost. `NoSpace` if metadata has none; a later flush writes it.
    pub fn flush(&self) -> Result<()> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.writable()?.flush().map_err(|error| self.name(error)),
        }
    }

    /// The durability that the caller or the cache mode requires.
    fn durability(&self, wanted: Durability) -> Durability {
        if self.cache.is_writethrough() { Durability::Fua } else { wanted }
    }
}
