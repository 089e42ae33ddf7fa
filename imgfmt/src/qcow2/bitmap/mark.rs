//! Announcing the first change of the disk: what the image has of its bitmaps is out of date then.

use std::collections::HashSet;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::directory::{Entry, flag};
use super::ownership::FOREIGN_DIRECTORY;
use super::store::{Bitmaps, ImageServices, unusable};
use crate::bitmap::{Bitmap, Condition, Recorded, Recording, State, WouldBlock};
use crate::error::Result;
use crate::qcow2::metadata::header_edit::change_autoclear;
use crate::qcow2::on_disk::header::autoclear;
use crate::units::GuestRange;

/// No more clusters of bitmaps than this are compared with each other.
const CLUSTERS_MAX: usize = 1 << 24;

impl Bitmaps {
    /// Loads the bitmaps that note changes, before the first change.
    pub(in crate::qcow2) fn begin_recording(&self) {
        let mut exclusive = self.tracker.exclusive();
        let mut bitmaps = exclusive.bitmaps().to_vec();
        self.find_shared_clusters(&mut bitmaps);
        for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.recording == Recording::Enabled) {
            if let Err(detail) = self.ready_bits(bitmap) {
                bitmap.condition = unusable(bitmap, detail);
            }
        }
        let is_marked = self.is_marked(&bitmaps);
        exclusive.replace(bitmaps, is_marked);
    }

    /// Whether the image says of every bitmap in which changes will be missing, as long as it is
    /// open, that it is in use.
    pub(super) fn is_marked(&self, bitmaps: &[Bitmap<Entry>]) -> bool {
        let disk = self.disk.lock();
        disk.damage.is_none()
            && !disk.is_doubtful
            && !self.metadata.is_sealed()
            && !bitmaps.iter().any(needs_mark)
    }

    /// Two bitmaps must not share clusters, or one would free what the other needs.
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

    /// Notes that a range is about to change; see [`Tracker::before_change`].
    pub(in crate::qcow2) fn before_change(
        &self,
        image: &dyn ImageServices,
        range: GuestRange,
    ) -> Result<Recorded<'_, Entry>> {
        self.tracker.before_change(range, |state| self.mark_in_use(image, state))
    }

    /// As [`before_change`](Self::before_change), if that takes no waiting.
    pub(in crate::qcow2) fn try_before_change(
        &self,
        range: GuestRange,
    ) -> Result<Recorded<'_, Entry>, WouldBlock> {
        self.tracker.try_before_change(range)
    }

    /// Says on disk of every bitmap that notes changes that what is stored is out of date.
    fn mark_in_use(&self, image: &dyn ImageServices, state: &State<Entry>) -> Result<()> {
        self.metadata.break_seal()?;
        let mut disk = self.disk.lock();
        if disk.damage.is_some() {
            // Nobody can find these bitmaps. Whoever can must not believe them from now on.
            self.metadata.edit_header(|file, _| change_autoclear(file, 0, autoclear::BITMAPS))?;
            disk.damage = None;
        }
        self.settle_directory(&mut disk)?;
        if disk.directory.is_none() {
            return Ok(());
        }
        self.give_up_foreign_directory(image, &mut disk.directory, state.bitmaps())?;
        let bitmaps = state.bitmaps().iter().zip(&disk.flags_places);
        let marked: Vec<_> = bitmaps.filter(|(bitmap, _)| needs_mark(bitmap)).collect();
        let Some(place) = disk.directory else {
            // Nothing on disk speaks of them now; the clean close stores them.
            self.go_without_session(FOREIGN_DIRECTORY)?;
            marked.iter().for_each(|(bitmap, _)| bitmap.in_use.store(true, Release));
            return Ok(());
        };
        // First the bits get a safe place, then the image says that what it has is out of date.
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
}

/// Whether changes will be missing in what is stored of a bitmap, and the image does not say so.
fn needs_mark(bitmap: &Bitmap<Entry>) -> bool {
    bitmap.recording == Recording::Enabled && !bitmap.in_use.load(Acquire)
}
