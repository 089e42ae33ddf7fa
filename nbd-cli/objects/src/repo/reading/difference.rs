//! What a backup has that another one does not have, from their maps alone.

use std::ops::Range;
use std::sync::Arc;

use super::super::error::Result;
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS, PAGE_SPAN, Page};
use super::super::seal::Hash;
use super::OpenBackup;

/// What blocks are, seen from another backup of the same repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// They read alike. Behind the end of the other disk, zeroes count as alike.
    Same,
    /// They read as zero, and do not in the other one.
    Zero,
    /// They hold other data.
    Data,
}

impl OpenBackup {
    /// Compares the block `first` and those behind it with another backup of this repository;
    /// returns what they are, and how many blocks are alike in this: at least one, at most a map
    /// page. Both have blocks of [`BLOCK_SIZE`] bytes. No data is read.
    ///
    /// # Errors
    ///
    /// If a map page is damaged or missing, and as for all requests to the store.
    pub async fn difference(&self, other: &Self, first: u64) -> Result<(Difference, u64)> {
        let blocks = self.size().div_ceil(BLOCK_SIZE);
        let number = first / PAGE_BLOCKS;
        let range = first..((number + 1) * PAGE_BLOCKS).min(blocks);
        let count = range.end.saturating_sub(first);
        let (own, others) = (self.page_at(number), other.page_at(number));
        match (own, others) {
            (None, None) => return Ok((Difference::Same, count)),
            // A page of the same content names the same places.
            (Some((_, own)), Some((_, others))) if own == others => {
                return Ok((Difference::Same, count));
            }
            _ => {}
        }
        let (own, others) = (self.page(own).await?, other.page(others).await?);
        let kinds = offsets(&range).map(|at| {
            let block = |page: &Option<Arc<Page>>| page.as_ref()?.blocks.get(at).copied().flatten();
            match (block(&own), block(&others)) {
                (None, None) => Difference::Same,
                (None, Some(_)) => Difference::Zero,
                (Some(here), Some(there)) if here.hash == there.hash => Difference::Same,
                (Some(_), _) => Difference::Data,
            }
        });
        let mut kinds = kinds.peekable();
        let kind = kinds.peek().copied().unwrap_or(Difference::Same);
        Ok((kind, kinds.take_while(|other| *other == kind).count() as u64))
    }

    /// Returns the number of a page of the disk in the backup, and its hash; `None` if it is zero
    /// or behind the end of the disk.
    fn page_at(&self, number: u64) -> Option<(usize, Hash)> {
        if number.saturating_mul(PAGE_SPAN) >= self.size() {
            return None;
        }
        let number = usize::try_from(self.window.start / PAGE_SPAN + number).ok()?;
        let page = self.disk.map.root().pages().get(number)?.as_ref()?;
        Some((number, page.stored.hash))
    }

    async fn page(&self, at: Option<(usize, Hash)>) -> Result<Option<Arc<Page>>> {
        match at {
            Some((number, _)) => self.disk.map.page(number).await.map(Some),
            None => Ok(None),
        }
    }
}

/// Where blocks of one page are in it.
fn offsets(blocks: &Range<u64>) -> Range<usize> {
    let begin = blocks.start / PAGE_BLOCKS * PAGE_BLOCKS;
    (blocks.start - begin) as usize..(blocks.end.max(blocks.start) - begin) as usize
}
