//! Reading a disk, and finding where its bytes are.

use std::os::fd::BorrowedFd;

use super::Image;
use crate::error::Result;
use crate::mapping::{Holes, Lookup, Mapped, Mapping, ReadMap};
use crate::read;
use crate::storage::TryRead;
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl Image {
    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    ///
    /// `OutOfBounds` if that goes beyond the end of the disk, `Corrupt`, `Io`.
    pub fn read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let range = self.check("read", offset, buffer.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let _lease = self.layer().lease();
        read::read_at(self.layer(), offset, buffer).map_err(|error| self.name(error))
    }

    /// As [`read_at`](Self::read_at), for a disk that reads as zero beyond its end.
    pub(crate) fn read_padded(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let inside = self.size().saturating_sub(offset.bytes()).min(buffer.len() as u64) as usize;
        let (present, beyond) = buffer.split_at_mut(inside);
        beyond.fill(0);
        if present.is_empty() { Ok(()) } else { self.read_at(offset, present) }
    }

    /// As [`read_at`](Self::read_at), for a job that copies what is below the image.
    pub(crate) fn read_for_job(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let range = self.check("read", offset, buffer.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let _lease = self.layer().lease();
        read::read_for_job(self.layer(), offset, buffer).map_err(|error| self.name(error))
    }

    /// Fills `buffer` with the bytes at `offset` if that needs no waiting for a disk.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at).
    pub fn try_read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<TryRead> {
        self.try_read(offset, buffer, Holes::AsData)
    }

    /// Like [`try_read_at`](Self::try_read_at), for data only: if metadata shows that a part of the
    /// range reads as zero, the result is [`TryRead::Sparse`]. [`map`](Self::map) then finds that
    /// part.
    ///
    /// # Errors
    ///
    /// As [`read_at`](Self::read_at).
    pub fn try_read_data_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<TryRead> {
        self.try_read(offset, buffer, Holes::Told)
    }

    fn try_read(&self, offset: GuestOffset, buffer: &mut [u8], holes: Holes) -> Result<TryRead> {
        let range = self.check("read", offset, buffer.len() as u64)?;
        if range.is_empty() {
            return Ok(TryRead::Complete);
        }
        let _lease = self.layer().lease();
        let read = read::try_read_at(self.layer(), offset, buffer, holes);
        read.map_err(|error| self.name(error))
    }

    /// Starts to read a range into memory, without waiting for it.
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Io`.
    pub fn cache(&self, range: GuestRange) -> Result<()> {
        let range = self.check("read ahead in", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let _lease = self.layer().lease();
        read::readahead(self.layer(), range).map_err(|error| self.name(error))
    }

    /// Finds where the bytes of a range are stored, so that the caller can transfer them.
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Corrupt`, `Io`.
    pub fn map_read(&self, range: GuestRange) -> Result<ReadMap> {
        let mut map = ReadMap::new(self.layer().lease());
        // This lookup may wait, so the map is complete.
        let _complete = self.map(range, Holes::AsData, Lookup::MayRead, |mapping| {
            map.push(mapping);
            true
        })?;
        Ok(map)
    }

    /// Like [`map_read`](Self::map_read), from metadata in memory only; `None` if that does not
    /// suffice. Does not block.
    ///
    /// # Errors
    ///
    /// As [`map_read`](Self::map_read).
    pub fn map_read_cached(&self, range: GuestRange, holes: Holes) -> Result<Option<ReadMap>> {
        let mut map = ReadMap::new(self.layer().lease());
        let mapped = self.map(range, holes, Lookup::CachedOnly, |mapping| {
            map.push(mapping);
            true
        })?;
        Ok((mapped == Mapped::Complete).then_some(map))
    }

    /// Calls `each` with the parts of a range, in order and without gaps, and the places that files
    /// keep for those that read as zero because their entry says so (for later writes, nothing of
    /// what is there is read) or because the file ends before. The range reads as zero.
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Corrupt`, `Io`.
    pub fn kept_for_zeroes(
        &self,
        range: GuestRange,
        each: impl FnMut(GuestRange, Option<HostOffset>),
    ) -> Result<()> {
        let range = self.check("map", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let _lease = self.layer().lease();
        read::kept_for_zeroes(self.layer(), range, each).map_err(|error| self.name(error))
    }

    /// Calls `each` with the mappings of a range, in order and without gaps, until it returns
    /// false. A mapping is valid only during the call; to transfer the bytes later, use
    /// [`map_read`](Self::map_read).
    ///
    /// # Errors
    ///
    /// `OutOfBounds`, `Corrupt`, `Io`.
    pub fn map(
        &self,
        range: GuestRange,
        holes: Holes,
        lookup: Lookup,
        each: impl FnMut(Mapping<'_>) -> bool,
    ) -> Result<Mapped> {
        let range = self.check("map", range.offset(), range.length())?;
        if range.is_empty() {
            return Ok(Mapped::Complete);
        }
        let _lease = self.layer().lease();
        read::map(self.layer(), range, (holes, lookup), each).map_err(|error| self.name(error))
    }

    /// Returns the file whose bytes are the disk's, at the same offsets, if the image is raw,
    /// stored in a file, and its data goes through the page cache.
    pub fn raw_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.direct.is_some() {
            return None;
        }
        self.chain.top.raw_storage()?.as_fd()
    }
}
