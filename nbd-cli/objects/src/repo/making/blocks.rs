//! Blocks: hashed, compared, compressed.

use super::super::page::BLOCK_SIZE;
use super::super::seal::{Hash, Sealer};
use super::super::stored::Stored;
use super::known::Known;

/// What becomes of a block.
#[derive(Debug)]
pub(super) enum Prepared {
    /// It reads as zero.
    Zero,
    /// The repository has it.
    Found(Stored),
    /// It is added: compressed, and its hash.
    New(Vec<u8>, Hash),
}

/// Looks at blocks that are next to each other; `expected` is what each may be equal to.
pub(super) fn prepare(
    sealer: &Sealer,
    known: &Known,
    bytes: &[u8],
    expected: &[Option<Stored>],
) -> Vec<Prepared> {
    let blocks = bytes.chunks(BLOCK_SIZE as usize).zip(expected);
    blocks
        .map(|(block, expected)| {
            if is_zero(block) {
                return Prepared::Zero;
            }
            let hash = sealer.hash(block);
            let same = expected.filter(|expected| expected.hash == hash);
            match same.or_else(|| known.block(hash)) {
                Some(stored) => Prepared::Found(stored),
                None => Prepared::New(Sealer::compress(block), hash),
            }
        })
        .collect()
}

fn is_zero(block: &[u8]) -> bool {
    // Compared with itself, shifted by a byte: the fast way to compare a block with zeroes.
    block.first() == Some(&0) && block[1..] == block[..block.len() - 1]
}
