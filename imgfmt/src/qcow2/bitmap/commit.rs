//! Carrying out a planned list of bitmaps: all of it at one instant, on disk and in memory.
//!
//! New tables and the new directory are written to new clusters, and then the refcounts. One write
//! of the header extension switches to the new list. Then the old clusters are freed. A crash
//! leaves the old list or the new one, and at worst leaked clusters.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Acquire;

use super::directory::{self, DirectoryLocation, Entry, Table, flag};
use super::error::CHANGE;
use super::freeze::planned_by_name;
use super::plan::Planned;
use super::store::{Bitmaps, ImageServices, StoredBitmaps};
use crate::bitmap::{Bitmap, Condition, ExclusiveState, Recording};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::{Freed, Reserved};
use crate::qcow2::metadata::header_edit::{
    change_autoclear, put_extension, remove_extension, replaces_at_once, rewrite_autoclear,
};
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::autoclear;

/// A list of bitmaps that is written, and that the header does not name yet.
#[derive(Debug)]
pub(in crate::qcow2) struct Prepared {
    plan: Vec<Planned>,
    entries: Vec<Entry>,
    place: Option<DirectoryLocation>,
    pub(super) reserved: Vec<Reserved>,
}

impl Bitmaps {
    /// Carries out the plan on disk and then in memory.
    pub(super) fn carry_out(
        &self,
        image: &dyn ImageServices,
        exclusive: &mut ExclusiveState<'_, Entry>,
        plan: Vec<Planned>,
    ) -> Result<()> {
        let prepared = self.prepare(image, plan)?;
        self.carry_out_prepared(image, exclusive, prepared)
    }

    /// Takes the space for the planned list, and writes it there.
    pub(super) fn prepare(
        &self,
        image: &dyn ImageServices,
        plan: Vec<Planned>,
    ) -> Result<Prepared> {
        self.settle_directory(&mut self.disk.lock())?;
        let mut reserved = Vec::new();
        let since = self.metadata.failed_syncs();
        let written = self.write_plan(image, &plan, &mut reserved);
        let written = written.and_then(|it| self.metadata.refuse_lost_since(since).map(|()| it));
        match written {
            Ok((entries, place)) => Ok(Prepared { plan, entries, place, reserved }),
            Err(error) => {
                self.clusters.release(&reserved);
                Err(error)
            }
        }
    }

    /// Switches to the prepared list on disk and then in memory.
    pub(super) fn carry_out_prepared(
        &self,
        image: &dyn ImageServices,
        exclusive: &mut ExclusiveState<'_, Entry>,
        prepared: Prepared,
    ) -> Result<()> {
        let bitmaps = self.switch_to(image, exclusive.bitmaps(), prepared)?;
        let is_marked = self.is_marked(&bitmaps);
        exclusive.replace(bitmaps, is_marked);
        Ok(())
    }

    /// Makes the disk name the prepared list, or leaves the old one.
    fn switch_to(
        &self,
        image: &dyn ImageServices,
        old: &[Bitmap<Entry>],
        prepared: Prepared,
    ) -> Result<Vec<Bitmap<Entry>>> {
        let Prepared { plan, entries, place, reserved } = prepared;
        let freed = self.replaced_clusters(old, &plan);
        let (_, flags_places) = directory::encode(&entries);
        let mut disk = self.disk.lock();
        let old_place = disk.directory;
        self.find_ownership(image, old, old_place);
        if let Err(error) = self.switch_directory(place, entries.len()) {
            // It is unknown which of the two the header on disk names now. Restore the old one.
            disk.is_doubtful = true;
            if self.settle_directory(&mut disk).is_ok() {
                self.clusters.release(&reserved);
            }
            return Err(error);
        }
        let (thawed, thaw_failure) = (std::mem::take(&mut disk.thawed), disk.thaw_failure.take());
        let directory = place;
        let listed = entries.clone();
        *disk = StoredBitmaps {
            directory,
            entries: listed,
            flags_places,
            thawed,
            thaw_failure,
            ..StoredBitmaps::default()
        };
        drop(disk);
        self.free_clusters(freed, old_place, &reserved)?;
        Ok(plan.into_iter().zip(entries).map(|(planned, entry)| finish(planned, entry)).collect())
    }

    /// Writes all new structures; returns the entries and the location of their directory.
    fn write_plan(
        &self,
        image: &dyn ImageServices,
        plan: &[Planned],
        reserved: &mut Vec<Reserved>,
    ) -> Result<(Vec<Entry>, Option<DirectoryLocation>)> {
        let mut entries = Vec::new();
        let all = planned_by_name(plan);
        for planned in plan {
            let bitmap = &planned.bitmap;
            let mut entry = bitmap.stored.clone();
            entry.flags &= !(flag::IN_USE | flag::AUTO);
            if bitmap.recording == Recording::Enabled {
                entry.flags |= flag::AUTO;
            }
            if planned.must_store {
                entry.table =
                    self.store_bits(image, &*self.bits_to_store(&all, planned)?, reserved)?;
            } else if bitmap.in_use.load(Acquire) {
                entry.flags |= flag::IN_USE;
            }
            entries.push(entry);
        }
        if entries.is_empty() {
            image.flush()?;
            return Ok((entries, None));
        }
        let (bytes, _) = directory::encode(&entries);
        let length = bytes.len() as u64;
        if length > directory::DIRECTORY_BYTES_MAX {
            let detail = "the directory of its bitmaps would become too long";
            return Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail));
        }
        let offset = self.store_whole(image, &bytes, reserved)?;
        // All that and its refcounts must be on disk before anything points to it.
        image.flush()?;
        Ok((entries, Some(DirectoryLocation { offset, length })))
    }

    /// Makes the header name a directory of `count` bitmaps, or none.
    fn switch_directory(&self, place: Option<DirectoryLocation>, count: usize) -> Result<()> {
        let since = self.metadata.failed_syncs();
        self.metadata.edit_header(|file, cluster| {
            let Some(place) = place else {
                change_autoclear(file, 0, autoclear::BITMAPS)?;
                return remove_extension(file, cluster, extension::BITMAPS);
            };
            let content = directory::encode_extension(place, count);
            if !replaces_at_once(file, cluster, extension::BITMAPS, content.len())? {
                // Without the bit the extension is ignored, whatever it contains.
                change_autoclear(file, 0, autoclear::BITMAPS)?;
            }
            put_extension(file, cluster, extension::BITMAPS, &content)?;
            change_autoclear(file, autoclear::BITMAPS, 0)
        })?;
        self.metadata.refuse_lost_since(since)
    }

    /// Makes sure that the header names the right directory, after a failed change has left that in
    /// doubt.
    pub(super) fn settle_directory(&self, disk: &mut StoredBitmaps) -> Result<()> {
        if disk.is_doubtful {
            self.metadata.edit_header(|file, _| rewrite_autoclear(file, 0, autoclear::BITMAPS))?;
            self.switch_directory(disk.directory, disk.flags_places.len())?;
            disk.is_doubtful = false;
        }
        Ok(())
    }

    /// The clusters of tables that are no longer named when the plan has been carried out.
    fn replaced_clusters(&self, old: &[Bitmap<Entry>], plan: &[Planned]) -> Vec<HostCluster> {
        let is_kept = |table: Table| {
            plan.iter().any(|planned| !planned.must_store && planned.bitmap.stored.table == table)
        };
        let trusted = |bitmap: &&Bitmap<Entry>| !matches!(bitmap.condition, Condition::Damaged(_));
        let tables = old.iter().filter(trusted).map(|bitmap| bitmap.stored.table);
        let gone = tables.filter(|table| table.entries > 0 && !is_kept(*table));
        // Clusters of an unreadable table leak, which is harmless.
        gone.filter_map(|table| self.table_clusters(table).ok()).flatten().collect()
    }

    /// Frees clusters and the place of a directory that the header on disk no longer names.
    /// Clusters that may have other references are leaked.
    fn free_clusters(
        &self,
        mut clusters: Vec<HostCluster>,
        directory: Option<DirectoryLocation>,
        reserved: &[Reserved],
    ) -> Result<()> {
        clusters.extend(self.place_clusters(directory));
        let freed = self.give_away(clusters, reserved).into_iter();
        self.clusters.free(freed.map(|cluster| Freed { cluster, punch: true }));
        Ok(())
    }
}

/// A bitmap after its plan has been carried out.
fn finish(planned: Planned, entry: Entry) -> Bitmap<Entry> {
    let Planned { mut bitmap, content, must_store, .. } = planned;
    if let Some(content) = content {
        match bitmap.bits.get() {
            Some(bits) if bits.size() == content.size() => bits.assign(&content),
            _ => bitmap.bits = content.into(),
        }
    }
    if must_store {
        bitmap.in_use = AtomicBool::new(false);
    }
    bitmap.stored = entry;
    bitmap
}
