//! The object of a backup: a head, which tells what it is, and a body, which lists its map pages
//! and the packs that it needs. A tombstone is the same with another kind.

use std::collections::HashMap;

use bytes::Bytes;

use super::disks::are_laid_out;
use super::error::{RepositoryError, Result};
use super::head::Head;
use super::id::{Id, PackId};
use super::pack_list::{push_packs, read_packs};
use super::page::{DISK_SIZE_MAX, PAGE_LEN_MAX, PAGE_SPAN};
use super::reader::Reader;
use super::seal::{FramePlace, Hash, OVERHEAD, ROOT, Sealer};
use super::stored::{Stored, push, stored};

/// The first bytes of every object of a backup. The version follows: 2 if it has several disks,
/// which older programs would take for one, and 3 for a compaction.
const MAGIC: &[u8; 7] = b"nbdroot";
/// Where the kind is.
const KIND: usize = 8;
/// Bytes in front of the head.
pub(crate) const PREFIX_LEN: usize = 32;
/// Longest head, in bytes.
pub(crate) const HEAD_LEN_MAX: usize = 64 << 10;
/// Longest body, in bytes.
pub(crate) const BODY_LEN_MAX: u64 = 256 << 20;
/// Most packs and references to packs, so that a body stays below its limit.
const REFERENCES_MAX: usize = 24 << 20;

/// What an object of a backup is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A backup.
    Live,
    /// A backup that was forgotten; its root is kept until the next gc.
    Forgotten,
    /// No backup: nothing but the name, so that no writer can take it.
    Empty,
    /// A compaction.
    Compaction,
}

/// A page of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRoot {
    /// Where it is.
    pub(crate) stored: Stored,
    /// Length before compression, in bytes.
    pub(crate) content: u32,
    /// Blocks of it that are not zero.
    pub(crate) data_blocks: u16,
    /// The first of its references in [`Root::references`], and their number.
    references: (u32, u16),
}

/// The body of a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Root {
    /// The packs that hold blocks or pages, each once.
    packs: Vec<PackId>,
    /// For each page where it is, or `None` if all of it reads as zero.
    pages: Vec<Option<PageRoot>>,
    /// For each page the packs of its blocks, as numbers of `packs`.
    references: Vec<u32>,
}

/// Builds a body, page by page.
#[derive(Debug, Default)]
pub(crate) struct RootBuilder {
    root: Root,
    numbers: HashMap<PackId, u32>,
}

impl RootBuilder {
    /// Adds a page that is zero.
    pub(crate) fn zero(&mut self) {
        self.root.pages.push(None);
    }

    /// Pages so far.
    pub(crate) fn len(&self) -> usize {
        self.root.pages.len()
    }

    /// Adds a page of so many bytes, so many blocks of which are not zero, in these packs.
    /// [`place`](Self::place) says where it is.
    pub(crate) fn page(&mut self, content: u32, data_blocks: u16, packs: &[PackId]) -> Result<()> {
        let first = u32::try_from(self.root.references.len()).unwrap_or(u32::MAX);
        let count = u16::try_from(packs.len()).unwrap_or(u16::MAX);
        for &pack in packs {
            let number = self.number(pack)?;
            self.root.references.push(number);
        }
        let is_small = self.root.references.len() <= REFERENCES_MAX;
        if !is_small || self.root.packs.len() > REFERENCES_MAX {
            return Err(RepositoryError::invalid(
                "the blocks of this disk are scattered over too many packs; make a backup under \
                 another name",
            ));
        }
        let nowhere = PackId { session: Id::from_bytes([0; 16]), number: 0 };
        let stored = Stored { pack: nowhere, offset: 0, length: 0, hash: Hash([0; 16]) };
        let references = (first, count);
        self.root.pages.push(Some(PageRoot { stored, content, data_blocks, references }));
        Ok(())
    }

    /// Says where a page is that was added before.
    pub(crate) fn place(&mut self, page: usize, place: Stored) -> Result<()> {
        self.number(place.pack)?;
        if let Some(Some(page)) = self.root.pages.get_mut(page) {
            page.stored = place;
        }
        Ok(())
    }

    fn number(&mut self, pack: PackId) -> Result<u32> {
        let next = u32::try_from(self.root.packs.len());
        let next = next.map_err(|_| RepositoryError::invalid("there are too many packs"))?;
        Ok(*self.numbers.entry(pack).or_insert_with(|| {
            self.root.packs.push(pack);
            next
        }))
    }

    pub(crate) fn finish(self) -> Root {
        self.root
    }
}

impl Root {
    /// The packs that the backup needs.
    pub(crate) fn packs(&self) -> &[PackId] {
        &self.packs
    }

    pub(crate) fn pages(&self) -> &[Option<PageRoot>] {
        &self.pages
    }

    /// The packs of the blocks of a page.
    pub(crate) fn packs_of(&self, page: &PageRoot) -> impl Iterator<Item = PackId> + '_ {
        let (first, count) = page.references;
        let first = first as usize;
        let range = first..first.saturating_add(usize::from(count));
        let numbers = self.references.get(range).unwrap_or_default();
        numbers.iter().filter_map(|&number| self.packs.get(number as usize).copied())
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        push_packs(&mut bytes, self.packs.iter());
        let numbers: HashMap<_, _> = self.packs.iter().zip(1u32..).collect();
        push(&mut bytes, self.pages.len());
        for page in &self.pages {
            let Some(page) = page else {
                bytes.extend_from_slice(&0u32.to_le_bytes());
                continue;
            };
            let PageRoot { stored, content, data_blocks, references: (first, count) } = page;
            let number = numbers.get(&stored.pack).copied().unwrap_or_default();
            for word in [number, stored.offset, stored.length] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes.extend_from_slice(&stored.hash.0);
            bytes.extend_from_slice(&content.to_le_bytes());
            bytes.extend_from_slice(&data_blocks.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            let first = *first as usize;
            for number in &self.references[first..first + usize::from(*count)] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        match bytes.len() as u64 <= BODY_LEN_MAX {
            true => Ok(bytes),
            false => Err(RepositoryError::invalid(
                "the map of this disk is too long; make a backup under another name",
            )),
        }
    }

    /// Decodes the body of a backup of a disk of `size` bytes; `None` if it is malformed.
    pub(crate) fn decode(bytes: &[u8], size: u64) -> Option<Self> {
        let mut reader = Reader(bytes);
        let mut root = Self { packs: read_packs(&mut reader)?, ..Self::default() };
        let pages = reader.count(4)?;
        if pages as u64 != size.div_ceil(PAGE_SPAN) {
            return None;
        }
        root.pages.reserve_exact(pages);
        for _ in 0..pages {
            let page = match reader.u32()? {
                0 => None,
                number => {
                    let pack = *root.packs.get(number as usize - 1)?;
                    Some(root.page(&mut reader, pack)?)
                }
            };
            root.pages.push(page);
        }
        reader.0.is_empty().then_some(root)
    }

    fn page(&mut self, reader: &mut Reader<'_>, pack: PackId) -> Option<PageRoot> {
        let stored = stored(reader, pack, (PAGE_LEN_MAX + OVERHEAD) as u32)?;
        let content = reader.u32()?;
        let (data_blocks, count) = (reader.u16()?, reader.u16()?);
        let first = u32::try_from(self.references.len()).ok()?;
        for _ in 0..count {
            let number = reader.u32()?;
            self.packs.get(number as usize)?;
            self.references.push(number);
        }
        let is_possible = content as usize <= PAGE_LEN_MAX;
        let references = (first, count);
        is_possible.then_some(PageRoot { stored, content, data_blocks, references })
    }
}

/// Returns the object of a backup. The head's id, and length and hash of the body, are filled in.
pub(crate) fn encode(sealer: &Sealer, id: Id, head: &Head, root: &Root) -> Result<Bytes> {
    let content = root.encode()?;
    let version = head.version();
    let mut head = head.clone();
    head.body_length = content.len() as u64;
    head.body_hash = format!("{:?}", sealer.hash(&content));
    head.id = Some(id.to_string());
    let text = serde_json::to_vec(&head);
    let text = text.map_err(|error| RepositoryError::invalid(format!("no JSON: {error}")))?;
    if text.len() > HEAD_LEN_MAX - OVERHEAD {
        return Err(RepositoryError::invalid("the names of the disk and its export are too long"));
    }
    let head = sealer.frame(place(id, 0), &text)?;
    let body = sealer.frame(place(id, 1), &content)?;
    let mut object = front(version, &head);
    object.extend_from_slice(&body);
    Ok(object.into())
}

/// The first bytes of an object, with its head.
pub(crate) fn front(version: u8, head: &[u8]) -> Vec<u8> {
    let mut object = MAGIC.to_vec();
    object.extend_from_slice(&[version, 0, 0, 0, 0]);
    push(&mut object, head.len());
    object.extend_from_slice(&checksum(head).0);
    object.extend_from_slice(head);
    object
}

pub(crate) fn place(session: Id, part: u32) -> FramePlace {
    FramePlace { session, number: ROOT, offset: part }
}

/// The hash of a head as it is stored, which needs no key.
fn checksum(stored: &[u8]) -> Hash {
    Sealer::default().hash(stored)
}

/// Returns a tombstone without a backup.
pub(crate) fn empty() -> Bytes {
    let mut object = Vec::with_capacity(PREFIX_LEN);
    object.extend_from_slice(MAGIC);
    object.extend_from_slice(&[1, 2]);
    object.resize(PREFIX_LEN, 0);
    object.into()
}

/// Returns the tombstone of a backup.
pub(crate) fn forgotten(object: &Bytes) -> Bytes {
    with_kind(object, 1)
}

/// Returns the backup that a tombstone still has.
pub(crate) fn live(object: &Bytes) -> Bytes {
    with_kind(object, 0)
}

fn with_kind(object: &Bytes, kind: u8) -> Bytes {
    let mut object = object.to_vec();
    if let Some(place) = object.get_mut(KIND) {
        *place = kind;
    }
    object.into()
}

/// Returns what an object is, by its first bytes; `None` if it is none of a backup.
pub(crate) fn kind(object: &[u8]) -> Option<Kind> {
    let prefix = object.first_chunk::<PREFIX_LEN>()?;
    let rest = prefix.strip_prefix(MAGIC)?;
    match (rest.first()?, rest.get(1)?) {
        (1 | 2, 0) => Some(Kind::Live),
        (1 | 2, 1) => Some(Kind::Forgotten),
        (1 | 2, 2) => Some(Kind::Empty),
        (3, 0) => Some(Kind::Compaction),
        _ => None,
    }
}

/// The error of an object that is none of a backup, or of a later version.
pub(crate) fn unknown(id: Id) -> RepositoryError {
    RepositoryError::damaged(format!(
        "the object backups/{id} is damaged, or a newer version of this program made it"
    ))
}

/// Returns the length of the head that follows the first bytes.
pub(crate) fn head_length(object: &[u8]) -> Option<usize> {
    let length = Reader(object.get(12..)?).u32()? as usize;
    (1..=HEAD_LEN_MAX).contains(&length).then_some(length)
}

/// The error of an object of a backup.
pub(crate) fn damaged(id: Id, why: &str) -> RepositoryError {
    RepositoryError::damaged(format!("the object backups/{id} {why}"))
}

/// Returns the head as it is stored.
pub(crate) fn stored_head(id: Id, object: &[u8]) -> Result<&[u8]> {
    let length = head_length(object).ok_or_else(|| damaged(id, "is malformed"))?;
    let stored = object.get(PREFIX_LEN..PREFIX_LEN + length);
    let stored = stored.ok_or_else(|| damaged(id, "ends too early"))?;
    match object.get(16..PREFIX_LEN) == Some(&checksum(stored).0[..]) {
        true => Ok(stored),
        false => Err(damaged(id, "holds something else than was written")),
    }
}

/// Reads the head of a backup or of its tombstone.
pub(crate) fn head(sealer: &Sealer, id: Id, object: &[u8]) -> Result<Head> {
    let damaged = |why: &str| damaged(id, why);
    let stored = stored_head(id, object)?;
    let text = sealer.open_unknown(place(id, 0), stored, HEAD_LEN_MAX);
    let text = text.map_err(|broken| damaged(&broken.to_string()))?;
    let mut head: Head = serde_json::from_slice(&text).map_err(|_| damaged("is malformed"))?;
    // Programs before this version did not write it.
    if let Some(other) = head.id.take().filter(|stored| *stored != id.to_string()) {
        return Err(damaged(&format!("is that of the backup '{}'", other.escape_debug())));
    }
    if object.get(MAGIC.len()) != Some(&head.version()) {
        return Err(damaged("is of another version than its head"));
    }
    let is_possible = head.size <= DISK_SIZE_MAX && head.body_length <= BODY_LEN_MAX;
    match is_possible && (head.disks.is_empty() || are_laid_out(&head.disks, head.size)) {
        true => Ok(head),
        false => Err(damaged("says impossible sizes")),
    }
}

/// Reads the body of a backup or of its tombstone.
pub(crate) fn body(sealer: &Sealer, id: Id, object: &[u8], head: &Head) -> Result<Root> {
    let damaged = |why: &str| damaged(id, why);
    let start = PREFIX_LEN + head_length(object).unwrap_or_default();
    let frame = object.get(start..).unwrap_or_default();
    let length = usize::try_from(head.body_length).unwrap_or(usize::MAX);
    let content = sealer.open_unknown(place(id, 1), frame, length);
    let content = content.map_err(|broken| damaged(&broken.to_string()))?;
    if content.len() != length || format!("{:?}", sealer.hash(&content)) != head.body_hash {
        return Err(damaged("holds something else than was written"));
    }
    Root::decode(&content, head.size).ok_or_else(|| damaged("is malformed"))
}

#[cfg(test)]
mod tests {
    use super::super::disks::{DiskHead, DiskOrigin};
    use super::*;

    fn a_root(pages: u32) -> Root {
        let mut builder = RootBuilder::default();
        for number in 0..pages {
            let pack = |n: u32| PackId { session: Id::from_bytes([n as u8 % 7; 16]), number: n };
            let place =
                Stored { pack: pack(number / 9), offset: 5, length: 8, hash: Hash([1; 16]) };
            let packs: Vec<_> = (0..number % 5).map(|n| pack(number + n)).collect();
            match number % 4 {
                0 => builder.zero(),
                _ => {
                    builder.page(77, 3, &packs).unwrap();
                    builder.place(number as usize, place).unwrap();
                }
            }
        }
        builder.finish()
    }

    fn a_head(pages: u64) -> Head {
        Head {
            name: "vm1".to_owned(),
            size: (pages * PAGE_SPAN).saturating_sub(100),
            time: 1,
            origin: DiskOrigin { bitmap: Some("b".to_owned()), ..DiskOrigin::default() },
            imported: None,
            disks: Vec::new(),
            data: 0,
            added: 0,
            body_length: 0,
            body_hash: String::new(),
            id: None,
        }
    }

    #[test]
    fn backups_are_read_as_they_were_written() {
        let id = Id::from_bytes([4; 16]);
        for sealer in [Sealer::default(), Sealer::encrypting(&[9; 32])] {
            for pages in [0, 1, 100] {
                let root = a_root(pages);
                let object = encode(&sealer, id, &a_head(u64::from(pages)), &root).unwrap();
                for (object, expected) in
                    [(object.clone(), Kind::Live), (forgotten(&object), Kind::Forgotten)]
                {
                    assert_eq!(kind(&object), Some(expected));
                    let found = head(&sealer, id, &object).unwrap();
                    assert_eq!((&*found.name, found.origin.bitmap.as_deref()), ("vm1", Some("b")));
                    assert_eq!(body(&sealer, id, &object, &found).unwrap(), root);
                }
                let page = root.pages().iter().flatten().last();
                assert!(page.is_none_or(|page| root.packs_of(page).count() <= 4));
            }
        }
        assert_eq!(kind(&empty()), Some(Kind::Empty));
    }

    #[test]
    fn backups_of_several_disks_are_another_version_that_older_programs_refuse() {
        let (id, sealer) = (Id::from_bytes([4; 16]), Sealer::default());
        let disk = |name: &str, offset, size| DiskHead {
            name: name.to_owned(),
            offset,
            size,
            origin: DiskOrigin { identity: Some(format!("of {name}")), ..DiskOrigin::default() },
        };
        let mut several = a_head(3);
        several.disks = vec![disk("a", 0, 7), disk("b", PAGE_SPAN, 2 * PAGE_SPAN - 100)];
        let object = encode(&sealer, id, &several, &a_root(3)).unwrap();
        let before = b"nbdroot\x01";
        assert_ne!(&object[..8], before, "what is compared there");
        let found = head(&sealer, id, &object).unwrap();
        assert_eq!((found.disks.len(), found.bytes()), (2, 2 * PAGE_SPAN - 93));
        let one = found.of_disk(Some("b")).unwrap();
        assert_eq!((&*one.name, one.origin.identity.as_deref()), ("vm1#b", Some("of b")));
        assert_eq!((one.size, one.disks.len()), (2 * PAGE_SPAN - 100, 1));
        let refused = |name: Option<&str>| found.of_disk(name).unwrap_err().to_string();
        assert!(refused(None).contains("named disks (a, b)"));
        assert!(refused(Some("c")).contains("no disk 'c' (it has a, b)"));
        let single = a_head(3).of_disk(Some("a")).unwrap_err().to_string();
        assert!(single.contains("of one disk"), "{single}");
        // Neither is taken for the other, and what comes later for neither.
        for version in [0, 1, 3, 0xff] {
            let mut other = object.to_vec();
            other[7] = version;
            assert!(kind(&other).is_none() || head(&sealer, id, &other).is_err());
        }
        several.disks.truncate(1);
        let object = encode(&sealer, id, &several, &a_root(3)).unwrap();
        assert!(head(&sealer, id, &object).is_err(), "the disks end elsewhere");
    }

    #[test]
    fn every_change_of_a_backup_is_noticed() {
        let (id, sealer) = (Id::from_bytes([4; 16]), Sealer::default());
        let root = a_root(40);
        let object = encode(&sealer, id, &a_head(40), &root).unwrap();
        let read = |object: &[u8]| {
            let head = head(&sealer, id, object).ok()?;
            body(&sealer, id, object, &head).ok()
        };
        for at in PREFIX_LEN - 20..object.len() {
            let mut damaged = object.to_vec();
            damaged[at] ^= 0x10;
            assert!(read(&damaged).is_none_or(|found| found == root), "byte {at}");
            assert!(read(&object[..at]).is_none());
        }
    }

    #[test]
    fn damaged_bodies_are_refused_without_a_panic() {
        let bytes = a_root(12).encode().unwrap();
        let size = 12 * PAGE_SPAN;
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                if let Some(root) = Root::decode(&damaged, size) {
                    root.pages()
                        .iter()
                        .flatten()
                        .for_each(|page| assert!(root.packs_of(page).count() < 6));
                }
            }
            assert_eq!(Root::decode(&bytes[..at], size), None);
        }
    }
}
