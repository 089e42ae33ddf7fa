//! The session of a writable image, in which its bitmaps survive a crash.
//!
//! It begins with the first change that a bitmap records. First the [sidecar](crate::sidecar) is
//! created. Then the header gets an extension that names it and a private autoclear bit. Then the
//! bitmaps are marked as in use. The session ends with the clean close, which removes all of these.
//! Another program that opens the image for writing in between clears the unknown bit; the sidecar
//! is then no longer trusted.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::directory::Entry;
use super::session_state::Session;
use super::sidecar::{encode_identity, no_file, sidecar_error};
use super::store::Bitmaps;
use crate::access::BitmapDurability;
use crate::bitmap::{Bitmap, Bits, State};
use crate::error::Result;
use crate::qcow2::metadata::header_edit::{
    change_autoclear, put_extension, remove_extension, rewrite_autoclear,
};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::autoclear;
use crate::sidecar::{BitmapDurabilityStatus, Description, Identity, Sidecar, SidecarLocation};

impl Bitmaps {
    /// Creates a sidecar for the recording bitmaps, and names it in the header. No change is in
    /// flight. If that fails, the bitmaps survive only a clean close, and any older sidecar is no
    /// longer trusted.
    pub(super) fn begin_session(&self, state: &State<Entry>) -> Result<()> {
        let mut session = self.session.lock();
        let bitmaps: Vec<_> = state.recording().collect();
        if session.durability == BitmapDurability::CleanClose
            || bitmaps.is_empty()
            || state.has_sidecar()
        {
            return self.give_up_found_sidecar(&mut session);
        }
        let identity = match session.identity {
            Some(identity) => Ok(identity),
            None => new_uuid().map(|uuid| Identity {
                uuid,
                generation: session.found_generation.wrapping_add(1),
            }),
        };
        session.epoch += 1;
        let made = identity.map_err(sidecar_error).and_then(|identity| {
            let sidecar = self.make_sidecar(&session, identity, &bitmaps)?;
            if session.identity.is_none() {
                self.mark_header(identity)?;
            }
            Ok((identity, sidecar))
        });
        match made {
            Ok((identity, sidecar)) => {
                session.is_recovery_unfinished = false;
                state.set_sidecar(Arc::clone(&sidecar));
                self.metadata.stamp_sidecar(Some(Arc::clone(&sidecar)));
                session.sidecar = Some(sidecar);
                session.identity = Some(identity);
                session.degraded = None;
            }
            Err(error) => {
                session.degraded = Some(error.to_string());
                self.metadata.stamp_sidecar(None);
                session.identity = None;
                self.unmark_header()?;
                // One that cannot be removed is harmless now.
                let _ = session.sidecar.take().map(|sidecar| sidecar.remove());
                self.give_up_found_sidecar(&mut session)?;
            }
        }
        Ok(())
    }

    /// Records why the bitmaps survive only a clean close.
    pub(super) fn go_without_session(&self, why: &str) -> Result<()> {
        let mut session = self.session.lock();
        session.degraded = Some(why.to_owned());
        self.give_up_found_sidecar(&mut session)
    }

    /// Gives up the recovered sidecar, whose bits are in memory only, because it will be out of
    /// date. A file that cannot be removed is harmless then.
    fn give_up_found_sidecar(&self, session: &mut Session) -> Result<()> {
        if std::mem::take(&mut session.is_recovery_unfinished) {
            self.unmark_header()?;
            let _ = self.sidecar_place().map(|place| place.remove());
        }
        Ok(())
    }

    /// Whether the bits survive in a sidecar if they are not stored.
    pub(super) fn is_kept_beside(&self) -> bool {
        let session = self.session.lock();
        let is_current = session.sidecar.as_ref().is_some_and(|sidecar| !sidecar.is_abandoned());
        is_current || session.is_recovery_unfinished
    }

    fn make_sidecar(
        &self,
        session: &Session,
        identity: Identity,
        bitmaps: &[(&Bitmap<Entry>, &Arc<Bits>)],
    ) -> Result<Arc<Sidecar>> {
        let place = self.sidecar_place()?;
        let description = self.describe(&*place, session, identity, bitmaps)?;
        let words = |bitmap: usize, word: u64| {
            bitmaps[bitmap].1.words().get(word as usize).map_or(0, |word| word.load(Relaxed))
        };
        let store = place.create(&description, &words).map_err(sidecar_error)?;
        Sidecar::new(store, &description).ok_or_else(no_file)
    }

    fn describe(
        &self,
        place: &dyn SidecarLocation,
        session: &Session,
        identity: Identity,
        bitmaps: &[(&Bitmap<Entry>, &Arc<Bits>)],
    ) -> Result<Description> {
        Ok(Description {
            durability: session.durability,
            identity,
            epoch: session.epoch,
            disk_size: self.size,
            log: place.log_shape(self.size),
            boot_id: place.boot_id(),
            image: self.fingerprint().ok_or_else(no_file)?,
            bitmaps: bitmaps.iter().map(|(bitmap, _)| self.descriptor(bitmap)).collect(),
        })
    }

    /// As [`durability_status`](Self::durability_status). If nothing has changed yet, it also tries
    /// to create the sidecar.
    pub(crate) fn probe_durability(&self) -> BitmapDurabilityStatus {
        let mut status = self.durability_status();
        let state = self.tracker.read();
        let bitmaps: Vec<_> = state.recording().collect();
        let session = self.session.lock();
        let is_settled =
            status.durability == BitmapDurability::CleanClose || session.sidecar.is_some();
        if is_settled || bitmaps.is_empty() || !self.metadata.is_writable() {
            return status;
        }
        let probed = self.sidecar_place().and_then(|place| {
            let identity = Identity { uuid: [0; 16], generation: 0 };
            let description = self.describe(&*place, &session, identity, &bitmaps)?;
            place.probe(&description).map_err(sidecar_error)
        });
        if let Err(error) = probed {
            status.durability = BitmapDurability::CleanClose;
            status.degraded = Some(error.to_string());
        }
        status
    }

    /// Ends the session once every bitmap is stored, and removes its traces from the image.
    pub(in crate::qcow2) fn end_session(&self) -> Result<()> {
        let is_over = {
            let state = self.tracker.read();
            !state.recording().any(|(bitmap, _)| bitmap.in_use.load(Acquire))
        };
        let mut session = self.session.lock();
        if session.identity.is_none() && !session.is_recovery_unfinished || !is_over {
            return Ok(());
        }
        self.unmark_header()?;
        self.give_up_found_sidecar(&mut session)?;
        session.identity = None;
        self.metadata.stamp_sidecar(None);
        match session.sidecar.take() {
            Some(sidecar) => {
                sidecar.remove().map_err(|error| self.metadata.named(sidecar_error(error)))
            }
            None => Ok(()),
        }
    }

    /// The durability of the bitmaps of this image.
    pub(crate) fn durability_status(&self) -> BitmapDurabilityStatus {
        let (thawed, thaw_failure) = {
            let disk = self.disk.lock();
            (disk.thawed.clone(), disk.thaw_failure.clone())
        };
        let session = self.session.lock();
        let is_gone = session.sidecar.as_ref().is_some_and(|sidecar| sidecar.is_abandoned());
        let degraded = match is_gone {
            true => Some("the file with the bits could not be kept up to date".to_owned()),
            false => session.degraded.clone(),
        };
        let durability =
            if degraded.is_some() { BitmapDurability::CleanClose } else { session.durability };
        BitmapDurabilityStatus {
            durability,
            degraded,
            recovered: session.recovered.clone(),
            thawed,
            thaw_failure,
            precision: session.precision,
        }
    }

    fn mark_header(&self, identity: Identity) -> Result<()> {
        let content = encode_identity(identity);
        self.metadata.edit_header(|file, cluster| {
            // Without the bit the extension is ignored.
            change_autoclear(file, 0, autoclear::SIDECAR)?;
            put_extension(file, cluster, extension::SIDECAR, &content)?;
            change_autoclear(file, autoclear::SIDECAR, 0)
        })
    }

    pub(super) fn unmark_header(&self) -> Result<()> {
        let since = self.metadata.failed_syncs();
        self.metadata.edit_header(|file, cluster| {
            rewrite_autoclear(file, 0, autoclear::SIDECAR)?;
            remove_extension(file, cluster, extension::SIDECAR)
        })?;
        self.metadata.refuse_lost_since(since)
    }
}

fn new_uuid() -> std::io::Result<[u8; 16]> {
    let mut uuid = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut uuid)?;
    Ok(uuid)
}
