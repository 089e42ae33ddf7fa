//! One bitmap in memory.
//!
//! A bit stands for `granularity` bytes of the disk. Many threads set bits at once; bits are never
//! cleared while a thread can set them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};

use super::DirtyExtent;
use crate::units::{GuestOffset, GuestRange};

/// A bit stands for at least 512 bytes.
pub(crate) const GRANULARITY_BITS_MIN: u32 = 9;
/// A bit stands for at most 2 GiB.
pub(crate) const GRANULARITY_BITS_MAX: u32 = 31;

const WORD_BITS: u64 = u64::BITS as u64;

/// The bits of a bitmap. Those past the end of the disk are never set.
pub(crate) struct Bits {
    granularity_bits: u32,
    /// Size of the disk in bytes.
    size: u64,
    words: Words,
}

/// Where the words are kept.
enum Words {
    Heap(Box<[AtomicU64]>),
}

/// The bits of a bitmap at one moment, to be merged into another.
#[derive(Clone, Debug)]
pub struct DirtyBits(pub(crate) Arc<Bits>);

impl Bits {
    /// A bitmap for a disk of `size` bytes in which nothing is dirty.
    pub(crate) fn new(size: u64, granularity_bits: u32) -> Self {
        let count = Self::bytes_for(size, granularity_bits).div_ceil(8);
        let words = (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { granularity_bits, size, words: Words::Heap(words) }
    }

    /// The number of bytes that the bits for a disk of `size` bytes take up.
    pub(crate) const fn bytes_for(size: u64, granularity_bits: u32) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// A bit stands for 2 to the power of this bytes.
    pub(crate) fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// The number of bits.
    fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits)
    }

    /// The bits in the order of the disk, the first the lowest of the first word.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        match &self.words {
            Words::Heap(words) => words,
        }
    }

    /// Marks every bit that a range touches. The part past the end of the disk is ignored.
    pub(crate) fn set_range(&self, range: GuestRange) {
        let end = range.end().bytes().min(self.size);
        let start = range.offset().bytes();
        if start < end {
            let last = (end - 1) >> self.granularity_bits;
            self.set_bits(start >> self.granularity_bits, last + 1);
        }
    }

    /// Marks everything.
    pub(crate) fn set_all(&self) {
        self.set_bits(0, self.count());
    }

    fn set_bits(&self, mut bit: u64, end: u64) {
        let words = self.words();
        while bit < end {
            let stop = end.min((bit / WORD_BITS + 1) * WORD_BITS);
            let mask = mask(bit % WORD_BITS, stop - bit);
            let word = &words[(bit / WORD_BITS) as usize];
            // Most writes find their bits set already. Without a store, the cache line stays
            // shared.
            if word.load(Relaxed) & mask != mask {
                word.fetch_or(mask, AcqRel);
            }
            bit = stop;
        }
    }

    /// Takes over what is dirty in `other`, whatever its granularity and size.
    pub(crate) fn merge(&self, other: &Self) {
        if self.granularity_bits == other.granularity_bits && self.size == other.size {
            for (word, other) in self.words().iter().zip(other.words()) {
                let other = other.load(Relaxed);
                if other != 0 {
                    word.fetch_or(other, AcqRel);
                }
            }
            return;
        }
        let mut position = 0;
        while let Some((start, end)) = other.next_dirty(position, other.size) {
            if let Some(range) = range(start, end) {
                self.set_range(range);
            }
            position = end;
        }
    }

    /// Becomes equal to `other`, which has the same size and granularity. No thread sets bits
    /// meanwhile.
    pub(crate) fn assign(&self, other: &Self) {
        for (word, other) in self.words().iter().zip(other.words()) {
            word.store(other.load(Relaxed), Relaxed);
        }
    }

    /// A copy for a disk of another size. An added part is clean.
    pub(crate) fn resized(&self, size: u64) -> Self {
        let copy = Self::new(size, self.granularity_bits);
        copy.merge(self);
        copy
    }

    /// The number of dirty bytes of the disk.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        let set: u64 =
            self.words().iter().map(|word| u64::from(word.load(Relaxed).count_ones())).sum();
        let bytes = set << self.granularity_bits;
        let last = self.count().saturating_sub(1);
        let is_cut = !self.size.is_multiple_of(1 << self.granularity_bits);
        match is_cut && self.is_set(last) {
            true => bytes - ((self.count() << self.granularity_bits) - self.size),
            false => bytes,
        }
    }

    fn is_set(&self, bit: u64) -> bool {
        let word = self.words().get((bit / WORD_BITS) as usize);
        word.is_some_and(|word| word.load(Relaxed) >> (bit % WORD_BITS) & 1 == 1)
    }

    /// The first dirty part from `start` on, cut at `end`: where it starts and ends, in bytes.
    fn next_dirty(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let end = end.min(self.size);
        if start >= end {
            return None;
        }
        let limit = ((end - 1) >> self.granularity_bits) + 1;
        let first = self.find(start >> self.granularity_bits, limit, 0)?;
        let behind = self.find(first, limit, u64::MAX).unwrap_or(limit);
        let (first, behind) = (first << self.granularity_bits, behind << self.granularity_bits);
        Some((first.max(start), behind.min(end)))
    }

    /// The first bit from `bit` on and before `limit` that is set after all words were combined
    /// with `flip` by exclusive or.
    fn find(&self, bit: u64, limit: u64, flip: u64) -> Option<u64> {
        let words = self.words();
        let (first, last) = ((bit / WORD_BITS) as usize, (limit.div_ceil(WORD_BITS)) as usize);
        for (index, word) in words.iter().enumerate().take(last).skip(first) {
            let mut value = word.load(Relaxed) ^ flip;
            if index == first {
                value &= u64::MAX << (bit % WORD_BITS);
            }
            if value != 0 {
                let found = index as u64 * WORD_BITS + u64::from(value.trailing_zeros());
                return (found < limit).then_some(found);
            }
        }
        None
    }

    /// The dirty and the clean parts of a range, from its start on, at most `max_count` of them.
    /// The part past the end of the bitmap is clean.
    pub(crate) fn extents(&self, whole: GuestRange, max_count: usize) -> Vec<DirtyExtent> {
        let mut extents: Vec<DirtyExtent> = Vec::new();
        let (mut position, end) = (whole.offset().bytes(), whole.end().bytes());
        while position < end && extents.len() < max_count {
            let (start, stop) = self.next_dirty(position, end).unwrap_or((end, end));
            let parts = [(position, start, false), (start, stop, true)];
            let parts = parts.into_iter().filter(|(start, stop, _)| start < stop);
            let room = max_count - extents.len();
            extents.extend(parts.take(room).filter_map(|(start, stop, is_dirty)| {
                Some(DirtyExtent { range: range(start, stop)?, is_dirty })
            }));
            position = stop;
        }
        extents
    }

    /// Copies bits out: `bytes` from the byte at `offset` of the bitmap on, eight bits each, the
    /// lowest first. Bits past the end are zero.
    pub(crate) fn store(&self, offset: u64, bytes: &mut [u8]) {
        debug_assert!(offset.is_multiple_of(8));
        let words = self.words().get((offset / 8) as usize..).unwrap_or_default();
        bytes.fill(0);
        for (part, word) in bytes.chunks_mut(8).zip(words) {
            let word = word.load(Relaxed).to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }

    /// Adds the bits that are set in `bytes`, which are laid out as [`store`](Self::store) does.
    pub(crate) fn load(&self, offset: u64, bytes: &[u8]) {
        debug_assert!(offset.is_multiple_of(8));
        let first = (offset / 8) as usize;
        let count = self.count();
        let words = self.words().get(first..).unwrap_or_default();
        for (index, (part, word)) in bytes.chunks(8).zip(words).enumerate() {
            let mut value = [0; 8];
            value[..part.len()].copy_from_slice(part);
            let start = (first + index) as u64 * WORD_BITS;
            let value = u64::from_le_bytes(value) & mask(0, (count - start).min(WORD_BITS));
            if value != 0 {
                word.fetch_or(value, AcqRel);
            }
        }
    }

    /// Sets the bits in `length` bytes from the byte at `offset` of the bitmap on.
    pub(crate) fn load_ones(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).saturating_mul(8).min(self.count());
        self.set_bits((offset * 8).min(end), end);
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let granularity = 1u64 << self.granularity_bits;
        f.debug_struct("Bits")
            .field("size", &self.size)
            .field("granularity", &granularity)
            .finish_non_exhaustive()
    }
}

/// `count` bits from `first` on; together at most 64.
fn mask(first: u64, count: u64) -> u64 {
    if count >= WORD_BITS { u64::MAX } else { ((1 << count) - 1) << first }
}

fn range(start: u64, end: u64) -> Option<GuestRange> {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, length: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), length).unwrap()
    }

    fn dirty(bits: &Bits) -> Vec<(u64, u64)> {
        let extents = bits.extents(span(0, bits.size()), usize::MAX);
        let dirty = extents.iter().filter(|extent| extent.is_dirty);
        dirty.map(|extent| (extent.range.offset().bytes(), extent.range.length())).collect()
    }

    #[test]
    fn a_byte_marks_its_whole_unit_and_the_end_of_the_disk_cuts_it() {
        let bits = Bits::new(200 * 512 + 100, 9);
        bits.set_range(span(511, 2));
        bits.set_range(span(200 * 512 + 99, 5000));
        bits.set_range(span(63 * 512, 2 * 512));
        let expected = vec![(0, 1024), (63 * 512, 1024), (200 * 512, 100)];
        assert_eq!(dirty(&bits), expected);
        assert_eq!(bits.dirty_bytes(), 2048 + 100);
        bits.set_all();
        assert_eq!(bits.dirty_bytes(), bits.size());
        assert_eq!(dirty(&bits), [(0, bits.size())]);
    }

    #[test]
    fn bytes_hold_eight_bits_each_the_lowest_first() {
        let bits = Bits::new(512 * 70, 9);
        bits.set_range(span(512 * 9, 1));
        bits.set_range(span(512 * 64, 1));
        let mut bytes = [0xff; 16];
        bits.store(0, &mut bytes);
        assert_eq!(bytes[..9], [0, 2, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[9..], [0; 7]);
        let copy = Bits::new(512 * 70, 9);
        copy.load(0, &[0xff; 16]);
        assert_eq!(copy.dirty_bytes(), 512 * 70, "bits past the end do not count");
        let ones = Bits::new(512 * 70, 9);
        ones.load_ones(8, 1 << 40);
        assert_eq!(dirty(&ones), [(512 * 64, 512 * 6)]);
    }

    #[test]
    fn bits_of_another_granularity_are_merged_so_that_nothing_is_missed() {
        let fine = Bits::new(1 << 20, 9);
        fine.set_range(span(65536 * 3 + 512, 512));
        let coarse = Bits::new(1 << 20, 16);
        coarse.merge(&fine);
        assert_eq!(dirty(&coarse), [(65536 * 3, 65536)]);
        let other = Bits::new(1 << 20, 12);
        other.merge(&coarse);
        assert_eq!(dirty(&other), [(65536 * 3, 65536)]);
        assert_eq!(dirty(&coarse.resized(65536 * 3 + 10)), [(65536 * 3, 10)]);
        assert_eq!(dirty(&coarse.resized(65536)), []);
    }

    #[test]
    fn extents_cover_the_range_without_gaps_and_stop_at_their_number() {
        let bits = Bits::new(1 << 20, 16);
        bits.set_range(span(65536, 65536));
        let extents = bits.extents(span(100, 200_000), 2);
        assert_eq!(extents.len(), 2);
        assert_eq!(extents[0], DirtyExtent { range: span(100, 65436), is_dirty: false });
        assert_eq!(extents[1], DirtyExtent { range: span(65536, 65536), is_dirty: true });
        let behind = bits.extents(span(1 << 20, 4096), 10);
        assert_eq!(behind, [DirtyExtent { range: span(1 << 20, 4096), is_dirty: false }]);
        assert!(bits.extents(span(0, 0), 10).is_empty());
    }
}
