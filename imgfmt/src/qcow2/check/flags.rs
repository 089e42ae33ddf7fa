//! COPIED bits: each says whether the cluster that its entry names has exactly one reference.

use super::checker::{Checker, Fix, READ_AHEAD};
use crate::error::Result;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::l2::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::qcow2::on_disk::refcount::{BlockView, Refcounts};
use crate::qcow2::on_disk::words::read_words;
use crate::units::HostOffset;

impl Checker<'_> {
    /// Finds COPIED bits that contradict the refcounts.
    pub(super) fn find_wrong_flags(&mut self, refcounts: &mut Refcounts) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry();
        for entry in std::mem::take(&mut self.active) {
            let cluster = geometry.host_cluster(HostOffset::new(entry.word & OFFSET_MASK));
            let refcount = refcounts.refcount(cluster)?;
            self.check_flag(entry.place, entry.word, refcount);
        }
        for number in 0..self.tables.len() {
            let offset = self.tables[number].offset;
            if !self.tables[number].is_active || !self.is_readable_table(offset) {
                continue;
            }
            if let Some(later) = self.tables.get(number + READ_AHEAD) {
                self.read_ahead(Some(later.offset));
            }
            let words =
                read_words(&*image.metadata.file, offset, (geometry.cluster_size() / 8) as usize)?;
            self.check_flags(refcounts, offset, &words)?;
        }
        Ok(())
    }

    fn is_readable_table(&self, offset: HostOffset) -> bool {
        let geometry = self.image.geometry();
        geometry.in_cluster(offset) == 0 && geometry.host_cluster(offset) < self.file_end
    }

    /// Compares the COPIED bits of an L2 table with the refcounts.
    fn check_flags(
        &mut self,
        refcounts: &mut Refcounts,
        offset: HostOffset,
        words: &[u64],
    ) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry();
        let block_entries = geometry.block_entries();
        // Neighbours are usually counted by the same block.
        let mut first = HostCluster::new(u64::MAX);
        let mut block = BlockView::default();
        for (index, entry) in words.chunks_exact(geometry.entry_words()).enumerate() {
            let word = entry[0];
            let host = HostOffset::new(word & OFFSET_MASK);
            let is_standard = word & COMPRESSED == 0 && geometry.in_cluster(host) == 0;
            let place = offset + (index * geometry.entry_words()) as u64 * 8;
            if image.mapping.format.has_data_file {
                let is_zero = !geometry.extended_l2 && word & ZERO != 0;
                if is_standard && host.bytes() != 0 || word & COPIED != 0 && !is_zero {
                    // There all clusters have one reference.
                    self.check_flag(place, word, 1);
                }
                continue;
            }
            if !is_standard || host.bytes() == 0 {
                continue;
            }
            let cluster = geometry.host_cluster(host);
            if cluster < first || cluster - first >= block_entries {
                let (index, _) = refcounts.place(cluster);
                first = refcounts.first_of_block(index);
                block = refcounts.block_view(index)?;
            }
            self.check_flag(place, word, block.refcount((cluster - first) as usize));
        }
        Ok(())
    }

    /// Compares the COPIED bit of the word at `place` with the refcount of the cluster that it
    /// names.
    fn check_flag(&mut self, place: HostOffset, word: u64, refcount: u64) {
        if (refcount == 1) != (word & COPIED != 0) {
            let new = word ^ COPIED;
            let fix = Fix { place, new, sets_copied: new & COPIED != 0 };
            self.fix(fix, format!("the entry at {place} has a wrong COPIED bit"));
        }
    }
}
