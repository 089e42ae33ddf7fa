//! An open sidecar: changes of the disk are announced to it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::clock::now_nanoseconds;
use super::layout::{self, Description, Layout};
use super::location::SidecarStorage;
use super::log::ActivityLog;
use crate::access::BitmapDurability;

/// The time of the last change is recorded again when it is older than this.
const LIVENESS_NANOSECONDS: u64 = 100_000_000;

/// An open sidecar.
#[derive(Debug)]
pub(crate) struct Sidecar {
    store: Box<dyn SidecarStorage>,
    bitmaps: Box<[BitmapWords]>,
    pub(super) log: Option<ActivityLog>,
    /// Whether the file was removed because it could not be kept up to date.
    is_abandoned: AtomicBool,
}

/// The location of the bits of a bitmap.
#[derive(Clone, Copy, Debug)]
struct BitmapWords {
    granularity_bits: u32,
    first_word: usize,
    word_count: usize,
}

/// An announced change of the disk. Drop it when the change has reached the image's storage, or has
/// failed.
#[derive(Debug)]
#[must_use = "the change is in flight for as long as this lives"]
pub(crate) struct InFlight {
    /// The sidecar and the extents, if they are counted.
    counted: Option<(Arc<Sidecar>, u32, u32)>,
}

impl Sidecar {
    /// Opens a sidecar on a store that [`SidecarLocation::create`](super::SidecarLocation::create)
    /// has filled.
    pub(crate) fn new(
        store: Box<dyn SidecarStorage>,
        description: &Description,
    ) -> Option<Arc<Self>> {
        let layout = Layout::of(description)?;
        if store.words().len() as u64 * 8 != layout.length {
            return None;
        }
        let places = description.bitmaps.iter().zip(&layout.word_offsets);
        let bitmaps = places.map(|(bitmap, offset)| BitmapWords {
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

    /// Announces that a range of the disk is about to change: sets its bits in every bitmap and, at
    /// the level of power loss, makes sure that the log on disk names its extents. Returns when the
    /// change may be submitted.
    ///
    /// # Errors
    ///
    /// Only if the file can neither be kept up to date nor removed: then the change must not be
    /// made, because a later recovery would miss it.
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

    /// Records that this program is about to change the image, but not its content.
    pub(crate) fn note_alive(&self) {
        let now = now_nanoseconds();
        let word = &self.store.words()[layout::LIVENESS_WORD];
        let noted = u64::from_le(word.load(Relaxed));
        if now.saturating_sub(noted) > LIVENESS_NANOSECONDS {
            word.store(now.to_le(), Relaxed);
        }
    }

    /// Removes the file: the bitmaps are stored, or lost.
    pub(crate) fn remove(&self) -> io::Result<()> {
        self.is_abandoned.store(true, Relaxed);
        self.store.remove()
    }

    /// Whether the file was removed, so that a crash would leave the bitmaps in use.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Relaxed)
    }

    /// Removes a file that cannot be kept up to date, so that it is not trusted after a crash.
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
/// written again, which keeps the cache lines of busy words shared.
pub(super) fn set_bits(words: &[AtomicU64], first: u64, last: u64) {
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
