//! Recovers bits that were kept beside an image that was not closed properly.

use std::sync::Arc;

use super::directory::{Entry, flag};
use super::plan::Planned;
use super::session_state::Found;
use super::sidecar::{decode_identity, sidecar_error};
use super::store::{Bitmaps, ImageServices};
use crate::access::Access;
use crate::bitmap::{Bitmap, Bits, Condition, Recording};
use crate::error::{Error, ErrorKind, Result, system_words};
use crate::qcow2::on_disk::header::autoclear;
use crate::sidecar::{FoundBytes, Recovery, RecoveryPrecision, Rejection, Trust};

impl Bitmaps {
    /// Examines the sidecar that the header names. Nothing is changed.
    ///
    /// # Errors
    ///
    /// `Busy` if the image is opened for writing and another process has locked the sidecar: after
    /// a change the bits would no longer be trusted. That process either ends soon or writes the
    /// image itself.
    pub(in crate::qcow2) fn find_sidecar(&self) -> Result<Option<Found>> {
        if self.metadata.header().version < 3
            || self.metadata.header().autoclear & autoclear::SIDECAR == 0
        {
            return Ok(None);
        }
        let found = self.examine_sidecar();
        if let (Err(Rejection::InUse(error)), true) = (&found, self.metadata.is_writable()) {
            return Err(self.sidecar_is_busy(error));
        }
        // Take the fingerprint now: the recovery's own writes are legitimate.
        if let (Ok(recovery), true) = (&found, self.metadata.is_writable()) {
            recovery.extend_life();
        }
        Ok(Some(found))
    }

    fn sidecar_is_busy(&self, error: &std::io::Error) -> Error {
        let name = self.sidecar_place().map(|place| place.name()).unwrap_or_default();
        let detail = format!(
            "its dirty bitmaps are to be recovered from '{name}', but {}; try again when that is \
             done (or move the file away, if the bitmaps may be lost)",
            system_words(error)
        );
        self.metadata.named(Error::new(ErrorKind::Busy, "open", detail))
    }

    fn examine_sidecar(&self) -> Found {
        let header = self.metadata.header();
        let content = header.extensions.sidecar.as_deref();
        let identity = content.and_then(decode_identity).ok_or(Rejection::OtherSession)?;
        self.session.lock().found_generation = identity.generation;
        let place = self.sidecar_place().map_err(|_| Rejection::Missing)?;
        let access = if self.metadata.is_writable() { Access::ReadWrite } else { Access::ReadOnly };
        let file = place.open(access)?.ok_or(Rejection::Missing)?;
        let image = self.fingerprint().ok_or(Rejection::Missing)?;
        let recovery = Recovery::examine(file, identity, image, &place.boot_id())?;
        match recovery.disk_size() == self.size {
            true => Ok(recovery),
            false => Err(Rejection::OtherSize),
        }
    }

    /// Restores the bits of bitmaps that were in use when the image was last open. A writable image
    /// stores them; then no trace of the crash remains.
    pub(in crate::qcow2) fn recover_all(
        &self,
        image: &dyn ImageServices,
        found: Found,
    ) -> Result<()> {
        let mut exclusive = self.tracker.exclusive();
        let mut bitmaps: Vec<Bitmap<Entry>> = exclusive.bitmaps().to_vec();
        let mut recovered = Vec::new();
        for bitmap in bitmaps.iter_mut().filter(|bitmap| was_recording(bitmap)) {
            match found.as_ref().map_err(ToString::to_string).and_then(|r| self.recover(r, bitmap))
            {
                Ok(()) => recovered.push(bitmap.name.clone()),
                Err(detail) => {
                    let detail =
                        format!("it was in use when the image was last left, and {detail}");
                    bitmap.condition = Condition::Inconsistent(detail);
                }
            }
        }
        {
            let mut session = self.session.lock();
            session.recovered.clone_from(&recovered);
            if found.as_ref().is_ok_and(|recovery| recovery.trust() == Trust::OtherBoot) {
                session.precision = RecoveryPrecision::WholeExtents;
            }
        }
        exclusive.replace(bitmaps, true);
        if !self.metadata.is_writable() {
            return Ok(());
        }
        if !recovered.is_empty() {
            let plan = Planned::to_store(exclusive.bitmaps());
            match self.carry_out(image, &mut exclusive, plan) {
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    // The image can be used nevertheless, for example to free space. The sidecar
                    // that was found remains valid until the first change creates another one, or
                    // records that there is none; a clean close stores the bits.
                    let bitmaps = exclusive.bitmaps().to_vec();
                    exclusive.replace(bitmaps, false);
                    self.session.lock().is_recovery_unfinished = true;
                    return Ok(());
                }
                stored => stored?,
            }
        } else {
            let is_marked = self.is_marked(exclusive.bitmaps());
            let bitmaps = exclusive.bitmaps().to_vec();
            exclusive.replace(bitmaps, is_marked);
        }
        self.unmark_header()?;
        // A file that was not trusted may belong to another user.
        match (found, self.sidecar_place()) {
            (Ok(_), Ok(place)) => place.remove().map_err(|e| self.metadata.named(sidecar_error(e))),
            _ => Ok(()),
        }
    }

    fn recover(
        &self,
        found: &Recovery<Box<dyn FoundBytes>>,
        bitmap: &mut Bitmap<Entry>,
    ) -> Result<(), String> {
        let wanted = self.descriptor(bitmap);
        self.take_memory(wanted.word_count() * 8)?;
        let words = match found.words(&wanted) {
            Ok(Some(words)) => words,
            other => {
                self.give_memory(wanted.word_count() * 8);
                return Err(match other {
                    Err(rejection) => rejection.to_string(),
                    _ => "its bits were not kept anywhere else".into(),
                });
            }
        };
        let bits = Bits::new(self.size, bitmap.granularity_bits);
        for (index, word) in words.into_iter().enumerate() {
            bits.load(index as u64 * 8, &word.to_le_bytes());
        }
        bitmap.bits = Arc::new(bits).into();
        bitmap.condition = Condition::Ready;
        Ok(())
    }
}

/// Whether a bitmap recorded changes when the image was last open.
fn was_recording(bitmap: &Bitmap<Entry>) -> bool {
    bitmap.stored.flags & flag::IN_USE != 0
        && bitmap.recording == Recording::Enabled
        && matches!(bitmap.condition, Condition::Inconsistent(_))
}
