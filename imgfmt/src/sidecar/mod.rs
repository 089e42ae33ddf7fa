//! The sidecar: a file beside an image from which dirty bitmaps are recovered after a crash.
//!
//! It holds all bits of the enabled bitmaps, mapped into memory ([`map`]), and an [activity
//! log](log) of the extents of the disk that are being written. A bit is set before its write is
//! submitted. If the process dies, the kernel still has the bits. If the machine dies, those that
//! did not reach the disk belong to extents that the log on disk names, and [recovery](recover)
//! marks these as a whole.
//!
//! A file belongs to one *epoch*: its bits are only set, never cleared. Every other change of
//! bitmaps (clearing, adding, merging) makes a new file that replaces the old one.
//!
//! This module is independent of formats and trackers. `DESIGN.md` documents the [`layout`].

mod file;
mod layout;
mod lock;
mod log;
mod map;
#[cfg(any(test, feature = "test-util"))]
mod recorded;
mod recover;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::access::{Access, BitmapDurability};
use file::InitialWords;
use layout::Layout;
use log::ActivityLog;

pub(crate) use file::SidecarPlace;
pub(crate) use layout::{BitmapDescriptor, Description, Fingerprint, Identity, LogShape};
pub(crate) use recover::{FoundBytes, Recovery, Rejection, Trust};

/// The time of the last change is written down again when it is older than this.
const LIVENESS_NANOSECONDS: u64 = 100_000_000;

/// The precision of recovered bitmaps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecoveryPrecision {
    /// Exact: only the ranges that were about to be written are marked.
    #[default]
    Exact,
    /// The machine was restarted: parts of the disk that were being written, of 4 MiB each on disks
    /// of usual size, are marked as a whole.
    WholeExtents,
}

/// The durability of the dirty bitmaps of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapDurabilityStatus {
    /// The failures that they survive.
    pub durability: BitmapDurability,
    /// The reason why that is less than requested, as a clause.
    pub degraded: Option<String>,
    /// The bitmaps that were recovered from a crash when the image was opened.
    pub recovered: Vec<String>,
    /// The bitmaps that got bits back which an interrupted checkpoint had
    /// [frozen](crate::BitmapChange::Freeze), when the image was opened.
    pub thawed: Vec<String>,
    /// The reason why bits could not be merged back, as a clause: the bitmaps that lack them report
    /// it.
    pub thaw_failure: Option<String>,
    /// The precision of the recovered bits.
    pub precision: RecoveryPrecision,
}

/// Where the sidecar of an image is: in the directory of the image, or in one that only tests have.
pub(crate) trait SidecarLocation: Send + Sync + fmt::Debug {
    /// Makes a new sidecar with these bits and puts it in the place of the one that is there, if
    /// any. Durable on return, at the level of power loss.
    fn create(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<Box<dyn SidecarStorage>>;

    /// Opens the sidecar that is there, if any. Nobody else can as long as it is open.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if somebody uses it, and goes on to do so; the error says who.
    fn open(&self, access: Access) -> io::Result<Option<Box<dyn FoundBytes>>>;

    /// Takes the sidecar away, if there is one; durable on return.
    fn remove(&self) -> io::Result<()>;

    /// Its name for messages.
    fn name(&self) -> String;

    /// Tries whether a sidecar could be made, and leaves nothing behind.
    fn probe(&self, description: &Description) -> io::Result<()>;

    /// The boot of this machine; empty if the system does not say.
    fn boot_id(&self) -> String;

    /// The shape of the activity log for a disk of this size in bytes.
    fn log_shape(&self, disk_size: u64) -> LogShape {
        LogShape::for_disk(disk_size)
    }
}

/// Where a sidecar's bytes live: a mapped file, or memory that remembers in tests.
pub(crate) trait SidecarStorage: Send + Sync + fmt::Debug {
    /// All bytes, as little-endian words.
    fn words(&self) -> &[AtomicU64];
    /// Writes to a place that nobody reaches through [`words`](Self::words); durable on return.
    fn write_durable(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes durable what was stored in the words before.
    fn sync(&self) -> io::Result<()>;
    /// Takes the file away, so that nobody recovers from it; durable on return.
    fn remove(&self) -> io::Result<()>;
}

/// An open sidecar.
#[derive(Debug)]
pub(crate) struct Sidecar {
    store: Box<dyn SidecarStorage>,
    bitmaps: Box<[Place]>,
    log: Option<ActivityLog>,
    /// Whether the file is gone because it could not be kept up to date.
    is_abandoned: AtomicBool,
}

/// Where the bits of a bitmap are.
#[derive(Clone, Copy, Debug)]
struct Place {
    granularity_bits: u32,
    first_word: usize,
    word_count: usize,
}

/// A change of the disk that was announced and is not finished. Drop it when the change has
/// reached the image's storage, or has failed.
#[derive(Debug)]
#[must_use = "the change is in flight for as long as this lives"]
pub(crate) struct InFlight {
    /// The sidecar and the extents, where anybody counts them.
    counted: Option<(Arc<Sidecar>, u32, u32)>,
}

impl Sidecar {
    /// Puts a sidecar on a store that [`SidecarPlace::create`] has filled.
    pub(crate) fn new(
        store: Box<dyn SidecarStorage>,
        description: &Description,
    ) -> Option<Arc<Self>> {
        let layout = Layout::of(description)?;
        if store.words().len() as u64 * 8 != layout.length {
            return None;
        }
        let places = description.bitmaps.iter().zip(&layout.word_offsets);
        let bitmaps = places.map(|(bitmap, offset)| Place {
            granularity_bits: bitmap.granularity_bits,
            first_word: (offset / 8) as usize,
            word_count: bitmap.word_count() as usize,
        });
        let log = (description.durability == BitmapDurability::PowerLoss)
            .then(|| ActivityLog::new(description.disk_size, description.log, description.epoch));
        let bitmaps = bitmaps.collect();
        let sidecar = Self { bitmaps, log, store, is_abandoned: AtomicBool::new(false) };
        sidecar.note_alive();
        Some(Arc::new(sidecar))
    }

    /// Announces that a range of the disk is about to change: sets its bits in every bitmap, and at
    /// the level of power loss makes sure that the disk knows enough. Returns when the change may
    /// be submitted.
    ///
    /// # Errors
    ///
    /// Only if the file can neither be kept up to date nor taken away: then the change must not be
    /// made, because a later recovery would not see it.
    pub(crate) fn before_change(self: &Arc<Self>, start: u64, length: u64) -> io::Result<InFlight> {
        let mut in_flight = InFlight { counted: None };
        if length == 0 || self.is_abandoned.load(Relaxed) {
            return Ok(in_flight);
        }
        self.note_alive();
        let end = start.saturating_add(length);
        let Some(log) = &self.log else {
            self.mark(start, end);
            return Ok(in_flight);
        };
        let is_covered = match log.enter(start, end) {
            Some((first, last, is_hot)) => {
                in_flight.counted = Some((Arc::clone(self), first, last));
                is_hot || log.activate(&*self.store, first, last)
            }
            None => false,
        };
        self.mark(start, end);
        if !is_covered {
            // Too much for the log, or the log cannot be written: the bits themselves have to be
            // durable.
            log.sync(&*self.store).or_else(|error| self.abandon(error))?;
        }
        Ok(in_flight)
    }

    /// As [`before_change`](Self::before_change), if that needs no waiting.
    pub(crate) fn try_before_change(self: &Arc<Self>, start: u64, length: u64) -> Option<InFlight> {
        let mut in_flight = InFlight { counted: None };
        if length == 0 || self.is_abandoned.load(Relaxed) {
            return Some(in_flight);
        }
        let end = start.saturating_add(length);
        if let Some(log) = &self.log {
            let (first, last) = log.try_enter(start, end)?;
            in_flight.counted = Some((Arc::clone(self), first, last));
        }
        self.note_alive();
        self.mark(start, end);
        Some(in_flight)
    }

    /// Notes that the image is about to be changed by this program, without any change of its
    /// content.
    pub(crate) fn note_alive(&self) {
        let now = now_nanoseconds();
        let word = &self.store.words()[layout::LIVENESS_WORD];
        let noted = u64::from_le(word.load(Relaxed));
        if now.saturating_sub(noted) > LIVENESS_NANOSECONDS {
            word.store(now.to_le(), Relaxed);
        }
    }

    /// Takes the file away: bitmaps are in a safe place, or lost.
    pub(crate) fn remove(&self) -> io::Result<()> {
        self.is_abandoned.store(true, Relaxed);
        self.store.remove()
    }

    /// Whether the file is gone, and a crash would leave the bitmaps in use.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Relaxed)
    }

    /// A file that cannot be kept up to date must not be believed after a crash.
    fn abandon(&self, error: io::Error) -> io::Result<()> {
        match self.remove() {
            Ok(()) => Ok(()),
            Err(_) => {
                self.is_abandoned.store(false, Relaxed);
                Err(error)
            }
        }
    }

    /// Sets the bits of the bytes from `start` to `end` in every bitmap.
    fn mark(&self, start: u64, end: u64) {
        let words = self.store.words();
        for place in &self.bitmaps {
            let words = &words[place.first_word..][..place.word_count];
            set_bits(words, start >> place.granularity_bits, (end - 1) >> place.granularity_bits);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some((sidecar, first, last)) = &self.counted
            && let Some(log) = &sidecar.log
        {
            log.leave(*first, *last);
        }
    }
}

/// Sets bits `first..=last`, as far as there are words for them. Bits that are set already are not
/// written again: that keeps the cache lines of busy words shared.
fn set_bits(words: &[AtomicU64], first: u64, last: u64) {
    for index in first / 64..=last / 64 {
        let Some(word) = usize::try_from(index).ok().and_then(|index| words.get(index)) else {
            return;
        };
        let from = if index == first / 64 { first % 64 } else { 0 };
        let to = if index == last / 64 { last % 64 } else { 63 };
        let mask = ((u64::MAX << from) & (u64::MAX >> (63 - to))).to_le();
        if word.load(Relaxed) & mask != mask {
            word.fetch_or(mask, Relaxed);
        }
    }
}

/// The time, in nanoseconds since 1970, by the clock whose ticks files are stamped with: asking it
/// costs next to nothing, and is no system call whatever the machine's clock is.
fn now_nanoseconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// Nanoseconds since 1970.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
