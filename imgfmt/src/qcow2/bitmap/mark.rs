//! Marking bitmaps as in use before the first change of the disk, which outdates the stored bits.

use std::collections::HashSet;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::directory::{Entry, flag};
use super::ownership::FOREIGN_DIRECTORY;
use super::store::{Bitmaps, ImageServices, Ownership, unusable};
use crate::bitmap::{Bitmap, Condition, Recorded, RecordedElsewhere, Recording, State, WouldBlock};
use crate::error::Result;
use crate::qcow2::metadata::header_edit::change_autoclear;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::header::autoclear;
use crate::units::GuestRange;

/// The maximum number of clusters of bitmaps that are compared with each other.
const CLUSTERS_MAX: usize = 1 << 24;

impl Bitmaps {
    /// Loads all bitmaps before the first change: also those that do not record changes, because in
    /// a damaged image their clusters may be the guest's as well, and change.
    pub(in crate::qcow2) fn begin_recording(&self) {
        let mut exclusive = self.tracker.exclusive();
        let mut bitmaps = exclusive.bitmaps().to_vec();
        self.find_shared_clusters(&mut bitmaps);
        // Recording bitmaps come first, in case memory does not suffice for all.
        for recording in [Recording::Enabled, Recording::Disabled] {
            for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.recording == recording) {
                if let Err(detail) = self.ready_bits(bitmap) {
                    bitmap.condition = unusable(bitmap, detail);
                }
            }
        }
        let is_marked = self.is_marked(&bitmaps);
        exclusive.replace(bitmaps, is_marked);
    }

    /// Whether every bitmap in which changes will be missing while the image is open is marked as
    /// in use.
    pub(super) fn is_marked(&self, bitmaps: &[Bitmap<Entry>]) -> bool {
        let disk = self.disk.lock();
        let ownership = self.ownership.lock();
        disk.damage.is_none()
            && !disk.is_doubtful
            && !self.metadata.is_sealed()
            && !bitmaps.iter().any(|bitmap| self.needs_mark(&ownership, bitmap))
    }

    /// Finds bitmaps that share clusters: one would free what the other needs.
    fn find_shared_clusters(&self, bitmaps: &mut [Bitmap<Entry>]) {
        let mut seen = HashSet::new();
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.stored.damage.is_none()) {
            let detail = match self.table_clusters(bitmap.stored.table) {
                Ok(clusters) if seen.len() + clusters.len() > CLUSTERS_MAX => {
                    "the bitmaps of the image have too many clusters".into()
                }
                Ok(clusters) if clusters.iter().all(|cluster| seen.insert(*cluster)) => continue,
                Ok(_) => "it shares clusters with another bitmap, or uses one twice".into(),
                Err(detail) => detail,
            };
            bitmap.condition = Condition::Damaged(detail);
        }
    }

    /// Records that a range is about to change; see [`Tracker::before_change`].
    pub(in crate::qcow2) fn before_change(
        &self,
        image: &dyn ImageServices,
        range: GuestRange,
    ) -> Result<Recorded<'_, Entry>> {
        self.tracker.before_change(range, |state| self.mark_in_use(image, state))
    }

    /// As [`before_change`](Self::before_change), if that needs no waiting.
    pub(in crate::qcow2) fn try_before_change(
        &self,
        range: GuestRange,
    ) -> Result<Recorded<'_, Entry>, WouldBlock> {
        self.tracker.try_before_change(range)
    }

    /// As [`try_before_change`](Self::try_before_change), for a change that no thread waits for.
    pub(in crate::qcow2) fn try_before_change_elsewhere(
        &self,
        range: GuestRange,
    ) -> Result<RecordedElsewhere, WouldBlock> {
        self.tracker.try_before_change_elsewhere(range)
    }

    /// Durably marks the stored bits of every recording bitmap as out of date.
    fn mark_in_use(&self, image: &dyn ImageServices, state: &State<Entry>) -> Result<()> {
        self.metadata.break_seal()?;
        let mut disk = self.disk.lock();
        if disk.damage.is_some() {
            // These bitmaps cannot be read here. A program that can read them must not trust them.
            self.metadata.edit_header(|file, _| change_autoclear(file, 0, autoclear::BITMAPS))?;
            disk.damage = None;
        }
        self.settle_directory(&mut disk)?;
        if disk.directory.is_none() {
            return Ok(());
        }
        self.give_up_foreign_directory(image, &mut disk.directory, state.bitmaps())?;
        let bitmaps = state.bitmaps().iter().zip(&disk.flags_places);
        let marked: Vec<_> = {
            let ownership = self.ownership.lock();
            // Clearing a flag that is thought to be set may have failed.
            let needs_flag = |bitmap: &Bitmap<Entry>| {
                bitmap.in_use.load(Acquire) || self.needs_mark(&ownership, bitmap)
            };
            bitmaps.filter(|(bitmap, _)| needs_flag(bitmap)).collect()
        };
        let Some(place) = disk.directory else {
            // The header no longer names them; the clean close stores them.
            self.go_without_session(FOREIGN_DIRECTORY)?;
            marked.iter().for_each(|(bitmap, _)| bitmap.in_use.store(true, Release));
            return Ok(());
        };
        // First create the sidecar for the bits, then mark the stored bits as out of date.
        self.begin_session(state)?;
        let since = self.metadata.failed_syncs();
        for (bitmap, flags_place) in &marked {
            let flags = bitmap.stored.flags | flag::IN_USE;
            self.metadata.write(place.offset + **flags_place, &flags.to_be_bytes())?;
        }
        self.metadata.sync()?;
        self.metadata.refuse_lost_since(since)?;
        marked.iter().for_each(|(bitmap, _)| bitmap.in_use.store(true, Release));
        disk.note_in_use(state.bitmaps());
        Ok(())
    }

    /// Whether the stored bits of a bitmap will be wrong when the disk has changed, without being
    /// marked so: changes will be missing, or the bitmap's clusters may be the guest's as well.
    fn needs_mark(&self, ownership: &Ownership, bitmap: &Bitmap<Entry>) -> bool {
        if bitmap.in_use.load(Acquire) {
            return false;
        }
        if bitmap.recording == Recording::Enabled {
            return true;
        }
        let is_alone =
            |clusters: Vec<HostCluster>| clusters.iter().all(|at| ownership.alone.contains(at));
        // Ownership is unknown, so it has to be found out.
        bitmap.stored.damage.is_none()
            && bitmap.stored.table.entries > 0
            && !self.table_clusters(bitmap.stored.table).is_ok_and(is_alone)
    }
}
