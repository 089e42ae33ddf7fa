//! A sparse storage in memory, for tests and temporary images.

use std::collections::BTreeMap;
use std::io;

use super::{Capabilities, Durability, Storage, StorageExtent, TryRead};
use crate::extent::ExtentKind;
use crate::ordered_lock::{OrderedRwLock, rank};
use crate::units::HostOffset;

const PAGE_SIZE: usize = 4096;
const PAGE: u64 = PAGE_SIZE as u64;

/// Bytes in memory that occupy space only for the 4 KiB pages that were written.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    content: OrderedRwLock<{ rank::MEMORY_STORAGE }, Content>,
}

#[derive(Debug, Default)]
struct Content {
    length: u64,
    pages: BTreeMap<u64, Box<[u8; PAGE_SIZE]>>,
}

impl MemoryStorage {
    /// Creates a storage of `length` bytes, all zero.
    pub fn new(length: u64) -> Self {
        Self { content: OrderedRwLock::new(Content { length, pages: BTreeMap::new() }) }
    }

    /// Creates a storage that holds a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut content = Content::default();
        content.write(0, bytes);
        Self { content: OrderedRwLock::new(content) }
    }
}

impl Content {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let (page, start) = split(offset + done as u64);
            let part = (PAGE_SIZE - start).min(data.len() - done);
            let bytes = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE_SIZE]));
            bytes[start..start + part].copy_from_slice(&data[done..done + part]);
            done += part;
        }
        self.length = self.length.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, end: u64) {
        let keys: Vec<u64> =
            self.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|p| *p.0).collect();
        for page in keys {
            let start = offset.saturating_sub(page * PAGE).min(PAGE) as usize;
            let stop = (end - page * PAGE).min(PAGE) as usize;
            if start == 0 && stop == PAGE_SIZE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[start..stop].fill(0);
            }
        }
    }
}

fn split(offset: u64) -> (u64, usize) {
    (offset / PAGE, (offset % PAGE) as usize)
}

impl Storage for MemoryStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.read().length)
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let content = self.content.read();
        let offset = offset.bytes();
        let available = content.length.saturating_sub(offset);
        let wanted = usize::try_from(available).unwrap_or(usize::MAX).min(buffer.len());
        let mut done = 0;
        while done < wanted {
            let (page, start) = split(offset + done as u64);
            let part = (PAGE_SIZE - start).min(wanted - done);
            let target = &mut buffer[done..done + part];
            match content.pages.get(&page) {
                Some(bytes) => target.copy_from_slice(&bytes[start..start + part]),
                None => target.fill(0),
            }
            done += part;
        }
        Ok(wanted)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], _: Durability) -> io::Result<()> {
        offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        self.content.write().write(offset.bytes(), data);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut content = self.content.write();
        if length < content.length {
            let end = content.length;
            content.zero(length, end);
        }
        content.length = length;
        Ok(())
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        self.content.write().zero(offset.bytes(), end.bytes());
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { fast_zero: true, discard: true, ..Capabilities::default() }
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.read_exact_at(offset, buffer)?;
        Ok(TryRead::Complete)
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let content = self.content.read();
        let end = offset.bytes().saturating_add(length);
        let (mut page, start) = split(offset.bytes());
        let is_data = content.pages.contains_key(&page);
        let mut found = PAGE - start as u64;
        while offset.bytes() + found < end && content.pages.contains_key(&(page + 1)) == is_data {
            if !is_data && content.pages.range(page + 1..).next().is_none() {
                found = length;
                break;
            }
            page += 1;
            found += PAGE;
        }
        let kind = if is_data { ExtentKind::Data } else { ExtentKind::Hole };
        Ok(StorageExtent { length: found.min(length), kind })
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        let data = StorageExtent { length, kind: ExtentKind::Data };
        self.next_extent(offset, length).is_ok_and(|found| found == data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(storage: &MemoryStorage, offset: u64, length: usize) -> Vec<u8> {
        let mut buffer = vec![0xee; length];
        storage.read_exact_at(HostOffset::new(offset), &mut buffer).unwrap();
        buffer
    }

    #[test]
    fn what_was_written_is_read_and_the_rest_is_zero() {
        let storage = MemoryStorage::new(10_000);
        storage.write_at(HostOffset::new(4090), b"across a page", Durability::Cached).unwrap();
        assert_eq!(bytes(&storage, 4089, 15), b"\0across a page\0");
        assert_eq!(storage.read_at(HostOffset::new(9_999), &mut [0; 5]).unwrap(), 1);
        assert_eq!(storage.read_at(HostOffset::new(20_000), &mut [0; 5]).unwrap(), 0);
    }

    #[test]
    fn bytes_cut_off_do_not_come_back() {
        let storage = MemoryStorage::from_bytes(&[7; 9000]);
        storage.set_len(4100).unwrap();
        storage.set_len(9000).unwrap();
        assert_eq!(bytes(&storage, 4099, 3), [7, 0, 0]);
        assert_eq!(bytes(&storage, 8999, 1), [0]);
    }

    #[test]
    fn a_punched_page_is_a_hole() {
        let storage = MemoryStorage::from_bytes(&[7; 5 * 4096]);
        storage.punch_hole(HostOffset::new(4000), 2 * 4096).unwrap();
        assert_eq!(bytes(&storage, 3999, 3), [7, 0, 0]);
        let extent = storage.next_extent(HostOffset::new(0), 20_480).unwrap();
        assert_eq!((extent.length, extent.kind), (4096, ExtentKind::Data));
        let extent = storage.next_extent(HostOffset::new(4096), 16_384).unwrap();
        assert_eq!((extent.length, extent.kind), (4096, ExtentKind::Hole));
    }
}
