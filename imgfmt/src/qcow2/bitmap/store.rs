//! The bitmaps of one open image: where they are in the file, and their bits in memory.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use super::directory::{self, DirectoryLocation, Entry, flag};
use super::lineage::Lineage;
use super::session_state::Session;
use crate::bitmap::{Bitmap, Bits, Condition, Recording, Tracker};
use crate::error::Result;
use crate::options::OpenOptions;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::qcow2::alloc::clusters::{Clusters, CountReferences};
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::sidecar::SidecarLocation;
use crate::units::HostOffset;

/// The memory limit for the bits of all bitmaps of one image, in bytes.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

/// The services that the store needs from its image.
pub(in crate::qcow2) trait ImageServices: CountReferences {
    /// Makes everything durable that was written before this call.
    fn flush(&self) -> Result<()>;

    /// The number of references of the image on disk to each of these clusters, except from
    /// refcounts and bitmaps; `None` if the references of some table are unknown.
    fn references_to(&self, clusters: &[HostCluster]) -> Result<Option<HashMap<HostCluster, u64>>>;

    /// Whether a cluster is known to hold other metadata, or to have no references.
    fn is_metadata(&self, offset: HostOffset) -> Result<bool>;
}

/// The bitmaps of an open image.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    pub(super) metadata: Arc<MetadataFile>,
    pub(super) clusters: Arc<Clusters>,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) tracker: Tracker<Entry>,
    pub(super) disk: OrderedMutex<{ rank::DIRECTORY }, StoredBitmaps>,
    /// The clusters that belong to them alone. Locked after `disk`.
    pub(super) ownership: OrderedMutex<{ rank::OWNERSHIP }, Ownership>,
    /// The memory that bits take up, in bytes.
    pub(super) memory_bytes: AtomicU64,
    /// The largest size that the disk has had since the image was opened.
    pub(super) size_peak: u64,
    /// The backups after which they began. Locked before the header is edited.
    pub(super) lineage: OrderedMutex<{ rank::LINEAGE }, Lineage>,
    /// The state of the sidecar, from which they survive a crash.
    pub(super) session: OrderedMutex<{ rank::SESSION }, Session>,
    /// The location of the sidecar; `None` means beside the image.
    pub(super) sidecar_location: Option<Arc<dyn SidecarLocation>>,
}

/// The locations of bitmaps in the file.
#[derive(Debug, Default)]
pub(super) struct StoredBitmaps {
    /// The location of the directory, if the image has a valid one.
    pub(super) directory: Option<DirectoryLocation>,
    /// The bitmaps that the directory lists, in its order.
    pub(super) entries: Vec<Entry>,
    /// The offset of the flags of each bitmap from the start of the directory, in bytes.
    pub(super) flags_places: Vec<u64>,
    /// Why the directory of bitmaps cannot be read.
    pub(super) damage: Option<String>,
    /// Whether the header may name another directory, because a change of it failed.
    pub(super) is_doubtful: bool,
    /// The bitmaps whose frozen bits were merged back when the image was opened.
    pub(super) thawed: Vec<String>,
    /// Why merging them back failed.
    pub(super) thaw_failure: Option<String>,
}

impl StoredBitmaps {
    /// Records which bitmaps are marked as in use in the file.
    pub(super) fn note_in_use(&mut self, bitmaps: &[Bitmap<Entry>]) {
        for (entry, bitmap) in self.entries.iter_mut().zip(bitmaps) {
            if bitmap.in_use.load(Acquire) {
                entry.flags |= flag::IN_USE;
            }
        }
    }
}

/// The clusters that bitmaps and their directory are known to own.
#[derive(Debug, Default)]
pub(super) struct Ownership {
    pub(super) is_known: bool,
    /// They may be freed: every reference is counted.
    pub(super) counted: HashSet<HostCluster>,
    /// They may also be written in place: there is no other reference.
    pub(super) alone: HashSet<HostCluster>,
}

impl Bitmaps {
    /// No bitmaps for a disk of `size` bytes, regardless of the image's directory.
    pub(in crate::qcow2) fn none(
        (metadata, clusters): (Arc<MetadataFile>, Arc<Clusters>),
        size: u64,
    ) -> Self {
        Self {
            metadata,
            clusters,
            size,
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

    /// Reads the directory of an image's bitmaps, but none of their bits.
    pub(in crate::qcow2) fn open(
        (metadata, clusters): (Arc<MetadataFile>, Arc<Clusters>),
        options: &OpenOptions,
    ) -> Self {
        let header = metadata.header();
        let (directory, mut entries, damage) = match directory::read(&*metadata.file, &header) {
            Ok(None) => (None, Vec::new(), None),
            Ok(Some((place, entries))) => (Some(place), entries, None),
            Err(detail) => (None, Vec::new(), Some(detail)),
        };
        directory::refuse_equal_names(&mut entries);
        let (_, flags_places) = directory::encode(&entries);
        let tracker = Tracker::new(entries.iter().cloned().map(bitmap_of).collect(), true);
        let disk =
            StoredBitmaps { directory, entries, flags_places, damage, ..StoredBitmaps::default() };
        Self {
            tracker,
            disk: OrderedMutex::new(disk),
            size_peak: header.size,
            lineage: OrderedMutex::new(Lineage::of(&header)),
            session: OrderedMutex::new(Session::new(options.bitmap_durability)),
            sidecar_location: sidecar_location(options),
            ..Self::none((metadata, clusters), header.size)
        }
    }

    /// The geometry of the image.
    pub(super) fn geometry(&self) -> Geometry {
        self.metadata.header().geometry
    }

    /// The bits of a bitmap, which are loaded if necessary. An error is the reason, as a clause,
    /// why there are none.
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
            self.give_memory(bytes); // Another thread has loaded them meanwhile.
        }
        Ok(Arc::clone(bits))
    }

    pub(super) fn take_memory(&self, bytes: u64) -> Result<(), String> {
        let memory = &self.memory_bytes;
        if memory.fetch_add(bytes, AcqRel).saturating_add(bytes) > MEMORY_BYTES_MAX {
            self.give_memory(bytes);
            return Err(format!(
                "the bitmaps of the image take up more than {} MiB of memory",
                MEMORY_BYTES_MAX >> 20
            ));
        }
        Ok(())
    }

    pub(super) fn give_memory(&self, bytes: u64) {
        self.memory_bytes.fetch_sub(bytes, AcqRel);
    }

    pub(super) fn count_memory(&self, bitmaps: &[Bitmap<Entry>]) {
        let bytes = bitmaps.iter().filter_map(|bitmap| bitmap.bits.get());
        let bytes = bytes.map(|bits| bits.words().len() as u64 * 8).sum();
        self.memory_bytes.store(bytes, std::sync::atomic::Ordering::Release);
    }
}

/// The location of the sidecar according to the options.
#[cfg(any(test, feature = "test-util"))]
fn sidecar_location(options: &OpenOptions) -> Option<Arc<dyn SidecarLocation>> {
    let directory = options.sidecar_directory.as_ref()?;
    Some(Arc::new(Arc::clone(directory)))
}

/// The location of the sidecar: always beside the image.
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

/// The condition of a bitmap whose bits could not be loaded.
pub(super) fn unusable(bitmap: &Bitmap<Entry>, detail: String) -> Condition {
    match &bitmap.condition {
        Condition::Inconsistent(detail) => Condition::Inconsistent(detail.clone()),
        _ => Condition::Damaged(detail),
    }
}

/// Why the bits of a bitmap are unreliable, if they are.
pub(super) fn unusable_detail(bitmap: &Bitmap<Entry>) -> Option<String> {
    match &bitmap.condition {
        Condition::Ready => None,
        Condition::Inconsistent(detail) | Condition::Damaged(detail) => Some(detail.clone()),
    }
}
