//! The bitmaps of an open image; every change of its disk passes through here.
//!
//! A change of the disk calls [`Tracker::before_change`] before it submits the first byte, and
//! keeps the returned guard until it has submitted the last one. A change of the set of bitmaps has
//! exclusive access to the state: no change of the disk is in flight, so each lies entirely before
//! or entirely after that moment. Otherwise a write could be recorded in the old bitmap only and
//! reach the disk after that bitmap was copied.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, OnceLock, RwLockReadGuard, RwLockWriteGuard};

use super::elsewhere::{Counted, Elsewhere};
use super::{Bits, Recording};
use crate::error::{Error, Result};
use crate::ordered_lock::{Ordered, OrderedMutex, OrderedRwLock, rank};
use crate::sidecar::{InFlight, Sidecar};
use crate::units::GuestRange;

/// Whether the bits of a bitmap are reliable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Ready,
    /// It was in use when the image was last closed.
    Inconsistent(String),
    Damaged(String),
}

/// One bitmap. `S` is what the format knows about where it is stored.
#[derive(Debug)]
pub(crate) struct Bitmap<S> {
    pub(crate) name: String,
    pub(crate) granularity_bits: u32,
    pub(crate) recording: Recording,
    pub(crate) condition: Condition,
    /// Whether the stored bits are marked as out of date. Only the hook of `before_change` and the
    /// holder of the exclusive state change it.
    pub(crate) in_use: AtomicBool,
    /// The bits; loaded when they are first needed.
    pub(crate) bits: OnceLock<Arc<Bits>>,
    pub(crate) stored: S,
}

impl<S: Clone> Clone for Bitmap<S> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            granularity_bits: self.granularity_bits,
            recording: self.recording,
            condition: self.condition.clone(),
            in_use: AtomicBool::new(self.in_use.load(Acquire)),
            bits: self.bits.clone(),
            stored: self.stored.clone(),
        }
    }
}

/// All bitmaps at one moment.
#[derive(Debug)]
pub(crate) struct State<S> {
    bitmaps: Vec<Bitmap<S>>,
    /// Those that record changes.
    live: Box<[Arc<Bits>]>,
    /// Whether the image marks the stored bits of all of them as out of date.
    is_marked: AtomicBool,
    /// Keeps the bits of all recording bitmaps, so that they survive a crash.
    sidecar: OnceLock<Arc<Sidecar>>,
}

impl<S> State<S> {
    fn new(bitmaps: Vec<Bitmap<S>>, is_marked: bool) -> Self {
        let live = bitmaps.iter().filter(records).filter_map(|bitmap| bitmap.bits.get().cloned());
        Self {
            live: live.collect(),
            is_marked: AtomicBool::new(is_marked),
            sidecar: OnceLock::new(),
            bitmaps,
        }
    }

    /// The bitmaps that record changes, and their bits.
    pub(crate) fn recording(&self) -> impl Iterator<Item = (&Bitmap<S>, &Arc<Bits>)> {
        self.bitmaps.iter().filter(records).filter_map(|bitmap| Some((bitmap, bitmap.bits.get()?)))
    }

    /// Whether [`set_sidecar`](Self::set_sidecar) has been called.
    pub(crate) fn has_sidecar(&self) -> bool {
        self.sidecar.get().is_some()
    }

    /// Keeps the sidecar up to date from now on. Called from `mark` only, while no change is in
    /// flight.
    pub(crate) fn set_sidecar(&self, sidecar: Arc<Sidecar>) {
        // A state is marked once.
        let _ = self.sidecar.set(sidecar);
    }

    /// Records that a range is about to change, if that needs no waiting.
    fn try_note(&self, range: GuestRange) -> Result<Option<InFlight>, WouldBlock> {
        if !self.is_marked.load(Acquire) {
            return Err(WouldBlock);
        }
        let (start, length) = (range.offset().bytes(), range.length());
        let in_flight = match self.sidecar.get() {
            Some(sidecar) => Some(sidecar.try_before_change(start, length).ok_or(WouldBlock)?),
            None => None,
        };
        self.live.iter().for_each(|bits| bits.set_range(range));
        Ok(in_flight)
    }

    /// The bitmaps, in the order in which they are stored.
    pub(crate) fn bitmaps(&self) -> &[Bitmap<S>] {
        &self.bitmaps
    }
}

fn records<S>(bitmap: &&Bitmap<S>) -> bool {
    bitmap.recording == Recording::Enabled && bitmap.condition == Condition::Ready
}

/// A change that has been recorded. It must be over before this is dropped.
#[derive(Debug)]
#[must_use = "the change must be over before this is dropped"]
pub(crate) struct Recorded<'a, S> {
    _in_flight: Option<InFlight>,
    _state: Ordered<RwLockReadGuard<'a, State<S>>>,
}

/// A change that has been recorded, and that the kernel carries out without a thread. It must be
/// over before this is dropped.
#[derive(Debug)]
#[must_use = "the change must be over before this is dropped"]
pub(crate) struct RecordedElsewhere {
    _in_flight: Option<InFlight>,
    _counted: Counted,
}

/// A change cannot be recorded without waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WouldBlock;

/// The bitmaps of one open image.
#[derive(Debug)]
pub(crate) struct Tracker<S> {
    state: OrderedRwLock<{ rank::BITMAPS }, State<S>>,
    /// Held while the image's bitmaps are marked as out of date.
    marking: OrderedMutex<{ rank::MARKING }, ()>,
    elsewhere: Arc<Elsewhere>,
}

impl<S> Tracker<S> {
    /// A tracker of these bitmaps. `is_marked` says whether no change needs to be announced to the
    /// image.
    pub(crate) fn new(bitmaps: Vec<Bitmap<S>>, is_marked: bool) -> Self {
        Self {
            state: OrderedRwLock::new(State::new(bitmaps, is_marked)),
            marking: OrderedMutex::default(),
            elsewhere: Arc::default(),
        }
    }

    /// Records that a range is about to change. The first change after a bitmap was stored calls
    /// `mark`, which durably marks the stored bits as out of date.
    ///
    /// No system call is made otherwise. It waits while the set of bitmaps is being changed.
    pub(crate) fn before_change(
        &self,
        range: GuestRange,
        mark: impl FnOnce(&State<S>) -> Result<()>,
    ) -> Result<Recorded<'_, S>> {
        let state = self.read();
        if !state.is_marked.load(Acquire) {
            let _marking = self.marking.lock();
            if !state.is_marked.load(Acquire) {
                mark(&state)?;
                state.is_marked.store(true, Release);
            }
        }
        let (start, length) = (range.offset().bytes(), range.length());
        let in_flight = state.sidecar.get().map(|sidecar| sidecar.before_change(start, length));
        let in_flight = in_flight.transpose().map_err(unkept)?;
        state.live.iter().for_each(|bits| bits.set_range(range));
        Ok(Recorded { _in_flight: in_flight, _state: state })
    }

    /// As [`before_change`](Self::before_change), if that needs no waiting.
    pub(crate) fn try_before_change(
        &self,
        range: GuestRange,
    ) -> Result<Recorded<'_, S>, WouldBlock> {
        let state = self.state.try_read().ok_or(WouldBlock)?;
        let in_flight = state.try_note(range)?;
        Ok(Recorded { _in_flight: in_flight, _state: state })
    }

    /// As [`try_before_change`](Self::try_before_change), for a change that no thread waits for.
    pub(crate) fn try_before_change_elsewhere(
        &self,
        range: GuestRange,
    ) -> Result<RecordedElsewhere, WouldBlock> {
        // Under the lock, so that its exclusive holder knows that nothing is counted.
        let state = self.state.try_read().ok_or(WouldBlock)?;
        let counted = self.elsewhere.begin().ok_or(WouldBlock)?;
        let in_flight = state.try_note(range)?;
        Ok(RecordedElsewhere { _in_flight: in_flight, _counted: counted })
    }

    /// The bitmaps as they are. Changes go on meanwhile.
    pub(crate) fn read(&self) -> Ordered<RwLockReadGuard<'_, State<S>>> {
        self.state.read()
    }

    /// Returns exclusive access to the bitmaps: every recorded change is over, and others wait.
    pub(crate) fn exclusive(&self) -> ExclusiveState<'_, S> {
        // A change without a thread may need a thread that waits for this lock, so first wait for
        // its end.
        let _closed = self.elsewhere.close();
        ExclusiveState { state: self.state.write() }
    }
}

/// Access to the bitmaps while no change of the disk is in flight.
#[derive(Debug)]
pub(crate) struct ExclusiveState<'a, S> {
    state: Ordered<RwLockWriteGuard<'a, State<S>>>,
}

impl<S> ExclusiveState<'_, S> {
    /// The bitmaps as they are.
    pub(crate) fn bitmaps(&self) -> &[Bitmap<S>] {
        self.state.bitmaps()
    }

    /// Replaces all bitmaps. `is_marked` as for [`Tracker::new`].
    pub(crate) fn replace(&mut self, bitmaps: Vec<Bitmap<S>>, is_marked: bool) {
        // Without a mark no sidecar is up to date, even if all remaining bitmaps are marked as in
        // use. The next change has to create one.
        let is_marked = is_marked && *self.state.is_marked.get_mut();
        let old = std::mem::replace(&mut *self.state, State::new(bitmaps, is_marked));
        if is_marked {
            // Each recording bitmap recorded before, or its bits are stored.
            self.state.sidecar = old.sidecar;
        }
    }
}

/// The error of a change that could not be recorded in the sidecar.
fn unkept(error: std::io::Error) -> Error {
    Error::from_io("keep the bits of bitmaps beside", error)
}
