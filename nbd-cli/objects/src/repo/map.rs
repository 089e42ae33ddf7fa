//! The map of a backup: its root, and its pages as they are needed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::{RepositoryError, Result};
use super::head::Head;
use super::id::{Folder, Id, Key, PackId};
use super::objects::Objects;
use super::page::{BLOCK_SIZE, PAGE_BLOCKS, Page};
use super::protocol::{Answer, Moves, Object, Request};
use super::repository::Repository;
use super::root::{self, PageRoot, Root};

/// Pages that are kept: 256 are 8 GiB of a disk, in about 6 MiB of memory.
const PAGES_KEPT: usize = 256;
/// Pages that one request reads, if they are next to each other.
const PAGES_READ: usize = 16;
/// Requests for pages at a time.
const READS: usize = 8;

/// Maps of a backup that are looked for, if each is removed meanwhile.
const TRIES: u32 = 4;

/// The map of a backup.
pub(crate) struct Map {
    objects: Arc<Objects>,
    id: Id,
    head: Head,
    root: Root,
    pages: Mutex<Pages>,
    /// Held while the pages of a group are read, so that each is read once.
    reads: [tokio::sync::Mutex<()>; READS],
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Map").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Pages {
    kept: HashMap<usize, (Arc<Page>, u64)>,
    uses: u64,
}

impl Pages {
    fn find(&mut self, number: usize) -> Option<Arc<Page>> {
        self.uses += 1;
        let (page, used) = self.kept.get_mut(&number)?;
        *used = self.uses;
        Some(Arc::clone(page))
    }

    fn keep(&mut self, number: usize, page: Arc<Page>) {
        self.uses += 1;
        if self.kept.len() >= PAGES_KEPT {
            let oldest = self.kept.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(number, _)| *number) {
                self.kept.remove(&oldest);
            }
        }
        self.kept.insert(number, (page, self.uses));
    }
}

impl Map {
    /// Opens the map of a backup, as the compactions say. Its packs stay, because a session is
    /// registered.
    pub(crate) async fn open(repository: &Repository, moves: &Moves, id: Id) -> Result<Self> {
        let found = repository.objects.carry_out(Request::Get(Key::Backup(id))).await?;
        let Answer::Found(Object::Live(backup)) = found else {
            return Err(RepositoryError::not_found(format!(
                "{} has no backup {id}, or it was forgotten",
                repository.name()
            )));
        };
        let mut chosen = moves.map_of(id);
        for _ in 0..TRIES {
            let Some((compaction, moved)) = chosen else {
                return Self::of(repository, id, &backup.object, None);
            };
            match repository.objects.carry_out(Request::GetMap(compaction, moved)).await? {
                Answer::Found(Object::Live(map)) => {
                    return Self::of(repository, id, &backup.object, Some(&map.object));
                }
                // It was moved once more.
                _ => chosen = repository.moves().await?.map_of(id),
            }
        }
        Err(RepositoryError::damaged(format!("the map of the backup {id} is moved all the time")))
    }

    /// Opens the map in the object of a backup, or the one that it has instead.
    pub(crate) fn of(
        repository: &Repository,
        id: Id,
        object: &[u8],
        map: Option<&[u8]>,
    ) -> Result<Self> {
        let sealer = &repository.objects.sealer;
        let head = root::head(sealer, id, object)?;
        let root = match map {
            None => root::body(sealer, id, object, &head)?,
            Some(map) => Root::decode(map, head.size).ok_or_else(|| {
                let message = format!("a compaction has a malformed map of the backup {id}");
                RepositoryError::damaged(message)
            })?,
        };
        let objects = Arc::clone(&repository.objects);
        Ok(Self { objects, id, head, root, pages: Mutex::default(), reads: Default::default() })
    }

    pub(crate) fn id(&self) -> Id {
        self.id
    }

    pub(crate) fn head(&self) -> &Head {
        &self.head
    }

    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.head.size
    }

    /// Length of a block in bytes: the last one ends with the disk.
    pub(crate) fn block_length(&self, block: u64) -> usize {
        let start = block.saturating_mul(BLOCK_SIZE);
        self.size().saturating_sub(start).min(BLOCK_SIZE) as usize
    }

    /// Returns whether a page is known to be zero without a request.
    pub(crate) fn is_zero(&self, number: usize) -> bool {
        matches!(self.root.pages().get(number), Some(None))
    }

    /// Returns a page that is in memory.
    pub(crate) fn kept(&self, number: usize) -> Option<Arc<Page>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).find(number)
    }

    fn blocks_of(&self, number: usize) -> usize {
        let first = number as u64 * PAGE_BLOCKS;
        self.size().div_ceil(BLOCK_SIZE).saturating_sub(first).min(PAGE_BLOCKS) as usize
    }

    /// Returns a page.
    pub(crate) async fn page(&self, number: usize) -> Result<Arc<Page>> {
        let page = self.root.pages().get(number);
        let page = page.ok_or_else(|| RepositoryError::invalid("the disk has no such page"))?;
        let Some(page) = page else {
            return Ok(Arc::new(Page { blocks: vec![None; self.blocks_of(number)] }));
        };
        if let Some(page) = self.kept(number) {
            return Ok(page);
        }
        let _alone = self.reads[number / PAGES_READ % READS].lock().await;
        if let Some(page) = self.kept(number) {
            return Ok(page);
        }
        self.read(number, page).await
    }

    /// Reads a page, and those behind it that are next to it in its pack.
    async fn read(&self, number: usize, first: &PageRoot) -> Result<Arc<Page>> {
        let mut group = vec![*first];
        let last = (number / PAGES_READ + 1) * PAGES_READ;
        for page in self.root.pages().iter().take(last).skip(number + 1) {
            let end = group[group.len() - 1].stored.range().end;
            match page {
                Some(page)
                    if page.stored.pack == first.stored.pack
                        && page.stored.range().start == end =>
                {
                    group.push(*page);
                }
                _ => break,
            }
        }
        let start = first.stored.range().start;
        let end = group[group.len() - 1].stored.range().end;
        let pack = first.stored.pack;
        let bytes = self.objects.read_range(Key::Pack(pack), start..end).await?;
        let bytes = bytes.ok_or_else(|| missing(pack))?;
        let mut wanted = None;
        for (number, page) in (number..).zip(&group) {
            let range = page.stored.range();
            let frame = bytes.get((range.start - start) as usize..(range.end - start) as usize);
            let opened = self.open_page(number, page, frame.unwrap_or_default()).map(Arc::new);
            if let Ok(page) = &opened {
                let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
                pages.keep(number, Arc::clone(page));
            }
            // The others are read again, and refused then, when they are needed.
            wanted.get_or_insert(opened);
        }
        wanted.unwrap_or_else(|| Err(missing(pack)))
    }

    fn open_page(&self, number: usize, page: &PageRoot, frame: &[u8]) -> Result<Page> {
        let stored = page.stored;
        let damaged = |why: &str| {
            RepositoryError::damaged(format!(
                "the map page {number} of the backup {} in {} {why}",
                self.id,
                Key::Pack(stored.pack)
            ))
        };
        let content =
            self.objects.sealer.open(stored.place(), frame, page.content as usize, stored.hash);
        let content = content.map_err(|broken| damaged(&broken.to_string()))?;
        Page::decode(&content, self.blocks_of(number)).ok_or_else(|| damaged("is malformed"))
    }
}

impl Repository {
    /// Reads what the compactions move, as far as they can be read.
    pub(crate) async fn moves(&self) -> Result<Moves> {
        let mut moves = Moves::default();
        for listed in self.objects.list(Folder::Moved).await? {
            let Key::Moved(id) = listed.key else { continue };
            let found = self.objects.carry_out(Request::GetMoves(id)).await?;
            if let Answer::Found(Object::Compaction(compaction)) = found {
                moves.add(id, compaction.moved);
            }
        }
        Ok(moves)
    }
}

/// The error of a pack that is not there.
pub(crate) fn missing(pack: PackId) -> RepositoryError {
    RepositoryError::damaged(format!("the pack {} is missing", Key::Pack(pack)))
}
