//! Checkpoints: the state of the disk at one moment, while clients continue to write.
//!
//! Copy before write: before a granule of the disk is changed for the first time since the
//! checkpoint, its old content is copied into a sparse file. [`PointInTimeView`] reads changed
//! granules from that file, and everything else from the disk.

mod granules;
mod log;
mod preserved;
#[cfg(test)]
mod tests;
mod view;

use std::fmt;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError,
};
use std::thread::sleep;
use std::time::{Duration, Instant};

use self::preserved::{Patience, Preserved};
pub use self::view::{PointInTimeView, StatusFn};
use super::{
    Durability, Export, ExportError, Holes, MayBlock, Operation, PlacedRead, Speed, TryWrite,
    ZeroMode,
};
use crate::error::system_words;

/// Longest pause between two looks at changes in flight.
const LOOK_MAX: Duration = Duration::from_millis(1);

/// The reason why a checkpoint cannot start or is lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError<E> {
    /// There is already a checkpoint.
    #[error("a checkpoint of this disk is in progress; end it first")]
    InProgress,
    /// There is no checkpoint.
    #[error("no checkpoint of this disk is in progress")]
    NotInProgress,
    /// Changes in flight did not end in time.
    #[error("writes in flight did not end within {} s; what the disk is on may hang", .0.as_secs_f64())]
    Busy(Duration),
    /// The file for overwritten data cannot be used.
    #[error("the file for overwritten data cannot be as long as the disk: {}", system_words(.0))]
    File(#[source] std::io::Error),
    /// The action at the moment of the checkpoint failed; there is no checkpoint.
    #[error("{0}")]
    AtSwitch(E),
}

/// An export with checkpoints. Without one in progress, a change costs one additional uncontended
/// lock, and a read costs nothing.
///
/// All changes of the disk must pass through this object.
pub struct Checkpointed {
    disk: Arc<dyn Export>,
    /// Held for reading during a change of the disk, and for writing at the moment of a checkpoint:
    /// every change lies entirely before or after it.
    moment: RwLock<()>,
    /// Held while a checkpoint waits for changes in flight: those that begin meanwhile wait for it
    /// here, because a thread that waits for a lock cannot give up.
    starting: Mutex<()>,
    is_starting: AtomicBool,
    /// Of the checkpoint in progress. Never held while the disk is used.
    preserved: Mutex<Option<Arc<Preserved>>>,
    /// Whether changes may have to wait for a checkpoint or for copies.
    is_slow: AtomicBool,
}

impl Checkpointed {
    /// Creates an export that behaves like `disk`.
    #[must_use]
    pub fn new(disk: Arc<dyn Export>) -> Self {
        let (moment, starting, preserved) = Default::default();
        let (is_starting, is_slow) = Default::default();
        Self { disk, moment, starting, is_starting, preserved, is_slow }
    }

    /// Returns the inner export.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Export> {
        &self.disk
    }

    /// Starts a checkpoint and returns its view. `file` must be empty, and receives the data that
    /// is overwritten from now on; preferably it has no name. `at_switch` is called at the moment
    /// of the checkpoint: every change is complete, or has not begun.
    ///
    /// Waits for changes in flight, for `limit` at most, and holds others back meanwhile. Blocks:
    /// do not call it on a thread of the runtime.
    ///
    /// # Errors
    ///
    /// See [`CheckpointError`]; nothing has changed then.
    pub fn begin<E>(
        &self,
        file: File,
        limit: Duration,
        at_switch: impl FnOnce() -> Result<(), E>,
    ) -> Result<PointInTimeView, CheckpointError<E>> {
        let preserved = Preserved::new(&*self.disk, file).map_err(CheckpointError::File)?;
        let preserved = Arc::new(preserved);
        let _starting = match self.starting.try_lock() {
            Ok(starting) => starting,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::InProgress),
        };
        if self.in_progress().is_some() {
            return Err(CheckpointError::InProgress);
        }
        // Before taking the lock, so that no connection waits for it.
        self.is_slow.store(true, Ordering::Relaxed);
        self.is_starting.store(true, Ordering::SeqCst);
        let moment = self.moment_within(limit);
        let begun = moment.ok_or(CheckpointError::Busy(limit)).and_then(|moment| {
            at_switch().map_err(CheckpointError::AtSwitch)?;
            *self.current() = Some(Arc::clone(&preserved));
            Ok(moment)
        });
        if begun.is_err() {
            self.is_slow.store(false, Ordering::Relaxed);
        }
        self.is_starting.store(false, Ordering::SeqCst);
        begun.map(|_| PointInTimeView::new(Arc::clone(&self.disk), preserved))
    }

    /// Waits until no change is in flight; `None` if that takes too long.
    fn moment_within(&self, limit: Duration) -> Option<RwLockWriteGuard<'_, ()>> {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_micros(10);
        loop {
            match self.moment.try_write() {
                Ok(moment) => return Some(moment),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(TryLockError::WouldBlock) => sleep(pause),
            }
            pause = (pause * 2).min(LOOK_MAX);
        }
    }

    /// Returns the reason for which the view of the checkpoint in progress is lost, if it is. The
    /// outer option is `None` if there is no checkpoint.
    #[must_use]
    pub fn failure(&self) -> Option<Option<String>> {
        let preserved = self.in_progress()?;
        Some(preserved.failure().map(ToOwned::to_owned))
    }

    /// Ends the checkpoint: its view fails from now on, and nothing is copied any more. The file's
    /// space is freed when the view is dropped.
    ///
    /// Waits for no change in flight. Returns whether there was a checkpoint.
    pub fn end(&self) -> bool {
        let mut current = self.current();
        let ended = current.take();
        if let Some(preserved) = &ended {
            // Under the lock, so that no change is made without a copy before the view is ended.
            preserved.end();
            self.is_slow.store(false, Ordering::Relaxed);
        }
        ended.is_some()
    }

    fn in_progress(&self) -> Option<Arc<Preserved>> {
        self.current().clone()
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Preserved>>> {
        self.preserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a change that holds `moment` has to copy to.
    fn preserved(&self) -> Option<Arc<Preserved>> {
        // Set before the moment of a checkpoint, and until its end.
        if self.is_slow.load(Ordering::Relaxed) { self.in_progress() } else { None }
    }

    /// Begins a change, as soon as no checkpoint waits for others.
    fn lock(&self) -> RwLockReadGuard<'_, ()> {
        if self.is_starting.load(Ordering::SeqCst) {
            drop(self.starting.lock());
        }
        self.moment.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change of a range, after its old content was copied if necessary.
    fn change<T>(&self, offset: u64, length: u64, change: impl FnOnce() -> T) -> T {
        let _moment = self.lock();
        if let Some(preserved) = self.preserved() {
            preserved.preserve(&*self.disk, offset, length, Patience::Waits);
        }
        change()
    }
}

impl super::Filter for Checkpointed {
    fn inner(&self) -> &dyn Export {
        &*self.disk
    }

    fn place_read(&self, offset: u64, length: usize, holes: Holes) -> Option<Box<dyn PlacedRead>> {
        self.disk.place_read(offset, length, holes)
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        match operation {
            Operation::Write(..) | Operation::Trim | Operation::WriteZeroes
                if self.is_slow.load(Ordering::Relaxed) =>
            {
                MayBlock::Yes
            }
            _ => self.disk.may_block(operation),
        }
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        let write = || self.disk.write_at(offset, data, durability);
        self.change(offset, data.len() as u64, write)
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        if self.is_starting.load(Ordering::SeqCst) {
            return Ok(TryWrite::WouldBlock);
        }
        let _moment = match self.moment.try_read() {
            Ok(moment) => moment,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(TryWrite::WouldBlock),
        };
        if let Some(preserved) = self.preserved() {
            let length = data.len() as u64;
            if !preserved.preserve(&*self.disk, offset, length, Patience::Never) {
                return Ok(TryWrite::WouldBlock);
            }
            // A disk with prompt writes has no other way to write without waiting.
            let write = Operation::Write(data.len(), Durability::Cached);
            if self.disk.may_block(write) == MayBlock::No {
                let written = self.disk.write_at(offset, data, Durability::Cached);
                return written.map(|()| TryWrite::Complete);
            }
        }
        self.disk.try_write_at(offset, data)
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        self.change(offset, length, || self.disk.trim(offset, length, durability))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        let zero = || self.disk.write_zeroes(offset, length, mode, speed, durability);
        self.change(offset, length, zero)
    }
}

impl fmt::Debug for Checkpointed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpointed").field("info", &self.disk.info()).finish_non_exhaustive()
    }
}
