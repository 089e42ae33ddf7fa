//! Writes to files that the caller carries out.

use std::ops::Range;
use std::sync::Arc;

use super::FileStorage;
use crate::storage::BegunWrite;
use crate::storage::known_data::KnownData;
use crate::storage::range_locks::RangeGuard;

/// A write of complete blocks that bypasses the page cache.
#[derive(Debug)]
struct BegunDirect {
    known_data: Arc<KnownData>,
    range: Range<u64>,
    _held: RangeGuard,
}

impl FileStorage {
    /// Begins a write that bypasses the page cache; `None` if the file is written through it.
    pub(super) fn begin_direct(&self, offset: u64, length: u64) -> Option<Box<dyn BegunWrite>> {
        let range = offset..offset.checked_add(length)?;
        let held = self.direct.as_deref()?.try_hold_blocks(range.clone())?;
        let known_data = Arc::clone(&self.known_data);
        Some(Box::new(BegunDirect { known_data, range, _held: held }))
    }
}

impl BegunWrite for BegunDirect {
    fn written(self: Box<Self>) {
        self.known_data.insert(self.range.start, self.range.end - self.range.start);
    }
}
