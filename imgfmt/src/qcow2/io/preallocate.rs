//! Preallocates all clusters of a new image.

use crate::error::Result;
use crate::qcow2::alloc::allocator::Reserved;
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::tables::Change;
use crate::qcow2::on_disk::l2::Cluster;
use crate::units::{GuestOffset, HostOffset};

impl Qcow2 {
    /// Allocates every cluster, in order, without writing data. Only for an empty image in a new
    /// file or on a device that was zeroed, where all clusters read as zero, or as noise if they
    /// are encrypted.
    pub(crate) fn preallocate(&self) -> Result<()> {
        let geometry = self.geometry();
        let (mut position, disk_end) = (GuestOffset::new(0), GuestOffset::new(self.size));
        while position < disk_end {
            let end = disk_end.min(self.mapping.slices.end(position));
            let table = self.mapping.table_for_write(position, self)?;
            let mut changes = Vec::new();
            let mut at_hand = Reserved::nothing();
            while position < end {
                if at_hand.clusters == 0 && !self.mapping.format.has_data_file {
                    at_hand = self.clusters.reserve(geometry.clusters_of(end - position), self)?;
                }
                let host = match self.mapping.format.has_data_file {
                    true => HostOffset::new(position.bytes()),
                    false => at_hand.offset,
                };
                let cluster = Cluster {
                    host: Some(host),
                    copied: true,
                    allocated: geometry.all_subclusters(),
                    ..Cluster::default()
                };
                changes.push(Change { guest: position, cluster });
                position += geometry.cluster_size();
                at_hand.offset += geometry.cluster_size();
                at_hand.clusters = at_hand.clusters.saturating_sub(1);
                if !self.mapping.format.has_data_file {
                    self.data.grow_to(at_hand.offset)?;
                }
            }
            self.mapping.commit(&table, &changes, &[])?;
            self.flusher().relieve_pressure()?;
        }
        self.flusher().flush()
    }
}
