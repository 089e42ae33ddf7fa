//! All references below an L1 table: for snapshots, which share them, and for shrinking a disk.

use crate::error::Result;
use crate::qcow2::alloc::allocator::{Allocator, Freed};
use crate::qcow2::alloc::clusters::CountReferences;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::l2::table_of;
use crate::qcow2::on_disk::words::{read_words, words_to_bytes};
use crate::units::{GuestOffset, HostOffset};

impl MappingTables {
    /// Adds one reference to every cluster below an L1 table, or to none if that fails.
    pub(in crate::qcow2) fn add_references(&self, l1: &[u64]) -> Result<()> {
        let clusters = self.clusters_below(l1)?;
        let mut allocator = self.clusters.allocator()?;
        self.commits.changes.note();
        reference_all(&mut allocator, &clusters)
    }

    /// Removes one reference from every cluster below an L1 table that the header on disk no longer
    /// names.
    pub(in crate::qcow2) fn remove_references(&self, l1: &[u64]) -> Result<()> {
        let clusters = self.clusters_below(l1)?.into_iter();
        self.clusters.free(clusters.map(|cluster| Freed { cluster, punch: true }));
        Ok(())
    }

    /// All clusters that an L1 table refers to, each once per reference; an error if one of them is
    /// known to hold other metadata.
    pub(in crate::qcow2) fn clusters_below(&self, l1: &[u64]) -> Result<Vec<HostCluster>> {
        let geometry = self.geometry();
        let mut clusters = Vec::new();
        for offset in l1.iter().filter_map(|entry| table_of(*entry)) {
            self.refuse_bad_table(offset)?;
            clusters.push(geometry.host_cluster(offset));
            let words =
                read_words(&*self.metadata.file, offset, (geometry.cluster_size() / 8) as usize)?;
            for entry in words.chunks_exact(geometry.entry_words()) {
                let bitmap = entry.get(1).copied().unwrap_or(0);
                let cluster = self.format.decode(entry[0], bitmap);
                let cluster =
                    cluster.map_err(|detail| self.metadata.corrupt(detail, offset.bytes()))?;
                self.refuse_bad_cluster(cluster, offset)?;
                let references = self.references(cluster, None, false);
                clusters.extend(references.iter().map(|freed| freed.cluster));
            }
        }
        Ok(clusters)
    }

    /// The words of a table for the part of the disk after `end`.
    pub(in crate::qcow2) fn words_behind(
        &self,
        end: GuestOffset,
        l1_index: u64,
        offset: HostOffset,
    ) -> Result<Vec<u64>> {
        let geometry = self.geometry();
        let length = (geometry.cluster_size() / 8) as usize;
        let words = read_words(&*self.metadata.file, offset, length)?;
        let is_cut = geometry.l1_index(end) == l1_index;
        let first = if is_cut { geometry.l2_index(end) * geometry.entry_words() } else { 0 };
        Ok(words[first..].to_vec())
    }

    /// Writes a copy of the L2 table that contains the new end, without the entries past the end.
    /// Returns its offset; `None` if there are no such entries.
    pub(in crate::qcow2) fn cut_table(
        &self,
        end: GuestOffset,
        references: &impl CountReferences,
    ) -> Result<Option<HostOffset>> {
        let geometry = self.geometry();
        let first = geometry.l2_index(end) * geometry.entry_words();
        let index = geometry.l1_index(end);
        if first == 0 || index as usize >= self.l1_len() {
            return Ok(None);
        }
        let slices = self.whole_table(index)?;
        let mut words: Vec<u64> = slices.iter().flat_map(|(slice, _)| slice.words()).collect();
        if words.is_empty() || words[first..].iter().all(|word| *word == 0) {
            return Ok(None);
        }
        words[first..].fill(0);
        // Before it is copied: bad entries in it are bad in the copy.
        let mut bad = self.bad_places(&slices)?;
        bad.retain(|place| *place < first as u64 * 8);
        let offset = self.clusters.write_new(&words_to_bytes(&words), references)?;
        self.l2_places.write().replace_bad(offset, geometry.cluster_size(), bad);
        Ok(Some(offset))
    }

    /// Refuses, before anything is changed, entries that would free clusters of other owners.
    pub(in crate::qcow2) fn refuse_bad_behind(&self, end: GuestOffset) -> Result<()> {
        let geometry = self.geometry();
        let words_per_entry = geometry.entry_words();
        self.refuse_bad_tables(geometry.l1_index(end))?;
        for l1_index in geometry.l1_index(end)..self.l1_len() as u64 {
            for (table, first) in self.whole_table(l1_index)? {
                let words = table.words();
                for (index, entry) in (0..).zip(words.chunks_exact(words_per_entry)) {
                    let guest = first + (index << geometry.cluster_bits);
                    if guest >= end && entry.iter().any(|word| *word != 0) {
                        self.refuse_bad(&table, guest)?;
                        self.decode_to_change(&table, guest)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Adds a reference to each of them, or to none.
fn reference_all(allocator: &mut Allocator, clusters: &[HostCluster]) -> Result<()> {
    for (done, cluster) in clusters.iter().enumerate() {
        if let Err(error) = allocator.reference(*cluster) {
            for cluster in &clusters[..done] {
                allocator.dereference(*cluster)?;
            }
            return Err(error);
        }
    }
    Ok(())
}
