//! Writes that the caller carries out: where their bytes go.

use std::sync::Arc;

use crate::bitmap::RecordedElsewhere;
use crate::lease::Lease;
use crate::storage::{BegunWrite, Storage};
use crate::units::HostOffset;

/// The place of a write that the caller carries out, as [`Image::map_write`](crate::Image::map_write)
/// gives it. While it lives, the place is not given to other parts of the disk, and changes of the set of
/// bitmaps wait: drop it only when nothing of the write is under way any more, and soon after that.
#[derive(Debug)]
pub struct WriteMap {
    // The fields are dropped in this order: the places are given away last.
    begun: Box<dyn BegunWrite>,
    recorded: Option<RecordedElsewhere>,
    storage: Arc<dyn Storage>,
    offset: HostOffset,
    lease: Option<Lease>,
}

impl WriteMap {
    /// A write of `length` bytes to a place in a storage; `None` if that does not allow it now.
    pub(crate) fn new(storage: &Arc<dyn Storage>, offset: HostOffset, length: u64) -> Option<Self> {
        let begun = storage.begin_write(offset, length)?;
        let storage = Arc::clone(storage);
        Some(Self { begun, recorded: None, storage, offset, lease: None })
    }

    /// Keeps what protects the place and notes the change.
    pub(crate) fn with(self, recorded: RecordedElsewhere, lease: Lease) -> Self {
        Self { recorded: Some(recorded), lease: Some(lease), ..self }
    }

    /// The storage to write to, through [`Storage::read_fd`].
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Where the bytes go in it.
    pub fn offset(&self) -> HostOffset {
        self.offset
    }

    /// Notes that all bytes were written. They are part of the disk, and the next flush makes them
    /// durable.
    pub fn written(self) {
        self.begun.written();
        drop((self.recorded, self.storage, self.lease));
    }
}
