//! Flushing: everything that was committed goes to disk in an order that no crash can hurt.
//!
//! 1. refcount blocks; data is there already: barrier
//! 2. the refcount table's entries, or a whole larger table and then the header: barrier
//! 3. L2 tables: barrier
//! 4. L1 entries: barrier
//!
//! What was freed stays referenced in the refcounts until all of that is done, so whatever the disk
//! holds after a crash, no cluster that something points to is counted as free. Only then do freed
//! clusters leave the [quarantine](crate::qcow2::alloc::allocator).

use crate::error::Result;
use crate::qcow2::alloc::allocator::{Allocator, Freed, TablePlace};
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::mapping_tables::DirtyTables;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::refcount::DirtyBlock;

/// A copy of all metadata that is not on disk, taken at one instant.
#[derive(Debug, Default)]
struct Copied {
    blocks: Vec<DirtyBlock>,
    table_entries: Vec<(usize, u64)>,
    /// The whole refcount table and the place it moves to.
    moved_table: Option<(TablePlace, Vec<u64>)>,
    mapping: DirtyTables,
}

impl Qcow2 {
    /// Makes everything durable that was written before this call.
    pub(in crate::qcow2) fn flush_all(&self) -> Result<()> {
        self.metadata.refuse_unwritable()?;
        let Some(turn) = self.commits.take_turn() else { return Ok(()) };
        if !self.has_changes() {
            self.sync_data()?;
        } else {
            self.flush_changes()?;
        }
        turn.has_succeeded();
        self.clusters.release_quarantine();
        Ok(())
    }

    /// Whether some change of metadata is not known to be on disk.
    fn has_changes(&self) -> bool {
        self.commits.changes.are_pending() || self.metadata.has_header_writes()
    }

    fn flush_changes(&self) -> Result<()> {
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
                    // A newer place may have been found meanwhile; it will do as well.
                    allocator.new_table_place.get_or_insert(*place);
                    allocator.refcounts.dirty_entries.extend(0..table.len());
                }
                drop(allocator);
                self.mapping.return_dirty(&changes.mapping);
                Err(error)
            }
        }
    }

    fn take_changes(&self) -> Result<Copied> {
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

    fn write_changes(&self, changes: &Copied) -> Result<()> {
        self.metadata.repeat_header_writes()?;
        for block in &changes.blocks {
            self.metadata.write(block.offset, &block.bytes)?;
        }
        self.sync_data()?;
        let mut file_is_synced = !self.mapping.format.has_data_file;
        if self.mapping.format.has_data_file && !changes.blocks.is_empty() {
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
        for (table, part) in &changes.mapping.tables {
            self.metadata.write(table.offset + part.first_word as u64 * 8, &part.bytes)?;
            file_is_synced = false;
        }
        if !changes.mapping.l1.is_empty() {
            // New L2 tables must be there before anything points to them.
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
    fn switch_refcount_table(&self, place: TablePlace, table: &[u64]) -> Result<()> {
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize((place.clusters * self.geometry().cluster_size()) as usize, 0);
        self.metadata.write(place.offset, &bytes)?;
        self.metadata.sync()?;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&place.offset.to_be_bytes());
        fields[8..].copy_from_slice(&(place.clusters as u32).to_be_bytes());
        self.metadata.write_header(field::REFCOUNT_TABLE_OFFSET, &fields)?;
        self.metadata.sync_header()
    }

    fn note_moved_table(&self, allocator: &mut Allocator, place: TablePlace) {
        let bits = self.geometry().cluster_bits;
        let old = std::mem::replace(&mut allocator.table_place, place);
        // Whoever counts all references looks for the table there from now on.
        self.metadata.update_header(|header| {
            header.refcount_table_offset = place.offset;
            header.refcount_table_clusters = place.clusters as u32;
        });
        let range = |place: TablePlace| (place.offset, place.offset + (place.clusters << bits));
        allocator.protected.retain(|protected| *protected != range(old));
        allocator.protected.push(range(place));
        let first = old.offset >> bits;
        let clusters = first..first + old.clusters;
        self.clusters.free(clusters.map(|cluster| Freed { cluster, punch: false }));
    }

    /// Writes everything and lets go of what was freed, before the image is closed.
    pub(in crate::qcow2) fn close_writer(&self) -> Result<()> {
        if !self.metadata.is_writable() {
            return Ok(());
        }
        self.end_with_cluster()?;
        self.flush_all()?;
        self.bitmaps.store(self)?;
        self.bitmaps.end_session()?;
        // The first flush may have moved the refcount table and so freed the old one.
        for _ in 0..2 {
            self.clusters.release_all_freed();
            if self.has_changes() {
                self.flush_all()?;
            }
        }
        Ok(())
    }

    /// Makes the file end where a cluster does, or the last sector of compressed ones: the last
    /// cluster may have been written in part, and other readers read it as a whole. Nobody else
    /// writes any more, and what is missing reads as zero here: failures do not matter.
    fn end_with_cluster(&self) -> Result<()> {
        let cluster_size = self.geometry().cluster_size();
        let Ok(length) = self.metadata.file.len() else { return Ok(()) };
        let compressed_end = self.clusters.allocator()?.compressed_at.unwrap_or(0);
        let is_whole =
            length.is_multiple_of(cluster_size) || length == compressed_end.next_multiple_of(512);
        if self.commits.changes.made() > 0 && !is_whole {
            let _ = self.metadata.file.set_len(length.next_multiple_of(cluster_size));
        }
        Ok(())
    }

    /// Flushes for somebody who relies on it for everything that was written since the last flush that
    /// succeeded.
    pub(in crate::qcow2) fn flush_for_caller(&self) -> Result<()> {
        self.metadata.report_failed(self.flush_all())
    }

    /// Syncs the file that holds the data.
    fn sync_data(&self) -> Result<()> {
        self.metadata.sync_storage(&*self.data)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // Whoever wants to know whether this works calls `Image::close`.
        let _ = self.close_writer();
    }
}
