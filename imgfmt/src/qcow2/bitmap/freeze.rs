//! Freezing and thawing the bits of a bitmap, for checkpoints. See [`frozen`](super::frozen).

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use super::directory::Entry;
use super::error::CHANGE;
use super::frozen::{ByName, by_name, frozen_bitmap_name, frozen_bits, is_frozen_part, owner};
use super::plan::{Planned, at, position};
use super::store::{Bitmaps, ImageServices, unusable_detail};
use crate::bitmap::{Bitmap, Bits, Recording};
use crate::error::{Error, ErrorKind, Result};

/// More bitmaps with frozen bits than this are a sign of a hostile image.
const FROZEN_MAX: usize = 256;

/// The error of using a bitmap without its frozen bits.
fn incomplete(name: &str, frozen: &str, problem: Option<String>) -> Error {
    let (name, frozen) = (name.escape_debug(), frozen.escape_debug());
    let what = format!("a checkpoint has moved bits of the bitmap '{name}' to '{frozen}'");
    let detail = match problem {
        None => format!("{what}; open the image for writing, which puts them back"),
        Some(problem) => format!(
            "{what}, and those cannot be relied on: {problem}; repair '{frozen}', so that \
             everything counts as dirty"
        ),
    };
    Error::new(ErrorKind::Corrupt, "use a bitmap of", detail)
}

/// Refuses a change after which a bitmap would look complete although some of its bits were lost
/// with the bitmap `name`.
pub(super) fn refuse_to_lose(plan: &[Planned], name: &str) -> Result<()> {
    let all = bitmaps_by_name(plan);
    let Some(owner) = owner(&all, name) else { return Ok(()) };
    let (name, owner) = (name.escape_debug(), owner.name.escape_debug());
    let detail = format!(
        "the bitmap '{name}' holds bits that a checkpoint has moved there from '{owner}', which \
         must not get lost; have them put back, or remove '{owner}' first"
    );
    Err(Error::new(ErrorKind::InvalidInput, CHANGE, detail))
}

/// The index of the bitmap with the frozen bits in the plan.
fn frozen_position(plan: &[Planned], name: &str) -> Result<usize> {
    let bitmap = &plan[position(plan, name)?].bitmap;
    let found = plan.iter().position(|planned| is_frozen_part(&planned.bitmap, bitmap));
    found.ok_or_else(|| {
        let detail = format!("no bits of the bitmap '{}' are frozen", name.escape_debug());
        Error::new(ErrorKind::NotFound, CHANGE, detail)
    })
}

fn bitmaps_by_name(plan: &[Planned]) -> ByName<'_> {
    by_name(plan.iter().map(|planned| &planned.bitmap))
}

/// Planned bitmaps by name.
pub(super) type PlannedByName<'a> = HashMap<&'a str, &'a Planned>;

/// Of several that have the same name, the first stays, as in [`by_name`].
pub(super) fn planned_by_name(plan: &[Planned]) -> PlannedByName<'_> {
    plan.iter().rev().map(|planned| (planned.bitmap.name.as_str(), planned)).collect()
}

impl Bitmaps {
    /// The name of the bitmap with frozen bits of `bitmap`, and why those are unreliable, if they
    /// are.
    pub(super) fn frozen_part(
        &self,
        all: &ByName<'_>,
        bitmap: &Bitmap<Entry>,
    ) -> Option<(String, Option<String>)> {
        let frozen = frozen_bits(all, bitmap)?;
        let problem = unusable_detail(frozen).or_else(|| self.ready_bits(frozen).err());
        Some((frozen.name.clone(), problem))
    }

    /// Refuses to read a bitmap that lacks its frozen bits.
    pub(super) fn refuse_incomplete(
        &self,
        all: &[Bitmap<Entry>],
        bitmap: &Bitmap<Entry>,
    ) -> Result<()> {
        let Some(frozen) = all.iter().find(|other| is_frozen_part(other, bitmap)) else {
            return Ok(());
        };
        let problem = unusable_detail(frozen).or_else(|| self.ready_bits(frozen).err());
        Err(incomplete(&bitmap.name, &frozen.name, problem))
    }

    /// As [`refuse_incomplete`](Self::refuse_incomplete), for a planned bitmap.
    pub(super) fn refuse_planned_incomplete(&self, plan: &[Planned], name: &str) -> Result<()> {
        match frozen_position(plan, name) {
            Ok(index) => {
                let frozen = &plan[index].bitmap;
                Err(incomplete(name, &frozen.name, unusable_detail(frozen)))
            }
            Err(_) => Ok(()),
        }
    }

    /// Moves the bits of a bitmap to a separate one; it restarts empty. Bits that were frozen
    /// earlier are kept with them.
    pub(super) fn plan_freeze(&self, plan: &mut Vec<Planned>, name: &str) -> Result<()> {
        if frozen_position(plan, name).is_ok() {
            self.plan_thaw(plan, name)?;
        }
        let planned = at(plan, name)?;
        let bits = self.planned_bits(planned)?;
        let granularity = 1 << planned.bitmap.granularity_bits;
        let frozen = frozen_bitmap_name(name);
        let mut added = self.plan_new(plan, &frozen, granularity, Recording::Disabled)?;
        // A copy, because the other bitmap is emptied in place.
        added.content = Some(Arc::new(bits.resized(bits.size())));
        plan.push(added);
        self.plan_content(at(plan, name)?, |_| ())
    }

    /// Drops the frozen bits of a bitmap.
    pub(super) fn plan_drop_frozen(&self, plan: &mut Vec<Planned>, name: &str) -> Result<()> {
        let index = frozen_position(plan, name)?;
        plan.remove(index);
        let planned = at(plan, name)?;
        // Its stored bits contain them.
        planned.must_store |= self.planned_bits(planned).is_ok();
        Ok(())
    }

    /// The bits of a planned bitmap as they are stored: with the frozen ones, so that programs that
    /// do not know frozen bits do not miss them. Everything is dirty if those are unreliable.
    pub(super) fn bits_to_store(
        &self,
        all: &PlannedByName<'_>,
        planned: &Planned,
    ) -> Result<Arc<Bits>> {
        let bits = self.planned_bits(planned)?;
        // One copy, however many names there are.
        let mut whole: Option<Bits> = None;
        let mut owner = planned;
        // The frozen bits may have frozen bits. Each name is longer, so this ends.
        while let Some(frozen) = all.get(frozen_bitmap_name(&owner.bitmap.name).as_str())
            && is_frozen_part(&frozen.bitmap, &owner.bitmap)
        {
            let whole = whole.get_or_insert_with(|| bits.resized(bits.size()));
            match self.planned_bits(frozen) {
                Ok(frozen) => whole.merge(&frozen),
                Err(_) => whole.set_all(),
            }
            owner = frozen;
        }
        Ok(whole.map_or(bits, Arc::new))
    }

    /// Merges the frozen bits of a bitmap back. If that is not possible, the plan is unchanged.
    pub(super) fn plan_thaw(&self, plan: &mut Vec<Planned>, name: &str) -> Result<()> {
        let index = frozen_position(plan, name)?;
        self.refuse_planned_incomplete(plan, &frozen_bitmap_name(name))?;
        let from = self.planned_bits(&plan[index])?;
        self.plan_merge(plan, name, &from)?;
        plan.remove(index);
        Ok(())
    }

    /// Merges all reliable frozen bits back into reliable bitmaps; returns the names of these
    /// bitmaps. No checkpoint may be in progress.
    pub(in crate::qcow2) fn thaw(&self, image: &dyn ImageServices) -> Result<Vec<String>> {
        let mut exclusive = self.tracker.exclusive();
        let mut names: Vec<String> = {
            let all = by_name(exclusive.bitmaps().iter());
            let waiting = all.values().filter(|bitmap| frozen_bits(&all, bitmap).is_some());
            waiting.map(|bitmap| bitmap.name.clone()).collect()
        };
        if names.is_empty() {
            return Ok(names);
        }
        if names.len() > FROZEN_MAX {
            let detail = format!("more than {FROZEN_MAX} of its bitmaps wait for frozen bits");
            return Err(self.metadata.named(Error::new(ErrorKind::Unsupported, CHANGE, detail)));
        }
        // A bitmap must have its own frozen bits back before it is merged into another.
        names.sort_by_key(|name| (Reverse(name.len()), name.clone()));
        let mut plan: Vec<Planned> = exclusive.bitmaps().iter().map(Planned::unchanged).collect();
        names.retain(|name| self.plan_thaw(&mut plan, name).is_ok());
        if !names.is_empty() {
            let carried_out = self.carry_out(image, &mut exclusive, plan);
            self.count_memory(exclusive.bitmaps());
            drop(exclusive);
            carried_out?;
            self.return_clusters(image);
        }
        names.sort();
        Ok(names)
    }

    /// As [`thaw`](Self::thaw), when the image is opened for writing. If it fails, the disk can be
    /// used nevertheless, but not the bitmaps that lack bits.
    pub(in crate::qcow2) fn thaw_at_open(&self, image: &dyn ImageServices) {
        let thawed = self.thaw(image);
        let mut disk = self.disk.lock();
        match thawed {
            Ok(names) => disk.thawed = names,
            Err(error) => disk.thaw_failure = Some(error.to_string()),
        }
    }
}
