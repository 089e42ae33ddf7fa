//! Flushing: writes committed metadata in an order that is safe at any crash.
//!
//! 1. refcount blocks, after the data: barrier
//! 2. the refcount table's entries, or a complete larger table and then the header: barrier
//! 3. L2 tables: barrier
//! 4. L1 entries: barrier
//!
//! Freed clusters keep their refcounts until all of that is done. After a crash no cluster that an
//! entry names is therefore counted as free. Only then do freed clusters enter the
//! [quarantine](crate::qcow2::alloc::allocator).

use crate::error::Result;
use crate::qcow2::alloc::allocator::{Allocator, Freed, TablePlace};
use crate::qcow2::alloc::clusters::Clusters;
use crate::qcow2::data_file::DataFile;
use crate::qcow2::map::mapping_tables::{DirtyTables, MappingTables};
use crate::qcow2::metadata::commits::Commits;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::refcount::DirtyBlock;
use crate::units::Offset as _;

/// Number of freed clusters at which the next change first flushes, to make them usable again.
const FREED_MAX: usize = 1 << 16;

/// The parts of an open image that a flush brings to disk.
#[derive(Clone, Copy, Debug)]
pub(in crate::qcow2) struct Flusher<'a> {
    pub(in crate::qcow2) metadata: &'a MetadataFile,
    pub(in crate::qcow2) data: &'a DataFile,
    pub(in crate::qcow2) clusters: &'a Clusters,
    pub(in crate::qcow2) mapping: &'a MappingTables,
    pub(in crate::qcow2) commits: &'a Commits,
    /// Whether no other call is in progress, as when the image is closed: a file that has not
    /// changed since its sync then needs no other sync.
    pub(in crate::qcow2) is_alone: bool,
}

/// A copy of all metadata that is not on disk, taken at one instant.
#[derive(Debug, Default)]
struct Copied {
    blocks: Vec<DirtyBlock>,
    table_entries: Vec<(usize, u64)>,
    /// The complete refcount table and its new place.
    moved_table: Option<(TablePlace, Vec<u64>)>,
    mapping: DirtyTables,
}

impl Flusher<'_> {
    /// Makes everything durable that was written before this call.
    pub(in crate::qcow2) fn flush(self) -> Result<()> {
        self.metadata.refuse_unwritable()?;
        let Some(turn) = self.commits.take_turn() else { return Ok(()) };
        if !self.has_changes() {
            self.sync_data()?;
            // The entries that were read may be in the page cache only: a process that wrote them
            // may have been killed before its sync.
            if self.data.is_external() && !self.commits.has_flushed() {
                self.sync_metadata()?;
            }
        } else {
            self.flush_changes()?;
        }
        turn.has_succeeded();
        self.clusters.release_quarantine();
        Ok(())
    }

    /// Flushes, and syncs the rest of the file that holds the metadata. Nothing else may be in
    /// progress.
    pub(in crate::qcow2) fn flush_rest(self) -> Result<()> {
        self.flush()?;
        self.sync_metadata()
    }

    /// As [`sync_data`](Self::sync_data), for the file that holds the metadata.
    fn sync_metadata(self) -> Result<()> {
        if self.is_alone && !self.metadata.may_be_unsynced() {
            Ok(())
        } else {
            self.metadata.sync()
        }
    }

    /// A sync that another call has begun may still fail.
    fn sync_data(self) -> Result<()> {
        if self.is_alone && !self.data.may_be_unsynced() { Ok(()) } else { self.data.sync() }
    }

    /// Flushes for a caller that relies on all its writes since its last successful flush.
    pub(in crate::qcow2) fn flush_for_caller(self) -> Result<()> {
        self.metadata.report_failed(self.flush())
    }

    /// Writes metadata to disk before more of it has changed than the cache should hold.
    pub(in crate::qcow2) fn relieve_pressure(self) -> Result<()> {
        if self.is_under_pressure() { self.flush() } else { Ok(()) }
    }

    /// Whether a flush should come before the next change.
    pub(in crate::qcow2) fn is_under_pressure(self) -> bool {
        self.mapping.is_under_pressure() || self.clusters.freed_count() > FREED_MAX
    }

    /// Whether some change of metadata may not be on disk.
    pub(in crate::qcow2) fn has_changes(self) -> bool {
        self.commits.changes.are_pending() || self.metadata.has_header_writes()
    }

    /// Whether all metadata is on disk, that which others wrote before the image was opened
    /// included, and no failed sync is to be reported. Changes that can be seen when this is called
    /// are taken into account.
    pub(in crate::qcow2) fn is_all_durable(self) -> bool {
        // A flush without changes syncs a data file only.
        !self.data.is_external()
            && self.commits.has_flushed()
            && !self.has_changes()
            && !self.metadata.owes_report()
    }

    fn flush_changes(self) -> Result<()> {
        let (changes, (mut freed, generation), change_count) = {
            let _gate = self.commits.close_gate();
            let change_count = self.commits.changes.made();
            (self.take_changes()?, self.clusters.take_freed(), change_count)
        };
        let since = self.metadata.failed_syncs();
        let written = self.write_changes(&changes);
        let result = written.and_then(|()| self.metadata.refuse_lost_since(since));
        if result.is_err() {
            self.clusters.return_freed(std::mem::take(&mut freed));
        }
        self.clusters.quarantine(generation, freed);
        let mut allocator = self.clusters.allocator()?;
        allocator.refcounts.written(&changes.blocks, result.is_ok());
        match result {
            Ok(()) => {
                if let Some((place, _)) = &changes.moved_table {
                    self.note_moved_table(&mut allocator, *place);
                }
                drop(allocator);
                self.commits.changes.are_durable(change_count);
                Ok(())
            }
            Err(error) => {
                let entries = changes.table_entries.iter().map(|(index, _)| *index);
                allocator.refcounts.dirty_entries.extend(entries);
                if let Some((place, table)) = &changes.moved_table {
                    // The place may be newer than the copy, which is harmless.
                    allocator.new_table_place.get_or_insert(*place);
                    allocator.refcounts.dirty_entries.extend(0..table.len());
                }
                drop(allocator);
                self.mapping.return_dirty(&changes.mapping);
                Err(error)
            }
        }
    }

    fn take_changes(self) -> Result<Copied> {
        let mut allocator = self.clusters.allocator()?;
        let blocks = allocator.refcounts.take_dirty();
        let dirty_entries = std::mem::take(&mut allocator.refcounts.dirty_entries);
        let table = &allocator.refcounts.table;
        let table_entries = dirty_entries.into_iter().map(|index| (index, table[index])).collect();
        let whole_table = table.clone();
        let moved_table = allocator.new_table_place.take().map(|place| (place, whole_table));
        drop(allocator);
        Ok(Copied { blocks, table_entries, moved_table, mapping: self.mapping.take_dirty() })
    }

    fn write_changes(self, changes: &Copied) -> Result<()> {
        self.metadata.repeat_header_writes()?;
        for block in &changes.blocks {
            self.metadata.write(block.offset, &block.bytes)?;
        }
        self.sync_data()?;
        let nothing_unsynced = self.is_alone && !self.metadata.may_be_unsynced();
        let mut file_is_synced = !self.data.is_external() || nothing_unsynced;
        if self.data.is_external() && !changes.blocks.is_empty() {
            self.metadata.sync()?;
            file_is_synced = true;
        }
        if let Some((place, table)) = &changes.moved_table {
            self.switch_refcount_table(*place, table)?;
        } else if !changes.table_entries.is_empty() {
            let offset = self.clusters.allocator()?.table_place.offset;
            for (index, entry) in &changes.table_entries {
                self.metadata.write(offset + *index as u64 * 8, &entry.to_be_bytes())?;
            }
            self.metadata.sync()?;
        }
        file_is_synced &= changes.mapping.tables.is_empty();
        changes.mapping.for_each_run(|offset, bytes| self.metadata.write(offset, bytes))?;
        if !changes.mapping.l1.is_empty() {
            // New L2 tables must be on disk before anything points to them.
            self.metadata.sync()?;
            for (index, entry) in &changes.mapping.l1 {
                let offset = self.metadata.header().l1_offset + *index as u64 * 8;
                self.metadata.write(offset, &entry.to_be_bytes())?;
            }
            file_is_synced = false;
        }
        if file_is_synced { Ok(()) } else { self.metadata.sync() }
    }

    /// Writes a larger refcount table to its new place and makes the header point to it.
    fn switch_refcount_table(self, place: TablePlace, table: &[u64]) -> Result<()> {
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize((place.clusters * self.mapping.geometry().cluster_size()) as usize, 0);
        self.metadata.write(place.offset, &bytes)?;
        self.metadata.sync()?;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&place.offset.bytes().to_be_bytes());
        fields[8..].copy_from_slice(&(place.clusters as u32).to_be_bytes());
        self.metadata.write_header(field::REFCOUNT_TABLE_OFFSET, &fields)?;
        self.metadata.sync_header()
    }

    fn note_moved_table(self, allocator: &mut Allocator, place: TablePlace) {
        let geometry = self.mapping.geometry();
        let old = std::mem::replace(&mut allocator.table_place, place);
        // A count of all references finds the table through the header.
        self.metadata.update_header(|header| {
            header.refcount_table_offset = place.offset;
            header.refcount_table_clusters = place.clusters as u32;
        });
        allocator.protected.retain(|protected| *protected != old.range(geometry));
        allocator.protected.push(place.range(geometry));
        let clusters = geometry.host_cluster(old.offset).run(old.clusters);
        self.clusters.free(clusters.map(|cluster| Freed { cluster, punch: false }));
    }

    /// Returns the space by which the file was extended beyond its last cluster. No other write
    /// runs. Failures do not matter, because no cluster is there.
    pub(in crate::qcow2) fn cut_extension(self) -> Result<()> {
        let end = self.clusters.allocator()?.end();
        if self.data.is_extended()
            && self.metadata.file.len().is_ok_and(|length| length > end.bytes())
        {
            let _ = self.metadata.file.set_len(end.bytes());
        }
        Ok(())
    }

    /// Extends the file to the end of its last cluster, or of the last sector of compressed ones:
    /// the last cluster may have been written in part, and other readers read it completely. No
    /// other write runs. Failures do not matter, because missing bytes read as zero here.
    pub(in crate::qcow2) fn end_with_cluster(self) -> Result<()> {
        let cluster_size = self.mapping.geometry().cluster_size();
        let Ok(length) = self.metadata.file.len() else { return Ok(()) };
        let compressed_end = self.clusters.allocator()?.compressed_at.unwrap_or_default();
        let is_whole =
            length.is_multiple_of(cluster_size) || length == compressed_end.round_up(512).bytes();
        if self.commits.changes.made() > 0 && !is_whole {
            let _ = self.metadata.file.set_len(length.next_multiple_of(cluster_size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
