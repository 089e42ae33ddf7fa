//! Where readers have found the layers below an image, for a job that copies what they have from
//! there first.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

/// The latest offsets that are kept; older ones are forgotten.
const PLACES: usize = 16;
const NOTHING: u64 = u64::MAX;

/// Readers within this many bytes of the one before want the same, as a power of two.
const SAME_BITS: u32 = 16;

/// The latest offsets, in bytes of the disk. What is lost by chance is only copied later, so no one
/// waits for anything.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The jobs that ask.
    jobs: AtomicU32,
    next: AtomicUsize,
    places: [AtomicU64; PLACES],
}

/// While this lives, readers say what they want.
#[derive(Debug)]
pub(crate) struct Asking<'a>(&'a Wanted);

impl Default for Wanted {
    fn default() -> Self {
        let places = [const { AtomicU64::new(NOTHING) }; PLACES];
        Self { jobs: AtomicU32::new(0), next: AtomicUsize::new(0), places }
    }
}

impl Wanted {
    /// A reader has found a layer below at `offset`.
    #[inline]
    pub(crate) fn note(&self, offset: u64) {
        if self.jobs.load(Relaxed) > 0 {
            self.keep(offset);
        }
    }

    #[cold]
    fn keep(&self, offset: u64) {
        let next = self.next.load(Relaxed);
        let last = self.places[next.wrapping_sub(1) % PLACES].load(Relaxed);
        if last != NOTHING && last >> SAME_BITS == offset >> SAME_BITS {
            return;
        }
        let next = self.next.fetch_add(1, Relaxed);
        self.places[next % PLACES].store(offset, Relaxed);
    }

    pub(crate) fn ask(&self) -> Asking<'_> {
        self.jobs.fetch_add(1, Relaxed);
        Asking(self)
    }
}

impl Asking<'_> {
    /// Takes the latest offset.
    pub(crate) fn take(&self) -> Option<u64> {
        let next = self.0.next.load(Relaxed);
        let mut latest = (1..=PLACES).map(|back| &self.0.places[next.wrapping_sub(back) % PLACES]);
        latest.find_map(|place| match place.load(Relaxed) {
            NOTHING => None,
            _ => Some(place.swap(NOTHING, Relaxed)).filter(|offset| *offset != NOTHING),
        })
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.jobs.fetch_sub(1, Relaxed);
        // Another job of this image asks again at the next read.
        while self.take().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_latest_offsets_come_first_and_the_oldest_are_forgotten() {
        let wanted = Wanted::default();
        wanted.note(MIB);
        let asking = wanted.ask();
        assert_eq!(asking.take(), None, "no one asked then");
        for offset in 0..40 {
            wanted.note(offset * MIB);
            // The next cluster of the same reader.
            wanted.note(offset * MIB + 4096);
        }
        wanted.note(u64::MAX);
        let found: Vec<_> = std::iter::from_fn(|| asking.take()).collect();
        let expected: Vec<_> = (25..40).rev().map(|offset| offset * MIB).collect();
        assert_eq!(found, expected);
        wanted.note(7 * MIB);
        drop(asking);
        assert_eq!(wanted.ask().take(), None, "of an earlier job");
    }

    #[test]
    fn readers_on_many_threads_disturb_nobody() {
        let wanted = Wanted::default();
        let asking = wanted.ask();
        std::thread::scope(|scope| {
            for reader in 0..4 {
                let wanted = &wanted;
                scope.spawn(move || (0..9999).for_each(|at| wanted.note((at * 4 + reader) * MIB)));
            }
            for _ in 0..9999 {
                assert!(asking.take().is_none_or(|offset| offset < 4 * 9999 * MIB));
            }
        });
    }
}
