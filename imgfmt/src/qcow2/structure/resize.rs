//! Changing the size of the disk.

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::{Freed, Reserved};
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::lookup::span;
use crate::qcow2::on_disk::header::field;
use crate::qcow2::on_disk::snapshot::Snapshot;
use crate::qcow2::on_disk::words::words_to_bytes;
use crate::storage::{Speed, ZeroMode};
use crate::units::HostOffset;

const L1_BYTES_MAX: u64 = 32 << 20;

impl Qcow2 {
    /// Changes the size of the disk. Added space reads as zero.
    pub(crate) fn resize(&mut self, size: u64) -> Result<()> {
        if size > i64::MAX as u64 || !size.is_multiple_of(512) {
            let detail = "the size of a qcow2 disk is a multiple of 512 below 2^63";
            return Err(Error::new(ErrorKind::InvalidInput, "resize", detail));
        }
        refuse_unknown_sizes(self.mapping.format.version, &self.metadata.snapshots()?)?;
        self.metadata.refuse_if_corrupt()?;
        let old_size = self.size;
        self.metadata.break_seal()?;
        self.flusher().flush()?;
        // Space is taken before the size changes: on a full disk the size stays.
        let prepared = self.bitmaps.prepare_resize(self, size, span(0, 0))?;
        if size < old_size {
            let switched = self.switch_to_smaller(size);
            // The disk is smaller, even if the rest fails.
            let old_l1 = self.bitmaps.finish_resize(self, prepared, switched)?;
            self.free_behind(size, &old_l1)?;
            return self.data.resize(old_size, size);
        }
        let switched = self.switch_to_larger(size);
        self.bitmaps.finish_resize(self, prepared, switched)
    }

    fn switch_to_larger(&mut self, size: u64) -> Result<()> {
        self.grow_l1(size)?;
        // The rest of the last cluster may have any content, and the backing file may be longer.
        let cluster_end = self.size.next_multiple_of(self.geometry().cluster_size()).min(size);
        let backing_end = self.backing.size().min(size);
        let stale = span(self.size, cluster_end.max(backing_end));
        if !stale.is_empty() {
            drop(self.bitmaps.before_change(self, span(0, 0))?);
            self.zero_range(stale, ZeroMode::MayUnmap, Speed::Any)?;
        }
        self.data.resize(self.size, size)?;
        self.flusher().flush()?;
        self.bitmaps.forget_lineage()?;
        let header = self.metadata.header();
        self.write_disk_fields(size, header.l1_entries, header.l1_offset)
    }

    /// Changes the size of the disk and the place of the L1 table with one write of the header, and
    /// syncs it. They are always written together: if two writes had to be repeated after an error,
    /// one could undo a part of the other.
    pub(in crate::qcow2) fn write_disk_fields(
        &mut self,
        size: u64,
        l1_entries: u32,
        l1_offset: HostOffset,
    ) -> Result<()> {
        let mut fields = [0; 24];
        fields[..8].copy_from_slice(&size.to_be_bytes());
        let method = self.metadata.header().encryption_method;
        fields[8..12].copy_from_slice(&method.to_be_bytes());
        fields[12..16].copy_from_slice(&l1_entries.to_be_bytes());
        fields[16..].copy_from_slice(&l1_offset.bytes().to_be_bytes());
        if size != self.size {
            drop(self.bitmaps.before_change(self, span(0, 0))?);
            self.bitmaps.before_resize(self)?;
        }
        self.metadata.write_header(field::SIZE, &fields)?;
        // Even if the sync fails, the file has these values now.
        let old_size = std::mem::replace(&mut self.size, size);
        self.metadata.update_header(|header| {
            header.size = size;
            header.l1_entries = l1_entries;
            header.l1_offset = l1_offset;
        });
        if size != old_size {
            self.bitmaps.resize(size);
        }
        self.metadata.sync_header()
    }

    fn grow_l1(&mut self, size: u64) -> Result<()> {
        let geometry = self.geometry();
        let needed = geometry.l1_entries_for(size);
        if needed <= self.mapping.l1_len() as u64 {
            return Ok(());
        }
        if needed * 8 > L1_BYTES_MAX {
            let detail = format!(
                "a disk of {size} bytes is too large for clusters of {} bytes",
                geometry.cluster_size()
            );
            return Err(Error::new(ErrorKind::Unsupported, "resize", detail));
        }
        let mut l1 = self.mapping.l1_words();
        l1.resize(needed as usize, 0);
        self.replace_l1(l1, self.size)
    }

    /// Writes the L1 table to a new place, and switches to it and to a size of the disk with one
    /// write of the header. The clusters of the old one are freed.
    pub(in crate::qcow2) fn replace_l1(&mut self, l1: Vec<u64>, size: u64) -> Result<()> {
        let place = self.write_l1(&l1)?;
        self.switch_flushed_l1(place, l1, size)
    }

    /// Writes an L1 table to a new place, and flushes: its refcounts too are durable.
    pub(in crate::qcow2) fn write_l1(&self, l1: &[u64]) -> Result<Reserved> {
        let geometry = self.geometry();
        let clusters = geometry.clusters_of(l1.len() as u64 * 8);
        let reserved = self.clusters.reserve_exact(clusters, self)?;
        let mut bytes = words_to_bytes(l1);
        bytes.resize((clusters << geometry.cluster_bits) as usize, 0);
        let prepared =
            self.metadata.write(reserved.offset, &bytes).and_then(|()| self.flusher().flush());
        prepared.inspect_err(|_| self.clusters.release(&[reserved])).map(|()| reserved)
    }

    /// Switches to an L1 table that is written, and to a size of the disk.
    pub(in crate::qcow2) fn switch_l1(
        &mut self,
        reserved: Reserved,
        l1: Vec<u64>,
        size: u64,
    ) -> Result<()> {
        // The refcounts of everything that the table points to must be on disk before the header.
        if let Err(error) = self.flusher().flush() {
            self.clusters.release(&[reserved]);
            return Err(error);
        }
        self.switch_flushed_l1(reserved, l1, size)
    }

    /// As [`switch_l1`](Self::switch_l1), if nothing has changed since the last flush.
    fn switch_flushed_l1(&mut self, reserved: Reserved, l1: Vec<u64>, size: u64) -> Result<()> {
        let geometry = self.geometry();
        let old = self.metadata.header();
        let (old_offset, old_entries) = (old.l1_offset, old.l1_entries);
        let switched = self.write_disk_fields(size, l1.len() as u32, reserved.offset);
        if self.metadata.header().l1_offset != reserved.offset {
            return switched;
        }
        // Even if the sync failed, the file names the new table now, so later changes must go
        // there. The old one is freed only if the disk certainly does not need it.
        let old_bytes = u64::from(old_entries) * 8;
        self.mapping.replace_l1(l1);
        let new_end = reserved.offset + u64::from(self.metadata.header().l1_entries) * 8;
        self.clusters.allocator()?.protected.push(reserved.offset..new_end);
        switched?;
        let old_place = old_offset..old_offset + old_bytes;
        self.clusters.allocator()?.protected.retain(|place| *place != old_place);
        let old_clusters = geometry.clusters_touched(old_offset, old_bytes);
        self.clusters.free(old_clusters.map(|cluster| Freed { cluster, punch: false }));
        Ok(())
    }
}

/// Refuses a change of the size if a snapshot does not record its own: the disk's would be used for
/// it. As in QEMU, version 2 is not trusted to record it.
pub(in crate::qcow2) fn refuse_unknown_sizes(version: u32, snapshots: &[Snapshot]) -> Result<()> {
    let is_known = |snapshot: &Snapshot| version >= 3 && snapshot.extra.len() >= 16;
    let Some(unknown) = snapshots.iter().find(|snapshot| !is_known(snapshot)) else {
        return Ok(());
    };
    let detail = format!(
        "its size cannot change while it has snapshots that do not record their own, such \
         as '{}': those of a version 2 image, or of an old program; delete them first",
        unknown.name.escape_debug()
    );
    Err(Error::new(ErrorKind::Unsupported, "resize", detail))
}
