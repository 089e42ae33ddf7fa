//! The granules of a disk whose old content was copied.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Smallest granule, in bytes, as a power of two. It is small because a small write costs the copy
/// of a granule.
const SHIFT_MIN: u32 = 12;
/// Words of a chunk.
const CHUNK_WORDS: usize = 512;
/// Granules of a chunk.
const CHUNK_GRANULES: u64 = CHUNK_WORDS as u64 * 64;
/// Disks that would need more chunks have larger granules.
const CHUNKS_MAX: u64 = 1 << 20;

type Chunk = [AtomicU64; CHUNK_WORDS];

/// One bit for each granule; memory is allocated for those parts of the disk in which a bit is set.
pub(super) struct Granules {
    size: u64,
    shift: u32,
    chunks: Box<[OnceLock<Box<Chunk>>]>,
}

impl Granules {
    /// No bit set, for a disk of `size` bytes that is written in units of at least `unit` bytes.
    pub(super) fn new(size: u64, unit: u64) -> Self {
        let mut shift = SHIFT_MIN.max(unit.next_power_of_two().trailing_zeros());
        while chunks_of(size, shift) > CHUNKS_MAX {
            shift += 1;
        }
        // At most CHUNKS_MAX.
        let count = chunks_of(size, shift) as usize;
        Self { size, shift, chunks: (0..count).map(|_| OnceLock::new()).collect() }
    }

    /// The granules that a range of bytes touches.
    pub(super) fn touched(&self, offset: u64, length: u64) -> Range<u64> {
        let end = offset.saturating_add(length).min(self.size);
        offset >> self.shift..(end + self.len() - 1) >> self.shift
    }

    /// The granules that are completely in a range of bytes.
    pub(super) fn inside(&self, offset: u64, length: u64) -> Range<u64> {
        let end = offset.saturating_add(length).min(self.size);
        let start = offset.div_ceil(self.len());
        let end = if end == self.size { end.div_ceil(self.len()) } else { end >> self.shift };
        start..end.max(start)
    }

    /// The bytes of a range of granules: offset and length.
    pub(super) fn bytes(&self, granules: &Range<u64>) -> (u64, u64) {
        let start = granules.start << self.shift;
        (start, (granules.end << self.shift).min(self.size) - start)
    }

    /// Size of a granule in bytes.
    pub(super) fn len(&self) -> u64 {
        1 << self.shift
    }

    /// Whether all granules of the range are set.
    pub(super) fn all_set(&self, granules: &Range<u64>) -> bool {
        self.run(granules) == (true, granules.end) || granules.is_empty()
    }

    /// Whether the first granule of the range is set, and the end of the run of equal ones.
    pub(super) fn run(&self, granules: &Range<u64>) -> (bool, u64) {
        let set = self.word(granules.start) >> (granules.start % 64) & 1 == 1;
        let mut at = granules.start;
        while at < granules.end {
            let word = self.word(at) ^ if set { 0 } else { u64::MAX };
            // In this word, ones are granules like the first.
            let like = (!(word >> (at % 64))).trailing_zeros();
            let in_word = 64 - (at % 64) as u32;
            if like < in_word {
                return (set, (at + u64::from(like)).min(granules.end));
            }
            at += u64::from(in_word);
        }
        (set, granules.end)
    }

    /// Sets the bits of a range. A thread that sees them also sees earlier writes.
    pub(super) fn set(&self, granules: &Range<u64>) {
        let mut at = granules.start;
        while at < granules.end {
            let in_word = (64 - at % 64).min(granules.end - at);
            let ones = if in_word == 64 { u64::MAX } else { (1 << in_word) - 1 };
            let chunk = self.chunk(at);
            let new = || Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS]);
            let word = &chunk.get_or_init(new)[(at % CHUNK_GRANULES / 64) as usize];
            word.fetch_or(ones << (at % 64), Ordering::SeqCst);
            at += in_word;
        }
    }

    fn word(&self, granule: u64) -> u64 {
        let chunk = self.chunk(granule).get();
        let word = chunk.map(|chunk| &chunk[(granule % CHUNK_GRANULES / 64) as usize]);
        word.map_or(0, |word| word.load(Ordering::SeqCst))
    }

    fn chunk(&self, granule: u64) -> &OnceLock<Box<Chunk>> {
        // The server has checked that the request lies within the disk.
        &self.chunks[(granule / CHUNK_GRANULES) as usize]
    }
}

fn chunks_of(size: u64, shift: u32) -> u64 {
    size.div_ceil(1 << shift).div_ceil(CHUNK_GRANULES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_across_words_and_chunks() {
        let granules = Granules::new(1 << 30, 1);
        let all = 0..(1 << 18);
        assert_eq!(granules.run(&all), (false, 1 << 18));
        granules.set(&(60..70));
        granules.set(&(CHUNK_GRANULES - 1..CHUNK_GRANULES + 129));
        let mut runs = Vec::new();
        let mut at = 0;
        while at < all.end {
            let (set, end) = granules.run(&(at..all.end));
            runs.push((set, at..end));
            at = end;
        }
        let c = CHUNK_GRANULES;
        assert_eq!(
            runs,
            [
                (false, 0..60),
                (true, 60..70),
                (false, 70..c - 1),
                (true, c - 1..c + 129),
                (false, c + 129..1 << 18)
            ]
        );
        assert!(granules.all_set(&(61..70)) && !granules.all_set(&(61..71)));
    }

    #[test]
    fn the_last_granule_may_be_cut() {
        let granules = Granules::new(10_000, 1);
        assert_eq!(granules.touched(0, 10_000), 0..3);
        assert_eq!(granules.touched(4095, 2), 0..2);
        assert_eq!(granules.inside(4095, 5905), 1..3);
        assert_eq!(granules.inside(1, 4096), 1..1);
        assert_eq!(granules.bytes(&(2..3)), (8192, 1808));
    }

    #[test]
    fn the_largest_disk_needs_little_memory() {
        let granules = Granules::new(i64::MAX as u64, 1);
        assert!(granules.chunks.len() as u64 <= CHUNKS_MAX);
        let last = granules.touched(i64::MAX as u64 - 1, 1);
        granules.set(&last);
        assert!(granules.all_set(&last));
    }
}
