//! Map pages: where the blocks of 32 MiB of a disk are.

use std::collections::HashMap;

use super::id::PackId;
use super::pack_list::{push_packs, read_packs};
use super::reader::Reader;
use super::seal::OVERHEAD;
use super::stored::{Stored, push, stored};

/// Size of a block, in bytes.
pub const BLOCK_SIZE: u64 = 64 << 10;
/// Largest disk, and largest sum of the disks of a backup, in bytes.
pub const DISK_SIZE_MAX: u64 = 64 << 40;
/// Blocks of a page.
pub const PAGE_BLOCKS: u64 = 512;
/// Bytes of a disk that a page describes.
pub(crate) const PAGE_SPAN: u64 = BLOCK_SIZE * PAGE_BLOCKS;
/// Longest page before compression: every block in a pack of a session of its own.
pub(crate) const PAGE_LEN_MAX: usize = 12 + PAGE_BLOCKS as usize * (16 + 8 + 26);
/// Longest frame of a block, in bytes.
const FRAME_MAX: u32 = BLOCK_SIZE as u32 + OVERHEAD as u32;

/// A page: for each block where it is, or `None` if it reads as zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) blocks: Vec<Option<Stored>>,
}

impl Page {
    /// Returns the packs that hold its blocks, each once, sorted.
    pub(crate) fn packs(&self) -> Vec<PackId> {
        let mut packs: Vec<_> = self.blocks.iter().flatten().map(|stored| stored.pack).collect();
        packs.sort_unstable();
        packs.dedup();
        packs
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.blocks.iter().all(Option::is_none)
    }

    /// Encodes the page: sessions, packs, blocks, each behind its number.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let packs = self.packs();
        let mut bytes = Vec::with_capacity(12 + packs.len() * 8 + self.blocks.len() * 28);
        push_packs(&mut bytes, packs.iter());
        let places: HashMap<_, _> = packs.iter().zip(1u16..).collect();
        push(&mut bytes, self.blocks.len());
        for block in &self.blocks {
            let Some(stored) = block else {
                bytes.extend_from_slice(&0u16.to_le_bytes());
                continue;
            };
            let place = places.get(&stored.pack).copied().unwrap_or_default();
            bytes.extend_from_slice(&place.to_le_bytes());
            bytes.extend_from_slice(&stored.offset.to_le_bytes());
            bytes.extend_from_slice(&stored.length.to_le_bytes());
            bytes.extend_from_slice(&stored.hash.0);
        }
        bytes
    }

    /// Decodes a page of so many blocks; `None` if it is malformed.
    pub(crate) fn decode(bytes: &[u8], blocks: usize) -> Option<Self> {
        let mut reader = Reader(bytes);
        let packs = read_packs(&mut reader)?;
        if reader.count(2)? != blocks {
            return None;
        }
        let mut page = Self { blocks: Vec::with_capacity(blocks) };
        for _ in 0..blocks {
            page.blocks.push(match reader.u16()? {
                0 => None,
                place => Some(stored(&mut reader, *packs.get(usize::from(place) - 1)?, FRAME_MAX)?),
            });
        }
        reader.0.is_empty().then_some(page)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::id::Id;
    use super::super::seal::Hash;
    use super::super::stored::PACK_BYTES_MAX;
    use super::*;

    pub(crate) fn a_page(blocks: usize) -> Page {
        let stored = |n: usize| Stored {
            pack: PackId { session: Id::from_bytes([n as u8 % 3; 16]), number: n as u32 % 5 },
            offset: n as u32 * 70_000,
            length: 1 + n as u32,
            hash: Hash([n as u8; 16]),
        };
        Page { blocks: (0..blocks).map(|n| (n % 4 != 0).then(|| stored(n % 100))).collect() }
    }

    #[test]
    fn pages_are_read_as_they_were_written() {
        for blocks in [0, 1, 2, 511, 512] {
            let page = a_page(blocks);
            let bytes = page.encode();
            assert!(bytes.len() <= PAGE_LEN_MAX);
            assert_eq!(Page::decode(&bytes, blocks), Some(page));
            assert_eq!(Page::decode(&bytes, blocks + 1), None);
            for end in 0..bytes.len() {
                assert_eq!(Page::decode(&bytes[..end], blocks), None);
            }
        }
    }

    #[test]
    fn damaged_pages_are_refused_or_stay_within_the_pack() {
        let bytes = a_page(60).encode();
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                for stored in
                    Page::decode(&damaged, 60).iter().flat_map(|page| &page.blocks).flatten()
                {
                    assert!(stored.range().end <= u64::from(PACK_BYTES_MAX));
                    assert!(stored.length <= FRAME_MAX);
                }
            }
        }
    }
}
