//! Looking up the places of data; the data itself is not touched.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use crate::error::Result;
pub(in crate::qcow2) use crate::mapping::Lookup;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::map::table::Table;
use crate::qcow2::on_disk::l2::{Cluster, Subcluster, table_of};
use crate::qcow2::on_disk::words::{read_words, try_read_words};
pub(in crate::qcow2) use crate::units::span;
use crate::units::{GuestOffset, GuestRange, HostOffset, Offset as _};

/// Maximum number of entries of a table that are examined for one mapped range.
const ENTRIES_MAX: u64 = 1024;

/// A range of the disk whose bytes are contiguous in the file, or all of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct MappedRange {
    pub(in crate::qcow2) range: GuestRange,
    /// For stored data: the offset of the range, not that of its cluster.
    pub(in crate::qcow2) content: Subcluster,
    /// Number of entries of a table that were examined.
    pub(in crate::qcow2) entries: u64,
}

impl MappedRange {
    fn is_continued_by(&self, next: &Self) -> bool {
        match (self.content, next.content) {
            (Subcluster::Stored(host), Subcluster::Stored(after)) => {
                host.checked_add(self.range.length()) == Some(after)
            }
            (Subcluster::Zero, Subcluster::Zero)
            | (Subcluster::Unallocated, Subcluster::Unallocated) => true,
            (Subcluster::Compressed(host), Subcluster::Compressed(after)) => host == after,
            _ => false,
        }
    }
}

impl MappingTables {
    /// The slice of an L2 table that maps a guest offset, `None` if there is no such table. The
    /// outer `None` means that it is not in memory and `lookup` forbids waiting.
    pub(in crate::qcow2) fn table(
        &self,
        guest: GuestOffset,
        lookup: Lookup,
    ) -> Result<Option<Option<Arc<Table>>>> {
        match self.table_offset(self.geometry().l1_index(guest))? {
            None => Ok(Some(None)),
            Some(table) => {
                let offset = self.slices.offset(table, guest);
                let load = || self.read_slice(table, offset, lookup);
                Ok(self.tables.find(offset, lookup, load)?.map(Some))
            }
        }
    }

    /// All slices of the L2 table of an L1 entry, in order, each with the first guest offset that
    /// it maps; none if there is no such table.
    pub(super) fn whole_table(&self, l1_index: u64) -> Result<Vec<(Arc<Table>, GuestOffset)>> {
        let count = self.geometry().l2_coverage() / self.slices.coverage();
        let mut slices = Vec::new();
        for number in 0..count {
            let first = self.geometry().table_start(l1_index) + number * self.slices.coverage();
            let Some(table) = self.table(first, Lookup::MayRead)?.flatten() else { break };
            slices.push((table, first));
        }
        Ok(slices)
    }

    /// The offset of the L2 table of an L1 entry, if there is one.
    pub(super) fn table_offset(&self, l1_index: u64) -> Result<Option<HostOffset>> {
        match self.l1.get(l1_index as usize) {
            Some(entry) => Ok(table_of(entry.load(Acquire))),
            None => Err(self.metadata.corrupt("the L1 table is too short", 0)),
        }
    }

    /// Reads the slice at `offset` of the L2 table at `table`; `None` if that would take waiting,
    /// which `lookup` forbids.
    fn read_slice(
        &self,
        table: HostOffset,
        offset: HostOffset,
        lookup: Lookup,
    ) -> Result<Option<Vec<u64>>> {
        let (count, is_aligned) = (self.slices.words(), self.geometry().in_cluster(table) == 0);
        if lookup == Lookup::CachedOnly {
            // A lookup that may wait reports the error.
            return Ok(try_read_words(&*self.metadata.file, offset, count).filter(|_| is_aligned));
        }
        if !is_aligned {
            return Err(self
                .metadata
                .corrupt("an L1 entry points into the middle of a cluster", offset.bytes()));
        }
        let length = self.metadata.file.len().map_err(crate::qcow2::on_disk::words::read_error)?;
        // The file may end within a table: the rest of it is zero.
        if table.bytes() >= length {
            let detail = "an L2 table lies past the end of the file";
            return Err(self.metadata.corrupt(detail, table.bytes()));
        }
        read_words(&*self.metadata.file, offset, count).map(Some)
    }

    /// Decodes the entry of a table that belongs to a guest offset.
    #[inline]
    pub(in crate::qcow2) fn decode(&self, table: &Table, guest: GuestOffset) -> Result<Cluster> {
        let words = self.geometry().entry_words();
        let (entry, bitmap) = table.entry(self.slices.index(guest) * words, words);
        let decoded = self.format.decode(entry, bitmap);
        decoded.map_err(|detail| self.metadata.corrupt(detail, guest.bytes()))
    }

    /// As [`decode`](Self::decode), for a change: an invalid entry is damage.
    pub(in crate::qcow2) fn decode_to_change(
        &self,
        table: &Table,
        guest: GuestOffset,
    ) -> Result<Cluster> {
        self.decode(table, guest).map_err(|error| self.metadata.note_damage(error))
    }

    /// The first mapped range from `start` on, which ends at `end` at the latest. At most one slice
    /// and [`ENTRIES_MAX`] entries are examined, so the next range may continue it. `start` is
    /// below `end`. `None` if the table is not in memory and may not be read.
    pub(in crate::qcow2) fn piece(
        &self,
        start: GuestOffset,
        end: GuestOffset,
        lookup: Lookup,
    ) -> Result<Option<MappedRange>> {
        let geometry = self.geometry();
        let l1_index = geometry.l1_index(start);
        match self.table_offset(l1_index)? {
            None => {
                let end = end.min(geometry.table_start(l1_index + 1));
                let range = span(start, end);
                Ok(Some(MappedRange { range, content: Subcluster::Unallocated, entries: 0 }))
            }
            Some(table) => {
                let end = end.min(self.slices.end(start));
                let offset = self.slices.offset(table, start);
                let load = || self.read_slice(table, offset, lookup);
                let look = |table: &Table| self.piece_in_table(table, start, end);
                self.tables.look(offset, lookup, load, look)?.transpose()
            }
        }
    }

    fn piece_in_table(
        &self,
        table: &Table,
        start: GuestOffset,
        end: GuestOffset,
    ) -> Result<MappedRange> {
        let mut piece = self.piece_of_entry(table, start, end)?;
        let mut position = piece.range.end();
        while position < end && piece.entries < ENTRIES_MAX {
            piece.entries += 1;
            // An entry that cannot be decoded is an error only where it is needed.
            match self.piece_of_entry(table, position, end) {
                Ok(next) if piece.is_continued_by(&next) => position = next.range.end(),
                _ => break,
            }
            piece.range = span(start, position);
        }
        Ok(piece)
    }

    /// The part of the subcluster at `start` that is before `end`.
    #[inline]
    fn piece_of_entry(
        &self,
        table: &Table,
        start: GuestOffset,
        end: GuestOffset,
    ) -> Result<MappedRange> {
        let geometry = self.geometry();
        let size = geometry.subcluster_size();
        let in_subcluster = start.bytes() % size;
        let subcluster = geometry.in_cluster(start) / size;
        let mut content = self.decode(table, start)?.content(geometry, subcluster as u32);
        if let Subcluster::Stored(host) = &mut content {
            *host += in_subcluster;
        }
        let stop = end.min(start.saturating_add(size - in_subcluster));
        Ok(MappedRange { range: span(start, stop), content, entries: 1 })
    }
}
