//! Finding clusters that can be written in place.

use crate::error::Result;
use crate::mapping::Lookup;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::units::{GuestRange, HostOffset};

impl MappingTables {
    /// Finds where a range can be written in place: for each segment the host offset, and the start
    /// and the end of its bytes in the data.
    pub(in crate::qcow2) fn find_in_place(
        &self,
        range: GuestRange,
        lookup: Lookup,
        segments: &mut Vec<(HostOffset, usize, usize)>,
    ) -> Result<bool> {
        let geometry = self.geometry();
        let (start, end) = (range.offset(), range.end());
        let mut position = start;
        while position < end {
            if !self.l1_is_copied(geometry.l1_index(position)) {
                return Ok(false);
            }
            let Some(Some(table)) = self.table(position, lookup)? else {
                return Ok(false);
            };
            let table_end = end.min(self.slices.end(position));
            if lookup == Lookup::CachedOnly && table.bad_entries.get().is_none() {
                return Ok(false); // Looking for them may need refcounts from the disk.
            }
            while position < table_end {
                self.refuse_bad(&table, position)?;
                let cluster = self.decode_to_change(&table, position)?;
                let in_cluster = geometry.in_cluster(position);
                let stop = table_end.min(position + (geometry.cluster_size() - in_cluster));
                let touched = geometry.subcluster_mask(in_cluster, in_cluster + (stop - position));
                let (Some(host), true) = (cluster.host, cluster.copied) else { return Ok(false) };
                if touched & !cluster.allocated != 0 {
                    return Ok(false);
                }
                let (from, to) = ((position - start) as usize, (stop - start) as usize);
                match segments.last_mut() {
                    Some((first, begun, until))
                        if *first + (from - *begun) as u64 == host + in_cluster =>
                    {
                        *until = to;
                    }
                    _ => segments.push((host + in_cluster, from, to)),
                }
                position = stop;
            }
        }
        Ok(true)
    }
}
