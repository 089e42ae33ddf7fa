//! Structures that have clusters of their own: writing them to a new place, freeing that place.

use crate::error::Result;
use crate::qcow2::alloc::clusters::{Clusters, CountReferences};
use crate::units::HostOffset;

impl Clusters {
    /// Writes bytes to new clusters next to each other; returns their offset.
    pub(in crate::qcow2) fn write_new(
        &self,
        bytes: &[u8],
        references: &(impl CountReferences + ?Sized),
    ) -> Result<HostOffset> {
        let geometry = self.metadata.header().geometry;
        let clusters = geometry.clusters_of(bytes.len() as u64).max(1);
        let reserved = self.reserve_exact(clusters, references)?;
        let mut padded = bytes.to_vec();
        padded.resize((clusters << geometry.cluster_bits) as usize, 0);
        let written = self.metadata.write(reserved.offset, &padded);
        written.inspect_err(|_| self.release(&[reserved])).map(|()| reserved.offset)
    }

    /// Drops the references to a place that the header on disk no longer names.
    pub(in crate::qcow2) fn free_place(&self, offset: HostOffset, length: u64) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let geometry = self.metadata.header().geometry;
        let mut allocator = self.allocator()?;
        for cluster in geometry.clusters_touched(offset, length) {
            allocator.dereference(cluster)?;
        }
        self.commits.changes.note();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::qcow2::alloc::clusters::tests::{Nothing, clusters_in_file};
    use crate::qcow2::on_disk::cluster::HostCluster;
    use crate::storage::Storage;
    use crate::testing::Fault;
    use crate::units::HostOffset;

    #[test]
    fn a_structure_has_whole_clusters_of_its_own_until_it_is_given_up() {
        let (storage, clusters) = clusters_in_file(true);
        let place = clusters.write_new(&[7; (1 << 16) + 1], &Nothing).unwrap();
        assert_eq!(place, HostOffset::new(4 << 16));
        let mut bytes = [9; 2];
        storage.read_exact_at(HostOffset::new(5 << 16), &mut bytes).unwrap();
        assert_eq!(bytes, [7, 0]);
        let refcounts = || {
            let mut allocator = clusters.allocator().unwrap();
            [4, 5, 6].map(|at| allocator.refcounts.refcount(HostCluster::new(at)).unwrap())
        };
        assert_eq!(refcounts(), [1, 1, 0]);
        clusters.free_place(place, (1 << 16) + 1).unwrap();
        assert_eq!(refcounts(), [0, 0, 0]);
        clusters.free_place(place, 0).unwrap();
    }

    #[test]
    fn a_structure_that_cannot_be_written_takes_up_no_place() {
        let (storage, clusters) = clusters_in_file(true);
        // So that only the write is left to fail.
        let first = clusters.write_new(&[], &Nothing).unwrap();
        let calls = storage.calls()..u64::MAX;
        storage.set_fault(Some(Fault { calls, code: libc::ENOSPC }));
        clusters.write_new(&[], &Nothing).unwrap_err();
        storage.set_fault(None);
        assert_eq!(clusters.write_new(&[], &Nothing).unwrap(), first + (1 << 16));
    }
}
