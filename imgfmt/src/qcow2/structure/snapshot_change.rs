//! Creates, applies and deletes internal snapshots.
//!
//! A snapshot is a copy of the L1 table. Everything below it is shared, and the refcounts count
//! both references. Each change takes its space first, and becomes valid by one write of the
//! header. Before that, everything it points to is on disk; after that, the old structures are
//! freed. A crash in between leaves leaked clusters, and COPIED bits that contradict the refcounts.
//! The image is marked as dirty meanwhile, so that the next open repairs it.

use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::{Freed, Reserved};
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::lookup::span;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::l2::{COPIED, OFFSET_MASK, table_of};
use crate::qcow2::on_disk::snapshot::{self, Snapshot};
use crate::qcow2::on_disk::words::read_words;
use crate::qcow2::on_disk::words::words_to_bytes;
use crate::qcow2::structure::resize::refuse_unknown_sizes;
use crate::units::{GuestOffset, HostOffset};

/// The part of a disk that reads differently after a change of its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    Nothing,
    Everything,
}

impl Qcow2 {
    /// Creates a snapshot of the present state.
    pub(crate) fn create_snapshot(&mut self, name: &str) -> Result<()> {
        self.prepare_for_snapshots()?;
        let snapshots = self.metadata.snapshots()?;
        if name.is_empty() || name.len() > 255 {
            return Err(unfit("a snapshot's name has 1 to 255 bytes"));
        }
        if snapshots.iter().any(|snapshot| snapshot.name == name) {
            return Err(unfit(&format!("there is a snapshot '{name}' already")));
        }
        let ids = snapshots.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok());
        let id = ids.max().unwrap_or(0).saturating_add(1).to_string();
        self.add_snapshot(snapshots, id, name)
    }

    /// Space is taken before any refcount changes: on a full disk nothing has happened.
    fn add_snapshot(&mut self, mut snapshots: Vec<Snapshot>, id: String, name: &str) -> Result<()> {
        let active = self.mapping.l1_words();
        let l1: Vec<u64> = active.iter().map(|entry| entry & OFFSET_MASK).collect();
        let l1_bytes = words_to_bytes(&l1);
        let l1_offset = self.clusters.write_new(&l1_bytes, self)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut extra = vec![0; 8];
        extra.extend(self.size.to_be_bytes());
        snapshots.push(Snapshot {
            raw_id: id.clone().into_bytes(),
            raw_name: name.as_bytes().to_vec(),
            id,
            name: name.to_owned(),
            date_s: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_ns: now.subsec_nanos(),
            vm_clock_ns: 0,
            vm_state_size: 0,
            disk_size: self.size,
            l1_offset,
            l1_entries: l1.len() as u32,
            extra,
        });
        let l1_length = l1_bytes.len().max(1) as u64;
        let table = match self.write_table(&snapshots) {
            Ok(table) => table,
            Err(error) => {
                self.clusters.free_place(l1_offset, l1_length)?;
                return Err(error);
            }
        };
        self.while_dirty(|image| {
            if let Err(error) = image.mapping.add_references(&active) {
                image.clusters.free_place(l1_offset, l1_length)?;
                image.clusters.free_place(table, snapshot::table_length(&snapshots))?;
                return Err(error);
            }
            image.update_flags()?;
            image.flusher().flush()?;
            image.switch_to_table(table, &snapshots)
        })
    }

    /// Restores the disk from the snapshot. The present state is lost.
    pub(crate) fn apply_snapshot(&mut self, name: &str) -> Result<()> {
        self.prepare_for_snapshots()?;
        let snapshots = self.metadata.snapshots()?;
        let snapshot = snapshot::find(&snapshots, name)?.clone();
        let l1 =
            read_words(&*self.metadata.file, snapshot.l1_offset, snapshot.l1_entries as usize)?;
        let size = snapshot.disk_size;
        if size != self.size {
            refuse_unknown_sizes(self.mapping.format.version, &snapshots)?;
        }
        self.mapping.refuse_bad_behind(GuestOffset::new(0))?;
        let mut copy: Vec<u64> = l1.iter().map(|entry| entry & OFFSET_MASK).collect();
        copy.resize(l1.len().max(self.mapping.l1_len()), 0);
        self.metadata.break_seal()?;
        // Space is taken before any refcount or bit changes: on a full disk nothing has happened.
        let place = self.write_l1(&copy)?;
        self.bitmaps.note_size(size);
        let prepared = self.bitmaps.prepare_resize(self, size, span(0, size));
        let prepared = prepared.inspect_err(|_| self.clusters.release(&[place]))?;
        // Everything may differ from the present disk.
        let changed = self.bitmaps.before_change(self, span(0, self.size)).map(drop);
        let applied = match changed {
            Ok(()) => self.while_dirty(|image| image.apply_l1(&l1, place, copy, size)),
            Err(error) => {
                self.clusters.release(&[place]);
                Err(error)
            }
        };
        self.bitmaps.finish_resize(self, prepared, applied)
    }

    /// Switches the disk to a copy of a snapshot's L1 table and to `size` bytes, with one write of
    /// the header.
    fn apply_l1(&mut self, l1: &[u64], place: Reserved, copy: Vec<u64>, size: u64) -> Result<()> {
        let old = self.mapping.l1_words();
        if let Err(error) = self.mapping.add_references(l1) {
            self.clusters.release(&[place]);
            return Err(error);
        }
        let replaced = self.switch_l1(place, copy, size);
        self.mapping.forget_tables(self.size);
        replaced?;
        self.mapping.remove_references(&old)?;
        self.settle()
    }

    /// Deletes a snapshot.
    pub(crate) fn delete_snapshot(&mut self, name: &str) -> Result<()> {
        self.prepare_for_snapshots()?;
        let mut snapshots = self.metadata.snapshots()?;
        let snapshot = snapshot::find(&snapshots, name)?.clone();
        snapshots.retain(|other| *other != snapshot);
        let l1 =
            read_words(&*self.metadata.file, snapshot.l1_offset, snapshot.l1_entries as usize)?;
        // Before anything changes: this finds places that do not belong to the snapshot.
        let clusters = self.mapping.clusters_below(&l1)?;
        self.while_dirty(|image| {
            image.replace_snapshots(&snapshots)?;
            let freed = clusters.into_iter().map(|cluster| Freed { cluster, punch: true });
            image.clusters.free(freed);
            image.clusters.free_place(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8)?;
            image.settle()
        })
    }

    /// Discards all content of this layer, so that its backing file shows. Snapshots stay.
    /// `changed` is the part of the disk that may read differently afterwards.
    pub(crate) fn clear(&mut self, changed: Changed) -> Result<()> {
        if self.mapping.format.has_data_file {
            return Err(unfit("an image with a data file cannot be emptied"));
        }
        self.require_no_leases()?;
        let old = self.mapping.l1_words();
        if old.is_empty() {
            return Ok(());
        }
        self.mapping.refuse_bad_behind(GuestOffset::new(0))?;
        let changed = match changed {
            Changed::Everything => span(0, self.size),
            // The file changes nevertheless, so its seal is broken.
            Changed::Nothing => span(0, 0),
        };
        self.metadata.break_seal()?;
        // Space is taken before any bit changes.
        let place = self.write_l1(&vec![0; old.len()])?;
        let recorded = self.bitmaps.before_change(self, changed).map(drop);
        recorded.inspect_err(|_| self.clusters.release(&[place]))?;
        self.while_dirty(|image| {
            image.switch_l1(place, vec![0; old.len()], image.size)?;
            image.mapping.forget_tables(image.size);
            image.mapping.remove_references(&old)?;
            image.settle()
        })
    }

    /// Makes a change that can leave wrong refcounts and COPIED bits if it is interrupted.
    fn while_dirty(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.metadata.mark_dirty(true)?;
        // After an error the mark stays: the next open repairs the image.
        change(self)?;
        self.metadata.mark_dirty(false)
    }

    fn prepare_for_snapshots(&mut self) -> Result<()> {
        if self.mapping.format.has_data_file {
            return Err(unfit("an image with a data file cannot have snapshots"));
        }
        if self.geometry().refcount_max() < 2 {
            return Err(unfit("its 1-bit refcounts cannot count a cluster that a snapshot shares"));
        }
        self.require_no_leases()
    }

    /// Checks that no lease is held, and makes refcounts equal the number of references.
    fn require_no_leases(&self) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        self.flusher().flush()?;
        // With the quarantine empty and no lease left, refcounts equal the references.
        self.clusters.refuse_leases()?;
        self.flusher().flush()
    }

    /// Writes a new snapshot table and switches to it.
    fn replace_snapshots(&mut self, snapshots: &[Snapshot]) -> Result<()> {
        let offset = self.write_table(snapshots)?;
        self.switch_to_table(offset, snapshots)
    }

    /// Writes a snapshot table, flushes, and returns its place: its refcounts too are durable.
    fn write_table(&mut self, snapshots: &[Snapshot]) -> Result<HostOffset> {
        let bytes = snapshot::encode_table(snapshots);
        let offset = match bytes.is_empty() {
            true => HostOffset::new(0),
            false => self.clusters.write_new(&bytes, self)?,
        };
        if let Err(error) = self.flusher().flush() {
            self.clusters.free_place(offset, bytes.len() as u64)?;
            return Err(error);
        }
        Ok(offset)
    }

    /// Switches to a snapshot table with one write of the header. Nothing has changed since the
    /// last flush.
    fn switch_to_table(&mut self, offset: HostOffset, snapshots: &[Snapshot]) -> Result<()> {
        let old = (
            self.metadata.header().snapshots_offset,
            snapshot::table_length(&self.metadata.snapshots()?),
        );
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&(snapshots.len() as u32).to_be_bytes());
        fields[4..].copy_from_slice(&offset.bytes().to_be_bytes());
        self.metadata.write_header(field::SNAPSHOT_COUNT, &fields)?;
        // Whether the sync succeeds or not, this is what the file says now.
        self.metadata.update_header(|header| {
            header.snapshots_offset = offset;
            header.snapshot_count = snapshots.len() as u32;
        });
        self.mapping.note_snapshots(offset, snapshots);
        self.metadata.sync_header()?;
        self.clusters.free_place(old.0, old.1)?;
        self.flusher().flush()
    }

    /// Flushes, releases freed clusters and makes the COPIED bits agree with the refcounts.
    fn settle(&mut self) -> Result<()> {
        // The refcounts of freed clusters fall in memory at the end of this flush, and on disk with
        // the one that `update_flags` begins with: only then may COPIED be set. Version 2, which
        // has no mark for an interrupted change, relies on both.
        self.flusher().flush()?;
        self.update_flags()?;
        self.flusher().flush()
    }

    /// Sets COPIED in the active tables exactly where the refcount is 1.
    fn update_flags(&mut self) -> Result<()> {
        self.flusher().flush()?;
        let geometry = self.geometry();
        for (l1_index, entry) in self.mapping.l1_words().into_iter().enumerate() {
            let Some(offset) = table_of(entry) else { continue };
            let mut words =
                read_words(&*self.metadata.file, offset, (geometry.cluster_size() / 8) as usize)?;
            let mut allocator = self.clusters.allocator()?;
            let mut is_changed = false;
            for entry in words.chunks_exact_mut(geometry.entry_words()) {
                let bitmap = entry.get(1).copied().unwrap_or(0);
                let cluster = self.mapping.format.decode(entry[0], bitmap);
                let cluster =
                    cluster.map_err(|detail| self.metadata.corrupt(detail, offset.bytes()))?;
                let Some(host) = cluster.host else { continue };
                let is_ours = allocator.refcounts.refcount(geometry.host_cluster(host))? == 1;
                is_changed |= cluster.copied != is_ours;
                entry[0] = if is_ours { entry[0] | COPIED } else { entry[0] & !COPIED };
            }
            let is_ours = allocator.refcounts.refcount(geometry.host_cluster(offset))? == 1;
            drop(allocator);
            if is_changed {
                self.metadata.write(offset, &words_to_bytes(&words))?;
            }
            let wanted = offset.bytes() | if is_ours { COPIED } else { 0 };
            if wanted != entry {
                self.mapping.set_l1(l1_index, wanted);
            }
        }
        self.mapping.forget_tables(self.size);
        Ok(())
    }
}

fn unfit(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "change", detail)
}
