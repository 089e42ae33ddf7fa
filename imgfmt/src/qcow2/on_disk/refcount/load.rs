//! Reading refcount blocks into memory.
//!
//! The refcounts are locked while they are used, but not while a block is read: work first fails
//! because the block is missing ([`Refcounts::read_nothing`]). Then the block is read
//! ([`Refcounts::begin_load`], [`Refcounts::end_load`]), and the work is repeated. Other work can
//! run in between.

use std::sync::Arc;

use super::{Block, CACHE_BYTES, Reads, Refcounts};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::units::HostOffset;

/// A refcount block that is to be read.
#[derive(Debug)]
pub(in crate::qcow2) struct BlockLoad {
    file: Arc<dyn Storage>,
    index: usize,
    offset: HostOffset,
    /// The length of a block, in bytes.
    length: usize,
    /// The number of blocks that had been put into memory before.
    inserted: u64,
}

impl BlockLoad {
    /// Reads the block.
    pub(in crate::qcow2) fn read(&self) -> Result<Vec<u8>> {
        read_block(&*self.file, self.offset, self.length)
    }
}

impl Refcounts {
    /// From now on, work that needs a block that is not in memory fails.
    pub(in crate::qcow2) fn read_nothing(&mut self) {
        (self.reads, self.missing) = (Reads::Nothing, None);
    }

    /// From now on, blocks are read when they are needed. Returns the index of the missing block if
    /// work has failed since [`read_nothing`](Self::read_nothing).
    pub(in crate::qcow2) fn read_missing(&mut self) -> Option<usize> {
        self.reads = Reads::Missing;
        self.missing.take()
    }

    /// The error of work that has failed because a block is missing.
    pub(in crate::qcow2) fn refuse_missing(&self) -> Result<()> {
        self.missing.map_or(Ok(()), |_| {
            Err(Error::new(ErrorKind::Busy, "change", "a refcount block is not in memory"))
        })
    }

    /// Prepares a read of the block of this index; `None` if it is in memory, does not exist or has
    /// an invalid place.
    pub(in crate::qcow2) fn begin_load(&self, index: usize) -> Option<BlockLoad> {
        if self.blocks.contains_key(&index) {
            return None;
        }
        let offset = self.offset_to_read(index).ok()?;
        let length = self.geometry.cluster_size() as usize;
        let (file, inserted) = (Arc::clone(&self.file), self.inserted);
        Some(BlockLoad { file, index, offset, length, inserted })
    }

    /// Puts a block that was read into memory, unless any block was put into memory meanwhile: it
    /// may have been this one, and it may have been changed, written and dropped since.
    pub(in crate::qcow2) fn end_load(&mut self, load: &BlockLoad, bytes: Vec<u8>) {
        if self.inserted == load.inserted {
            self.insert(load.index, Block::clean(bytes));
        }
    }

    /// The block of this index, which is read if it is not in memory.
    pub(super) fn block(&mut self, index: usize) -> Result<&mut Block> {
        if !self.blocks.contains_key(&index) {
            let offset = self.offset_to_read(index)?;
            if self.reads == Reads::Nothing {
                self.missing = Some(index);
                self.refuse_missing()?;
            }
            let bytes = read_block(&*self.file, offset, self.geometry.cluster_size() as usize)?;
            self.insert(index, Block::clean(bytes));
        }
        let missing = || Error::new(ErrorKind::Corrupt, "change", "a refcount block is missing");
        self.blocks.get_mut(&index).ok_or_else(missing)
    }

    /// Puts a block into memory. If there are too many, it replaces one that is on disk.
    pub(super) fn insert(&mut self, index: usize, block: Block) {
        let blocks_max = (CACHE_BYTES / self.geometry.cluster_size()).max(8) as usize;
        if self.blocks.len() >= blocks_max {
            let clean = |block: &Block| block.dirty.is_none() && !block.is_being_written;
            let victim =
                self.blocks.iter().find(|(_, block)| clean(block)).map(|(index, _)| *index);
            victim.and_then(|index| self.blocks.remove(&index));
        }
        self.inserted += 1;
        self.blocks.insert(index, block);
    }

    /// The offset of the block of this index, if it is valid.
    fn offset_to_read(&self, index: usize) -> Result<HostOffset> {
        let offset = self.block_offset(index).unwrap_or_default();
        let is_possible = offset.bytes() != 0 && offset.bytes() >> 56 == 0;
        if is_possible && self.geometry.in_cluster(offset) == 0 {
            return Ok(offset);
        }
        let detail = "a refcount block is missing or not aligned; check it with \
                      'nbd-cli image check'";
        Err(Error::new(ErrorKind::Corrupt, "change", detail).at(offset.bytes()))
    }
}

fn read_block(file: &dyn Storage, offset: HostOffset, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    file.read_exact_at(offset, &mut bytes).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::new(
            ErrorKind::Corrupt,
            "change",
            "a refcount block lies past the end of the file; check it with 'nbd-cli image check'",
        )
        .at(offset.bytes()),
        _ => Error::from_io("read a refcount block of", error),
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::on_disk::cluster::HostCluster;
    use crate::qcow2::on_disk::geometry::Geometry;
    use crate::storage::MemoryStorage;

    const OWN: HostCluster = HostCluster::new(1);

    /// One block in cluster 1, of clusters of 512 bytes, that counts itself alone.
    fn refcounts() -> Refcounts {
        let mut bytes = vec![0; 1024];
        bytes[512 + 2..][..2].copy_from_slice(&1u16.to_be_bytes());
        let geometry = Geometry { cluster_bits: 9, extended_l2: false, refcount_order: 4 };
        let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
        Refcounts::new(storage, geometry, vec![512])
    }

    #[test]
    fn work_fails_for_lack_of_a_block_and_succeeds_when_it_is_read() {
        let mut refcounts = refcounts();
        refcounts.read_nothing();
        assert_eq!(refcounts.refcount(OWN).unwrap_err().kind(), ErrorKind::Busy);
        refcounts.refuse_missing().unwrap_err();
        assert_eq!(refcounts.read_missing(), Some(0));
        refcounts.refuse_missing().unwrap();
        let load = refcounts.begin_load(0).unwrap();
        let bytes = load.read().unwrap();
        refcounts.end_load(&load, bytes);
        refcounts.read_nothing();
        assert_eq!(refcounts.refcount(OWN).unwrap(), 1);
        assert_eq!(refcounts.read_missing(), None);
        assert!(refcounts.begin_load(0).is_none(), "it is in memory");
        assert!(refcounts.begin_load(1).is_none(), "there is none");
    }

    #[test]
    fn an_old_block_does_not_replace_one_that_came_into_memory_meanwhile() {
        let mut refcounts = refcounts();
        let load = refcounts.begin_load(0).unwrap();
        let old = load.read().unwrap();
        refcounts.set_refcount(OWN, 3).unwrap();
        refcounts.end_load(&load, old.clone());
        assert_eq!(refcounts.refcount(OWN).unwrap(), 3);
        // Nor if it has been written and dropped since.
        let parts = refcounts.take_dirty();
        refcounts.written(&parts, true);
        refcounts.blocks.clear();
        refcounts
            .file
            .write_at(parts[0].offset, &parts[0].bytes, crate::storage::Durability::Cached)
            .unwrap();
        refcounts.end_load(&load, old);
        assert_eq!(refcounts.refcount(OWN).unwrap(), 3);
    }
}
