//! Storing what was noted, when the image is closed.

use std::sync::atomic::Ordering::Acquire;

use super::change::Planned;
use crate::bitmap::Condition;
use crate::error::Result;
use crate::qcow2::image::Qcow2;

impl Qcow2 {
    /// Stores the bitmaps that changed and makes the image say that they are sound. Everything
    /// they speak of must be on disk. Until this has succeeded they stay in use.
    pub(in crate::qcow2) fn store_bitmaps(&self) -> Result<()> {
        let mut exclusive = self.bitmaps.tracker.exclusive();
        let mut plan: Vec<Planned> = exclusive.bitmaps().iter().map(Planned::unchanged).collect();
        for planned in &mut plan {
            let bitmap = &planned.bitmap;
            planned.must_store =
                bitmap.condition == Condition::Ready && bitmap.in_use.load(Acquire);
        }
        self.settle_directory(&mut self.bitmaps.disk.lock())?;
        if !plan.iter().any(|planned| planned.must_store) {
            return Ok(());
        }
        self.carry_out(&mut exclusive, plan)
    }
}
