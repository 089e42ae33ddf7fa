//! Refcounts: the number of references to each cluster of the file.
//!
//! A refcount table names refcount blocks; a block is an array of counts, 1 to 64 bits wide. Blocks
//! are cached; changed ones stay in memory until [`flush`](crate::qcow2::flush) has written them.

mod load;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::refcount_entry::{read_entry, write_entry};
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

/// Memory for refcount blocks that are not waiting to be written.
const CACHE_BYTES: u64 = 16 << 20;

const TABLE_OFFSET_MASK: u64 = !511;

/// The refcounts of one file.
#[derive(Debug)]
pub(crate) struct Refcounts {
    pub(in crate::qcow2) file: Arc<dyn Storage>,
    pub(in crate::qcow2) geometry: Geometry,
    /// Offsets of the blocks, as in the file: 0 if there is none.
    pub(in crate::qcow2) table: Vec<u64>,
    /// Entries of the table that are not yet on disk.
    pub(in crate::qcow2) dirty_entries: BTreeSet<usize>,
    blocks: HashMap<usize, Block>,
    /// The places of the blocks; none ever moves.
    places: HashSet<HostOffset>,
    /// Entries of the table that are invalid.
    lies: HashSet<usize>,
    /// The clusters, in order, of other metadata known when the image was opened.
    others: Vec<HostCluster>,
    trusts_all: bool,
    reads: Reads,
    /// The block that the work needed and that was not in memory.
    missing: Option<usize>,
    /// The number of blocks that were put into memory so far.
    inserted: u64,
}

/// Whether blocks that are not in memory are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reads {
    #[default]
    Missing,
    Nothing,
}

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    /// First and last (excluded) changed byte.
    dirty: Option<(usize, usize)>,
    /// Whether a copy is being written to the disk, which has older content.
    is_being_written: bool,
    /// Whether it is known to be a refcount block and nothing else.
    is_trusted: bool,
}

impl Block {
    fn clean(bytes: Vec<u8>) -> Self {
        Self { bytes, dirty: None, is_being_written: false, is_trusted: false }
    }
}

/// The refcounts of one block, to be examined one after the other.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct BlockView<'a> {
    bytes: Option<&'a [u8]>,
    order: u32,
}

impl BlockView<'_> {
    /// The refcount of this number within the block.
    pub(in crate::qcow2) fn refcount(&self, entry: usize) -> u64 {
        match (self.bytes, self.order) {
            (None, _) => 0,
            // The usual width.
            (Some(bytes), 4) => u64::from(bytes[entry * 2]) << 8 | u64::from(bytes[entry * 2 + 1]),
            (Some(bytes), order) => read_entry(bytes, entry, order),
        }
    }
}

/// Changed bytes of a block that are about to be written.
#[derive(Debug)]
pub(crate) struct DirtyBlock {
    pub(crate) index: usize,
    start: usize,
    pub(crate) offset: HostOffset,
    pub(crate) bytes: Vec<u8>,
}

impl Refcounts {
    pub(crate) fn new(file: Arc<dyn Storage>, geometry: Geometry, table: Vec<u64>) -> Self {
        let has_reserved = |(_, entry): &(usize, &u64)| **entry & !TABLE_OFFSET_MASK != 0;
        let reserved: Vec<usize> =
            table.iter().enumerate().filter(has_reserved).map(|(index, _)| index).collect();
        let table: Vec<u64> = table.into_iter().map(|entry| entry & TABLE_OFFSET_MASK).collect();
        let (mut places, mut twice) = (HashSet::new(), HashSet::new());
        for offset in table.iter().filter(|offset| **offset != 0) {
            if !places.insert(HostOffset::new(*offset)) {
                twice.insert(*offset);
            }
        }
        let is_lie = |(_, offset): &(usize, &u64)| {
            twice.contains(*offset) || geometry.in_cluster(HostOffset::new(**offset)) != 0
        };
        let mut lies: HashSet<usize> =
            table.iter().enumerate().filter(is_lie).map(|(index, _)| index).collect();
        lies.extend(reserved);
        Self {
            file,
            geometry,
            table,
            dirty_entries: BTreeSet::new(),
            blocks: HashMap::new(),
            places,
            lies,
            others: Vec::new(),
            trusts_all: false,
            reads: Reads::default(),
            missing: None,
            inserted: 0,
        }
    }

    /// The index of the block that counts a cluster, and of the entry in it.
    pub(in crate::qcow2) fn place(&self, cluster: HostCluster) -> (usize, usize) {
        let entries = self.geometry.block_entries();
        ((cluster.number() / entries) as usize, (cluster.number() % entries) as usize)
    }

    /// The first cluster that a block counts.
    pub(in crate::qcow2) fn first_of_block(&self, index: usize) -> HostCluster {
        HostCluster::new(index as u64 * self.geometry.block_entries())
    }

    /// The offset of the block of this index, if there is one.
    pub(in crate::qcow2) fn block_offset(&self, index: usize) -> Option<HostOffset> {
        self.table.get(index).filter(|offset| **offset != 0).copied().map(HostOffset::new)
    }

    /// Whether there is a block for this cluster.
    pub(in crate::qcow2) fn has_block(&self, index: usize) -> bool {
        self.block_offset(index).is_some()
    }

    /// Whether there is a block of this index in memory.
    pub(in crate::qcow2) fn is_in_memory(&self, index: usize) -> bool {
        self.has_block(index) && self.blocks.contains_key(&index)
    }

    /// Whether there is a block at this offset.
    pub(in crate::qcow2) fn is_block(&self, offset: HostOffset) -> bool {
        self.places.contains(&offset)
    }

    /// The refcount of a cluster.
    pub(crate) fn refcount(&mut self, cluster: HostCluster) -> Result<u64> {
        let (index, entry) = self.place(cluster);
        if !self.has_block(index) {
            return Ok(0);
        }
        let order = self.geometry.refcount_order;
        Ok(read_entry(&self.block(index)?.bytes, entry, order))
    }

    /// The refcounts of one block, all zero if there is no such block.
    pub(in crate::qcow2) fn block_view(&mut self, index: usize) -> Result<BlockView<'_>> {
        let order = self.geometry.refcount_order;
        match self.has_block(index) {
            true => Ok(BlockView { bytes: Some(&self.block(index)?.bytes), order }),
            false => Ok(BlockView { bytes: None, order }),
        }
    }

    /// Changes a refcount. There must be a block for it, and the value must fit.
    pub(crate) fn set_refcount(&mut self, cluster: HostCluster, value: u64) -> Result<()> {
        let (index, entry) = self.place(cluster);
        if value > self.geometry.refcount_max() {
            let detail = format!(
                "a cluster would have {value} references, more than its {}-bit refcounts can hold",
                self.geometry.refcount_bits()
            );
            return Err(Error::new(ErrorKind::Unsupported, "change", detail));
        }
        if !self.block(index)?.is_trusted {
            self.refuse_lie(index)?;
            self.block(index)?.is_trusted = true;
        }
        let order = self.geometry.refcount_order;
        let block = self.block(index)?;
        let (start, end) = write_entry(&mut block.bytes, entry, order, value);
        let (old_start, old_end) = block.dirty.unwrap_or((start, end));
        block.dirty = Some((old_start.min(start), old_end.max(end)));
        Ok(())
    }

    /// Records the clusters of other metadata.
    pub(in crate::qcow2) fn note_others(&mut self, mut clusters: Vec<HostCluster>) {
        clusters.sort_unstable();
        clusters.dedup();
        self.others = clusters;
    }

    /// Records that all blocks are known to be nothing else.
    pub(in crate::qcow2) fn trust_all(&mut self) {
        self.lies.clear();
        self.others.clear();
        self.trusts_all = true;
    }

    /// The clusters in which the blocks begin.
    pub(in crate::qcow2) fn block_clusters(&self) -> Vec<HostCluster> {
        self.places.iter().map(|place| self.geometry.host_cluster(*place)).collect()
    }

    /// Whether some block does not count its own cluster. Blocks usually do; the refcount of a
    /// block that another one counts proves nothing about it.
    pub(in crate::qcow2) fn has_strangers(&self) -> bool {
        let is_stranger = |index| {
            let offset = self.block_offset(index);
            offset.is_some_and(|at| self.place(self.geometry.host_cluster(at)).0 != index)
        };
        !self.trusts_all && (0..self.table.len()).any(is_stranger)
    }

    /// Lets no block be written.
    pub(in crate::qcow2) fn trust_none(&mut self) {
        self.lies.extend(0..self.table.len());
    }

    /// Refuses the first write of a refcount block that is known to be something else as well, or
    /// that counts a used cluster as free. A damaged or hostile table may name a block within the
    /// guest's data.
    fn refuse_lie(&mut self, index: usize) -> Result<()> {
        if self.trusts_all {
            return Ok(());
        }
        let offset = self.block_offset(index).unwrap_or_default();
        let own = self.geometry.host_cluster(offset);
        let is_other = self.others.binary_search(&own).is_ok();
        let mut is_lie = self.lies.contains(&index) || is_other || self.refcount(own)? != 1;
        let first = self.first_of_block(index);
        let start = self.others.partition_point(|cluster| *cluster < first);
        let order = self.geometry.refcount_order;
        let last = first + self.geometry.block_entries();
        let others = std::mem::take(&mut self.others);
        let block = self.block(index).map(|block| {
            let inside = others[start..].iter().take_while(|cluster| **cluster < last);
            let mut counts =
                inside.map(|cluster| read_entry(&block.bytes, (*cluster - first) as usize, order));
            counts.any(|count| count == 0)
        });
        self.others = others;
        is_lie |= block?;
        match is_lie {
            false => Ok(()),
            true => {
                let detail = "its metadata is damaged: a refcount block is something else as well, \
                              or counts a table as free; repair it with 'nbd-cli image check \
                              --repair all'";
                Err(Error::new(ErrorKind::Corrupt, "change", detail).at(offset.bytes()))
            }
        }
    }

    /// The first entry of a block, from `entry` on, that is zero, and the number of such entries in
    /// a row, up to `count_max`.
    pub(in crate::qcow2) fn find_free(
        &mut self,
        index: usize,
        entry: usize,
        count_max: usize,
    ) -> Result<Option<(usize, usize)>> {
        let (order, entries) =
            (self.geometry.refcount_order, self.geometry.block_entries() as usize);
        let bytes = &self.block(index)?.bytes;
        let Some(first) = (entry..entries).find(|entry| read_entry(bytes, *entry, order) == 0)
        else {
            return Ok(None);
        };
        let free = (first..entries).take(count_max);
        let count = free.take_while(|entry| read_entry(bytes, *entry, order) == 0).count();
        Ok(Some((first, count)))
    }

    /// Adds a new block, all zero but present on disk, at `offset`.
    pub(in crate::qcow2) fn add_block(&mut self, index: usize, offset: HostOffset) -> Result<()> {
        let bytes = vec![0; self.geometry.cluster_size() as usize];
        // Written now, so that a full disk is noticed now and not by a flush.
        self.file
            .write_at(offset, &bytes, Durability::Cached)
            .map_err(|error| Error::from_io("write a refcount block of", error))?;
        // Still, it may not be on disk before a flush has written it again and synced.
        let dirty = Some((0, bytes.len()));
        self.insert(index, Block { bytes, dirty, is_being_written: false, is_trusted: true });
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
        }
        self.table[index] = offset.bytes();
        self.places.insert(offset);
        self.dirty_entries.insert(index);
        Ok(())
    }

    /// Removes a block that was just added and counts nothing but itself.
    pub(in crate::qcow2) fn remove_block(&mut self, index: usize) {
        self.blocks.remove(&index);
        self.dirty_entries.remove(&index);
        if let Some(offset) = self.block_offset(index) {
            self.places.remove(&offset);
            self.table[index] = 0;
        }
    }

    /// Takes copies of all changed parts.
    pub(in crate::qcow2) fn take_dirty(&mut self) -> Vec<DirtyBlock> {
        let mut parts = Vec::new();
        for (index, block) in &mut self.blocks {
            if let Some((start, end)) = block.dirty.take() {
                let start = start / 512 * 512;
                let end = end.next_multiple_of(512);
                let bytes = block.bytes[start..end].to_vec();
                block.is_being_written = true;
                let offset = HostOffset::new(self.table[*index]) + start as u64;
                parts.push(DirtyBlock { index: *index, start, offset, bytes });
            }
        }
        parts
    }

    /// Records whether writing the result of [`take_dirty`](Self::take_dirty) succeeded.
    pub(in crate::qcow2) fn written(&mut self, parts: &[DirtyBlock], success: bool) {
        for part in parts {
            let Some(block) = self.blocks.get_mut(&part.index) else { continue };
            block.is_being_written = false;
            if !success {
                let (start, end) = (part.start, part.start + part.bytes.len());
                let (old_start, old_end) = block.dirty.unwrap_or((start, end));
                block.dirty = Some((old_start.min(start), old_end.max(end)));
            }
        }
    }
}
