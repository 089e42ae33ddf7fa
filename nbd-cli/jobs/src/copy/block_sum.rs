//! The sum of the blocks that a backup holds: its parts may come in any order.

use imgfmt::ContentSum;
use imgfmt::zero::is_zero;
use openssl::sha::Sha256;

/// Size of a block, in bytes: a cluster of a backup.
pub(crate) const BLOCK: u64 = 64 << 10;

/// Returns the sum of the blocks of a part of the disk, which begins at a block: for each block
/// that is not zero, the SHA-256 of its number (as 8 bytes, the lowest first) and its bytes. The
/// last block of the disk may be shorter.
pub(crate) fn of(offset: u64, data: &[u8]) -> ContentSum {
    debug_assert!(offset.is_multiple_of(BLOCK), "{offset}");
    let mut sum = ContentSum::default();
    for (number, block) in (offset / BLOCK..).zip(data.chunks(BLOCK as usize)) {
        if is_zero(block) {
            continue;
        }
        let mut hash = Sha256::new();
        hash.update(&number.to_le_bytes());
        hash.update(block);
        sum.add(ContentSum::from_bytes(hash.finish()));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_depend_on_places_and_bytes_but_not_on_order_or_zeroes() {
        let (len, mut disk) = (BLOCK as usize, vec![0; 5 * BLOCK as usize + 9]);
        disk[len..2 * len].fill(1);
        disk[4 * len..].fill(2);
        let mut parts = ContentSum::default();
        parts.add(of(4 * BLOCK, &disk[4 * len..]));
        parts.add(of(0, &disk[..3 * len]));
        assert_eq!(parts, of(0, &disk));
        assert_ne!(of(0, &disk), of(BLOCK, &disk));
        for at in [len, 4 * len, 5 * len + 8] {
            disk[at] ^= 1;
            assert_ne!(parts, of(0, &disk), "byte {at}");
            disk[at] ^= 1;
        }
    }
}
