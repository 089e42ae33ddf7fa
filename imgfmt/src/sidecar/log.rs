//! The activity log: a durable list of the extents of the disk that may be written now.
//!
//! A write into a *hot* extent, which is one that the log on disk names, costs two atomic
//! additions. A write into a *cold* extent waits until a slot that names it is durable; all waiting
//! writes share one write of the log. The extent becomes hot in memory only after that.
//!
//! An extent leaves the log when no write to it is in flight and its bits are durable. Only then
//! does another extent take its entry in a slot. Until that slot is written the log still names the
//! old extent, which costs a few extra dirty bits after a crash.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Condvar;
use std::sync::atomic::{
    AtomicBool, AtomicU32, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};

use super::layout::{LOG_OFFSET, LogShape, SLOT_BYTES, SLOT_EXTENTS, encode_slot};
use super::location::SidecarStorage;
use crate::ordered_lock::{OrderedMutex, rank};

/// Set if the log on disk names the extent.
const HOT: u32 = 1 << 31;
/// Set if the extent was written since the last search for extents to retire passed it.
const USED: u32 = 1 << 30;
/// The other bits count changes in flight.
const COUNT: u32 = USED - 1;

/// A change of more extents than this is not logged: its bits are made durable instead.
const EXTENTS_AT_A_TIME: u32 = 64;
/// The maximum number of extents that are made hot ahead of a sequential stream.
const AHEAD_MAX: u32 = 8;
/// The number of extents that are retired together, with one sync.
const RETIRED_AT_A_TIME: usize = 128;

/// The extents and the slots.
#[derive(Debug)]
pub(super) struct ActivityLog {
    extent_bits: u32,
    epoch: u64,
    states: Box<[AtomicU32]>,
    queue: OrderedMutex<{ rank::LOG_QUEUE }, Queue>,
    done: Condvar,
    slots: OrderedMutex<{ rank::LOG_SLOTS }, Slots>,
    /// Whether a sync has failed: then later successful syncs prove nothing.
    sync_has_failed: AtomicBool,
}

/// The waiting threads, and the commits they wait for.
#[derive(Debug, Default)]
struct Queue {
    wanted: Vec<u32>,
    /// The number of the commit that will include the wanted extents.
    next: u64,
    /// All commits below this number are done.
    done: u64,
    is_committing: bool,
}

/// The contents of the slots.
#[derive(Debug)]
struct Slots {
    /// The extent at each place.
    places: Vec<Option<u32>>,
    free: Vec<usize>,
    hand: usize,
    sequence: u64,
}

impl ActivityLog {
    /// An empty log.
    pub(super) fn new(disk_size: u64, shape: LogShape, epoch: u64) -> Self {
        let extents = disk_size.div_ceil(1 << shape.extent_bits);
        let places = vec![None; shape.slots * SLOT_EXTENTS];
        // Places are taken from the end, so that extents that become hot together share slots.
        let free = (0..places.len()).rev().collect();
        Self {
            extent_bits: shape.extent_bits,
            epoch,
            states: (0..extents).map(|_| AtomicU32::new(0)).collect(),
            queue: OrderedMutex::default(),
            done: Condvar::new(),
            slots: OrderedMutex::new(Slots { places, free, hand: 0, sequence: 1 }),
            sync_has_failed: AtomicBool::new(false),
        }
    }

    /// Counts a change in flight to the extents of a range; returns the first, the last, and
    /// whether all are hot. `None`, with nothing counted, if there are too many or they do not
    /// exist.
    pub(super) fn enter(&self, start: u64, end: u64) -> Option<(u32, u32, bool)> {
        let first = u32::try_from(start >> self.extent_bits).ok()?;
        let last = u32::try_from((end - 1) >> self.extent_bits).ok()?;
        if last - first >= EXTENTS_AT_A_TIME || last as usize >= self.states.len() {
            return None;
        }
        let mut is_hot = true;
        for state in &self.states[first as usize..=last as usize] {
            // A retiring thread gives up when it sees the count; a thread that does not see HOT
            // waits below.
            let old = state.fetch_add(1, AcqRel);
            if old & USED == 0 {
                state.fetch_or(USED, Relaxed);
            }
            is_hot &= old & HOT != 0;
        }
        Some((first, last, is_hot))
    }

    /// Ends what [`enter`](Self::enter) began.
    pub(super) fn leave(&self, first: u32, last: u32) {
        for state in &self.states[first as usize..=last as usize] {
            state.fetch_sub(1, Release);
        }
    }

    /// Counts a change in flight if all its extents are hot.
    pub(super) fn try_enter(&self, start: u64, end: u64) -> Option<(u32, u32)> {
        let (first, last, is_hot) = self.enter(start, end)?;
        if !is_hot {
            self.leave(first, last);
            return None;
        }
        Some((first, last))
    }

    /// Waits until the log on disk names all extents of a range that was entered; returns whether
    /// it does.
    pub(super) fn activate(&self, store: &dyn SidecarStorage, first: u32, last: u32) -> bool {
        let mut queue = self.queue.lock();
        queue.wanted.extend(first..=last);
        let mine = queue.next;
        while queue.done <= mine {
            if queue.is_committing {
                queue = queue.wait(&self.done);
                continue;
            }
            let wanted = std::mem::take(&mut queue.wanted);
            queue.is_committing = true;
            queue.next += 1;
            drop(queue);
            // Waiters notice extents that stay cold after a failure.
            let _ = self.commit(store, wanted);
            queue = self.queue.lock();
            queue.is_committing = false;
            queue.done = queue.next;
            self.done.notify_all();
        }
        drop(queue);
        // Counted extents cannot have been retired since.
        self.extents(first..=last).all(|state| state.load(Acquire) & HOT != 0)
    }

    /// Makes all bits durable that were set before.
    pub(super) fn sync(&self, store: &dyn SidecarStorage) -> io::Result<()> {
        if self.sync_has_failed.load(Relaxed) {
            return Err(io::Error::other("an earlier sync has failed"));
        }
        store.sync().inspect_err(|_| self.sync_has_failed.store(true, Relaxed))
    }

    /// Whether an extent is hot.
    #[cfg(test)]
    pub(super) fn is_hot(&self, extent: u32) -> bool {
        self.states[extent as usize].load(Acquire) & HOT != 0
    }

    fn extents(&self, range: RangeInclusive<u32>) -> impl Iterator<Item = &AtomicU32> {
        self.states[*range.start() as usize..=*range.end() as usize].iter()
    }

    /// Writes the log so that it names as many of the wanted extents as there is space for.
    fn commit(&self, store: &dyn SidecarStorage, wanted: Vec<u32>) -> io::Result<()> {
        let wanted = self.with_those_ahead(wanted);
        let mut slots = self.slots.lock();
        if slots.free.len() < wanted.len() {
            let missing = wanted.len() - slots.free.len();
            let some = RETIRED_AT_A_TIME.min(slots.places.len() / 4);
            self.retire(store, &mut slots, missing.max(some))?;
        }
        let mut taken = Vec::new();
        for extent in wanted {
            let Some(place) = slots.free.pop() else { break };
            slots.places[place] = Some(extent);
            taken.push((place, extent));
        }
        let Some((low, high)) = slot_range(&taken) else { return Ok(()) };
        slots.sequence += 1;
        let bytes: Vec<u8> = (low..=high).flat_map(|slot| slots.encode(slot, self.epoch)).collect();
        let written = store.write_durable(LOG_OFFSET + (low * SLOT_BYTES) as u64, &bytes);
        for (place, extent) in taken {
            if written.is_ok() {
                self.states[extent as usize].fetch_or(HOT, Release);
            } else {
                slots.places[place] = None;
                slots.free.push(place);
            }
        }
        written
    }

    /// The wanted extents that are not hot, each once. An extent that follows a hot one is followed
    /// by those that a sequential stream would need next.
    fn with_those_ahead(&self, mut wanted: Vec<u32>) -> Vec<u32> {
        let is_hot = |extent: u32| {
            self.states.get(extent as usize).is_some_and(|state| state.load(Acquire) & HOT != 0)
        };
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|extent| !is_hot(*extent));
        let mut ahead = Vec::new();
        for extent in &wanted {
            let behind = (1..=AHEAD_MAX).take_while(|n| extent.checked_sub(*n).is_some_and(is_hot));
            let count = behind.count() as u32;
            ahead.extend((1..=count).map_while(|n| {
                let next = extent.checked_add(n)?;
                ((next as usize) < self.states.len() && !is_hot(next)).then_some(next)
            }));
        }
        for extent in &ahead {
            self.states[*extent as usize].fetch_or(USED, Relaxed);
        }
        // Extents with waiters come first.
        ahead.sort_unstable();
        ahead.dedup();
        ahead.retain(|extent| wanted.binary_search(extent).is_err());
        wanted.extend(ahead);
        wanted
    }

    /// Retires up to `count` extents that have not been used recently: makes them cold, and frees
    /// their places.
    fn retire(
        &self,
        store: &dyn SidecarStorage,
        slots: &mut Slots,
        count: usize,
    ) -> io::Result<()> {
        let mut retired = Vec::new();
        for _ in 0..2 * slots.places.len() {
            if retired.len() == count {
                break;
            }
            let place = slots.hand;
            slots.hand = (place + 1) % slots.places.len();
            let Some(extent) = slots.places[place] else { continue };
            let state = &self.states[extent as usize];
            if state.load(Relaxed) & USED != 0 {
                state.fetch_and(!USED, Relaxed);
            } else if state.compare_exchange(HOT, 0, AcqRel, Relaxed).is_ok() {
                retired.push((place, extent));
            }
        }
        if retired.is_empty() {
            return Ok(());
        }
        // This covers the bits of all changes that have ended, including those of the retired
        // extents.
        let synced = self.sync(store);
        for (place, extent) in retired {
            if synced.is_ok() {
                slots.places[place] = None;
                slots.free.push(place);
            } else {
                self.states[extent as usize].fetch_or(HOT, Release);
            }
        }
        synced
    }
}

impl Slots {
    fn encode(&self, slot: usize, epoch: u64) -> [u8; SLOT_BYTES] {
        let places = &self.places[slot * SLOT_EXTENTS..][..SLOT_EXTENTS];
        let extents: Vec<u32> = places.iter().copied().flatten().collect();
        encode_slot(self.sequence, epoch, &extents)
    }
}

/// The first and the last slot of the places.
fn slot_range(taken: &[(usize, u32)]) -> Option<(usize, usize)> {
    let slots = || taken.iter().map(|(place, _)| place / SLOT_EXTENTS);
    Some((slots().min()?, slots().max()?))
}

const _: () = assert!(COUNT > 1 << 20, "more changes in flight than can exist");
