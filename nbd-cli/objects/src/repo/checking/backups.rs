//! Checks the maps of backups.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join_all;

use super::super::error::{RepositoryErrorKind, Result};
use super::super::id::Key;
use super::super::listing::BackupInfo;
use super::super::map::Map;
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS, Page};
use super::super::protocol::Moves;
use super::super::repository::Repository;
use super::super::root::PageRoot;
use super::super::seal::{Hash, Sealer};
use super::super::stored::Stored;
use super::Needs;

/// Pages that are read at a time: several requests, in a few MiB of memory.
const PAGES: usize = 128;

impl Repository {
    pub(super) async fn check_backup(
        &self,
        info: &BackupInfo,
        moves: &Moves,
        needs: &mut Needs,
    ) -> Result<()> {
        let number = needs.names.len();
        let name = info.head.as_ref().map_or_else(|_| "?".to_owned(), |head| head.name.clone());
        needs.names.push((info.id, name));
        let map = match Map::open(self, moves, info.id).await {
            Ok(map) => map,
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                needs.problems.entry(error.to_string()).or_default().insert(number);
                return Ok(());
            }
            // It was forgotten meanwhile.
            Err(error) if error.kind() == RepositoryErrorKind::NotFound => {
                needs.names.pop();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for pack in map.root().packs() {
            needs.packs.entry(*pack).or_default();
        }
        let pages: Vec<_> = map.root().pages().iter().enumerate().collect();
        for pages in pages.chunks(PAGES) {
            let mut unchecked = Vec::new();
            for &(number, page) in pages {
                let Some(page) = page else { continue };
                let end = needs.packs.entry(page.stored.pack).or_default();
                *end = page.stored.range().end.max(*end);
                let said = said(&map, number, page);
                if needs.pages.insert(said) {
                    unchecked.push((number, page, said));
                }
            }
            let reads = join_all(unchecked.iter().map(|(number, ..)| map.page(*number))).await;
            for ((page_number, page, said), content) in unchecked.into_iter().zip(reads) {
                let problems = self.check_page(&map, (page_number, page), content, needs).await?;
                if !problems.is_empty() {
                    // Other backups with this page are named as well.
                    needs.pages.remove(&said);
                }
                for problem in problems {
                    needs.problems.entry(problem).or_default().insert(number);
                }
            }
        }
        Ok(())
    }

    /// Checks a page, and what the backup says of it.
    async fn check_page(
        &self,
        map: &Map,
        (number, page): (usize, &PageRoot),
        content: Result<Arc<Page>>,
        needs: &mut Needs,
    ) -> Result<Vec<String>> {
        let content = match content {
            Ok(content) => content,
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                return Ok(vec![error.to_string()]);
            }
            Err(error) => return Err(error),
        };
        let mut problems = Vec::new();
        if !page_is_as_said(map, page, &content) {
            problems.push(format!(
                "the backup {} lists other packs or blocks for its page {number} than the page has",
                map.id()
            ));
        }
        let first = number as u64 * PAGE_BLOCKS;
        for (block, stored) in (first..).zip(&content.blocks) {
            let Some(stored) = stored else { continue };
            let end = needs.packs.entry(stored.pack).or_default();
            *end = stored.range().end.max(*end);
            if let Some(why) = self.check_block(map, block, stored, needs).await? {
                problems.push(format!(
                    "the backup {} is damaged at {}: {why}",
                    map.id(),
                    map.head().place(block * BLOCK_SIZE)
                ));
                // The first one tells enough of a page.
                break;
            }
        }
        Ok(problems)
    }

    /// Checks what a page says of a block: by what is in its pack, if the pack was read; the last
    /// one of a disk always, because its length is its own.
    async fn check_block(
        &self,
        map: &Map,
        block: u64,
        stored: &Stored,
        needs: &mut Needs,
    ) -> Result<Option<String>> {
        let length = map.block_length(block);
        let key = Key::Pack(stored.pack);
        if let Some((footer, short)) = needs.sound.get(&stored.pack) {
            match needs.directories.lists(self, *footer, stored).await? {
                None => return Ok(None),
                Some(false) => return Ok(Some(format!("{key} has no such block"))),
                Some(true) => {}
            }
            let short = short.iter().find(|(offset, _)| *offset == stored.offset);
            let own = short.map_or(BLOCK_SIZE as usize, |(_, length)| *length as usize);
            let why = || format!("its block in {key} has {own} bytes, and the disk {length} there");
            return Ok((own != length).then(why));
        }
        if (block + 1) * BLOCK_SIZE < map.size()
            || !needs.last.insert((stored.pack, stored.offset, length))
        {
            return Ok(None);
        }
        let frame = match self.objects.read_range(key, stored.range()).await {
            Ok(Some(frame)) => frame,
            // That the pack is missing or too short is noticed elsewhere.
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => return Ok(None),
            Err(error) => return Err(error),
        };
        let opened = self.objects.sealer.open(stored.place(), &frame, length, stored.hash);
        Ok(opened.err().map(|broken| {
            needs.last.remove(&(stored.pack, stored.offset, length));
            format!("its block in {key} {broken}")
        }))
    }
}

/// Returns whether a page has the packs and as many blocks as its backup says: a collector and a
/// writer rely on it without reading the page.
fn page_is_as_said(map: &Map, page: &PageRoot, content: &Page) -> bool {
    let listed: BTreeSet<_> = map.root().packs_of(page).collect();
    content.packs().iter().all(|pack| listed.contains(pack))
        && content.blocks.iter().flatten().count() == usize::from(page.data_blocks)
}

/// Everything that a backup says of a page: what was checked need not be checked again if all of it
/// is the same, and the number of blocks as well.
fn said(map: &Map, number: usize, page: &PageRoot) -> Hash {
    let stored = &page.stored;
    let mut bytes = Vec::new();
    let mut add = |pack: super::super::id::PackId| {
        bytes.extend_from_slice(pack.session.bytes());
        bytes.extend_from_slice(&pack.number.to_le_bytes());
    };
    add(stored.pack);
    map.root().packs_of(page).for_each(add);
    for word in [stored.offset, stored.length, page.content, u32::from(page.data_blocks)] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&stored.hash.0);
    let start = number as u64 * PAGE_BLOCKS * BLOCK_SIZE;
    let rest = map.size().saturating_sub(start).min(PAGE_BLOCKS * BLOCK_SIZE);
    bytes.extend_from_slice(&rest.to_le_bytes());
    Sealer::default().hash(&bytes)
}
