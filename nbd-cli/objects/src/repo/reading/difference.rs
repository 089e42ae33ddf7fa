//! What a backup has that another one does not have, from their maps alone.

use std::ops::Range;

use super::super::error::Result;
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS};
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
    /// Compares the block `first` and those behind it with another backup of this repository; returns
    /// what they are, and how many blocks are alike in this: at least one, at most a map page. Both
    /// have blocks of [`BLOCK_SIZE`] bytes. No data is read.
    ///
    /// # Errors
    ///
    /// If a map page is damaged or missing, and as for all requests to the store.
    pub async fn difference(&self, other: &Self, first: u64) -> Result<(Difference, u64)> {
        let (own, other) = (&self.disk.map, &other.disk.map);
        let blocks = own.size().div_ceil(BLOCK_SIZE);
        let number = first / PAGE_BLOCKS;
        let range = first..((number + 1) * PAGE_BLOCKS).min(blocks);
        let page = number as usize;
        let count = range.end.saturating_sub(first);
        let others = other.root().pages().get(page).copied().flatten();
        match own.root().pages().get(page).copied().flatten() {
            None if others.is_none() => return Ok((Difference::Same, count)),
            // A page of the same content names the same places.
            Some(own) if others.is_some_and(|others| others.stored.hash == own.stored.hash) => {
                return Ok((Difference::Same, count));
            }
            _ => {}
        }
        let own = own.page(page).await?;
        let others = match others {
            Some(_) => Some(other.page(page).await?),
            None => None,
        };
        let kinds = offsets(&range).map(|at| {
            let here = own.blocks.get(at).copied().flatten();
            let there = others.as_ref().and_then(|page| page.blocks.get(at).copied().flatten());
            match (here, there) {
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
}

/// Where blocks of one page are in it.
fn offsets(blocks: &Range<u64>) -> Range<usize> {
    let begin = blocks.start / PAGE_BLOCKS * PAGE_BLOCKS;
    (blocks.start - begin) as usize..(blocks.end.max(blocks.start) - begin) as usize
}
