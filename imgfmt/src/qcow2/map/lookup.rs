//! Looking up where data is. No data is moved here.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use crate::error::Result;
pub(in crate::qcow2) use crate::mapping::Lookup;
use crate::qcow2::map::cache::Table;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::on_disk::l2::{Cluster, Content, OFFSET_MASK};
use crate::qcow2::on_disk::words::read_words;
use crate::units::{GuestOffset, GuestRange};

/// A part of the disk whose bytes are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Piece {
    pub(in crate::qcow2) range: GuestRange,
    /// For stored data: where the piece starts, not where its cluster does.
    pub(in crate::qcow2) content: Content,
}

impl MappingTables {
    /// The L2 table of an L1 entry, `None` if there is none. The outer `None` means that it is not
    /// in memory and may not be read.
    pub(in crate::qcow2) fn table(
        &self,
        l1_index: u64,
        lookup: Lookup,
    ) -> Result<Option<Option<Arc<Table>>>> {
        let entry = match self.l1.get(l1_index as usize) {
            Some(entry) => entry.load(Acquire),
            None => return Err(self.metadata.corrupt("the L1 table is too short", 0)),
        };
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(Some(None));
        }
        match lookup {
            Lookup::CachedOnly => Ok(self.tables.try_load(offset).map(Some)),
            Lookup::MayRead => {
                self.tables.load(offset, || self.read_table(offset)).map(|table| Some(Some(table)))
            }
        }
    }

    fn read_table(&self, offset: u64) -> Result<Vec<u64>> {
        let geometry = self.geometry();
        if geometry.in_cluster(offset) != 0 {
            return Err(self
                .metadata
                .corrupt("an L1 entry points into the middle of a cluster", offset));
        }
        let length = self.metadata.file.len().map_err(crate::qcow2::on_disk::words::read_error)?;
        if offset >= length {
            return Err(self.metadata.corrupt("an L2 table lies past the end of the file", offset));
        }
        read_words(&*self.metadata.file, offset, (geometry.cluster_size() / 8) as usize)
    }

    /// Decodes the entry of a table that belongs to a guest offset.
    pub(in crate::qcow2) fn decode(&self, words: &[u64], guest: u64) -> Result<Cluster> {
        let geometry = self.geometry();
        let index = geometry.l2_index(guest) * geometry.entry_words();
        let entry = words[index];
        let bitmap = if geometry.extended_l2 { words[index + 1] } else { 0 };
        self.format.decode(entry, bitmap).map_err(|detail| self.metadata.corrupt(detail, guest))
    }

    /// Appends the pieces of a range that lies within one L2 table, of at most `max_entries` entries.
    /// Returns false if the table is not in memory and may not be read; nothing is appended then.
    fn map_in_table(
        &self,
        range: GuestRange,
        lookup: Lookup,
        max_entries: u64,
        pieces: &mut Vec<Piece>,
    ) -> Result<bool> {
        let geometry = self.geometry();
        let l1_index = geometry.l1_index(range.offset().bytes());
        let Some(table) = self.table(l1_index, lookup)? else { return Ok(false) };
        let Some(table) = table else {
            push(pieces, Piece { range, content: Content::Unallocated });
            return Ok(true);
        };
        let content = table.read();
        let mut position = range.offset().bytes();
        let length = max_entries.saturating_mul(geometry.cluster_size());
        let end = range.end().bytes().min(geometry.cluster_start(position).saturating_add(length));
        while position < end {
            let cluster = self.decode(&content.words, position)?;
            let cluster_start = geometry.cluster_start(position);
            let cluster_end = end.min(cluster_start.saturating_add(geometry.cluster_size()));
            while position < cluster_end {
                let subcluster_size = geometry.subcluster_size();
                let in_subcluster = position % subcluster_size;
                let subcluster = (position - cluster_start) / subcluster_size;
                let mut found = cluster.content(geometry, subcluster as u32);
                if let Content::Stored(host) = &mut found {
                    *host += in_subcluster;
                }
                let stop = cluster_end.min(position - in_subcluster + subcluster_size);
                let range = span(position, stop);
                push(pieces, Piece { range, content: found });
                position = stop;
            }
        }
        Ok(true)
    }

    /// Calls `each` with the pieces of every L2 table in turn until it returns false. Returns false
    /// if that was not possible without reading metadata.
    pub(in crate::qcow2) fn for_each_table(
        &self,
        range: GuestRange,
        lookup: Lookup,
        each: impl FnMut(&[Piece]) -> Result<bool>,
    ) -> Result<bool> {
        self.for_each_part(range, lookup, u64::MAX, each)
    }

    /// As [`for_each_table`](Self::for_each_table), with at most `max_entries` entries of a table at
    /// a time.
    pub(in crate::qcow2) fn for_each_part(
        &self,
        range: GuestRange,
        lookup: Lookup,
        max_entries: u64,
        mut each: impl FnMut(&[Piece]) -> Result<bool>,
    ) -> Result<bool> {
        let coverage = self.geometry().l2_coverage();
        let end = range.end().bytes();
        let mut position = range.offset().bytes();
        let mut pieces = Vec::new();
        while position < end {
            let stop = end.min((position / coverage + 1).saturating_mul(coverage));
            pieces.clear();
            if !self.map_in_table(span(position, stop), lookup, max_entries, &mut pieces)? {
                return Ok(false);
            }
            let stop = pieces.last().map_or(stop, |last| last.range.end().bytes());
            if !each(&pieces)? {
                break;
            }
            position = stop;
        }
        Ok(true)
    }
}

/// Appends a piece, joined to the one before if it continues it.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut() {
        let continues = match (last.content, piece.content) {
            (Content::Stored(before), Content::Stored(host)) => {
                before.checked_add(last.range.length()) == Some(host)
            }
            (Content::Zero, Content::Zero) | (Content::Unallocated, Content::Unallocated) => true,
            (Content::Compressed(before), Content::Compressed(after)) => before == after,
            _ => false,
        };
        if continues {
            last.range = span(last.range.offset().bytes(), piece.range.end().bytes());
            return;
        }
    }
    pieces.push(piece);
}

/// The range from `start` to `end`, which does not lie before.
pub(in crate::qcow2) fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}
