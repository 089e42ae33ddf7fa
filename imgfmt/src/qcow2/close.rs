//! Closes an image: writes all pending changes, and frees what was kept.

use crate::error::{ErrorKind, Result};
use crate::qcow2::flush::Flusher;
use crate::qcow2::image::Qcow2;

impl Qcow2 {
    /// Writes everything and releases freed clusters, before the image is closed.
    pub(in crate::qcow2) fn close_writer(&self) -> Result<()> {
        if !self.metadata.is_writable() {
            return Ok(());
        }
        let flusher = Flusher { is_alone: true, ..self.flusher() };
        let flushed = flusher.end_with_cluster().and_then(|()| flusher.flush_rest());
        if let Err(error) = flushed {
            // More bits are stored than changes reach the disk, which does no harm.
            if error.kind() == ErrorKind::NoSpace && self.bitmaps.store_in_place()? {
                self.bitmaps.end_session()?;
            }
            return Err(error);
        }
        // A client that is served next has no use for a checkpoint that is cut off here. If this
        // fails, the next writable open repeats it.
        let _ = self.bitmaps.thaw(self);
        self.bitmaps.store(self)?;
        self.bitmaps.end_session()?;
        // Not before: the session relies on the length of the file.
        flusher.cut_extension()?;
        // The first flush may have moved the refcount table and so freed the old one.
        for _ in 0..2 {
            self.clusters.release_all_freed();
            flusher.flush_rest()?;
        }
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // `Image::close` reports errors; dropping cannot.
        let _ = self.close_writer();
    }
}
