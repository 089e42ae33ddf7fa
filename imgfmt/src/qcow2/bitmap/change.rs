//! Changing the list of bitmaps: all steps at one instant, on disk and in memory.
//!
//! What is new is written to new clusters, the new directory too; then refcounts, then one write of
//! the header extension, which is the switch; then the old clusters are freed. A crash leaves the
//! old list or the new one, and leaks at worst.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Acquire;

use super::directory::{self, Entry, Place, Table, flag};
use super::frozen::{plan_drop_frozen, refuse_to_lose};
use super::{Disk, no_bitmap, not_reliable};
use crate::bitmap::{
    BITMAP_NAME_BYTES_MAX, Bitmap, BitmapChange, Bits, Condition, ExclusiveState,
    GRANULARITY_BITS_MAX, GRANULARITY_BITS_MIN, Recording,
};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::alloc::allocator::{Freed, Reserved};
use crate::qcow2::image::Qcow2;
use crate::qcow2::metadata::header_edit::{
    change_autoclear, put_extension, remove_extension, replaces_at_once, rewrite_autoclear,
};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::autoclear;

/// A new bitmap has at most this many bits, as in QEMU.
const BITS_MAX: u64 = 1 << 29;

/// A bitmap as it is to be.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) bitmap: Bitmap<Entry>,
    /// Bits that replace those it has.
    pub(super) content: Option<Arc<Bits>>,
    /// What is stored is to be replaced by its bits as they are now.
    pub(super) must_store: bool,
}

impl Planned {
    pub(super) fn unchanged(bitmap: &Bitmap<Entry>) -> Self {
        Self { bitmap: bitmap.clone(), content: None, must_store: false }
    }
}

impl Qcow2 {
    /// Makes all changes at one instant, at which no write is on its way, or none of them. Then,
    /// still at that instant, calls `at_the_instant`.
    pub(crate) fn bitmap_transaction<T>(
        &self,
        changes: &[BitmapChange],
        at_the_instant: impl FnOnce() -> T,
    ) -> Result<T> {
        self.metadata.refuse_unwritable()?;
        if self.mapping.format.version < 3 {
            let detail = "images of version 2 cannot have bitmaps; convert it to version 3";
            return Err(Error::new(ErrorKind::Unsupported, CHANGE, detail));
        }
        if let Some(detail) = self.bitmap_damage() {
            let detail = format!("{detail}; check and repair the image, which drops its bitmaps");
            return Err(Error::new(ErrorKind::Corrupt, CHANGE, detail));
        }
        // What can be written before must not be waited for by those who write.
        self.flush_all()?;
        let mut exclusive = self.bitmaps.tracker.exclusive();
        let changed = self.change_alone(&mut exclusive, changes);
        self.count_memory(exclusive.bitmaps());
        changed.map(|()| at_the_instant())
    }

    fn change_alone(
        &self,
        exclusive: &mut ExclusiveState<'_, Entry>,
        changes: &[BitmapChange],
    ) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut plan: Vec<Planned> = exclusive.bitmaps().iter().map(Planned::unchanged).collect();
        for change in changes {
            self.plan_change(&mut plan, change)?;
        }
        self.carry_out_changes(exclusive, plan, changes)
    }

    /// Makes the plan true on disk and then in memory.
    pub(super) fn carry_out(
        &self,
        exclusive: &mut ExclusiveState<'_, Entry>,
        plan: Vec<Planned>,
    ) -> Result<()> {
        let bitmaps = self.store_plan(exclusive.bitmaps(), plan)?;
        let is_marked = self.is_marked(&bitmaps);
        exclusive.replace(bitmaps, is_marked);
        Ok(())
    }

    fn plan_change(&self, plan: &mut Vec<Planned>, change: &BitmapChange) -> Result<()> {
        match change {
            BitmapChange::Add { name, granularity, recording } => {
                let added = self.plan_new(plan, name, *granularity, *recording)?;
                plan.push(added);
            }
            BitmapChange::Remove { name } => {
                refuse_to_lose(plan, name)?;
                let index = position(plan, name)?;
                plan.remove(index);
            }
            BitmapChange::Clear { name } => {
                refuse_to_lose(plan, name)?;
                self.plan_content(at(plan, name)?, |_| ())?;
            }
            BitmapChange::MarkAll { name } => self.plan_content(at(plan, name)?, Bits::set_all)?,
            BitmapChange::Freeze { name, .. } => self.plan_freeze(plan, name)?,
            BitmapChange::Thaw { name } => self.plan_thaw(plan, name)?,
            BitmapChange::DropFrozen { name } => plan_drop_frozen(plan, name)?,
            BitmapChange::Enable { name } => {
                refuse_to_lose(plan, name)?;
                let planned = at(plan, name)?;
                self.planned_bits(planned)?;
                planned.bitmap.recording = Recording::Enabled;
            }
            BitmapChange::Disable { name } => {
                let planned = at(plan, name)?;
                self.planned_bits(planned)?;
                planned.bitmap.recording = Recording::Disabled;
                planned.must_store |= planned.bitmap.in_use.load(Acquire);
            }
            BitmapChange::Merge { into, from } => {
                self.refuse_planned_incomplete(plan, from)?;
                let from = self.planned_bits(at(plan, from)?)?;
                self.plan_merge(plan, into, &from)?;
            }
            BitmapChange::MergeBits { into, from } => self.plan_merge(plan, into, &from.0)?,
            BitmapChange::Repair { name } => self.plan_repair(at(plan, name)?)?,
        }
        Ok(())
    }

    /// The bitmap gets new bits: `fill` of empty ones.
    pub(super) fn plan_content(
        &self,
        planned: &mut Planned,
        fill: impl FnOnce(&Bits),
    ) -> Result<()> {
        let old = self.planned_bits(planned)?;
        let content = Bits::new(old.size(), old.granularity_bits());
        fill(&content);
        planned.content = Some(Arc::new(content));
        planned.must_store = true;
        Ok(())
    }

    pub(super) fn plan_new(
        &self,
        plan: &[Planned],
        name: &str,
        granularity: u64,
        recording: Recording,
    ) -> Result<Planned> {
        check_name(name)?;
        if plan.iter().any(|planned| planned.bitmap.name == name) {
            let detail = format!("there is a bitmap '{}' already", name.escape_debug());
            return Err(Error::new(ErrorKind::AlreadyExists, CHANGE, detail));
        }
        let granularity_bits = granularity.trailing_zeros();
        let possible = GRANULARITY_BITS_MIN..=GRANULARITY_BITS_MAX;
        if !granularity.is_power_of_two() || !possible.contains(&granularity_bits) {
            let detail = format!(
                "a granularity of {granularity} bytes is not possible; choose a power of two from \
                 512 bytes to 2 GiB"
            );
            return Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail));
        }
        if self.size.div_ceil(granularity) > BITS_MAX {
            let detail = format!(
                "a bitmap with a granularity of {granularity} bytes is too large for a disk of {} \
                 bytes; choose a coarser one",
                self.size
            );
            return Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail));
        }
        if plan.len() >= directory::BITMAPS_MAX {
            return Err(Error::new(ErrorKind::InvalidInput, CHANGE, "it has too many bitmaps"));
        }
        let stored = Entry {
            table: Table::default(),
            flags: 0,
            granularity_bits,
            name: name.as_bytes().to_vec(),
            damage: None,
        };
        let bitmap = Bitmap {
            name: name.to_owned(),
            granularity_bits,
            recording,
            condition: Condition::Ready,
            in_use: AtomicBool::new(false),
            bits: std::sync::OnceLock::new(),
            stored,
        };
        let bytes = Bits::bytes_for(self.size, granularity_bits);
        self.take_memory(bytes)
            .map_err(|detail| Error::new(ErrorKind::InvalidInput, CHANGE, detail))?;
        let bits = Arc::new(Bits::new(self.size, granularity_bits));
        Ok(Planned { bitmap, content: Some(bits), must_store: true })
    }

    pub(super) fn plan_merge(&self, plan: &mut [Planned], into: &str, from: &Bits) -> Result<()> {
        let planned = at(plan, into)?;
        let old = self.planned_bits(planned)?;
        let merged = old.resized(old.size());
        merged.merge(from);
        planned.content = Some(Arc::new(merged));
        planned.must_store = true;
        Ok(())
    }

    fn plan_repair(&self, planned: &mut Planned) -> Result<()> {
        let name = planned.bitmap.name.clone();
        check_name(&name)?;
        if self.ready_bits(&planned.bitmap).is_ok() {
            let detail = format!("the bitmap '{name}' is sound; clear it, or remove it");
            return Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail));
        }
        let possible = GRANULARITY_BITS_MIN..=GRANULARITY_BITS_MAX;
        let granularity_bits = planned.bitmap.granularity_bits;
        if !possible.contains(&granularity_bits)
            || self.size.div_ceil(1 << granularity_bits) > BITS_MAX
        {
            let detail = format!("the bitmap '{name}' is damaged beyond repair; remove it");
            return Err(Error::new(ErrorKind::Corrupt, CHANGE, detail));
        }
        let bits = Bits::new(self.size, granularity_bits);
        bits.set_all();
        planned.content = Some(Arc::new(bits));
        planned.must_store = true;
        planned.bitmap.condition = Condition::Ready;
        planned.bitmap.stored.name = name.into_bytes();
        planned.bitmap.stored.damage = None;
        Ok(())
    }

    /// The bits that a planned bitmap will have.
    pub(super) fn planned_bits(&self, planned: &Planned) -> Result<Arc<Bits>> {
        match &planned.content {
            Some(bits) => Ok(Arc::clone(bits)),
            None => self
                .ready_bits(&planned.bitmap)
                .map_err(|detail| not_reliable(&planned.bitmap.name, &detail)),
        }
    }

    /// Makes the list on disk what the plan says, or leaves it as it was.
    fn store_plan(&self, old: &[Bitmap<Entry>], plan: Vec<Planned>) -> Result<Vec<Bitmap<Entry>>> {
        self.settle_directory(&mut self.bitmaps.disk.lock())?;
        let mut reserved = Vec::new();
        let since = self.metadata.failed_syncs();
        let prepared = self.write_plan(&plan, &mut reserved);
        let prepared = prepared.and_then(|it| self.metadata.refuse_lost_since(since).map(|()| it));
        let (entries, place) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.clusters.release(&reserved);
                return Err(error);
            }
        };
        let freed = self.replaced_clusters(old, &plan);
        let (_, flags_places) = directory::encode(&entries);
        let mut disk = self.bitmaps.disk.lock();
        let old_place = disk.directory;
        self.find_ownership(old, old_place);
        if let Err(error) = self.switch_directory(place, entries.len()) {
            // Nobody knows which of the two the disk names now. It must be the old one.
            disk.is_doubtful = true;
            if self.settle_directory(&mut disk).is_ok() {
                self.clusters.release(&reserved);
            }
            return Err(error);
        }
        let (thawed, thaw_failure) = (std::mem::take(&mut disk.thawed), disk.thaw_failure.take());
        let directory = place;
        let listed = entries.clone();
        *disk = Disk {
            directory,
            entries: listed,
            flags_places,
            thawed,
            thaw_failure,
            ..Disk::default()
        };
        drop(disk);
        self.free_clusters(freed, old_place, &reserved)?;
        Ok(plan.into_iter().zip(entries).map(|(planned, entry)| finish(planned, entry)).collect())
    }

    /// Writes everything that is new; returns the entries and where their directory is.
    fn write_plan(
        &self,
        plan: &[Planned],
        reserved: &mut Vec<Reserved>,
    ) -> Result<(Vec<Entry>, Option<Place>)> {
        let mut entries = Vec::new();
        for planned in plan {
            let bitmap = &planned.bitmap;
            let mut entry = bitmap.stored.clone();
            entry.flags &= !(flag::IN_USE | flag::AUTO);
            if bitmap.recording == Recording::Enabled {
                entry.flags |= flag::AUTO;
            }
            if planned.must_store {
                entry.table = self.store_bits(&*self.planned_bits(planned)?, reserved)?;
            } else if bitmap.in_use.load(Acquire) {
                entry.flags |= flag::IN_USE;
            }
            entries.push(entry);
        }
        if entries.is_empty() {
            self.flush_all()?;
            return Ok((entries, None));
        }
        let (bytes, _) = directory::encode(&entries);
        let length = bytes.len() as u64;
        if length > directory::DIRECTORY_BYTES_MAX {
            let detail = "the directory of its bitmaps would become too long";
            return Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail));
        }
        let offset = self.store_whole(&bytes, reserved)?;
        // All that and its refcounts must be there before anything points to it.
        self.flush_all()?;
        Ok((entries, Some(Place { offset, length })))
    }

    /// Makes the header name a directory of `count` bitmaps, or none.
    fn switch_directory(&self, place: Option<Place>, count: usize) -> Result<()> {
        let since = self.metadata.failed_syncs();
        self.metadata.edit_header(|file, cluster| {
            let Some(place) = place else {
                change_autoclear(file, 0, autoclear::BITMAPS)?;
                return remove_extension(file, cluster, extension::BITMAPS);
            };
            let content = directory::encode_extension(place, count);
            if !replaces_at_once(file, cluster, extension::BITMAPS, content.len())? {
                // Without the bit nobody looks at the extension, whatever is in it.
                change_autoclear(file, 0, autoclear::BITMAPS)?;
            }
            put_extension(file, cluster, extension::BITMAPS, &content)?;
            change_autoclear(file, autoclear::BITMAPS, 0)
        })?;
        self.metadata.refuse_lost_since(since)
    }

    /// Makes sure that the header names the directory which it should, after a change that failed
    /// has left that in doubt.
    pub(super) fn settle_directory(&self, disk: &mut Disk) -> Result<()> {
        if disk.is_doubtful {
            self.metadata.edit_header(|file, _| rewrite_autoclear(file, 0, autoclear::BITMAPS))?;
            self.switch_directory(disk.directory, disk.flags_places.len())?;
            disk.is_doubtful = false;
        }
        Ok(())
    }

    /// The clusters of tables that are no longer named when the plan has been carried out.
    fn replaced_clusters(&self, old: &[Bitmap<Entry>], plan: &[Planned]) -> Vec<u64> {
        let is_kept = |table: Table| {
            plan.iter().any(|planned| !planned.must_store && planned.bitmap.stored.table == table)
        };
        let trusted = |bitmap: &&Bitmap<Entry>| !matches!(bitmap.condition, Condition::Damaged(_));
        let tables = old.iter().filter(trusted).map(|bitmap| bitmap.stored.table);
        let gone = tables.filter(|table| table.entries > 0 && !is_kept(*table));
        // What cannot be read leaks, which harms nobody.
        gone.filter_map(|table| self.table_clusters(table).ok()).flatten().collect()
    }

    /// Frees clusters and the place of a directory which the header, on disk, names no more. What
    /// may be something else as well leaks.
    fn free_clusters(
        &self,
        mut clusters: Vec<u64>,
        directory: Option<Place>,
        reserved: &[Reserved],
    ) -> Result<()> {
        clusters.extend(self.place_clusters(directory));
        let freed = self.give_away(clusters, reserved).into_iter();
        self.clusters.free(freed.map(|cluster| Freed { cluster, punch: true }));
        Ok(())
    }

    pub(super) fn count_memory(&self, bitmaps: &[Bitmap<Entry>]) {
        let bytes = bitmaps.iter().filter_map(|bitmap| bitmap.bits.get());
        let bytes = bytes.map(|bits| bits.words().len() as u64 * 8).sum();
        self.bitmaps.memory_bytes.store(bytes, std::sync::atomic::Ordering::Release);
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

const CHANGE: &str = "change the bitmaps of";

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > BITMAP_NAME_BYTES_MAX || name.contains('\0') {
        let detail = format!(
            "a bitmap's name has 1 to {BITMAP_NAME_BYTES_MAX} bytes, none of them zero; this one \
             has {}",
            name.len()
        );
        return Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail));
    }
    Ok(())
}

pub(super) fn position(plan: &[Planned], name: &str) -> Result<usize> {
    plan.iter().position(|planned| planned.bitmap.name == name).ok_or_else(|| no_bitmap(name))
}

pub(super) fn at<'a>(plan: &'a mut [Planned], name: &str) -> Result<&'a mut Planned> {
    let index = position(plan, name)?;
    Ok(&mut plan[index])
}
