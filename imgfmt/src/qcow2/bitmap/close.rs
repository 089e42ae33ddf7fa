//! Storing bitmaps when the image is closed.

use std::sync::atomic::Ordering::Acquire;

use super::plan::Planned;
use super::store::{Bitmaps, ImageServices};
use crate::bitmap::Condition;
use crate::error::Result;

impl Bitmaps {
    /// Stores the bitmaps that changed and clears their in-use flags. The changes that they record
    /// must be on disk before. Until this has succeeded they stay marked as in use.
    pub(in crate::qcow2) fn store(&self, image: &dyn ImageServices) -> Result<()> {
        let mut exclusive = self.tracker.exclusive();
        let mut plan: Vec<Planned> = exclusive.bitmaps().iter().map(Planned::unchanged).collect();
        for planned in &mut plan {
            let bitmap = &planned.bitmap;
            planned.must_store =
                bitmap.condition == Condition::Ready && bitmap.in_use.load(Acquire);
        }
        self.settle_directory(&mut self.disk.lock())?;
        if !plan.iter().any(|planned| planned.must_store) {
            return Ok(());
        }
        self.carry_out(image, &mut exclusive, plan)
    }
}
