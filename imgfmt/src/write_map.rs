//! Writes that the caller carries out itself.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::bitmap::RecordedElsewhere;
use crate::lease::Lease;
use crate::storage::{BegunWrite, Storage};
use crate::units::HostOffset;

/// The place of a write that the caller carries out, from
/// [`Image::map_write`](crate::Image::map_write). While it lives, the place is not reused for other
/// parts of the disk, and changes of the set of bitmaps wait. Drop it when no part of the write is
/// in flight any more, and not much later.
#[derive(Debug)]
pub struct WriteMap {
    // The fields are dropped in this order: the places may be reused last.
    begun: Box<dyn BegunWrite>,
    recorded: Option<RecordedElsewhere>,
    storage: Arc<dyn Storage>,
    offset: HostOffset,
    lease: Option<Lease>,
    is_durable_alone: bool,
    failures: Option<Arc<dyn SyncFailures>>,
}

/// The receiver of failed syncs.
pub(crate) trait SyncFailures: Send + Sync + fmt::Debug {
    /// A write to stable storage has failed: data that was written before may be lost.
    fn sync_has_failed(&self, error: &io::Error);
}

impl WriteMap {
    /// A write of `length` bytes to a place in a storage; `None` if the storage does not allow it
    /// now.
    pub(crate) fn new(storage: &Arc<dyn Storage>, offset: HostOffset, length: u64) -> Option<Self> {
        let begun = storage.begin_write(offset, length)?;
        let storage = Arc::clone(storage);
        let (recorded, lease, is_durable_alone, failures) = (None, None, false, None);
        Some(Self { begun, recorded, storage, offset, lease, is_durable_alone, failures })
    }

    /// Marks the write as durable once its own bytes are on stable storage.
    pub(crate) fn durable_alone(self) -> Self {
        Self { is_durable_alone: true, ..self }
    }

    /// Sets the receiver of failed syncs.
    pub(crate) fn reporting_to(self, failures: Arc<dyn SyncFailures>) -> Self {
        Self { failures: Some(failures), ..self }
    }

    /// Adds the guards that protect the place and record the change.
    pub(crate) fn with(self, recorded: RecordedElsewhere, lease: Lease) -> Self {
        Self { recorded: Some(recorded), lease: Some(lease), ..self }
    }

    /// Returns the storage to write to, through [`Storage::read_fd`].
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Returns the offset of the write in the storage.
    pub fn offset(&self) -> HostOffset {
        self.offset
    }

    /// Whether the bytes are a durable part of the disk as soon as they are on stable storage,
    /// because all metadata already is. Otherwise a [`flush`](crate::Image::flush) makes them
    /// durable.
    pub fn is_durable_alone(&self) -> bool {
        self.is_durable_alone
    }

    /// Records that a write to stable storage has failed. It must not be repeated: the system
    /// reports lost data once, and the error may be that of other data. The next
    /// [`flush`](crate::Image::flush) of an image with metadata fails. Report the error to all
    /// writers of the disk.
    pub fn failed(self, error: &io::Error) {
        if let Some(failures) = &self.failures {
            failures.sync_has_failed(error);
        }
    }

    /// Records that all bytes were written. They are part of the disk now, and the next flush makes
    /// them durable.
    pub fn written(self) {
        self.begun.written();
        drop((self.recorded, self.storage, self.lease));
    }
}
