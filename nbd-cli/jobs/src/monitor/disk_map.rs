//! Pictures of disks: the contents of each part of a disk, determined in the background.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nbd_proto::wire::MetaContextName;
use nbd_server::export::Export;
use serde::Serialize;
use tokio::sync::{Semaphore, watch};

use crate::tasks;

/// Most cells of a picture.
const MAX_CELLS: u64 = 512;
const MIN_CELL_LENGTH: u64 = 512;
/// Bitmaps of a picture. The others are left out.
const MAX_BITMAPS: usize = 16;
/// Extents per call, which takes a few milliseconds at most.
const EXTENTS_OF_CALL: usize = 1024;
/// Ratio of the pauses of a walk to its work: it takes a sixth of a core at most.
const PAUSE_FACTOR: u32 = 5;
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Ratio of the shortest interval between two pictures to the time that one takes.
const REST_FACTOR: u32 = 10;

/// The contents of the parts of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DiskMap {
    pub(super) size: u64,
    /// Length of a cell, in bytes: a power of two. The last one may be shorter.
    pub(super) cell_length: u64,
    /// For each class of `base:allocation`, the bytes in each cell; absent if the export does not
    /// report it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) allocation: Option<Allocation>,
    /// The deepest layer in each cell: 0 nowhere, 1 the active one, 2 its backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) depth: Option<Vec<u64>>,
    /// For each bitmap that is offered, the dirty bytes in each cell.
    pub(super) dirty: BTreeMap<String, Vec<u64>>,
}

/// The classes of `base:allocation`, in bytes for each cell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Allocation {
    pub(super) data: Vec<u64>,
    /// A hole that may read as anything.
    pub(super) hole: Vec<u64>,
    /// Allocated, and reads as zero.
    pub(super) zero: Vec<u64>,
    /// A hole that reads as zero.
    pub(super) hole_zero: Vec<u64>,
}

/// The pictures of a server's disks. At most one is made at a time.
#[derive(Clone)]
pub(super) struct DiskMaps {
    known: Arc<Mutex<HashMap<usize, Known>>>,
    turn: Arc<Semaphore>,
    gate: Gate,
}

/// Held during each call of an export; true when no more may be made. The last owner of an export
/// closes its image, which must not happen on a thread that is not waited for.
type Gate = Arc<Mutex<bool>>;

struct Known {
    /// Tells whether the address is still that of the same export.
    export: Weak<dyn Export>,
    latest: watch::Receiver<Option<Arc<Picture>>>,
    /// Whether a newer one is being made.
    walk: Option<tokio::task::JoinHandle<()>>,
}

/// A picture, and when it was made.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) map: DiskMap,
    pub(super) at: Instant,
    took: Duration,
}

impl Default for DiskMaps {
    fn default() -> Self {
        let (known, gate) = (Arc::default(), Gate::default());
        Self { known, turn: Arc::new(Semaphore::new(1)), gate }
    }
}

impl DiskMaps {
    /// Returns the latest picture of an export. If it is older than `max_age`, a new one is begun,
    /// and waited for as long as `patience` lasts. The export is not held: it may be removed.
    pub(super) async fn get(
        &self,
        export: &Weak<dyn Export>,
        max_age: Duration,
        patience: Duration,
    ) -> Option<Arc<Picture>> {
        let (mut latest, is_due) = self.refresh(export, max_age);
        if is_due {
            // It comes late, or never if the disk fails: the latest one is used then.
            let _ = tokio::time::timeout(patience, latest.changed()).await;
        }
        latest.borrow().clone()
    }

    /// Ends all walks. No export is in use after it returns.
    pub(super) fn close(&self) {
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Begins a walk if one is due.
    fn refresh(
        &self,
        export: &Weak<dyn Export>,
        max_age: Duration,
    ) -> (watch::Receiver<Option<Arc<Picture>>>, bool) {
        let address = export.as_ptr().cast::<()>() as usize;
        let mut known = self.known();
        known.retain(|_, known| known.export.strong_count() > 0);
        if let Some(known) = known.get(&address) {
            let is_walking = known.walk.as_ref().is_some_and(|walk| !walk.is_finished());
            let is_fresh = known.latest.borrow().as_ref().is_some_and(|picture| {
                picture.at.elapsed() < max_age.max(REST_FACTOR * picture.took)
            });
            if is_walking || is_fresh {
                let mut latest = known.latest.clone();
                latest.mark_unchanged();
                return (latest, is_walking && !is_fresh);
            }
        }
        let (sender, receiver) = match known.remove(&address) {
            Some(Known { latest, .. }) => {
                let sender = watch::Sender::new(latest.borrow().clone());
                let receiver = sender.subscribe();
                (sender, receiver)
            }
            None => watch::channel(None),
        };
        let export = Weak::clone(export);
        let source = Source { export: Weak::clone(&export), gate: Arc::clone(&self.gate) };
        let walk = tasks::spawn(draw(source, Arc::clone(&self.turn), sender));
        let latest = receiver.clone();
        known.insert(address, Known { export, latest, walk: Some(walk) });
        (receiver, true)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<usize, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An export that a picture is made of.
struct Source {
    export: Weak<dyn Export>,
    gate: Gate,
}

impl Source {
    /// Calls the export, which is held no longer than that: a removed one has to be closed. `None`
    /// if it was removed, or walks have to end.
    fn call<T>(&self, call: impl FnOnce(&dyn Export) -> T) -> Option<T> {
        let is_closed = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_closed {
            return None;
        }
        let export = self.export.upgrade()?;
        Some(call(&*export))
    }
}

/// Makes a picture, after the others that wait.
async fn draw(source: Source, turn: Arc<Semaphore>, sender: watch::Sender<Option<Arc<Picture>>>) {
    let Ok(_turn) = turn.acquire().await else { return };
    let started = Instant::now();
    match tasks::spawn_blocking(move || DiskMap::of(&source)).await {
        Ok(Ok(Some(map))) => {
            let picture = Picture { map, at: Instant::now(), took: started.elapsed() };
            sender.send_replace(Some(Arc::new(picture)));
        }
        // The export was removed.
        Ok(Ok(None)) => {}
        Ok(Err(message)) => tracing::debug!(%message, "a disk cannot be drawn"),
        Err(error) => tracing::debug!(%error, "drawing a disk failed"),
    }
}

impl DiskMap {
    fn new(size: u64) -> Self {
        let cell_length = size.div_ceil(MAX_CELLS).checked_next_power_of_two();
        let cell_length = cell_length.unwrap_or(1 << 63).max(MIN_CELL_LENGTH);
        Self { size, cell_length, ..Self::default() }
    }

    fn cells(&self) -> Vec<u64> {
        vec![0; usize::try_from(self.size.div_ceil(self.cell_length)).unwrap_or(0)]
    }

    /// Sums the contents of the cells. Returns `None` if the export is removed meanwhile.
    fn of(source: &Source) -> Result<Option<Self>, String> {
        let Some(info) = source.call(|export| export.info()) else { return Ok(None) };
        let mut map = Self::new(info.size);
        let mut bitmaps = 0;
        for context in &info.meta_contexts {
            let bitmap = context.dirty_bitmap();
            bitmaps += usize::from(bitmap.is_some());
            let is_known = match context.as_str() {
                MetaContextName::BASE_ALLOCATION => {
                    let cells = map.cells();
                    let [data, hole, zero] = [cells.clone(), cells.clone(), cells.clone()];
                    map.allocation = Some(Allocation { data, hole, zero, hole_zero: cells });
                    true
                }
                MetaContextName::QEMU_ALLOCATION_DEPTH => {
                    map.depth = Some(map.cells());
                    true
                }
                _ => bitmap.is_some() && bitmaps <= MAX_BITMAPS,
            };
            if let Some(bitmap) = bitmap.filter(|_| is_known) {
                map.dirty.insert(bitmap.to_owned(), map.cells());
            }
            if is_known && !map.walk(source, context)? {
                return Ok(None);
            }
        }
        Ok(Some(map))
    }

    /// Notes the extents of one context; false if the export is gone.
    fn walk(&mut self, source: &Source, context: &MetaContextName) -> Result<bool, String> {
        let mut at = 0;
        while at < self.size {
            let started = Instant::now();
            let rest = self.size - at;
            let found =
                source.call(|export| export.block_status(context, at, rest, EXTENTS_OF_CALL));
            let Some(found) = found else { return Ok(false) };
            let before = at;
            for extent in found.map_err(|error| error.to_string())? {
                self.note(context, at, extent.length, extent.flags);
                at = at.saturating_add(extent.length);
            }
            if at == before {
                return Err("the export gave no status".to_owned());
            }
            if at < self.size {
                std::thread::sleep((started.elapsed() * PAUSE_FACTOR).min(LONGEST_PAUSE));
            }
        }
        Ok(true)
    }

    fn note(&mut self, context: &MetaContextName, offset: u64, length: u64, flags: u64) {
        let end = offset.saturating_add(length).min(self.size);
        if let Some(bitmap) = context.dirty_bitmap() {
            if flags & 1 == 0 {
                return;
            }
            if let Some(cells) = self.dirty.get_mut(bitmap) {
                add(cells, self.cell_length, offset, end);
            }
        } else if context.as_str() == MetaContextName::BASE_ALLOCATION {
            if let Some(Allocation { data, hole, zero, hole_zero }) = &mut self.allocation {
                let cells = match flags & 3 {
                    0 => data,
                    1 => hole,
                    2 => zero,
                    _ => hole_zero,
                };
                add(cells, self.cell_length, offset, end);
            }
        } else if let Some(cells) = &mut self.depth {
            let parts = parts(cells, self.cell_length, offset, end);
            parts.for_each(|(cell, _)| *cell = (*cell).max(flags));
        }
    }
}

fn add(cells: &mut [u64], cell_length: u64, offset: u64, end: u64) {
    parts(cells, cell_length, offset, end).for_each(|(cell, length)| *cell += length);
}

/// The cells of a range, and how many bytes of it are in each.
fn parts(
    cells: &mut [u64],
    cell_length: u64,
    offset: u64,
    end: u64,
) -> impl Iterator<Item = (&mut u64, u64)> {
    let first = offset / cell_length;
    let skipped = usize::try_from(first).unwrap_or(usize::MAX);
    let cells = (first..).zip(cells.iter_mut().skip(skipped));
    let touched = cells.take_while(move |(index, _)| index.saturating_mul(cell_length) < end);
    touched.map(move |(index, cell)| {
        let start = (index * cell_length).max(offset);
        let cell_end = (index + 1).saturating_mul(cell_length).min(end);
        (cell, cell_end.saturating_sub(start))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::export::{Durability, MemoryExport};

    #[test]
    fn a_picture_has_the_bytes_of_every_class_in_each_cell() {
        let context = MetaContextName::base_allocation();
        let mut map = DiskMap::new(1 << 20);
        assert_eq!((map.cell_length, map.cells().len()), (2048, 512));
        let cells = map.cells();
        let [data, hole, zero] = [cells.clone(), cells.clone(), cells.clone()];
        map.allocation = Some(Allocation { data, hole, zero, hole_zero: cells });
        map.note(&context, 0, 3000, 0);
        map.note(&context, 3000, (1 << 20) - 3000, 3);
        let allocation = map.allocation.unwrap();
        assert_eq!(allocation.data[..3], [2048, 952, 0]);
        assert_eq!(allocation.hole_zero[..3], [0, 1096, 2048]);
        assert_eq!(allocation.hole_zero.iter().sum::<u64>(), (1 << 20) - 3000);
    }

    #[test]
    fn any_size_can_be_drawn() {
        for size in [0, 1, 511, 513, 1_000_001, (1 << 63) - 1] {
            let mut map = DiskMap::new(size);
            map.depth = Some(map.cells());
            assert!(map.cells().len() <= 512, "{size}");
            map.note(&MetaContextName::qemu_allocation_depth(), 0, u64::MAX, 2);
            assert!(map.depth.unwrap().iter().all(|depth| *depth == 2), "{size}");
        }
    }

    #[tokio::test]
    async fn pictures_are_kept_for_a_while_and_made_again_then() {
        let export: Arc<dyn Export> = Arc::new(MemoryExport::new(1 << 20));
        let maps = DiskMaps::default();
        let patience = Duration::from_secs(30);
        let data = async |max_age| {
            let picture = maps.get(&Arc::downgrade(&export), max_age, patience).await.unwrap();
            picture.map.allocation.as_ref().unwrap().data.iter().sum::<u64>()
        };
        assert_eq!(data(Duration::ZERO).await, 0);
        export.write_at(0, &[1; 4096], Durability::Cached).unwrap();
        assert_eq!(data(Duration::from_secs(60)).await, 0, "it is kept");
        let mut found = 0;
        while found == 0 {
            found = data(Duration::ZERO).await;
        }
        assert!(found >= 4096, "{found}");
    }
}
