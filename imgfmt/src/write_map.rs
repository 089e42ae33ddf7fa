//! Writes that the caller carries out itself.

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
}

impl WriteMap {
    /// A write of `length` bytes to a place in a storage; `None` if the storage does not allow it
    /// now.
    pub(crate) fn new(storage: &Arc<dyn Storage>, offset: HostOffset, length: u64) -> Option<Self> {
        let begun = storage.begin_write(offset, length)?;
        let storage = Arc::clone(storage);
        Some(Self { begun, recorded: None, storage, offset, lease: None })
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

    /// Records that all bytes were written. They are part of the disk now, and the next flush makes
    /// them durable.
    pub fn written(self) {
        self.begun.written();
        drop((self.recorded, self.storage, self.lease));
    }
}
