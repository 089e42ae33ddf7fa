//! The map of a backup that is being made.

use super::super::error::{RepositoryError, Result};
use super::super::pack::{FrameKind, PACK_SIZE};
use super::super::page::{BLOCK_SIZE, PAGE_BLOCKS};
use super::super::seal::Sealer;
use super::super::stored::Stored;
use super::base::no_base;
use super::blocks::Prepared;
use super::{PIECES, Piece, Session};

impl Session {
    /// Moves the first of the queue into the map.
    pub(super) async fn take(&mut self) -> Result<()> {
        match self.queue.pop_front() {
            None => {}
            Some(Piece::Zero(mut blocks)) => {
                while blocks > 0 {
                    if self.page.blocks.is_empty() && blocks >= PAGE_BLOCKS {
                        self.root.zero();
                        blocks -= PAGE_BLOCKS;
                    } else {
                        self.push(None).await?;
                        blocks -= 1;
                    }
                }
            }
            Some(Piece::Stored(blocks)) => {
                for block in blocks {
                    self.found += block.map_or(0, |_| BLOCK_SIZE);
                    self.push(block).await?;
                }
            }
            Some(Piece::Page(number)) => self.share(number)?,
            Some(Piece::Data(work)) => {
                let (prepared, bytes) = work.await.ok().flatten().ok_or_else(|| {
                    RepositoryError::invalid("the compression of a block was given up")
                })?;
                if self.spent.len() < PIECES {
                    self.spent.push(bytes);
                }
                let first = self.root.len() as u64 * PAGE_BLOCKS + self.page.blocks.len() as u64;
                for (index, block) in (first..).zip(prepared) {
                    let stored = match block {
                        Prepared::Zero => None,
                        Prepared::Found(stored) => {
                            self.found += BLOCK_SIZE;
                            Some(stored)
                        }
                        Prepared::New(packed, hash) => {
                            Some(self.sender.store((FrameKind::Block, index), packed, hash).await?)
                        }
                    };
                    self.push(stored).await?;
                }
            }
        }
        Ok(())
    }

    /// Takes a page of the base as it is.
    fn share(&mut self, number: usize) -> Result<()> {
        let base = self.base.as_ref().ok_or_else(no_base)?;
        let Some(Some(page)) = base.root().pages().get(number) else {
            self.root.zero();
            return Ok(());
        };
        let packs: Vec<_> = base.root().packs_of(page).collect();
        self.root.page(page.content, page.data_blocks, &packs)?;
        self.root.place(number, page.stored)?;
        let bytes = u64::from(page.data_blocks) * BLOCK_SIZE;
        self.data += bytes;
        self.found += bytes;
        Ok(())
    }

    /// Adds a block to the page, and ends the page if it is full.
    async fn push(&mut self, block: Option<Stored>) -> Result<()> {
        self.data += block.map_or(0, |_| BLOCK_SIZE);
        self.page.blocks.push(block);
        let first = self.root.len() as u64 * PAGE_BLOCKS;
        let count = (self.blocks() - first).min(PAGE_BLOCKS);
        if self.page.blocks.len() as u64 == count {
            self.end_page().await?;
        }
        Ok(())
    }

    async fn end_page(&mut self) -> Result<()> {
        let page = std::mem::take(&mut self.page);
        if page.is_zero() {
            self.root.zero();
            return Ok(());
        }
        let number = self.root.len();
        let content = page.encode();
        let hash = self.repository.objects.sealer.hash(&content);
        let data_blocks = page.blocks.iter().flatten().count() as u16;
        self.root.page(content.len() as u32, data_blocks, &page.packs())?;
        if let Some(stored) = self.same_page(number, hash) {
            return self.root.place(number, stored);
        }
        let packed = Sealer::compress(&content);
        self.pages_len += packed.len();
        self.pages.push((number, packed, hash));
        if self.pages_len >= PACK_SIZE {
            self.send_pages().await?;
        }
        Ok(())
    }

    /// Puts all pages into packs. They are together there, so that a reader gets many by one
    /// request.
    pub(super) async fn send_pages(&mut self) -> Result<()> {
        if self.sender.len() + self.pages_len > PACK_SIZE {
            self.sender.send_pack().await?;
        }
        self.pages_len = 0;
        for (number, packed, hash) in std::mem::take(&mut self.pages) {
            let stored = self.sender.store((FrameKind::Page, number as u64), packed, hash).await?;
            self.root.place(number, stored)?;
        }
        Ok(())
    }
}
