//! Blocks that identify themselves.
//!
//! ```text
//! 0       8      16       24           32      36
//! | magic | seed | offset | generation | crc32 | zero | random bytes of (seed, offset, generation) ...
//! ```
//!
//! Numbers are big-endian. The checksum covers the block with zero in its own place.

use super::random::{Random, mix};

/// Smallest block, in bytes.
pub(super) const MIN_BLOCK_LEN: u32 = 512;

const MAGIC: [u8; 8] = *b"NBDbench";
const CHECKSUM_AT: usize = 32;
const HEADER_LEN: usize = 40;

/// The identity of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) seed: u64,
    /// Offset in the disk, in bytes.
    pub(super) offset: u64,
    /// Number of earlier writes of this offset, plus one.
    pub(super) generation: u64,
}

/// The contents of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// An intact block, perhaps of another offset or seed.
    Block(Identity),
    /// A block with a wrong checksum.
    Torn(Identity),
    /// Zeroes.
    Zeroes,
    /// Anything else.
    Foreign,
}

/// Makes a block; it is at least [`MIN_BLOCK_LEN`] bytes long.
pub(super) fn fill(block: &mut [u8], identity: Identity) {
    let Some((header, data)) = block.split_first_chunk_mut::<HEADER_LEN>() else { return };
    let key = mix(identity.seed) ^ mix(identity.offset).rotate_left(21) ^ identity.generation;
    Random::new(key, 0).fill(data);
    *header = [0; HEADER_LEN];
    let words = [identity.seed, identity.offset, identity.generation].map(u64::to_be_bytes);
    let fields = std::iter::once(MAGIC).chain(words);
    for (place, field) in header.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
        *place = field;
    }
    let checksum = crc32fast::hash(block);
    if let Some(place) = block.get_mut(CHECKSUM_AT..CHECKSUM_AT + 4) {
        place.copy_from_slice(&checksum.to_be_bytes());
    }
}

/// Examines a block.
pub(super) fn inspect(block: &[u8]) -> Found {
    let Some((header, data)) = block.split_first_chunk::<HEADER_LEN>() else {
        return Found::Foreign;
    };
    let words = header.as_chunks::<8>().0;
    let [magic, seed, offset, generation, checksum] = words else { return Found::Foreign };
    if *magic != MAGIC {
        return if imgfmt::is_zero(block) { Found::Zeroes } else { Found::Foreign };
    }
    let identity = Identity {
        seed: u64::from_be_bytes(*seed),
        offset: u64::from_be_bytes(*offset),
        generation: u64::from_be_bytes(*generation),
    };
    let (mut hasher, mut front) = (crc32fast::Hasher::new(), *header);
    if let Some(place) = front.get_mut(CHECKSUM_AT..CHECKSUM_AT + 4) {
        place.fill(0);
    }
    hasher.update(&front);
    hasher.update(data);
    // The checksum, then four zeroes.
    let expected = u64::from(hasher.finalize()) << 32;
    match u64::from_be_bytes(*checksum) == expected {
        true => Found::Block(identity),
        false => Found::Torn(identity),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { seed: 5, offset: 8192, generation: 3 };

    #[test]
    fn block_says_what_it_is_and_every_bit_counts() {
        for length in [512, 4096] {
            let mut block = vec![0; length];
            fill(&mut block, IDENTITY);
            assert_eq!(inspect(&block), Found::Block(IDENTITY));
            for bit in 0..length * 8 {
                block[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(inspect(&block), Found::Block(IDENTITY), "bit {bit}");
                block[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn half_of_another_block_is_torn() {
        let (mut old, mut new) = (vec![0; 4096], vec![0; 4096]);
        fill(&mut old, Identity { generation: 2, ..IDENTITY });
        fill(&mut new, IDENTITY);
        new[2048..].copy_from_slice(&old[2048..]);
        assert_eq!(inspect(&new), Found::Torn(IDENTITY));
    }

    #[test]
    fn what_is_no_block_is_told_apart() {
        assert_eq!(inspect(&[0; 512]), Found::Zeroes);
        assert_eq!(inspect(&[1; 512]), Found::Foreign);
        assert_eq!(inspect(&[0; 7]), Found::Foreign);
    }
}
