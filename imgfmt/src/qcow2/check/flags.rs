//! COPIED bits: each says whether the cluster behind it has exactly one reference.

use super::super::l2::{COPIED, OFFSET_MASK};
use super::super::open::read_words;
use super::super::refcount::{BlockView, Refcounts};
use super::{Checker, READ_AHEAD};
use crate::error::Result;

/// An L2 table of the present state.
pub(super) struct ActiveTable {
    /// Where its L1 entry lies in the file.
    pub(super) l1_place: u64,
    pub(super) l1_entry: u64,
    /// It could be counted.
    pub(super) is_sound: bool,
}

/// A word with a wrong COPIED bit.
pub(super) struct Flag {
    /// Where the word lies in the file.
    pub(super) place: u64,
    pub(super) word: u64,
}

impl Checker<'_> {
    /// Finds COPIED bits that contradict the refcounts, as these are now.
    pub(super) fn find_wrong_flags(&mut self, refcounts: &mut Refcounts) -> Result<()> {
        if self.refcounts_unusable {
            return Ok(());
        }
        let image = self.image;
        let geometry = image.geometry();
        let tables = std::mem::take(&mut self.tables);
        for (index, table) in tables.iter().enumerate() {
            let offset = table.l1_entry & OFFSET_MASK;
            let refcount = refcounts.refcount(offset >> geometry.cluster_bits)?;
            self.check_flag(table.l1_place, table.l1_entry, refcount);
            if !table.is_sound || image.format.has_data_file {
                continue;
            }
            if let Some(later) = tables.get(index + READ_AHEAD) {
                self.read_ahead(later.l1_entry & OFFSET_MASK);
            }
            let words = read_words(&*image.file, offset, (geometry.cluster_size() / 8) as usize)?;
            self.check_flags(refcounts, offset, &words)?;
        }
        Ok(())
    }

    /// Holds the COPIED bits of an L2 table against the refcounts.
    fn check_flags(&mut self, refcounts: &mut Refcounts, offset: u64, words: &[u64]) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry();
        let block_entries = geometry.block_entries();
        // Neighbours are counted by the same block most of the time.
        let mut first = u64::MAX;
        let mut block = BlockView::default();
        for (index, entry) in words.chunks_exact(geometry.entry_words()).enumerate() {
            let (word, bitmap) = (entry[0], entry.get(1).copied().unwrap_or(0));
            let cluster = image.format.decode(word, bitmap).unwrap_or_default();
            let (Some(host), None) = (cluster.host, cluster.compressed) else { continue };
            let number = host >> geometry.cluster_bits;
            if number < first || number - first >= block_entries {
                let (index, entry) = refcounts.place(number);
                first = number - entry as u64;
                block = refcounts.block_view(index)?;
            }
            let place = offset + (index * geometry.entry_words()) as u64 * 8;
            self.check_flag(place, word, block.refcount((number - first) as usize));
        }
        Ok(())
    }

    /// Holds the COPIED bit of the word at `place` against the refcount of what it points to.
    fn check_flag(&mut self, place: u64, word: u64, refcount: u64) {
        if (refcount == 1) != (word & COPIED != 0) {
            self.say(format!("the entry at {place} has a wrong COPIED bit"));
            self.wrong_flags.push(Flag { place, word });
        }
    }

    pub(super) fn repair_flags(&self) -> Result<()> {
        for flag in &self.wrong_flags {
            self.image.write_metadata(flag.place, &(flag.word ^ COPIED).to_be_bytes())?;
        }
        Ok(())
    }
}
