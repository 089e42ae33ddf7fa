//! Adds and removes passphrases of a header of version 1.
//!
//! At every moment at least one passphrase opens the volume. A new slot is used when its key
//! material is durable and was read back; an old one is destroyed only when another one that stays
//! was opened. What makes a slot valid or invalid is its state, which is one word in one sector.

use std::num::NonZeroU64;

use openssl::memcmp;
use openssl::rand::rand_bytes;
use rustix::fs::{Advice, fadvise};
use zeroize::Zeroizing;

use super::field::read_exact;
use super::header::Header;
use super::new::salt;
use super::slot::Slot;
use super::v1::{SLOT_EMPTY, empty_slot, slot_bytes};
use crate::bytes::u32_at;
use crate::crypto::error::{invalid, library};
use crate::crypto::hash;
use crate::crypto::kdf::{Budget, Kdf, iterations_within};
use crate::crypto::split::STRIPES;
use crate::error::{Error, ErrorKind, Result};
use crate::luks::{
    HEADER_LENGTH, SALT_END, SALT_OF_REMOVED, SECTOR, SLOT_ACTIVE, SLOT_LENGTH, SLOTS_START,
    is_being_removed, slots_of,
};
use crate::passphrase::{KeyChange, KeysChanged, NewKey, Passphrase};
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

const OPERATION: &str = "change the keys of";

/// Changes the passphrases of the header at `base`; no key material is past `room`, which is
/// counted from there.
pub(crate) fn change_keys(
    storage: &dyn Storage,
    (base, room): (u64, u64),
    passphrases: &[Passphrase],
    change: &KeyChange,
) -> Result<KeysChanged> {
    let mut header = super::read(storage, base)?;
    if header.version != 1 {
        return Err(refused(
            ErrorKind::Unsupported,
            "it has a LUKS header of version 2, whose keys 'cryptsetup' changes, with luksAddKey, \
             luksRemoveKey, luksKillSlot and luksChangeKey",
        ));
    }
    if header.payload == 0 {
        let detail = "it is a detached LUKS header, whose keys 'cryptsetup' changes";
        return Err(refused(ErrorKind::Unsupported, detail));
    }
    let room = room.min(header.payload);
    let file = File { storage, base, room };
    match change {
        KeyChange::Add { key, slot } => {
            let (opened, master) = header.find_slot(storage, base, passphrases)?;
            let added = file.add(&header, opened, &master, key, *slot)?;
            Ok(KeysChanged { added: Some(added), removed: Vec::new() })
        }
        KeyChange::Replace { old, key } => {
            let (removed, master) = file.opened_by(&header, old)?;
            file.refuse_overlaps(&removed)?;
            let added = file.add(&header, removed[0], &master, key, None)?;
            file.remove(&removed).map_err(|error| {
                let detail = format!(
                    "key slot {added} has the new passphrase, but the old one may still open it: {}",
                    error.detail()
                );
                refused(error.kind(), detail)
            })?;
            Ok(KeysChanged { added: Some(added), removed })
        }
        KeyChange::Remove(old) => {
            let (removed, _) = file.opened_by(&header, old)?;
            file.remove_guarded(&mut header, &removed, passphrases)?;
            Ok(KeysChanged { added: None, removed })
        }
        KeyChange::RemoveSlot(slot) => {
            let is_in_use = header.slots.iter().any(|used| used.number == *slot);
            if !(is_in_use || *slot < SLOTS && is_being_removed(&file.slot(*slot)?)) {
                let detail = format!("key slot {slot} of it is not in use");
                return Err(refused(ErrorKind::InvalidInput, detail));
            }
            file.remove_guarded(&mut header, &[*slot], passphrases)?;
            Ok(KeysChanged { added: None, removed: vec![*slot] })
        }
    }
}

/// Where a header is.
struct File<'a> {
    storage: &'a dyn Storage,
    base: u64,
    room: u64,
}

impl File<'_> {
    /// The slots that a passphrase opens, at least one, and the key in them.
    fn opened_by(
        &self,
        header: &Header,
        passphrase: &Passphrase,
    ) -> Result<(Vec<u32>, Zeroizing<Vec<u8>>)> {
        let bytes = passphrase.bytes()?;
        let (mut budget, mut numbers, mut found) = (Budget::default(), Vec::new(), None);
        for slot in &header.slots {
            // A slot that cannot be tried may be one of them.
            if let Some(key) = slot.open(self.storage, self.base, &bytes, &mut budget)? {
                numbers.push(slot.number);
                found = Some(key);
            }
        }
        let detail = "the old passphrase opens none of its key slots";
        let key = found.ok_or_else(|| refused(ErrorKind::KeyRequired, detail))?;
        Ok((numbers, key))
    }

    /// Puts the key into a slot that is not in use: the given one, or the first.
    fn add(
        &self,
        header: &Header,
        opened: u32,
        master: &[u8],
        new: &NewKey,
        wanted: Option<u32>,
    ) -> Result<u32> {
        let new = new.read()?;
        let number = self.free_slot(wanted)?;
        if is_being_removed(&self.slot(number)?) {
            self.remove(&[number])?;
        }
        let slot = self.new_slot(header, opened, number, &new)?;
        let passphrase = new.passphrase.bytes()?;
        let material = slot.seal(master, &passphrase)?;
        self.write(slot.offset, &material)?;
        let mut bytes = slot_bytes(&slot);
        bytes[..4].copy_from_slice(&SLOT_EMPTY.to_be_bytes());
        self.write(place_of(number), &bytes)?;
        self.sync()?;
        // What was read back, and not what was written.
        let read = slot.open(self.storage, self.base, &passphrase, &mut Budget::default())?;
        let is_same = |read: &[u8]| read.len() == master.len() && memcmp::eq(read, master);
        if !read.is_some_and(|read| is_same(&read)) {
            return Err(self.lost(number));
        }
        self.write(place_of(number), &SLOT_ACTIVE.to_be_bytes())?;
        self.sync()?;
        if self.slot(number)? != slot_bytes(&slot) {
            return Err(self.lost(number));
        }
        Ok(number)
    }

    fn lost(&self, number: u32) -> Error {
        let detail =
            format!("key slot {number} does not read as it was written; no other slot has changed");
        refused(ErrorKind::Io, detail)
    }

    /// A slot like the one that was opened, for another passphrase.
    fn new_slot(&self, header: &Header, opened: u32, number: u32, new: &NewKey) -> Result<Slot> {
        let like = header.slots.iter().find(|slot| slot.number == opened);
        let like = like.ok_or_else(|| invalid("its LUKS header has no slot in use"))?;
        let function = hash::by_name(&like.split_hash)?;
        let length = like.area_key_length as usize;
        let iterations = iterations_within(new.iteration_time, length, function)?;
        let kdf = Kdf::Pbkdf2 { hash: like.split_hash.clone(), iterations, salt: salt()? };
        let (offset, stripes) = place_in(&self.slot(number)?);
        if stripes != STRIPES {
            let detail = format!("key slot {number} of its LUKS header has {stripes} stripes");
            return Err(invalid(format!("{detail} instead of {STRIPES}")));
        }
        Ok(Slot { number, kdf, offset, stripes, ..like.clone() })
    }

    fn free_slot(&self, wanted: Option<u32>) -> Result<u32> {
        let is_free = |number| {
            let slot = self.slot(number)?;
            Ok::<_, Error>(u32_at(&slot, 0) == SLOT_EMPTY || is_being_removed(&slot))
        };
        if let Some(number) = wanted {
            if number >= SLOTS {
                let detail = format!("it has the key slots 0 to {}, and no {number}", SLOTS - 1);
                return Err(refused(ErrorKind::InvalidInput, detail));
            }
            if !is_free(number)? {
                let detail = format!("key slot {number} of it is in use; remove that one first");
                return Err(refused(ErrorKind::AlreadyExists, detail));
            }
            self.refuse_overlaps(&[number])?;
            return Ok(number);
        }
        for number in 0..SLOTS {
            if is_free(number)? {
                self.refuse_overlaps(&[number])?;
                return Ok(number);
            }
        }
        let detail = "all of its key slots are in use; remove one first";
        Err(refused(ErrorKind::NoSpace, detail))
    }

    /// Refuses to write to slots whose key material shares bytes with something else.
    fn refuse_overlaps(&self, numbers: &[u32]) -> Result<()> {
        let mut bytes = [0; HEADER_LENGTH];
        read_exact(self.storage, self.base, 0, &mut bytes)?;
        let length = u64::from(u32_at(&bytes, 108));
        let places: Vec<(u64, u64)> = slots_of(&bytes)
            .map(|slot| {
                let (offset, stripes) = place_in(slot);
                let length = (length * u64::from(stripes)).next_multiple_of(SECTOR);
                (offset, offset.saturating_add(length))
            })
            .collect();
        for number in numbers {
            let (start, end) = places.get(*number as usize).copied().unwrap_or_default();
            let is_other = |other: usize| other != *number as usize;
            let mut others = places.iter().enumerate().filter(|(other, _)| is_other(*other));
            if start < HEADER_LENGTH as u64
                || end > self.room
                || others.any(|(_, (from, to))| start < *to && *from < end)
            {
                return Err(invalid(format!(
                    "key slot {number} of its LUKS header overlaps another slot, the header or the data"
                )));
            }
        }
        Ok(())
    }

    /// Removes slots, if one of the passphrases opens a slot that stays.
    fn remove_guarded(
        &self,
        header: &mut Header,
        removed: &[u32],
        passphrases: &[Passphrase],
    ) -> Result<()> {
        header.slots.retain(|slot| !removed.contains(&slot.number));
        if header.slots.is_empty() {
            let detail = "these are the last key slots in use, without which nothing can ever open it; \
                          add another passphrase first";
            return Err(refused(ErrorKind::InvalidInput, detail));
        }
        header.find_slot(self.storage, self.base, passphrases).map_err(|error| {
            let detail = format!(
                "a passphrase that stays has to be given, which shows that it can still be opened \
                 afterwards: {}",
                error.detail()
            );
            refused(error.kind(), detail)
        })?;
        self.refuse_overlaps(removed)?;
        self.remove(removed)
    }

    /// Marks slots as being removed, destroys their key material, and then marks them as not in
    /// use: a slot that is said not to be in use holds no key, and one that is not said to be
    /// removed has its key, also after a crash.
    fn remove(&self, numbers: &[u32]) -> Result<()> {
        for number in numbers {
            let slot = self.slot(*number)?;
            let (offset, stripes) = place_in(&slot);
            let mut header = [0; HEADER_LENGTH];
            read_exact(self.storage, self.base, 0, &mut header)?;
            let length = u64::from(u32_at(&header, 108)) * u64::from(stripes);
            let mut noise = vec![0; length.next_multiple_of(SECTOR) as usize];
            rand_bytes(&mut noise).map_err(|error| library(&error))?;
            self.write(place_of(*number) + SALT_END.start as u64, SALT_OF_REMOVED)?;
            self.sync()?;
            self.write(offset, &noise)?;
            self.sync()?;
            self.write(place_of(*number), &SLOT_EMPTY.to_be_bytes())?;
            self.sync()?;
            // The salt and the iterations.
            self.write(place_of(*number), &empty_slot(offset, stripes))?;
            self.sync()?;
            if self.slot(*number)? != empty_slot(offset, stripes) {
                let detail = format!("key slot {number} does not read as it was written");
                return Err(refused(ErrorKind::Io, detail));
            }
        }
        Ok(())
    }

    /// The bytes of a slot in the header.
    fn slot(&self, number: u32) -> Result<[u8; SLOT_LENGTH]> {
        let mut bytes = [0; SLOT_LENGTH];
        read_exact(self.storage, self.base, place_of(number), &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let place = self.base.checked_add(offset).map(HostOffset::new);
        let place =
            place.ok_or_else(|| invalid("its LUKS header lies past the end of the file"))?;
        let written = self.storage.write_at(place, data, Durability::Cached);
        written.map_err(|error| Error::from_io(OPERATION, error))
    }

    /// Waits until everything is on stable storage. What is read afterwards comes from there, as
    /// far as the system can be told: not from its memory.
    fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(|error| Error::from_io(OPERATION, error))?;
        if let Some(fd) = self.storage.as_fd() {
            // It is advice: without it the medium is trusted with what it has confirmed.
            let _ = fadvise(fd, self.base, NonZeroU64::new(self.room), Advice::DontNeed);
        }
        Ok(())
    }
}

/// The number of slots.
const SLOTS: u32 = ((HEADER_LENGTH - SLOTS_START) / SLOT_LENGTH) as u32;

/// Where the bytes of a slot begin in the header.
fn place_of(number: u32) -> u64 {
    SLOTS_START as u64 + u64::from(number) * SLOT_LENGTH as u64
}

/// Where the key material of a slot begins, in bytes, and its number of stripes.
fn place_in(slot: &[u8]) -> (u64, u32) {
    (u64::from(u32_at(slot, 40)) * SECTOR, u32_at(slot, 44))
}

fn refused(kind: ErrorKind, detail: impl Into<String>) -> Error {
    Error::new(kind, OPERATION, detail)
}
