//! A disk in memory, and an example of a complete export.

use std::collections::HashMap;

use nbd_proto::wire::{AllocationFlags, BlockDescriptor, MetaContextName, TransmissionFlags};

use std::sync::{PoisonError, RwLock};

use super::{
    Descriptors, Durability, Export, ExportError, ExportInfo, FastExport, Holes, Lookup, Mapped,
    MayBlock, Operation, ReadMap, Speed, TryRead, ZeroMode,
};

/// Pages are allocated when they are first written.
const PAGE_SIZE: u64 = 64 * 1024;
/// Maximum number of pages that one call examines. A disk may have 2^47 pages, and a client may ask
/// about all.
const MAX_WALKED_PAGES: u64 = 1 << 14;
/// Pages are spread over this many locks, so that connections seldom wait for each other.
const SHARDS: u64 = 64;

type Page = Box<[u8; PAGE_SIZE as usize]>;

/// A sparse disk in memory. It occupies memory only for data that was written.
#[derive(Debug)]
pub struct MemoryExport {
    size: u64,
    shards: Vec<RwLock<HashMap<u64, Page>>>,
}

impl MemoryExport {
    /// Creates a disk of `size` bytes that reads as zeroes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, shards: (0..SHARDS).map(|_| RwLock::default()).collect() }
    }

    fn shard(&self, page: u64) -> &RwLock<HashMap<u64, Page>> {
        &self.shards[(page % SHARDS) as usize]
    }

    /// Fills `buffer`, or with [`Holes::Told`] gives up at the first page that does not exist.
    fn read(&self, offset: u64, buffer: &mut [u8], holes: Holes) -> TryRead {
        let mut rest = buffer;
        for part in parts(offset, rest.len() as u64) {
            let (head, tail) = rest.split_at_mut(part.length);
            let pages = self.shard(part.page).read().unwrap_or_else(PoisonError::into_inner);
            match (pages.get(&part.page), holes) {
                (Some(page), _) => {
                    head.copy_from_slice(&page[part.start..part.start + part.length]);
                }
                (None, Holes::AsData) => head.fill(0),
                (None, Holes::Told) => return TryRead::Sparse,
            }
            rest = tail;
        }
        TryRead::Complete
    }

    /// Zeroes a range; complete pages are freed.
    fn clear(&self, offset: u64, length: u64) {
        let end = offset + length;
        let whole = offset.div_ceil(PAGE_SIZE)..end / PAGE_SIZE;
        if whole.end.saturating_sub(whole.start) <= MAX_WALKED_PAGES {
            return self.clear_parts(offset, length);
        }
        // For a long range, examine the existing pages, not all possible ones.
        for shard in &self.shards {
            let mut pages = shard.write().unwrap_or_else(PoisonError::into_inner);
            pages.retain(|page, _| !whole.contains(page));
        }
        self.clear_parts(offset, whole.start * PAGE_SIZE - offset);
        self.clear_parts(whole.end * PAGE_SIZE, end - whole.end * PAGE_SIZE);
    }

    fn clear_parts(&self, offset: u64, length: u64) {
        for part in parts(offset, length) {
            let mut pages = self.shard(part.page).write().unwrap_or_else(PoisonError::into_inner);
            if part.length == PAGE_SIZE as usize {
                pages.remove(&part.page);
            } else if let Some(page) = pages.get_mut(&part.page) {
                page[part.start..part.start + part.length].fill(0);
            }
        }
    }
}

impl Export for MemoryExport {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(self.size);
        info.flags |= TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::CAN_MULTI_CONN;
        info.meta_contexts.push(MetaContextName::base_allocation());
        info
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.read(offset, buffer, Holes::AsData);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), ExportError> {
        let mut rest = data;
        for part in parts(offset, rest.len() as u64) {
            let (head, tail) = rest.split_at(part.length);
            let mut pages = self.shard(part.page).write().unwrap_or_else(PoisonError::into_inner);
            let page = pages.entry(part.page).or_insert_with(|| Box::new([0; PAGE_SIZE as usize]));
            page[part.start..part.start + part.length].copy_from_slice(head);
            rest = tail;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64, _: Durability) -> Result<(), ExportError> {
        self.clear(offset, length);
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        _: ZeroMode,
        _: Speed,
        _: Durability,
    ) -> Result<(), ExportError> {
        self.clear(offset, length);
        Ok(())
    }

    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Ok(())
    }

    fn block_status(
        &self,
        _context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        let hole = AllocationFlags::STATE_HOLE | AllocationFlags::STATE_ZERO;
        let mut status = Descriptors::new(max_count);
        for part in parts(offset, length.min(MAX_WALKED_PAGES * PAGE_SIZE)) {
            let pages = self.shard(part.page).read().unwrap_or_else(PoisonError::into_inner);
            let flags = if pages.contains_key(&part.page) { 0 } else { hole.bits() };
            if !status.push(part.length as u64, flags) {
                break;
            }
        }
        Ok(status.into_vec())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for MemoryExport {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        Ok(self.read(offset, buffer, holes))
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        _: Holes,
        _: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        for part in parts(offset, length as u64) {
            let pages = self.shard(part.page).read().unwrap_or_else(PoisonError::into_inner);
            match pages.contains_key(&part.page) {
                true => map.push_export(part.length),
                false => map.push_zero(part.length),
            }
        }
        Ok(Mapped::Complete)
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        match operation {
            // These walk every page of a range that may be the complete disk.
            Operation::Trim | Operation::WriteZeroes | Operation::BlockStatus => MayBlock::Yes,
            _ => MayBlock::No,
        }
    }
}

/// The part of a range that is in one page.
struct PagePart {
    page: u64,
    start: usize,
    length: usize,
}

fn parts(offset: u64, length: u64) -> impl Iterator<Item = PagePart> {
    let end = offset + length;
    let mut next = offset;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let start = next % PAGE_SIZE;
        let length = (PAGE_SIZE - start).min(end - next);
        let part =
            PagePart { page: next / PAGE_SIZE, start: start as usize, length: length as usize };
        next += length;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_across_pages_is_read_back_and_the_rest_is_zero() {
        let disk = MemoryExport::new(1 << 40);
        let offset = 5 * PAGE_SIZE - 3;
        disk.write_at(offset, b"across", Durability::Cached).unwrap();
        let mut buffer = [0xff; 10];
        disk.read_at(offset - 2, &mut buffer).unwrap();
        assert_eq!(&buffer, b"\0\0across\0\0");
    }

    #[test]
    fn a_range_of_any_length_is_cleared_and_nothing_beside_it() {
        let disk = MemoryExport::new(i64::MAX as u64);
        let far = 1 << 60;
        let places = [PAGE_SIZE - 1, PAGE_SIZE + 7, far - 1, far, far + 5 * PAGE_SIZE];
        for place in places {
            disk.write_at(place, &[1], Durability::Cached).unwrap();
        }
        disk.trim(PAGE_SIZE, far - PAGE_SIZE, Durability::Cached).unwrap();
        let left = places.map(|place| {
            let mut byte = [9];
            disk.read_at(place, &mut byte).unwrap();
            byte[0]
        });
        assert_eq!(left, [1, 0, 0, 1, 1]);
        disk.trim(PAGE_SIZE - 1, far - PAGE_SIZE + 2, Durability::Cached).unwrap();
        let mut byte = [9; 1];
        disk.read_at(PAGE_SIZE - 1, &mut byte).unwrap();
        assert_eq!(byte, [0], "the part of a page in front of the whole ones");
        disk.read_at(far, &mut byte).unwrap();
        assert_eq!(byte, [0], "the part of a page behind them");
    }

    #[test]
    fn trimmed_pages_become_holes_again() {
        let disk = MemoryExport::new(4 * PAGE_SIZE);
        let context = MetaContextName::base_allocation();
        disk.write_at(PAGE_SIZE, &[1; 2 * PAGE_SIZE as usize], Durability::Cached).unwrap();
        disk.trim(PAGE_SIZE, PAGE_SIZE + 1, Durability::Cached).unwrap();
        let status = disk.block_status(&context, 0, 4 * PAGE_SIZE, 10).unwrap();
        let expected = [(2 * PAGE_SIZE, 3), (PAGE_SIZE, 0), (PAGE_SIZE, 3)];
        assert_eq!(status.iter().map(|d| (d.length, d.flags)).collect::<Vec<_>>(), expected);
        let mut byte = [9; 2];
        disk.read_at(2 * PAGE_SIZE, &mut byte).unwrap();
        assert_eq!(byte, [0, 1], "only the trimmed byte of a page is zero");
        assert_eq!(disk.block_status(&context, 0, 4 * PAGE_SIZE, 1).unwrap().len(), 1);
    }
}
