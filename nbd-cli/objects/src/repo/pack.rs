//! Packs: frames one behind another, with a directory at the end.

use bytes::{Bytes, BytesMut};

use super::error::{RepositoryError, Result};
use super::id::PackId;
use super::reader::Reader;
use super::seal::{FramePlace, Hash, OVERHEAD, Sealer};
use super::stored::{PACK_BYTES_MAX, Stored, stored};

/// Size at which a pack is complete, in bytes: a backup of a GiB that does not compress, with
/// everything else that it puts, takes at most 128 requests.
pub const PACK_SIZE: usize = 9 << 20;
/// Bytes of the footer: the length of the directory's frame and of the directory, its hash, and the
/// magic.
pub(crate) const FOOTER_LEN: usize = 32;
/// The last bytes of every pack.
const MAGIC: &[u8; 8] = b"nbdpack1";
/// Bytes of an entry of the directory.
const ENTRY_LEN: usize = 33;

/// What a frame in a pack is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum FrameKind {
    /// A block of a disk.
    Block,
    /// A map page.
    Page,
}

/// A frame in a pack, by its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: FrameKind,
    /// The number of the block or page in its disk.
    pub(crate) index: u64,
    pub(crate) stored: Stored,
}

/// A pack that grows.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    id: PackId,
    bytes: BytesMut,
    entries: Vec<Entry>,
}

impl PackBuilder {
    pub(crate) fn new(id: PackId) -> Self {
        Self::reusing(id, BytesMut::new())
    }

    /// Uses memory again.
    pub(crate) fn reusing(id: PackId, mut memory: BytesMut) -> Self {
        memory.clear();
        // With the last frame and the directory, so that it need not be moved.
        memory.reserve(PACK_SIZE + (256 << 10));
        Self { id, bytes: memory, entries: Vec::new() }
    }

    pub(crate) fn id(&self) -> PackId {
        self.id
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds compressed content, and returns where it is.
    pub(crate) fn add(
        &mut self,
        sealer: &Sealer,
        (kind, index): (FrameKind, u64),
        packed: Vec<u8>,
        hash: Hash,
    ) -> Result<Stored> {
        let offset = length_of(self.bytes.len())?;
        let frame = sealer.seal(self.place(offset), packed)?;
        let stored = Stored { pack: self.id, offset, length: length_of(frame.len())?, hash };
        self.bytes.extend_from_slice(&frame);
        self.entries.push(Entry { kind, index, stored });
        Ok(stored)
    }

    fn place(&self, offset: u32) -> FramePlace {
        FramePlace::in_pack(self.id, offset)
    }

    /// Appends the directory and the footer.
    pub(crate) fn finish(mut self, sealer: &Sealer) -> Result<Bytes> {
        let mut directory = Vec::with_capacity(self.entries.len() * ENTRY_LEN);
        for Entry { kind, index, stored } in &self.entries {
            directory.push(match kind {
                FrameKind::Block => 0,
                FrameKind::Page => 1,
            });
            directory.extend_from_slice(&index.to_le_bytes());
            directory.extend_from_slice(&stored.offset.to_le_bytes());
            directory.extend_from_slice(&stored.length.to_le_bytes());
            directory.extend_from_slice(&stored.hash.0);
        }
        let hash = sealer.hash(&directory);
        let offset = length_of(self.bytes.len())?;
        let frame = sealer.frame(self.place(offset), &directory)?;
        self.bytes.extend_from_slice(&frame);
        self.bytes.extend_from_slice(&length_of(frame.len())?.to_le_bytes());
        self.bytes.extend_from_slice(&length_of(directory.len())?.to_le_bytes());
        self.bytes.extend_from_slice(&hash.0);
        self.bytes.extend_from_slice(MAGIC);
        Ok(self.bytes.freeze())
    }
}

/// Where the directory of a pack is, by its footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Offset of the directory's frame in the pack, in bytes.
    offset: u32,
    length: u32,
    /// Length of the directory itself.
    content: usize,
    hash: Hash,
}

impl Footer {
    /// Reads the end of a pack of `size` bytes; `None` if it is none.
    pub(crate) fn read(end: &[u8], size: u64) -> Option<Self> {
        let mut reader = Reader(end.last_chunk::<FOOTER_LEN>()?);
        let (length, content) = (reader.u32()?, reader.u32()?);
        let hash = Hash(reader.array()?);
        if reader.0 != MAGIC || size > u64::from(PACK_BYTES_MAX) {
            return None;
        }
        let content = usize::try_from(content).ok()?;
        let is_whole = content.is_multiple_of(ENTRY_LEN) && content <= PACK_BYTES_MAX as usize;
        let is_possible = is_whole && length as usize <= content + OVERHEAD;
        let end = size.checked_sub(FOOTER_LEN as u64)?;
        let offset = u32::try_from(end.checked_sub(u64::from(length))?).ok()?;
        is_possible.then_some(Self { offset, length, content, hash })
    }

    /// The bytes of the pack that hold the directory.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.length)
    }

    /// Opens the directory of a pack.
    pub(crate) fn entries(
        &self,
        sealer: &Sealer,
        pack: PackId,
        frame: &[u8],
    ) -> std::result::Result<Vec<Entry>, String> {
        let place = FramePlace::in_pack(pack, self.offset);
        let directory = sealer.open(place, frame, self.content, self.hash);
        let directory = directory.map_err(|broken| format!("its directory {broken}"))?;
        let malformed = || "its directory is malformed".to_owned();
        let mut reader = Reader(&directory);
        let mut entries = Vec::with_capacity(directory.len() / ENTRY_LEN);
        while !reader.0.is_empty() {
            let entry = self.entry(&mut reader, pack).ok_or_else(malformed)?;
            entries.push(entry);
        }
        Ok(entries)
    }

    fn entry(&self, reader: &mut Reader<'_>, pack: PackId) -> Option<Entry> {
        let kind = match reader.u8()? {
            0 => FrameKind::Block,
            1 => FrameKind::Page,
            _ => return None,
        };
        let index = reader.u64()?;
        // Frames are in front of the directory.
        let stored = stored(reader, pack, self.offset)?;
        (stored.range().end <= u64::from(self.offset)).then_some(Entry { kind, index, stored })
    }
}

fn length_of(bytes: usize) -> Result<u32> {
    let length = u32::try_from(bytes).ok().filter(|&length| length <= PACK_BYTES_MAX);
    length.ok_or_else(|| RepositoryError::invalid("a pack has become too long"))
}

#[cfg(test)]
mod tests {
    use super::super::id::Id;
    use super::*;

    fn a_pack(sealer: &Sealer) -> (PackId, Bytes, Vec<Entry>) {
        let id = PackId { session: Id::from_bytes([5; 16]), number: 3 };
        let mut builder = PackBuilder::new(id);
        let mut entries = Vec::new();
        for index in 0..20u64 {
            let content = vec![index as u8; 1000 * index as usize];
            let kind = if index == 19 { FrameKind::Page } else { FrameKind::Block };
            let hash = sealer.hash(&content);
            let stored =
                builder.add(sealer, (kind, index), Sealer::compress(&content), hash).unwrap();
            entries.push(Entry { kind, index, stored });
        }
        (id, builder.finish(sealer).unwrap(), entries)
    }

    fn directory(sealer: &Sealer, id: PackId, pack: &[u8]) -> Option<Vec<Entry>> {
        let footer = Footer::read(pack, pack.len() as u64)?;
        let range = footer.range();
        let frame = pack.get(range.start as usize..range.end as usize)?;
        footer.entries(sealer, id, frame).ok()
    }

    #[test]
    fn directory_lists_the_frames() {
        for sealer in [Sealer::default(), Sealer::encrypting(&[9; 32])] {
            let (id, pack, entries) = a_pack(&sealer);
            assert_eq!(directory(&sealer, id, &pack).unwrap(), entries);
            for (index, entry) in entries.iter().enumerate() {
                let range = entry.stored.range();
                let frame = &pack[range.start as usize..range.end as usize];
                let place = entry.stored.place();
                let content = sealer.open(place, frame, 1000 * index, entry.stored.hash).unwrap();
                assert_eq!(content, vec![index as u8; 1000 * index]);
            }
        }
    }

    #[test]
    fn every_change_of_footer_and_directory_is_noticed() {
        let sealer = Sealer::default();
        let (id, pack, entries) = a_pack(&sealer);
        let footer = Footer::read(&pack, pack.len() as u64).unwrap();
        for at in footer.offset as usize..pack.len() {
            for bit in 0..8 {
                let mut damaged = pack.to_vec();
                damaged[at] ^= 1 << bit;
                let found = directory(&sealer, id, &damaged);
                assert!(found.is_none() || found.unwrap() == entries, "byte {at}");
            }
        }
        for end in 0..pack.len() {
            assert!(directory(&sealer, id, &pack[..end]).is_none());
        }
    }
}
