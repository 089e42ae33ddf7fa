//! Persistent dirty bitmaps, as the format defines them.
//!
//! [`directory`] knows the list of bitmaps and [`table`] the bits of one. [`change`] replaces the list
//! by another at one instant, [`close`] stores what was noted while the image was open.

mod change;
mod close;
mod directory;
mod frozen;
mod lineage;
mod ownership;
mod resize;
mod session;
mod table;

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Arc, OnceLock};

use crate::bitmap::{
    Bitmap, BitmapChange, BitmapInfo, BitmapState, Bits, Condition, DirtyBits, DirtyExtent,
    Recorded, Recording, State, Tracker,
};
use crate::error::{Error, ErrorKind, Result};
use crate::info::BitmapEntry;
use crate::options::OpenOptions;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::qcow2::image::Qcow2;
use crate::qcow2::metadata::header_edit::{change_autoclear, remove_extension};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{Header, autoclear};
use crate::sidecar::SidecarLocation;
use crate::storage::Storage;
use crate::units::GuestRange;
use directory::{Entry, Place, flag};
pub use frozen::frozen_bitmap_name;
use lineage::Lineage;
use ownership::Ownership;
use session::Session;

/// The bits of all bitmaps of one image take up no more memory than this.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

/// No more clusters of bitmaps than this are compared with each other.
const CLUSTERS_MAX: usize = 1 << 24;

/// The bitmaps of an open image.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    pub(super) tracker: Tracker<Entry>,
    disk: OrderedMutex<{ rank::DIRECTORY }, Disk>,
    /// Which clusters belong to them alone. Locked after the disk.
    ownership: OrderedMutex<{ rank::OWNERSHIP }, Ownership>,
    /// How much memory bits take up.
    memory_bytes: AtomicU64,
    /// The largest size that the disk has had since the image was opened.
    size_peak: u64,
    /// After which backup each of them began. Locked before the header is edited.
    lineage: OrderedMutex<{ rank::LINEAGE }, Lineage>,
    /// What makes them survive a crash.
    session: OrderedMutex<{ rank::SESSION }, Session>,
    /// Where the sidecar is; `None` means beside the image.
    sidecar_location: Option<Arc<dyn SidecarLocation>>,
}

/// Where bitmaps are in the file.
#[derive(Debug, Default)]
struct Disk {
    /// Where the directory is, if the image has a valid one.
    directory: Option<Place>,
    /// The bitmaps that the directory lists, in its order.
    entries: Vec<Entry>,
    /// Where the flags of each bitmap are, from the start of the directory on.
    flags_places: Vec<u64>,
    /// Why the bitmaps that the image claims to have cannot be found.
    damage: Option<String>,
    /// The header may name another directory, because a change of it failed.
    is_doubtful: bool,
    /// The bitmaps whose frozen bits were put back when the image was opened.
    thawed: Vec<String>,
    /// Why that failed.
    thaw_failure: Option<String>,
}

impl Disk {
    /// Notes which bitmaps the file says are in use.
    fn note_in_use(&mut self, bitmaps: &[Bitmap<Entry>]) {
        for (entry, bitmap) in self.entries.iter_mut().zip(bitmaps) {
            if bitmap.in_use.load(Acquire) {
                entry.flags |= flag::IN_USE;
            }
        }
    }
}

impl Bitmaps {
    /// No bitmaps, whatever the image says.
    pub(super) fn none() -> Self {
        Self {
            tracker: Tracker::new(Vec::new(), true),
            disk: OrderedMutex::default(),
            ownership: OrderedMutex::default(),
            memory_bytes: AtomicU64::new(0),
            size_peak: 0,
            lineage: OrderedMutex::default(),
            session: OrderedMutex::default(),
            sidecar_location: None,
        }
    }

    /// Reads what an image says about its bitmaps, but none of their bits.
    pub(super) fn open(storage: &dyn Storage, header: &Header, options: &OpenOptions) -> Self {
        let (directory, mut entries, damage) = match directory::read(storage, header) {
            Ok(None) => (None, Vec::new(), None),
            Ok(Some((place, entries))) => (Some(place), entries, None),
            Err(detail) => (None, Vec::new(), Some(detail)),
        };
        directory::refuse_equal_names(&mut entries);
        let (_, flags_places) = directory::encode(&entries);
        let tracker = Tracker::new(entries.iter().cloned().map(bitmap_of).collect(), true);
        let disk = Disk { directory, entries, flags_places, damage, ..Disk::default() };
        let disk = OrderedMutex::new(disk);
        Self {
            tracker,
            disk,
            ownership: OrderedMutex::default(),
            memory_bytes: AtomicU64::new(0),
            size_peak: header.size,
            lineage: OrderedMutex::new(Lineage::of(header)),
            session: OrderedMutex::new(Session::new(options.survives)),
            sidecar_location: sidecar_location(options),
        }
    }
}

/// Where the options say that the sidecar is.
#[cfg(any(test, feature = "test-util"))]
fn sidecar_location(options: &OpenOptions) -> Option<Arc<dyn SidecarLocation>> {
    let folder = options.sidecar_folder.as_ref()?;
    Some(Arc::new(Arc::clone(folder)))
}

/// Where the options say that the sidecar is: nothing else than beside the image.
#[cfg(not(any(test, feature = "test-util")))]
fn sidecar_location(_: &OpenOptions) -> Option<Arc<dyn SidecarLocation>> {
    None
}

fn bitmap_of(entry: Entry) -> Bitmap<Entry> {
    let in_use = entry.flags & flag::IN_USE != 0;
    let condition = match &entry.damage {
        Some((detail, _)) => Condition::Damaged(detail.clone()),
        None if in_use => Condition::Inconsistent(
            "it was in use when the image was last left, so changes may be missing in it".into(),
        ),
        None => Condition::Ready,
    };
    Bitmap {
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        granularity_bits: entry.granularity_bits.min(63),
        recording: match entry.flags & flag::AUTO {
            0 => Recording::Disabled,
            _ => Recording::Enabled,
        },
        condition,
        in_use: AtomicBool::new(in_use),
        bits: OnceLock::new(),
        stored: entry,
    }
}

impl Qcow2 {
    /// Loads the bitmaps that note changes, before the first change.
    pub(super) fn begin_recording(&mut self) {
        let mut exclusive = self.bitmaps.tracker.exclusive();
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
    fn is_marked(&self, bitmaps: &[Bitmap<Entry>]) -> bool {
        let disk = self.bitmaps.disk.lock();
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

    /// The bits of a bitmap, loaded if they were not. An error says, as a clause, why there are none.
    pub(super) fn ready_bits(&self, bitmap: &Bitmap<Entry>) -> Result<Arc<Bits>, String> {
        if let Condition::Inconsistent(detail) | Condition::Damaged(detail) = &bitmap.condition {
            return Err(detail.clone());
        }
        if let Some(bits) = bitmap.bits.get() {
            return Ok(Arc::clone(bits));
        }
        let bytes = Bits::bytes_for(self.size, bitmap.granularity_bits);
        self.take_memory(bytes)?;
        let loaded = self.load_bits(bitmap.stored.table, self.size, bitmap.granularity_bits);
        let loaded = loaded.inspect_err(|_| self.give_memory(bytes))?;
        let mut is_ours = false;
        let bits = bitmap.bits.get_or_init(|| {
            is_ours = true;
            Arc::new(loaded)
        });
        if !is_ours {
            self.give_memory(bytes); // Somebody else has loaded them meanwhile.
        }
        Ok(Arc::clone(bits))
    }

    fn take_memory(&self, bytes: u64) -> Result<(), String> {
        let memory = &self.bitmaps.memory_bytes;
        if memory.fetch_add(bytes, AcqRel).saturating_add(bytes) > MEMORY_BYTES_MAX {
            self.give_memory(bytes);
            return Err(format!(
                "the bitmaps of the image take up more than {} MiB of memory",
                MEMORY_BYTES_MAX >> 20
            ));
        }
        Ok(())
    }

    fn give_memory(&self, bytes: u64) {
        self.bitmaps.memory_bytes.fetch_sub(bytes, AcqRel);
    }

    /// Notes that a range is about to change; see [`Tracker::before_change`].
    pub(super) fn before_change(&self, range: GuestRange) -> Result<Recorded<'_, Entry>> {
        self.bitmaps.tracker.before_change(range, |state| self.mark_in_use(state))
    }

    /// Says on disk of every bitmap that notes changes that what is stored is out of date.
    fn mark_in_use(&self, state: &State<Entry>) -> Result<()> {
        self.metadata.break_seal()?;
        let mut disk = self.bitmaps.disk.lock();
        if disk.damage.is_some() {
            // Nobody can find these bitmaps. Whoever can must not believe them from now on.
            self.metadata.edit_header(|file, _| change_autoclear(file, 0, autoclear::BITMAPS))?;
            disk.damage = None;
        }
        self.settle_directory(&mut disk)?;
        if disk.directory.is_none() {
            return Ok(());
        }
        self.give_up_foreign_directory(&mut disk.directory, state.bitmaps())?;
        let bitmaps = state.bitmaps().iter().zip(&disk.flags_places);
        let marked: Vec<_> = bitmaps.filter(|(bitmap, _)| needs_mark(bitmap)).collect();
        let Some(place) = disk.directory else {
            // Nothing on disk speaks of them now; the clean close stores them.
            self.go_without_session(ownership::FOREIGN_DIRECTORY)?;
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

    /// What is known about the bitmaps of this layer.
    pub(crate) fn bitmap_list(&self) -> Vec<BitmapInfo> {
        let state = self.bitmaps.tracker.read();
        let all = frozen::by_name(state.bitmaps().iter());
        let incomplete = |bitmap: &Bitmap<Entry>| {
            let (frozen, problem) = self.frozen_part(&all, bitmap)?;
            Some(BitmapState::Incomplete { frozen, problem })
        };
        let info = |bitmap: &Bitmap<Entry>| BitmapInfo {
            name: bitmap.name.clone(),
            granularity: 1 << bitmap.granularity_bits,
            recording: bitmap.recording,
            is_in_use: bitmap.in_use.load(Acquire),
            began_after: self.began_after(&bitmap.name),
            state: match (&bitmap.condition, self.ready_bits(bitmap)) {
                (Condition::Inconsistent(reason), _) => {
                    BitmapState::Inconsistent { reason: reason.clone() }
                }
                (_, Err(reason)) => BitmapState::Damaged { reason },
                (_, Ok(bits)) => incomplete(bitmap)
                    .unwrap_or(BitmapState::Consistent { dirty_bytes: bits.dirty_bytes() }),
            },
        };
        state.bitmaps().iter().map(info).collect()
    }

    /// What the image says about its bitmaps.
    pub(crate) fn bitmap_entries(&self) -> Vec<BitmapEntry> {
        let state = self.bitmaps.tracker.read();
        let entry = |bitmap: &Bitmap<Entry>| BitmapEntry {
            name: bitmap.name.clone(),
            granularity: 1 << bitmap.granularity_bits,
            recording: bitmap.recording,
            is_in_use: bitmap.in_use.load(Acquire),
        };
        state.bitmaps().iter().map(entry).collect()
    }

    /// Why the bitmaps that the image claims to have cannot be found, as a clause.
    pub(crate) fn bitmap_damage(&self) -> Option<String> {
        self.bitmaps.disk.lock().damage.clone()
    }

    /// Whether this layer has a bitmap of that name.
    pub(crate) fn has_bitmap(&self, name: &str) -> bool {
        self.bitmaps.tracker.read().bitmaps().iter().any(|bitmap| bitmap.name == name)
    }

    /// What a bitmap of this layer says about a range.
    pub(crate) fn dirty_extents(
        &self,
        name: &str,
        range: GuestRange,
        max_count: usize,
    ) -> Result<Vec<DirtyExtent>> {
        self.with_bits(name, |bits| bits.extents(range, max_count))
    }

    /// The bits of a bitmap of this layer as they are now.
    pub(crate) fn dirty_bits(&self, name: &str) -> Result<DirtyBits> {
        self.with_bits(name, |bits| DirtyBits(Arc::new(bits.resized(bits.size()))))
    }

    fn with_bits<T>(&self, name: &str, ask: impl FnOnce(&Bits) -> T) -> Result<T> {
        // Kept while bits are looked at: whoever clears them needs the state alone.
        let state = self.bitmaps.tracker.read();
        let bitmap = find(state.bitmaps(), name)?;
        self.refuse_incomplete(state.bitmaps(), bitmap)?;
        let bits = self.ready_bits(bitmap).map_err(|detail| not_reliable(name, &detail))?;
        Ok(ask(&bits))
    }

    /// Whether the image has no bitmaps, nor claims to have any.
    pub(super) fn has_no_bitmaps(&self) -> bool {
        let disk = self.bitmaps.disk.lock();
        disk.directory.is_none() && disk.damage.is_none()
    }

    /// Where bitmaps lie in the file (offset, length), and what is damaged.
    ///
    /// Does not ask the tracker: clusters are allocated, and so all references counted, also while
    /// the bitmaps are changed or a write has noted what it changes.
    pub(super) fn bitmap_places(&self) -> (Vec<(u64, u64)>, Vec<String>) {
        let bits = self.geometry().cluster_bits;
        let disk = self.bitmaps.disk.lock();
        let mut damages: Vec<String> = disk.damage.iter().cloned().collect();
        let mut places: Vec<(u64, u64)> =
            disk.directory.iter().map(|place| (place.offset, place.length)).collect();
        let entries = disk.entries.clone();
        drop(disk);
        for entry in &entries {
            match self.entry_clusters(entry) {
                Ok(clusters) => places.extend(clusters.iter().map(|at| (at << bits, 1 << bits))),
                Err(detail) => {
                    let name = String::from_utf8_lossy(&entry.name);
                    damages.push(format!("the bitmap '{}': {detail}", name.escape_debug()));
                }
            }
        }
        (places, damages)
    }

    /// The clusters of a bitmap that the directory lists. An error says, as a clause, why it cannot be
    /// used, and QEMU would not open the image.
    fn entry_clusters(&self, entry: &Entry) -> Result<Vec<u64>, String> {
        if let Some((detail, _)) = &entry.damage {
            return Err(detail.clone());
        }
        let table = entry.table;
        let bytes = Bits::bytes_for(self.size, entry.granularity_bits);
        let needed = bytes.div_ceil(self.geometry().cluster_size());
        if entry.flags & flag::IN_USE == 0 && u64::from(table.entries) != needed {
            return Err(format!("its table has {} entries, not {needed}", table.entries));
        }
        self.table_clusters(table)
    }

    /// Removes the bitmaps whose places cannot be told, as the last step of a repair.
    pub(super) fn drop_damaged_bitmaps(&self) -> Result<()> {
        let mut disk = self.bitmaps.disk.lock();
        if disk.damage.is_some() {
            self.metadata.edit_header(|file, cluster_size| {
                change_autoclear(file, 0, autoclear::BITMAPS)?;
                // QEMU refuses an extension that it cannot read, whatever the bit says.
                remove_extension(file, cluster_size, extension::BITMAPS)
            })?;
            disk.damage = None;
        }
        let entries = disk.entries.clone();
        drop(disk);
        let state = self.bitmaps.tracker.read();
        let all = frozen::by_name(state.bitmaps().iter());
        let without = |bitmap: &Bitmap<Entry>| {
            let name = bitmap.name.clone();
            match frozen::owner(&all, &name) {
                // Without it the other one would look complete: then everything is dirty.
                Some(_) => BitmapChange::Repair { name },
                None => BitmapChange::Remove { name },
            }
        };
        let damaged = state.bitmaps().iter().zip(&entries);
        let damaged = damaged.filter(|(_, entry)| self.entry_clusters(entry).is_err());
        let changes: Vec<_> = damaged.map(|(bitmap, _)| without(bitmap)).collect();
        drop(state);
        match changes.is_empty() {
            true => Ok(()),
            false => self.bitmap_transaction(&changes, || ()),
        }
    }
}

/// Whether changes will be missing in what is stored of a bitmap, and the image does not say so.
fn needs_mark(bitmap: &Bitmap<Entry>) -> bool {
    bitmap.recording == Recording::Enabled && !bitmap.in_use.load(Acquire)
}

/// The condition of a bitmap whose bits could not be loaded.
fn unusable(bitmap: &Bitmap<Entry>, detail: String) -> Condition {
    match &bitmap.condition {
        Condition::Inconsistent(detail) => Condition::Inconsistent(detail.clone()),
        _ => Condition::Damaged(detail),
    }
}

/// Why the bits of a bitmap cannot be relied on, if that is known.
fn unusable_detail(bitmap: &Bitmap<Entry>) -> Option<String> {
    match &bitmap.condition {
        Condition::Ready => None,
        Condition::Inconsistent(detail) | Condition::Damaged(detail) => Some(detail.clone()),
    }
}

fn find<'a>(bitmaps: &'a [Bitmap<Entry>], name: &str) -> Result<&'a Bitmap<Entry>> {
    let found = bitmaps.iter().find(|bitmap| bitmap.name == name);
    found.ok_or_else(|| no_bitmap(name))
}

/// The error of naming a bitmap that is not there.
pub(crate) fn no_bitmap(name: &str) -> Error {
    let detail = format!("the image has no bitmap '{}'", name.escape_debug());
    Error::new(ErrorKind::NotFound, "use a bitmap of", detail)
}

/// The error of using bits that cannot be relied on.
fn not_reliable(name: &str, detail: &str) -> Error {
    let detail = format!(
        "the bitmap '{}' cannot be relied on: {detail}; remove it, or repair it so that everything \
         counts as dirty",
        name.escape_debug()
    );
    Error::new(ErrorKind::Corrupt, "use a bitmap of", detail)
}
