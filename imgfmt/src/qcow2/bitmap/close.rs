//! Storing bitmaps when the image is closed.

use super::plan::Planned;
use super::store::{Bitmaps, ImageServices};
use crate::error::{ErrorKind, Result};

impl Bitmaps {
    /// Stores the bitmaps that changed and clears their in-use flags. The changes that they record
    /// must be on disk before. Until this has succeeded they stay marked as in use.
    pub(in crate::qcow2) fn store(&self, image: &dyn ImageServices) -> Result<()> {
        let mut exclusive = self.tracker.exclusive();
        let plan = Planned::to_store(exclusive.bitmaps());
        self.settle_directory(&mut self.disk.lock())?;
        if !plan.iter().any(|planned| planned.must_store) {
            return Ok(());
        }
        match self.carry_out(image, &mut exclusive, plan) {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                if self.overwrite(&mut exclusive)? {
                    Ok(())
                } else {
                    Err(error)
                }
            }
            stored => stored,
        }
    }
}
