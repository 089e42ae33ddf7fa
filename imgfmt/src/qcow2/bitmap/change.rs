//! Changing the list of bitmaps: the effect of each change on the list.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Acquire;

use super::directory::{self, Entry, Table};
use super::error::{CHANGE, not_reliable};
use super::freeze::refuse_to_lose;
use super::plan::{Planned, at, position};
use super::store::{Bitmaps, ImageServices};
use crate::bitmap::{
    BITMAP_NAME_BYTES_MAX, Bitmap, BitmapChange, Bits, Condition, ExclusiveState,
    GRANULARITY_BITS_MAX, GRANULARITY_BITS_MIN, Recording,
};
use crate::error::{Error, ErrorKind, Result};

/// A new bitmap has at most this many bits, as in QEMU.
const BITS_MAX: u64 = 1 << 29;

impl Bitmaps {
    /// Makes all changes at one instant, at which no write is in flight, or none of them.
    pub(in crate::qcow2) fn transaction(
        &self,
        image: &dyn ImageServices,
        changes: &[BitmapChange],
    ) -> Result<()> {
        self.metadata.refuse_unwritable()?;
        if self.metadata.header().version < 3 {
            let detail = "images of version 2 cannot have bitmaps; convert it to version 3";
            return Err(Error::new(ErrorKind::Unsupported, CHANGE, detail));
        }
        if let Some(detail) = self.damage() {
            let detail = format!("{detail}; check and repair the image, which drops its bitmaps");
            return Err(Error::new(ErrorKind::Corrupt, CHANGE, detail));
        }
        // Flushed before writers are locked out, so that they wait for less.
        image.flush()?;
        let mut exclusive = self.tracker.exclusive();
        let changed = self.change_alone(image, &mut exclusive, changes);
        self.count_memory(exclusive.bitmaps());
        drop(exclusive);
        if changed.is_ok() {
            self.return_clusters(image);
        }
        changed
    }

    /// Makes the refcounts on disk forget the clusters of the old list, so that a process that is
    /// killed now leaks none of them. If that fails, the next flush tells.
    pub(super) fn return_clusters(&self, image: &dyn ImageServices) {
        // The first flush frees them, and the second one writes their refcounts.
        let _ = image.flush().and_then(|()| image.flush());
    }

    fn change_alone(
        &self,
        image: &dyn ImageServices,
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
        self.carry_out_changes(image, exclusive, plan, changes)
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
            BitmapChange::DropFrozen { name } => self.plan_drop_frozen(plan, name)?,
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
}

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
