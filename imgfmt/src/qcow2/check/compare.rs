//! Compares the counted references with the refcounts.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::checker::{Checker, READ_AHEAD};
use crate::error::Result;
use crate::qcow2::on_disk::refcount::Refcounts;

impl Checker<'_> {
    /// Compares all refcounts with the counted references, and COPIED bits with the refcounts.
    pub(super) fn compare(&mut self, table: Vec<u64>) -> Result<()> {
        let image = self.image;
        let mut refcounts =
            Refcounts::new(Arc::clone(&image.metadata.file), image.geometry(), table);
        let indexes: Vec<usize> = self.block_indexes(&refcounts).into_iter().collect();
        for (position, &index) in indexes.iter().enumerate() {
            let later = indexes.get(position + READ_AHEAD);
            self.read_ahead(later.and_then(|index| refcounts.block_offset(*index)));
            self.compare_block(&mut refcounts, index)?;
        }
        self.find_wrong_flags(&mut refcounts)
    }

    /// The indexes of the refcount blocks that exist, and of those that should, because a cluster
    /// that they would count has references.
    fn block_indexes(&self, refcounts: &Refcounts) -> BTreeSet<usize> {
        let existing = (0..refcounts.table.len()).filter(|index| refcounts.has_block(*index));
        let mut indexes: BTreeSet<usize> = existing.collect();
        for (first, last) in self.counts.parts() {
            indexes.extend(refcounts.place(first).0..=refcounts.place(last).0);
        }
        indexes
    }

    fn compare_block(&mut self, refcounts: &mut Refcounts, index: usize) -> Result<()> {
        let geometry = self.image.geometry();
        let has_block = refcounts.has_block(index);
        let first = refcounts.first_of_block(index);
        // Clusters past the end of the file cannot leak, but a structure may end there.
        let end = (first + geometry.block_entries()).min(self.file_end + 1);
        let mut wrong = Vec::new();
        let mut last_used = None;
        let block = refcounts.block_view(index)?;
        let (file_end, max) = (self.file_end, geometry.refcount_max());
        self.counts.for_each(first, end, |cluster, should| {
            if cluster >= file_end && should == 0 {
                return;
            }
            let is = block.refcount((cluster - first) as usize);
            if is.max(should) > 0 {
                last_used = Some(cluster);
            }
            if is != should {
                wrong.push((cluster, is, should));
            }
        });
        if let Some(cluster) = last_used {
            self.report.image_end_offset = geometry.host_offset(cluster + 1).bytes();
        }
        for (cluster, is, should) in wrong {
            let message =
                format!("cluster {} has refcount {is}, should be {should}", cluster.number());
            if should > max {
                self.damage(format!("{message}, which is more than its refcounts can hold"));
                continue;
            }
            self.say(message);
            if is > should {
                self.report.leaks += 1;
            } else {
                self.report.corruptions += 1;
                self.too_low += 1;
                self.lacks_block |= !has_block;
            }
        }
        Ok(())
    }
}
