//! A repository as large as one wants, of which hardly anything takes memory: for tests.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use super::disks::DiskOrigin;
use super::error::Result;
use super::head::Head;
use super::id::{Id, Key, PackId};
use super::pack::{FrameKind, PACK_SIZE, PackBuilder};
use super::page::{BLOCK_SIZE, PAGE_BLOCKS, PAGE_SPAN, Page};
use super::root::{self, RootBuilder};
use super::seal::{Hash, Sealer};
use super::stored::Stored;

/// Bytes of a frame of a block that is not compressed.
const FRAME: u32 = BLOCK_SIZE as u32 + 1;
/// Blocks of a pack.
const BLOCKS: u64 = PACK_SIZE as u64 / BLOCK_SIZE + 1;
/// Blocks of a page that a backup changes.
const CHANGED: u64 = 64;

/// What the repository holds: the backups of a disk without zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Large {
    /// Bytes of the disk, a multiple of 32 MiB.
    pub size: u64,
    /// Backups.
    pub backups: u64,
    /// Map pages that each backup changes. They are in the first tenth of the disk.
    pub changed: u64,
}

/// A page as a backup has it.
#[derive(Clone, Default)]
struct Place {
    content: u32,
    packs: Vec<PackId>,
    stored: Option<Stored>,
}

/// What is made, one backup after the other.
struct Making<'a> {
    large: Large,
    put: &'a mut dyn FnMut(String, Bytes),
    sealer: Sealer,
    /// A pack whose frames are blocks of zeroes that were not compressed. All are this one.
    blocks: Bytes,
    hash: Hash,
    first: Id,
    /// Blocks that were changed, by their pages.
    changed: HashMap<u64, BTreeMap<u64, Stored>>,
    pages: Vec<Place>,
}

impl Large {
    /// Gives the names and contents of all objects but `repo.json`, and returns the backups.
    ///
    /// # Errors
    ///
    /// If the maps are too long.
    pub fn make(self, mut put: impl FnMut(String, Bytes)) -> Result<Vec<Id>> {
        let sealer = Sealer::default();
        let (hash, first) = (sealer.hash(&[0; BLOCK_SIZE as usize]), Id::random_at(1 << 40)?);
        let blocks = Bytes::from(vec![0; (BLOCKS * u64::from(FRAME)) as usize + 40]);
        let pages = vec![Place::default(); (self.size / PAGE_SPAN) as usize];
        let changed = HashMap::new();
        let mut making =
            Making { large: self, put: &mut put, sealer, blocks, hash, first, changed, pages };
        let mut ids = Vec::new();
        for number in 0..self.backups {
            let id = if number == 0 { first } else { Id::random_at((1 << 40) + number)? };
            making.backup(id, number)?;
            ids.push(id);
        }
        Ok(ids)
    }
}

impl Making<'_> {
    fn block(&self, session: Id, number: u64) -> Stored {
        let pack = PackId { session, number: (number / BLOCKS) as u32 };
        let offset = (number % BLOCKS) as u32 * FRAME;
        Stored { pack, offset, length: FRAME, hash: self.hash }
    }

    fn backup(&mut self, id: Id, number: u64) -> Result<()> {
        let pages = self.pages.len() as u64;
        let mut blocks = 0;
        let mut changed: Vec<u64> = match number {
            0 => (0..pages).collect(),
            _ => (0..self.large.changed)
                .map(|at| (at * 7919 + number * 104_729) % (pages / 10).max(1))
                .collect(),
        };
        changed.sort_unstable();
        changed.dedup();
        if number == 0 {
            blocks = pages * PAGE_BLOCKS;
        } else {
            for page in &changed {
                for at in 0..CHANGED {
                    let stored = self.block(id, blocks);
                    let of_page = self.changed.entry(*page).or_default();
                    of_page.insert((at * 8 + number) % PAGE_BLOCKS, stored);
                    blocks += 1;
                }
            }
        }
        let mut packs = blocks.div_ceil(BLOCKS) as u32;
        for number in 0..packs {
            let key = Key::Pack(PackId { session: id, number });
            (self.put)(key.to_string(), self.blocks.clone());
        }
        let mut pack = PackBuilder::new(PackId { session: id, number: packs });
        for page in changed {
            self.page(page, &mut pack)?;
            if pack.len() >= PACK_SIZE {
                packs += 1;
                let next = PackBuilder::new(PackId { session: id, number: packs });
                self.finish(std::mem::replace(&mut pack, next))?;
            }
        }
        self.finish(pack)?;
        let mut root = RootBuilder::default();
        for (number, page) in self.pages.iter().enumerate() {
            root.page(page.content, PAGE_BLOCKS as u16, &page.packs)?;
            if let Some(stored) = page.stored {
                root.place(number, stored)?;
            }
        }
        let object = root::encode(&self.sealer, id, &self.head(number), &root.finish())?;
        (self.put)(Key::Backup(id).to_string(), object);
        Ok(())
    }

    fn page(&mut self, number: u64, pack: &mut PackBuilder) -> Result<()> {
        let first = number * PAGE_BLOCKS;
        let mut page = Page {
            blocks: (first..first + PAGE_BLOCKS)
                .map(|number| Some(self.block(self.first, number)))
                .collect(),
        };
        for (at, stored) in self.changed.get(&number).into_iter().flatten() {
            page.blocks[*at as usize] = Some(*stored);
        }
        let content = page.encode();
        let hash = self.sealer.hash(&content);
        let packed = Sealer::compress(&content);
        let stored = pack.add(&self.sealer, (FrameKind::Page, number), packed, hash)?;
        let (content, packs, stored) = (content.len() as u32, page.packs(), Some(stored));
        self.pages[number as usize] = Place { content, packs, stored };
        Ok(())
    }

    fn finish(&mut self, pack: PackBuilder) -> Result<()> {
        if pack.len() > 0 {
            let key = Key::Pack(pack.id()).to_string();
            (self.put)(key, pack.finish(&self.sealer)?);
        }
        Ok(())
    }

    fn head(&self, number: u64) -> Head {
        Head {
            name: "vm".to_owned(),
            size: self.large.size,
            time: (1 << 40) + number,
            origin: DiskOrigin::default(),
            imported: None,
            disks: Vec::new(),
            data: self.large.size,
            added: 0,
            body_length: 0,
            body_hash: String::new(),
            id: None,
        }
    }
}
