//! A cache of the parts of a file that have no holes, which saves system calls.
//!
//! Only data is cached, never a hole. "Data" remains a correct answer when other processes change
//! the file; a cached hole would hide data that another process wrote.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Maximum memory for one file, in bytes. A bit stands for 4 KiB in files up to 32 GiB, and for
/// more in longer ones.
const MEMORY_MAX: u64 = 1 << 20;
const GRANULE_BITS_MIN: u32 = 12;

/// The known data of one file.
#[derive(Debug, Default)]
pub(super) struct KnownData {
    /// Set when the file is first examined; nothing is known before.
    state: OnceLock<State>,
}

#[derive(Debug)]
struct State {
    /// There is no hole before this offset.
    solid: AtomicU64,
    /// The length of the file when it was first examined, which determines that of the bitmap.
    length: u64,
    granule_bits: u32,
    /// A bit for each granule that is data throughout. Created when it is needed: most files have
    /// no holes.
    granules: OnceLock<Box<[AtomicU64]>>,
}

impl KnownData {
    /// Records the result of the first examination by `look`: the length of the file, and the
    /// offset before which it has no hole.
    pub(super) fn first_look(&self, look: impl FnOnce() -> (u64, u64)) {
        self.state.get_or_init(|| {
            let (length, solid) = look();
            State::new(length, solid.min(length))
        });
    }

    /// Whether all of a range, in bytes, is known to be data.
    pub(super) fn contains(&self, start: u64, length: u64) -> bool {
        let Some(state) = self.state.get() else { return false };
        let Some(end) = start.checked_add(length) else { return false };
        end <= state.solid.load(Relaxed) || state.contains(start, end)
    }

    /// Records that a range, in bytes, is data.
    pub(super) fn insert(&self, start: u64, length: u64) {
        let Some(state) = self.state.get() else { return };
        let end = start.saturating_add(length).min(state.length);
        if end > state.solid.load(Relaxed) {
            state.insert(start, end);
        }
    }

    /// Forgets a range, in bytes, after it may have become a hole.
    pub(super) fn remove(&self, start: u64, length: u64) {
        let Some(state) = self.state.get() else { return };
        let end = start.saturating_add(length).min(state.length);
        if start < end {
            state.remove(start, end);
        }
    }
}

impl State {
    fn new(length: u64, solid: u64) -> Self {
        let mut granule_bits = GRANULE_BITS_MIN;
        while (length >> granule_bits) / 8 >= MEMORY_MAX {
            granule_bits += 1;
        }
        Self { solid: AtomicU64::new(solid), length, granule_bits, granules: OnceLock::new() }
    }

    fn granules(&self) -> &[AtomicU64] {
        self.granules.get_or_init(|| {
            // At most `MEMORY_MAX` bytes: see `new`.
            let count = (self.length >> self.granule_bits) / 64 + 1;
            let granules: Box<[_]> = (0..count).map(|_| AtomicU64::new(0)).collect();
            set(&granules, 0, self.solid.load(Relaxed) >> self.granule_bits);
            granules
        })
    }

    fn contains(&self, start: u64, end: u64) -> bool {
        let Some(granules) = self.granules.get() else { return false };
        if start >= end || end > self.length {
            return false;
        }
        let (first, last) = (start >> self.granule_bits, (end - 1) >> self.granule_bits);
        words(first, last + 1).all(|(word, mask)| {
            granules.get(word).is_some_and(|bits| bits.load(Relaxed) & mask == mask)
        })
    }

    fn insert(&self, start: u64, end: u64) {
        let first = start.div_ceil(1 << self.granule_bits);
        // The end of the file ends its last granule.
        let last = if end == self.length {
            end.div_ceil(1 << self.granule_bits)
        } else {
            end >> self.granule_bits
        };
        if first < last {
            set(self.granules(), first, last);
        }
    }

    fn remove(&self, start: u64, end: u64) {
        let granules = self.granules();
        // From now on the bitmap is used, which contains the same information.
        self.solid.fetch_min(start, Relaxed);
        let (first, last) = (start >> self.granule_bits, (end - 1) >> self.granule_bits);
        for (word, mask) in words(first, last + 1) {
            if let Some(bits) = granules.get(word) {
                bits.fetch_and(!mask, Relaxed);
            }
        }
    }
}

fn set(granules: &[AtomicU64], first: u64, end: u64) {
    for (word, mask) in words(first, end) {
        if let Some(bits) = granules.get(word)
            && bits.load(Relaxed) & mask != mask
        {
            bits.fetch_or(mask, Relaxed);
        }
    }
}

/// The words that hold the bits from `first` to `end`, each with a mask of those bits.
fn words(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut next = first;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let word = next / 64;
        let stop = end.min((word + 1) * 64);
        let mask = (u64::MAX >> (64 - (stop - next))) << (next % 64);
        next = stop;
        Some((word as usize, mask))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn known(length: u64, solid: u64) -> KnownData {
        let known = KnownData::default();
        known.first_look(|| (length, solid));
        known
    }

    #[test]
    fn nothing_is_known_before_the_first_look() {
        let known = KnownData::default();
        known.insert(0, 1 << 20);
        assert!(!known.contains(0, 1));
    }

    #[test]
    fn a_file_without_holes_is_known_at_once_and_has_no_bitmap() {
        let known = known(1 << 40, 1 << 40);
        assert!(known.contains(0, 1 << 40));
        known.insert(12345, 1 << 30);
        assert!(known.state.get().unwrap().granules.get().is_none());
        assert!(!known.contains(1 << 40, 1), "past the end nothing is known");
        assert!(!known.contains(u64::MAX, 2));
    }

    #[test]
    fn what_is_punched_is_forgotten_and_nothing_else() {
        let known = known(1 << 20, 1 << 20);
        known.remove(100 * KIB + 1, 1);
        assert!(!known.contains(0, 1 << 20));
        assert!(known.contains(0, 100 * KIB));
        assert!(!known.contains(100 * KIB + 1, 1));
        assert!(!known.contains(102 * KIB, 1), "the granule counts as a whole");
        assert!(known.contains(104 * KIB, (1 << 20) - 104 * KIB));
    }

    #[test]
    fn only_whole_granules_become_known() {
        let known = known(1 << 20, 0);
        known.insert(1, 12 * KIB);
        assert!(!known.contains(0, 4 * KIB));
        assert!(known.contains(4 * KIB, 8 * KIB));
        assert!(!known.contains(4 * KIB, 8 * KIB + 1));
        known.insert(0, 4 * KIB);
        known.insert(12 * KIB, 1000 * KIB);
        assert!(known.contains(0, 1012 * KIB));
    }

    #[test]
    fn the_last_granule_of_a_file_may_be_cut() {
        let known = known(10_000, 0);
        known.insert(8192, 1808);
        assert!(known.contains(8192, 1808));
        assert!(!known.contains(8192, 1809));
    }

    #[test]
    fn the_bitmap_of_the_longest_file_is_bounded() {
        let known = known(u64::MAX, 0);
        known.insert(1 << 60, 1 << 59);
        let granules = known.state.get().unwrap().granules.get().unwrap().len() as u64;
        assert!(granules * 8 <= MEMORY_MAX + 8);
        assert!(known.contains(1 << 60, 1 << 59));
        assert!(!known.contains(1 << 60, (1 << 59) + 1));
    }
}
