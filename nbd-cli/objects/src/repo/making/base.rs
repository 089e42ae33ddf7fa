//! What a backup takes from the one on which it builds.

use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS};
use super::super::seal::Hash;
use super::super::stored::Stored;
use super::new_backup::LOOKS;
use super::{Piece, Session};

impl Session {
    /// Gives at most so many blocks that are as in the base, and returns how many were taken. The
    /// next one, if there is one, has to be read and given as data: the repository does not have it
    /// any more, or the base is of a smaller disk. If the sizes differ, that is so for the block in
    /// which the smaller disk ends, too: its length is another one.
    ///
    /// # Errors
    ///
    /// If there is no base, and as for all requests to the store.
    pub async fn unchanged(&mut self, blocks: u64) -> Result<u64> {
        let base = self.base.as_ref().ok_or_else(no_base)?.size();
        let same = match base == self.new.size {
            true => self.blocks(),
            false => base.min(self.new.size) / BLOCK_SIZE,
        };
        let (begin, end) = (self.given, self.given.saturating_add(blocks).min(same));
        while self.given < end {
            let number = (self.given / PAGE_BLOCKS) as usize;
            let page_end = ((number as u64 + 1) * PAGE_BLOCKS).min(self.blocks());
            if self.given.is_multiple_of(PAGE_BLOCKS)
                && end >= page_end
                && self.is_shared(number).await?
            {
                self.given = page_end;
                self.give(Piece::Page(number)).await?;
                continue;
            }
            let first = self.given;
            let Some(found) = self.in_base(first..end.min(page_end)).await? else { break };
            let length = found.len() as u64;
            let taken: Vec<_> = found.into_iter().map_while(|it| self.may_take(it)).collect();
            let count = taken.len() as u64;
            self.given += count;
            self.give(Piece::Stored(taken)).await?;
            if count < length {
                break;
            }
        }
        Ok(self.given - begin)
    }

    fn may_take(&self, block: Option<Stored>) -> Option<Option<Stored>> {
        block.is_none_or(|stored| self.packs.holds(&stored)).then_some(block)
    }

    /// Returns whether a page of the base is taken as it is.
    async fn is_shared(&self, number: usize) -> Result<bool> {
        let base = self.base.as_ref().ok_or_else(no_base)?;
        // Its last page has another number of blocks, if the disk was resized.
        let Some(page) = base.root().pages().get(number).filter(|_| base.size() == self.new.size)
        else {
            return Ok(false);
        };
        let Some(page) = page else { return Ok(true) };
        let packs: Vec<_> = base.root().packs_of(page).collect();
        if !self.packs.holds(&page.stored) || !packs.iter().all(|&pack| self.packs.has(pack)) {
            return Ok(false);
        }
        let pages = base.root().pages().len();
        if (number + pages - self.first_look) % pages >= LOOKS {
            return Ok(true);
        }
        // What is lost in a backup would be lost in all later ones.
        match base.page(number).await {
            Ok(content) => Ok(content.packs().iter().all(|pack| packs.contains(pack))
                && content.blocks.iter().flatten().all(|block| self.packs.holds(block))),
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns where the base has these blocks, which are of one page; `None` if that is lost.
    async fn in_base(&self, blocks: std::ops::Range<u64>) -> Result<Option<Vec<Option<Stored>>>> {
        let base = self.base.as_ref().ok_or_else(no_base)?;
        let number = (blocks.start / PAGE_BLOCKS) as usize;
        let page = match base.page(number).await {
            Ok(page) => page,
            // What is lost is read from the disk again.
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => return Ok(None),
            Err(error) => return Err(error),
        };
        let first = blocks.start - number as u64 * PAGE_BLOCKS;
        let range = first as usize..(first + blocks.end - blocks.start) as usize;
        let found = page.blocks.get(range).map(<[_]>::to_vec);
        let smaller = || RepositoryError::invalid("the base is of a smaller disk");
        found.ok_or_else(smaller).map(Some)
    }

    /// Returns for each block what it may be equal to.
    pub(super) async fn expected(
        &self,
        blocks: std::ops::Range<u64>,
    ) -> Result<Vec<Option<Stored>>> {
        let mut expected = Vec::new();
        let base_blocks = self.base.as_ref().map_or(0, |base| base.size().div_ceil(BLOCK_SIZE));
        let mut at = blocks.start;
        while at < blocks.end.min(base_blocks) {
            let page_end = (at / PAGE_BLOCKS + 1) * PAGE_BLOCKS;
            let end = page_end.min(blocks.end).min(base_blocks);
            let found = self.in_base(at..end).await?;
            let found = found.unwrap_or_else(|| vec![None; (end - at) as usize]);
            let holds = |stored: &Stored| self.packs.holds(stored);
            expected.extend(found.into_iter().map(|block| block.filter(holds)));
            at = end;
        }
        expected.resize((blocks.end - blocks.start) as usize, None);
        Ok(expected)
    }

    /// Returns where the same page is, if the base or an interrupted session has it.
    pub(super) fn same_page(&self, number: usize, hash: Hash) -> Option<Stored> {
        let in_base = || {
            let page = self.base.as_ref()?.root().pages().get(number)?.as_ref()?;
            let is_same = page.stored.hash == hash && self.packs.holds(&page.stored);
            is_same.then_some(page.stored)
        };
        in_base().or_else(|| self.known.page(hash))
    }
}

pub(super) fn no_base() -> RepositoryError {
    RepositoryError::invalid("there is no backup to build on")
}
