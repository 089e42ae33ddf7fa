//! Copies frames, and writes map pages anew.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use futures_util::future::join_all;
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::super::id::{Key, PackId};
use super::super::super::map::Map;
use super::super::super::pack::{FrameKind, PACK_SIZE};
use super::super::super::page::{BLOCK_SIZE, PAGE_BLOCKS, Page};
use super::super::super::root::{PageRoot, Root, RootBuilder};
use super::super::super::seal::{Hash, Sealer};
use super::super::super::stored::Stored;
use super::{Compactor, FRAMES_MAX, PAGES, page, place_of};

/// Requests for frames at a time.
const READS: usize = 4;
/// Longest request, in bytes.
const READ_MAX: u64 = 8 << 20;
/// Most bytes between frames that are read for nothing.
const GAP_MAX: u64 = 256 << 10;

/// Frames that one request reads, with the numbers of their blocks.
struct Group {
    pack: PackId,
    range: Range<u64>,
    frames: Vec<(u64, Stored)>,
}

impl Compactor<'_> {
    /// Writes a map anew. Pages that the last one had are taken from that.
    pub(super) async fn rewrite(&mut self, map: &Map, last: Option<&(Map, Root)>) -> Result<Root> {
        let pages = map.root().pages();
        let mut root = RootBuilder::default();
        let mut pending = Vec::new();
        let mut pending_len = 0;
        for start in (0..pages.len()).step_by(PAGES) {
            let numbers = start..(start + PAGES).min(pages.len());
            let affected = |number: &usize| {
                let page = pages[*number].as_ref();
                page.is_some_and(|page| {
                    self.is_affected(map.root(), page) && of_last(last, *number, page).is_none()
                })
            };
            let affected: Vec<_> = numbers.clone().filter(affected).collect();
            let reads = join_all(affected.iter().map(|number| page(map, *number))).await;
            let mut contents = HashMap::new();
            for (number, content) in affected.into_iter().zip(reads) {
                // What cannot be read stays where it is.
                contents.extend(content?.map(|content| (number, content)));
            }
            self.copy(&contents).await?;
            for number in numbers {
                let Some(page) = &pages[number] else {
                    root.zero();
                    continue;
                };
                if let Some((root_of_last, page)) = of_last(last, number, page) {
                    keep(&mut root, number, root_of_last, page)?;
                    continue;
                }
                let Some(content) = contents.remove(&number) else {
                    keep(&mut root, number, map.root(), page)?;
                    continue;
                };
                let moved = self.moved_page(&content);
                let encoded = moved.encode();
                let hash = self.repository.objects.sealer.hash(&encoded);
                root.page(encoded.len() as u32, page.data_blocks, &moved.packs())?;
                let stays =
                    hash == page.stored.hash && !self.choice.packs.contains(&page.stored.pack);
                let found = match stays {
                    true => Some(page.stored),
                    false => self.pages.get(&hash).copied().or_else(|| self.known.page(hash)),
                };
                match found {
                    Some(stored) => root.place(number, stored)?,
                    None => {
                        let packed = Sealer::compress(&encoded);
                        pending_len += packed.len();
                        pending.push((number, packed, hash));
                    }
                }
            }
            if pending_len >= PACK_SIZE {
                self.send_pages(&mut pending, &mut root).await?;
                pending_len = 0;
            }
        }
        self.send_pages(&mut pending, &mut root).await?;
        Ok(root.finish())
    }

    /// Stores pages, which are together in their packs.
    async fn send_pages(
        &mut self,
        pending: &mut Vec<(usize, Vec<u8>, Hash)>,
        root: &mut RootBuilder,
    ) -> Result<()> {
        for (number, packed, hash) in pending.drain(..) {
            let what = (FrameKind::Page, number as u64);
            let stored = self.sender.store(what, packed, hash).await?;
            root.place(number, stored)?;
            self.pages.insert(hash, stored);
        }
        Ok(())
    }

    /// Returns a page with the blocks where they are now.
    fn moved_page(&self, content: &Page) -> Page {
        let moved = |stored: &Stored| *self.moved.get(&place_of(stored)).unwrap_or(stored);
        Page { blocks: content.blocks.iter().map(|block| block.as_ref().map(moved)).collect() }
    }

    /// Copies the blocks of these pages that are in chosen packs.
    async fn copy(&mut self, contents: &HashMap<usize, Arc<Page>>) -> Result<()> {
        let mut frames = Vec::new();
        for (number, page) in contents {
            let first = *number as u64 * PAGE_BLOCKS;
            for (index, stored) in (first..).zip(&page.blocks) {
                if let Some(stored) = stored
                    && self.choice.packs.contains(&stored.pack)
                    && !self.moved.contains_key(&place_of(stored))
                {
                    frames.push((index, *stored));
                }
            }
        }
        frames.sort_unstable_by_key(|(index, stored)| (place_of(stored), *index));
        frames.dedup_by_key(|(_, stored)| place_of(stored));
        let mut groups: Vec<Group> = Vec::new();
        let mut count = self.moved.len();
        for (index, stored) in frames {
            let known = self.known.block(stored.hash).or(self.latest.get(&stored.hash).copied());
            let is_other = |known: &Stored| {
                !self.choice.packs.contains(&known.pack) && self.packs.holds(known)
            };
            if let Some(known) = known.filter(is_other) {
                self.moved.insert(place_of(&stored), known);
                continue;
            }
            if count >= FRAMES_MAX {
                self.is_full = true;
                break;
            }
            count += 1;
            let range = stored.range();
            match groups.last_mut() {
                Some(group)
                    if group.pack == stored.pack
                        && range.start <= group.range.end.saturating_add(GAP_MAX)
                        && range.end.saturating_sub(group.range.start) <= READ_MAX =>
                {
                    group.range.end = group.range.end.max(range.end);
                    group.frames.push((index, stored));
                }
                _ => groups.push(Group { pack: stored.pack, range, frames: vec![(index, stored)] }),
            }
        }
        let repository = self.repository.clone();
        let reads = groups.into_iter().map(|group| {
            let repository = repository.clone();
            async move { read(&repository, group).await }
        });
        let mut reads = futures_util::stream::iter(reads).buffered(READS);
        while let Some(read) = reads.try_next().await? {
            for (index, stored, packed) in read {
                let Some(packed) = packed else {
                    self.damaged.insert(stored.pack);
                    continue;
                };
                let what = (FrameKind::Block, index);
                let copy = self.sender.store(what, packed, stored.hash).await?;
                self.moved.insert(place_of(&stored), copy);
                self.copied += u64::from(stored.length);
            }
            if let Some(told) = &self.options.on_copied {
                told(self.copied, self.choice.needed);
            }
        }
        Ok(())
    }
}

/// Adds a page as another map has it.
fn keep(root: &mut RootBuilder, number: usize, of: &Root, page: &PageRoot) -> Result<()> {
    let packs: Vec<_> = of.packs_of(page).collect();
    root.page(page.content, page.data_blocks, &packs)?;
    root.place(number, page.stored)
}

/// Returns where the last map has the same page now.
fn of_last<'a>(
    last: Option<&'a (Map, Root)>,
    number: usize,
    page: &PageRoot,
) -> Option<(&'a Root, &'a PageRoot)> {
    let (map, root) = last?;
    let before = map.root().pages().get(number)?.as_ref()?;
    let is_same = before.stored == page.stored
        && before.data_blocks == page.data_blocks
        && before.content == page.content;
    let now = root.pages().get(number)?.as_ref()?;
    is_same.then_some((root, now))
}

/// Reads frames, and compares them with their hashes. Those that are damaged are `None`.
async fn read(
    repository: &super::Repository,
    group: Group,
) -> Result<Vec<(u64, Stored, Option<Vec<u8>>)>> {
    let Group { pack, range, frames } = group;
    let bytes = match repository.objects.read_range(Key::Pack(pack), range.clone()).await {
        Err(error) if error.kind() == RepositoryErrorKind::Damaged => None,
        bytes => bytes?,
    };
    let bytes = bytes.unwrap_or_default();
    let sealer = repository.objects.sealer.clone();
    let open = move || {
        let frames = frames.into_iter().map(|(index, stored)| {
            let own = stored.range();
            let frame =
                bytes.get((own.start - range.start) as usize..(own.end - range.start) as usize);
            let packed = frame.and_then(|frame| {
                sealer.packed(stored.place(), frame, BLOCK_SIZE as usize, stored.hash).ok()
            });
            (index, stored, packed)
        });
        frames.collect()
    };
    tokio::task::spawn_blocking(open)
        .await
        .map_err(|error| RepositoryError::invalid(format!("a pack could not be read: {error}")))
}
