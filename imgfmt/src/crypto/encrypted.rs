//! The storage of encrypted bytes as a storage of plain ones.

use std::io;
use std::sync::Arc;

use super::cipher::Direction;
use super::luks::Volume;
use crate::storage::{
    BouncePool, Capabilities, DirectAlignment, Durability, FileIdentity, RangeLocks, Storage,
    TRANSFER_MAX, TryRead, TryWrite,
};
use crate::units::HostOffset;

/// The alignment of buffers, in bytes: enough for direct I/O.
const BUFFER_ALIGNMENT: usize = 4096;

/// A read of more bytes that must not wait is left to threads, of which several decrypt at once.
const TRY_READ_MAX: usize = 256 << 10;

/// A write of more bytes that must not wait is left to threads too.
const TRY_WRITE_MAX: usize = 64 << 10;

/// Decrypts what is read from a part of another storage, and encrypts what is written there.
///
/// Everything reads as data: a hole of the other storage decrypts to noise. So zeroes are written
/// like data, and space is never freed.
///
/// A sector that two threads write at once, or that is written when power fails, has blocks of both
/// contents as on a plain disk. That holds for blocks of 16 bytes of XTS; in CBC a block at the
/// border decrypts to noise, so writes there exclude each other and reads. Nothing helps at power
/// loss: a disk that does not write whole sectors at once needs XTS.
#[derive(Debug)]
pub(crate) struct Encrypted {
    inner: Arc<dyn Storage>,
    volume: Volume,
    /// Keeps a sector that is written in part from being written by others, or read, meanwhile.
    ranges: Arc<RangeLocks>,
    buffers: BouncePool,
}

impl Encrypted {
    pub(crate) fn new(inner: Arc<dyn Storage>, volume: Volume) -> Self {
        let buffers = BouncePool::new(BUFFER_ALIGNMENT);
        Self { inner, volume, ranges: Arc::default(), buffers }
    }

    fn sector(&self) -> u64 {
        self.volume.sector_size
    }

    /// The offset in the other storage of a range in this one.
    fn place(&self, offset: u64, length: u64) -> io::Result<HostOffset> {
        let end = offset.checked_add(length);
        let is_inside = end.is_some_and(|end| self.volume.size.is_none_or(|size| end <= size));
        let end = end.and_then(|end| end.checked_add(self.volume.start));
        match end {
            Some(_) if is_inside => Ok(HostOffset::new(offset + self.volume.start)),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    /// The complete sectors that a range touches.
    fn sectors(&self, offset: u64, length: usize) -> io::Result<std::ops::Range<u64>> {
        let end = offset.checked_add(length as u64);
        let end = end.and_then(|end| end.checked_next_multiple_of(self.sector()));
        let end = end.ok_or(io::ErrorKind::StorageFull)?;
        Ok(offset / self.sector() * self.sector()..end)
    }

    fn apply(&self, direction: Direction, offset: u64, sectors: &mut [u8]) -> io::Result<()> {
        let first = (offset / 512).wrapping_add(self.volume.first_number);
        let size = self.sector() as usize;
        let applied = self.volume.cipher.apply(direction, first, size, sectors);
        applied.map_err(|error| io::Error::other(error.to_string()))
    }

    /// Reads complete sectors; returns the number of bytes before the end of the storage. A sector
    /// that the end cuts is completed with zeroes before it is decrypted, as QEMU does.
    fn read_sectors(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read_at(self.place(offset, buffer.len() as u64)?, buffer)?;
        let end = read.next_multiple_of(self.sector() as usize).min(buffer.len());
        buffer[read..end].fill(0);
        self.apply(Direction::Decrypt, offset, &mut buffer[..end])?;
        Ok(read)
    }

    /// Reads a range of any alignment through a buffer.
    fn read_unaligned(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let position = offset + done as u64;
            let skipped = (position % self.sector()) as usize;
            let wanted = (buffer.len() - done).min(TRANSFER_MAX - skipped);
            let length = (skipped + wanted).next_multiple_of(self.sector() as usize);
            let mut sectors = self.buffers.take(length);
            let read = self.read_sectors(position - skipped as u64, sectors.bytes_mut())?;
            let found = read.saturating_sub(skipped).min(wanted);
            buffer[done..done + found].copy_from_slice(&sectors.bytes()[skipped..skipped + found]);
            done += found;
            if found < wanted {
                break;
            }
        }
        Ok(done)
    }

    /// Encrypts and writes a part of a write, which is at most [`TRANSFER_MAX`] bytes with the
    /// sectors that it touches.
    fn write_part(&self, offset: u64, data: &[u8], durability: Durability) -> io::Result<()> {
        let sectors = self.sectors(offset, data.len())?;
        let (start, end) = (sectors.start, sectors.end);
        let place = self.place(start, end - start)?;
        let mut buffer = self.buffers.take((end - start) as usize);
        let size = self.sector() as usize;
        let bytes = buffer.bytes_mut();
        // What is around the data in its first and its last sector.
        if offset != start {
            self.read_around(start, &mut bytes[..size])?;
        }
        let last = end - self.sector();
        if offset + data.len() as u64 != end && (offset == start || last != start) {
            self.read_around(last, &mut bytes[(last - start) as usize..])?;
        }
        bytes[(offset - start) as usize..][..data.len()].copy_from_slice(data);
        self.apply(Direction::Encrypt, start, bytes)?;
        self.inner.write_at(place, buffer.bytes(), durability)
    }

    /// Reads a sector that is written in part; it is zero if it is not in the storage.
    fn read_around(&self, offset: u64, sector: &mut [u8]) -> io::Result<()> {
        if self.read_sectors(offset, sector)? == 0 {
            sector.fill(0);
        }
        Ok(())
    }

    /// Writes encrypted zeroes from `position` to `end`, upwards.
    fn write_zeroes_until(&self, mut position: u64, end: u64) -> io::Result<()> {
        let zeroes = vec![0; TRANSFER_MAX];
        while position < end {
            let part = (end - position).min(TRANSFER_MAX as u64);
            let place = HostOffset::new(position);
            self.write_at(place, &zeroes[..part as usize], Durability::Cached)?;
            position += part;
        }
        Ok(())
    }

    fn is_aligned(&self, offset: u64, length: usize) -> bool {
        offset.is_multiple_of(self.sector()) && (length as u64).is_multiple_of(self.sector())
    }

    /// The length of a read that does not reach past the size that the header gives. The end of the
    /// other storage is found by reading.
    fn within(&self, offset: u64, length: usize) -> usize {
        let rest = self.volume.size.map_or(u64::MAX, |size| size.saturating_sub(offset));
        usize::try_from(rest).unwrap_or(usize::MAX).min(length)
    }
}

impl Storage for Encrypted {
    fn len(&self) -> io::Result<u64> {
        let available = self.inner.len()?.saturating_sub(self.volume.start);
        let available = available / self.sector() * self.sector();
        Ok(self.volume.size.map_or(available, |size| size.min(available)))
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let offset = offset.bytes();
        let length = self.within(offset, buffer.len());
        if length == 0 {
            return Ok(0);
        }
        let buffer = &mut buffer[..length];
        let _shared = self.ranges.shared(self.sectors(offset, length)?);
        match self.is_aligned(offset, length) {
            true => self.read_sectors(offset, buffer),
            false => self.read_unaligned(offset, buffer),
        }
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        let offset = offset.bytes();
        if buffer.len() > TRY_READ_MAX {
            return Ok(TryRead::WouldBlock);
        }
        let sectors = self.sectors(offset, buffer.len())?;
        let Ok(place) = self.place(sectors.start, sectors.end - sectors.start) else {
            return Ok(TryRead::WouldBlock);
        };
        let Some(_shared) = self.ranges.try_shared(sectors.clone()) else {
            return Ok(TryRead::WouldBlock);
        };
        if self.is_aligned(offset, buffer.len()) {
            let read = self.inner.try_read_at(place, buffer)?;
            if read == TryRead::Complete {
                self.apply(Direction::Decrypt, offset, buffer)?;
            }
            return Ok(read);
        }
        let length = (sectors.end - sectors.start) as usize;
        if length > TRANSFER_MAX {
            return Ok(TryRead::WouldBlock);
        }
        let mut bounce = self.buffers.take(length);
        let read = self.inner.try_read_at(place, bounce.bytes_mut())?;
        if read == TryRead::Complete {
            self.apply(Direction::Decrypt, sectors.start, bounce.bytes_mut())?;
            let skipped = (offset - sectors.start) as usize;
            buffer.copy_from_slice(&bounce.bytes()[skipped..skipped + buffer.len()]);
        }
        Ok(read)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let offset = offset.bytes();
        let sectors = self.sectors(offset, data.len())?;
        // Before the first byte is written.
        self.place(sectors.start, sectors.end - sectors.start)?;
        let may_share = self.is_aligned(offset, data.len()) && !self.volume.cipher.blocks_depend();
        let _held = match may_share {
            true => self.ranges.shared(sectors),
            false => self.ranges.exclusive(sectors),
        };
        let (mut position, mut rest) = (offset, data);
        while !rest.is_empty() {
            // Parts end where sectors do.
            let skipped = (position % self.sector()) as usize;
            let (part, behind) = rest.split_at(rest.len().min(TRANSFER_MAX - skipped));
            self.write_part(position, part, durability)?;
            position += part.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    /// Whole sectors of a file alone: around others is data that may have to be read.
    fn try_write_at(&self, offset: HostOffset, data: &[u8]) -> io::Result<TryWrite> {
        let offset = offset.bytes();
        let may_share = self.is_aligned(offset, data.len()) && !self.volume.cipher.blocks_depend();
        let is_file = self.inner.as_fd().is_some() && self.inner.direct_alignment().is_none();
        if !may_share || !is_file || data.len() > TRY_WRITE_MAX {
            return Ok(TryWrite::WouldBlock);
        }
        let Some(_shared) = self.ranges.try_shared(self.sectors(offset, data.len())?) else {
            return Ok(TryWrite::WouldBlock);
        };
        self.write_part(offset, data, Durability::Cached)?;
        Ok(TryWrite::Complete)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        if self.volume.size.is_some() {
            return refused("the header of the encrypted disk fixes its size".to_owned());
        }
        if !length.is_multiple_of(self.sector()) {
            let sector = self.sector();
            return refused(format!(
                "the size of this encrypted disk must be a multiple of {sector} bytes"
            ));
        }
        let (old, inner_old) = (self.len()?, self.inner.len()?);
        if length <= old {
            return self.inner.set_len(self.place(length, 0)?.bytes());
        }
        // Bytes that the other storage adds would decrypt to noise, also after a crash. So it grows
        // by writes.
        self.write_zeroes_until(old, length).inspect_err(|_| {
            // The error of the write is the one to report.
            let _ = self.inner.set_len(inner_old);
        })
    }

    fn punch_hole(&self, _offset: HostOffset, _length: u64) -> io::Result<()> {
        // It would show which parts of the disk are in use, and read as noise.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn capabilities(&self) -> Capabilities {
        let inner = self.inner.capabilities();
        let sector = self.sector() as u32;
        Capabilities {
            fast_zero: false,
            discard: false,
            minimum_size: inner.minimum_size.max(sector),
            preferred_size: inner.preferred_size.max(sector),
        }
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.readahead(self.place(offset.bytes(), length)?, length)
    }

    fn allocated_len(&self) -> io::Result<Option<u64>> {
        self.inner.allocated_len()
    }

    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.inner.direct_alignment()
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.inner.identity()
    }
}
