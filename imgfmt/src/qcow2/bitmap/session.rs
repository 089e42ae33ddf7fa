//! The session of a writable image: what makes its bitmaps survive a crash.
//!
//! It begins with the first change that a bitmap notes: the [sidecar](crate::sidecar) is made, then
//! the header gets an extension that names it and a private autoclear bit, and only then are
//! the bitmaps marked as in use. It ends when the image is closed and nothing of that is left. Whoever
//! else writes the image in between clears the bit, because he does not know it, and the sidecar is
//! no longer trusted.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::change::Planned;
use super::directory::{Entry, flag};
use crate::bitmap::{Bitmap, Bits, Condition, Recording, State};
use crate::bytes::u64_at;
use crate::error::{Error, ErrorKind, Result, system_words};
use crate::options::{Access, Survives};
use crate::qcow2::image::Qcow2;
use crate::qcow2::metadata::header_edit::{
    change_autoclear, put_extension, remove_extension, rewrite_autoclear,
};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::autoclear;
use crate::sidecar::{
    BitmapDescriptor, BitmapSafety, Description, Fingerprint, FoundBytes, Identity, Recovery,
    RecoveryPrecision, Rejection, Sidecar, SidecarLocation, SidecarPlace, Trust,
};
use crate::units::HostOffset;

/// What is known about the session.
#[derive(Debug, Default)]
pub(super) struct Session {
    survives: Survives,
    identity: Option<Identity>,
    /// The generation of the session that was found in the header.
    found_generation: u64,
    epoch: u64,
    sidecar: Option<Arc<Sidecar>>,
    /// Why bitmaps do not survive what they should.
    shortfall: Option<String>,
    recovered: Vec<String>,
    precision: RecoveryPrecision,
    /// What was recovered is in memory only: the header and the sidecar are as they were found.
    is_recovery_unfinished: bool,
}

/// A sidecar that was found and is believed, or why not.
pub(in crate::qcow2) type Found = Result<Recovery<Box<dyn FoundBytes>>, Rejection>;

impl Session {
    pub(super) fn new(survives: Survives) -> Self {
        Self { survives, ..Self::default() }
    }
}

impl Qcow2 {
    /// Looks at the sidecar that the header speaks of. Nothing is changed.
    ///
    /// # Errors
    ///
    /// `Busy` if somebody has locked it and the image is going to be changed: after that the bits
    /// would not be believed any more, and who holds the lock is either about to be done, or
    /// writes the image himself.
    pub(in crate::qcow2) fn find_sidecar(&self) -> Result<Option<Found>> {
        if self.mapping.format.version < 3
            || self.metadata.header().autoclear & autoclear::SIDECAR == 0
        {
            return Ok(None);
        }
        let found = self.examine_sidecar();
        if let (Err(Rejection::InUse(error)), true) = (&found, self.metadata.is_writable()) {
            return Err(self.sidecar_is_busy(error));
        }
        // The bits are stamped now: what is written by the recovery is ours.
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
        self.bitmaps.session.lock().found_generation = identity.generation;
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

    /// Gives bitmaps that were in use when the image was left their bits back. A writable image
    /// stores them, and has no trace of the crash then.
    pub(in crate::qcow2) fn recover_bitmaps(&self, found: Found) -> Result<()> {
        let mut exclusive = self.bitmaps.tracker.exclusive();
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
            let mut session = self.bitmaps.session.lock();
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
            let mut plan: Vec<Planned> =
                exclusive.bitmaps().iter().map(Planned::unchanged).collect();
            for planned in &mut plan {
                let is_in_use = planned.bitmap.in_use.load(Acquire);
                planned.must_store = planned.bitmap.condition == Condition::Ready && is_in_use;
            }
            match self.carry_out(&mut exclusive, plan) {
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    // The image can be used all the same, to free space for instance. The sidecar
                    // that was found counts until the first change makes another one, or says
                    // that there is none; a clean close stores the bits.
                    let bitmaps = exclusive.bitmaps().to_vec();
                    exclusive.replace(bitmaps, false);
                    self.bitmaps.session.lock().is_recovery_unfinished = true;
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
        // A file that was not trusted may be somebody else's.
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

    /// Makes a sidecar for the bitmaps that note changes, and makes the header name it. No change is
    /// on its way. If that cannot be done the bitmaps survive a clean close only, and any older
    /// sidecar is not trusted.
    pub(super) fn begin_session(&self, state: &State<Entry>) -> Result<()> {
        let mut session = self.bitmaps.session.lock();
        let bitmaps: Vec<_> = state.recording().collect();
        if session.survives == Survives::CleanClose || bitmaps.is_empty() || state.has_sidecar() {
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
                session.shortfall = None;
            }
            Err(error) => {
                session.shortfall = Some(error.to_string());
                self.metadata.stamp_sidecar(None);
                session.sidecar = None;
                session.identity = None;
                self.unmark_header()?;
                self.give_up_found_sidecar(&mut session)?;
            }
        }
        Ok(())
    }

    /// Notes why the bitmaps survive a clean close only.
    pub(super) fn go_without_session(&self, why: &str) -> Result<()> {
        let mut session = self.bitmaps.session.lock();
        session.shortfall = Some(why.to_owned());
        self.give_up_found_sidecar(&mut session)
    }

    /// Gives up a sidecar whose bits are in memory only, because it does not say everything from now
    /// on. A file that cannot be taken away harms nobody then.
    fn give_up_found_sidecar(&self, session: &mut Session) -> Result<()> {
        if std::mem::take(&mut session.is_recovery_unfinished) {
            self.unmark_header()?;
            let _ = self.sidecar_place().map(|place| place.remove());
        }
        Ok(())
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
            survives: session.survives,
            identity,
            epoch: session.epoch,
            disk_size: self.size,
            log: place.log_shape(self.size),
            boot_id: place.boot_id(),
            image: self.fingerprint().ok_or_else(no_file)?,
            bitmaps: bitmaps.iter().map(|(bitmap, _)| self.descriptor(bitmap)).collect(),
        })
    }

    /// As [`bitmap_safety`](Self::bitmap_safety); if nothing has changed yet it is tried whether the
    /// sidecar could be made.
    pub(crate) fn probe_bitmap_safety(&self) -> BitmapSafety {
        let mut safety = self.bitmap_safety();
        let state = self.bitmaps.tracker.read();
        let bitmaps: Vec<_> = state.recording().collect();
        let session = self.bitmaps.session.lock();
        let is_settled = safety.survives == Survives::CleanClose || session.sidecar.is_some();
        if is_settled || bitmaps.is_empty() || !self.metadata.is_writable() {
            return safety;
        }
        let probed = self.sidecar_place().and_then(|place| {
            let identity = Identity { uuid: [0; 16], generation: 0 };
            let description = self.describe(&*place, &session, identity, &bitmaps)?;
            place.probe(&description).map_err(sidecar_error)
        });
        if let Err(error) = probed {
            safety.survives = Survives::CleanClose;
            safety.shortfall = Some(error.to_string());
        }
        safety
    }

    /// Ends the session once every bitmap is stored: the image is as if there had been none.
    pub(in crate::qcow2) fn end_session(&self) -> Result<()> {
        let is_over = {
            let state = self.bitmaps.tracker.read();
            !state.recording().any(|(bitmap, _)| bitmap.in_use.load(Acquire))
        };
        let mut session = self.bitmaps.session.lock();
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

    /// The bitmaps' safety as far as this image is concerned.
    pub(crate) fn bitmap_safety(&self) -> BitmapSafety {
        let (thawed, thaw_failure) = {
            let disk = self.bitmaps.disk.lock();
            (disk.thawed.clone(), disk.thaw_failure.clone())
        };
        let session = self.bitmaps.session.lock();
        let is_gone = session.sidecar.as_ref().is_some_and(|sidecar| sidecar.is_abandoned());
        let shortfall = match is_gone {
            true => Some("the file with the bits could not be kept up to date".to_owned()),
            false => session.shortfall.clone(),
        };
        let survives = if shortfall.is_some() { Survives::CleanClose } else { session.survives };
        BitmapSafety {
            survives,
            shortfall,
            recovered: session.recovered.clone(),
            thawed,
            thaw_failure,
            precision: session.precision,
        }
    }

    fn mark_header(&self, identity: Identity) -> Result<()> {
        let content = encode_identity(identity);
        self.metadata.edit_header(|file, cluster| {
            // Without the bit nobody looks at the extension.
            change_autoclear(file, 0, autoclear::SIDECAR)?;
            put_extension(file, cluster, extension::SIDECAR, &content)?;
            change_autoclear(file, autoclear::SIDECAR, 0)
        })
    }

    fn unmark_header(&self) -> Result<()> {
        let since = self.metadata.failed_syncs();
        self.metadata.edit_header(|file, cluster| {
            rewrite_autoclear(file, 0, autoclear::SIDECAR)?;
            remove_extension(file, cluster, extension::SIDECAR)
        })?;
        self.metadata.refuse_lost_since(since)
    }

    fn sidecar_place(&self) -> Result<Arc<dyn SidecarLocation>> {
        if let Some(home) = &self.bitmaps.sidecar_location {
            return Ok(Arc::clone(home));
        }
        let path = self.metadata.path().ok_or_else(no_file)?;
        let place = SidecarPlace::beside(path).map_err(sidecar_error)?;
        Ok(Arc::new(place))
    }

    fn descriptor(&self, bitmap: &Bitmap<Entry>) -> BitmapDescriptor {
        BitmapDescriptor {
            name: bitmap.stored.name.clone(),
            granularity_bits: bitmap.granularity_bits,
            bit_count: self.size.div_ceil(1 << bitmap.granularity_bits.min(63)),
        }
    }

    /// What the image's file looks like; `None` if it is not an ordinary file.
    fn fingerprint(&self) -> Option<Fingerprint> {
        let inode = self.metadata.file.identity()?.inode;
        let length = self.metadata.file.len().ok()?;
        let modified = self.metadata.file.as_fd().map_or(Some(0), modification_time)?;
        let mut header = [0; 112];
        self.metadata.file.read_exact_at(HostOffset::new(0), &mut header).ok()?;
        // Magic, version; cluster_bits; crypt_method; refcount_order and header_length.
        let fixed = [0..8, 20..24, 32..36, 96..104];
        let fixed: Vec<u8> = fixed.into_iter().flat_map(|part| header[part].to_vec()).collect();
        (inode != 0).then(|| Fingerprint {
            inode,
            length,
            modified,
            header_crc: crc32fast::hash(&fixed),
        })
    }
}

/// Nanoseconds since 1970.
fn modification_time(file: BorrowedFd<'_>) -> Option<u64> {
    let status = rustix::fs::fstat(file).ok()?;
    let seconds = u64::try_from(status.st_mtime).unwrap_or(0);
    Some(seconds.saturating_mul(1_000_000_000).saturating_add(status.st_mtime_nsec as u64))
}

/// Whether a bitmap noted changes when the image was left.
fn was_recording(bitmap: &Bitmap<Entry>) -> bool {
    bitmap.stored.flags & flag::IN_USE != 0
        && bitmap.recording == Recording::Enabled
        && matches!(bitmap.condition, Condition::Inconsistent(_))
}

fn encode_identity(identity: Identity) -> Vec<u8> {
    [&identity.uuid[..], &identity.generation.to_be_bytes()].concat()
}

fn decode_identity(content: &[u8]) -> Option<Identity> {
    let uuid = content.get(..16)?.try_into().ok()?;
    (content.len() == 24).then(|| Identity { uuid, generation: u64_at(content, 16) })
}

fn new_uuid() -> std::io::Result<[u8; 16]> {
    let mut uuid = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut uuid)?;
    Ok(uuid)
}

fn no_file() -> Error {
    let detail = "the image is not an ordinary file, or its bitmaps are too large for that";
    Error::new(ErrorKind::Unsupported, KEEP, detail)
}

fn sidecar_error(error: std::io::Error) -> Error {
    Error::from_io(KEEP, error)
}

const KEEP: &str = "keep the bits of bitmaps beside";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_holds_uuid_and_generation_and_nothing_else() {
        let identity = Identity { uuid: *b"0123456789abcdef", generation: 0x0102 };
        let content = encode_identity(identity);
        assert_eq!(content[16..], [0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(decode_identity(&content), Some(identity));
        for length in 0..24 {
            assert_eq!(decode_identity(&content[..length]), None);
        }
        assert_eq!(decode_identity(&[0; 32]), None);
    }
}
