//! New images that are the bytes of the disk, and something behind them, written from the start to
//! the end: for what can only be appended to, such as a pipe.

use std::io;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::layer::{FilledInOrder, Layer, Walk, WritableLayer};
use crate::mapping::Mapped;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::storage::{Capabilities, Durability, Speed, Storage, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// What is written at a time, in bytes.
const UNIT: u64 = 256 << 10;

/// A new image that is being written.
#[derive(Debug)]
pub(crate) struct DiskInOrder {
    storage: Arc<dyn Storage>,
    /// Of the disk, in bytes.
    size: u64,
    /// What comes behind the disk.
    ending: Vec<u8>,
    written: OrderedMutex<{ rank::NEW_IMAGE }, Written>,
}

#[derive(Debug, Default)]
struct Written {
    /// How much of the disk.
    end: u64,
    is_finished: bool,
}

impl DiskInOrder {
    pub(crate) fn boxed(
        storage: Arc<dyn Storage>,
        size: u64,
        ending: Vec<u8>,
    ) -> Box<dyn WritableLayer> {
        let written = OrderedMutex::new(Written::default());
        Box::new(Self { storage, size, ending, written })
    }

    /// Writes zeroes up to an offset of the disk.
    fn fill_up_to(&self, written: &mut Written, offset: u64) -> io::Result<()> {
        let length = offset.saturating_sub(written.end);
        if length > 0 {
            let (start, mode) = (HostOffset::new(written.end), ZeroMode::KeepAllocated);
            self.storage.write_zeroes(start, length, mode, Speed::Any)?;
            written.end += length;
        }
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        let mut written = self.written.lock();
        if !written.is_finished {
            self.fill_up_to(&mut written, self.size)?;
            if !self.ending.is_empty() {
                let end = HostOffset::new(self.size);
                self.storage.write_at(end, &self.ending, Durability::Cached)?;
            }
            written.is_finished = true;
        }
        Ok(())
    }
}

impl Layer for DiskInOrder {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: GuestRange, _: &mut Walk<'_>) -> Result<Mapped> {
        let detail = "what is written in order cannot be read";
        Err(Error::new(ErrorKind::Unsupported, "read", detail).at(range.offset().bytes()))
    }
}

impl FilledInOrder for DiskInOrder {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn encode(&self, _: GuestOffset, data: &[u8]) -> Result<Vec<u8>> {
        Ok(data.to_vec())
    }

    fn append(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        let mut written = self.written.lock();
        let start = offset.bytes();
        let end = start.checked_add(data.len() as u64).filter(|end| *end <= self.size);
        let Some(end) = end.filter(|_| start >= written.end && !written.is_finished) else {
            let detail = "the disk is written from the start to the end, each part once";
            return Err(Error::new(ErrorKind::Unsupported, "write to", detail).at(start));
        };
        let io = |error| io(error).at(start);
        self.fill_up_to(&mut written, start).map_err(io)?;
        self.storage.write_at(HostOffset::new(start), data, Durability::Cached).map_err(io)?;
        written.end = end;
        Ok(())
    }
}

impl WritableLayer for DiskInOrder {
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn filled_in_order(&self) -> Option<&dyn FilledInOrder> {
        Some(self)
    }

    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        self.append(offset, data)?;
        self.flush_if(durability)
    }

    fn try_write_at(&self, _: GuestOffset, _: &[u8]) -> Result<TryWrite> {
        Ok(TryWrite::WouldBlock)
    }

    /// What is not written becomes zero.
    fn write_zeroes(&self, range: GuestRange, _: ZeroMode, _: Speed) -> Result<()> {
        self.append(range.offset(), &[])
    }

    fn discard(&self, _: GuestRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.storage.sync().map_err(io)
    }

    fn close(&self) -> Result<()> {
        self.finish().map_err(io)?;
        self.flush()
    }

    fn resize(&mut self, _: u64) -> Result<()> {
        let detail = "the size of a disk that is written in order cannot be changed";
        Err(Error::new(ErrorKind::Unsupported, "resize", detail))
    }
}

fn io(error: io::Error) -> Error {
    Error::from_io("write to", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    const SIZE: u64 = 3 * UNIT + 1000;

    #[test]
    fn gaps_and_the_rest_are_zeroes_and_the_ending_follows_the_disk() {
        let storage = Arc::new(MemoryStorage::new(0));
        let image = DiskInOrder::boxed(Arc::clone(&storage) as _, SIZE, vec![9; 512]);
        for (offset, value) in [(UNIT, 1), (2 * UNIT + 5, 2)] {
            image.write_at(GuestOffset::new(offset), &[value; 100], Durability::Cached).unwrap();
        }
        assert_eq!(storage.len().unwrap(), 2 * UNIT + 105, "nothing is written ahead");
        image.close().unwrap();
        image.close().unwrap();
        let mut expected = vec![0; SIZE as usize];
        expected[UNIT as usize..][..100].fill(1);
        expected[2 * UNIT as usize + 5..][..100].fill(2);
        expected.extend([9; 512]);
        let mut bytes = vec![0; expected.len() + 1];
        assert_eq!(storage.read_at(HostOffset::new(0), &mut bytes).unwrap(), expected.len());
        assert!(bytes[..expected.len()] == expected);
    }

    #[test]
    fn what_was_passed_and_what_is_beyond_the_end_is_refused() {
        let image = DiskInOrder::boxed(Arc::new(MemoryStorage::new(0)), SIZE, Vec::new());
        let write = |offset: u64, length: usize| {
            image.write_at(GuestOffset::new(offset), &vec![1; length], Durability::Cached)
        };
        write(1000, 1000).unwrap();
        for (offset, length) in [(1999, 1), (0, 0), (SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2)] {
            let error = write(offset, length).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{offset} {length}: {error}");
        }
        write(2000, 1).unwrap();
        image.close().unwrap();
        assert!(write(3000, 1).is_err(), "it is complete");
    }
}
