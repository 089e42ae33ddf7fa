//! A file with changes that are only in memory.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::storage::{Durability, FileIdentity, Speed, Storage, TryRead, ZeroMode};
use crate::units::HostOffset;

/// A change of a range of the file.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// As many bytes; `None` for zeroes.
    pub(super) data: Option<Arc<[u8]>>,
}

impl Change {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// The part of it before an offset, if there is one.
    fn before(&self, offset: u64) -> Option<Self> {
        let length =
            offset.min(self.end()).checked_sub(self.offset).filter(|length| *length > 0)?;
        let data = self.data.as_ref().map(|data| data[..length as usize].into());
        Some(Self { offset: self.offset, length, data })
    }

    /// The part of it from an offset on, if there is one.
    fn from(&self, offset: u64) -> Option<Self> {
        let start = offset.max(self.offset);
        let length = self.end().checked_sub(start).filter(|length| *length > 0)?;
        let data = self.data.as_ref().map(|data| data[(start - self.offset) as usize..].into());
        Some(Self { offset: start, length, data })
    }
}

/// A file as it will be when the changes are made. Nothing can be written to it.
#[derive(Debug)]
pub(super) struct Overlay {
    below: Arc<dyn Storage>,
    /// By their offsets; none overlaps another.
    changes: BTreeMap<u64, Change>,
    /// At least this long.
    length: u64,
}

impl Overlay {
    /// Lays the changes over a file, the last one on top.
    pub(super) fn new(below: Arc<dyn Storage>, changes: Vec<Change>, length: u64) -> Self {
        let mut overlay = Self { below, changes: BTreeMap::new(), length };
        for change in changes.into_iter().filter(|change| change.length > 0) {
            overlay.length = overlay.length.max(change.end());
            overlay.lay(change);
        }
        overlay
    }

    fn lay(&mut self, change: Change) {
        let before = self.changes.range(..change.offset).next_back();
        let mut covered: Vec<u64> = before
            .filter(|(_, before)| before.end() > change.offset)
            .map(|(offset, _)| *offset)
            .into_iter()
            .collect();
        covered.extend(self.changes.range(change.offset..change.end()).map(|(offset, _)| *offset));
        for offset in covered {
            let Some(other) = self.changes.remove(&offset) else { continue };
            for rest in
                [other.before(change.offset), other.from(change.end())].into_iter().flatten()
            {
                self.changes.insert(rest.offset, rest);
            }
        }
        self.changes.insert(change.offset, change);
    }

    /// Makes the changes in the file, and waits until they are on stable storage.
    pub(super) fn write_out(&self) -> io::Result<()> {
        if self.below.len()? < self.length {
            self.below.set_len(self.length)?;
        }
        for change in self.changes.values() {
            let offset = HostOffset::new(change.offset);
            match &change.data {
                Some(data) => self.below.write_at(offset, data, Durability::Cached)?,
                None => {
                    let mode = ZeroMode::MayUnmap;
                    self.below.write_zeroes(offset, change.length, mode, Speed::Any)?;
                }
            }
        }
        self.below.sync()
    }

    /// Makes the changes in bytes that were read from an offset on.
    fn apply(&self, offset: u64, buffer: &mut [u8]) {
        let end = offset.saturating_add(buffer.len() as u64);
        let before = self.changes.range(..offset).next_back();
        let changes = before.into_iter().chain(self.changes.range(offset..end));
        for (_, change) in changes {
            let Some(part) = change.from(offset).and_then(|part| part.before(end)) else {
                continue;
            };
            let start = (part.offset - offset) as usize;
            let bytes = &mut buffer[start..start + part.length as usize];
            match &part.data {
                Some(data) => bytes.copy_from_slice(data),
                None => bytes.fill(0),
            }
        }
    }
}

impl Storage for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.below.len()?.max(self.length))
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.len()?.saturating_sub(offset.bytes());
        let wanted = (buffer.len() as u64).min(rest) as usize;
        let buffer = &mut buffer[..wanted];
        let read = self.below.read_at(offset, buffer)?;
        // What the file is to be longer by reads as zero.
        buffer[read..].fill(0);
        self.apply(offset.bytes(), buffer);
        Ok(wanted)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        let end = offset.bytes().saturating_add(buffer.len() as u64);
        if end > self.below.len()? {
            return Ok(TryRead::WouldBlock);
        }
        let read = self.below.try_read_at(offset, buffer)?;
        if read == TryRead::Complete {
            self.apply(offset.bytes(), buffer);
        }
        Ok(read)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.below.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn the_last_change_of_a_byte_is_seen() {
        let change = |offset: u64, length: u64, value: u8| Change {
            offset,
            length,
            data: (value > 0).then(|| vec![value; length as usize].into()),
        };
        let changes = [(10, 20, 1), (15, 5, 2), (0, 4, 3), (28, 10, 0), (2, 9, 4), (90, 20, 5)];
        let mut expected = vec![9; 100];
        expected.resize(110, 0);
        for (offset, length, value) in changes {
            expected[offset..offset + length].fill(value);
        }
        let changes =
            changes.map(|(offset, length, value)| change(offset as u64, length as u64, value));
        let below = Arc::new(MemoryStorage::from_bytes(&[9; 100]));
        let overlay = Overlay::new(below, changes.to_vec(), 0);
        assert_eq!(overlay.len().unwrap(), 110);
        for start in 0..110 {
            for end in start..=112 {
                let mut found = vec![0xee; end - start];
                let read = overlay.read_at(HostOffset::new(start as u64), &mut found).unwrap();
                assert_eq!(found[..read], expected[start..end.min(110)], "{start} to {end}");
            }
        }
    }
}
