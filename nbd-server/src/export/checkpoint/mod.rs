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
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use self::preserved::{Patience, Preserved};
pub use self::view::{PointInTimeView, StatusFn};
use super::{
    Durability, Export, ExportError, Holes, MayBlock, Operation, PlacedRead, Speed, TryWrite,
    ZeroMode,
};
use crate::error::system_words;

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
    preserved: RwLock<Option<Arc<Preserved>>>,
    /// Whether changes may have to wait for copies.
    is_slow: AtomicBool,
}

impl Checkpointed {
    /// Creates an export that behaves like `disk`.
    #[must_use]
    pub fn new(disk: Arc<dyn Export>) -> Self {
        Self { disk, preserved: RwLock::new(None), is_slow: AtomicBool::new(false) }
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
    /// Waits for changes in progress. Blocks: do not call it on a thread of the runtime.
    ///
    /// # Errors
    ///
    /// See [`CheckpointError`]; nothing has changed then.
    pub fn begin<E>(
        &self,
        file: File,
        at_switch: impl FnOnce() -> Result<(), E>,
    ) -> Result<PointInTimeView, CheckpointError<E>> {
        let preserved = Preserved::new(&*self.disk, file).map_err(CheckpointError::File)?;
        let preserved = Arc::new(preserved);
        if self.in_progress().is_some() {
            return Err(CheckpointError::InProgress);
        }
        // Before taking the lock, so that no connection waits for it.
        self.is_slow.store(true, Ordering::Relaxed);
        let mut current = self.preserved.write().unwrap_or_else(PoisonError::into_inner);
        if current.is_some() {
            return Err(CheckpointError::InProgress);
        }
        if let Err(error) = at_switch() {
            self.is_slow.store(false, Ordering::Relaxed);
            return Err(CheckpointError::AtSwitch(error));
        }
        *current = Some(Arc::clone(&preserved));
        drop(current);
        Ok(PointInTimeView::new(Arc::clone(&self.disk), preserved))
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
    /// Blocks like [`begin`](Self::begin). Returns whether there was a checkpoint.
    pub fn end(&self) -> bool {
        let mut current = self.preserved.write().unwrap_or_else(PoisonError::into_inner);
        let ended = current.take();
        if let Some(preserved) = &ended {
            // Under the lock, so that no change is made without a copy before the view is ended.
            preserved.end();
        }
        self.is_slow.store(false, Ordering::Relaxed);
        ended.is_some()
    }

    fn in_progress(&self) -> Option<Arc<Preserved>> {
        self.lock().clone()
    }

    fn lock(&self) -> RwLockReadGuard<'_, Option<Arc<Preserved>>> {
        self.preserved.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change of a range, after its old content was copied if necessary.
    fn change<T>(&self, offset: u64, length: u64, change: impl FnOnce() -> T) -> T {
        let guard = self.lock();
        if let Some(preserved) = &*guard {
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
        let guard = match self.preserved.try_read() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(TryWrite::WouldBlock),
        };
        if let Some(preserved) = &*guard {
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
