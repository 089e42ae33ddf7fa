//! The bits of one bitmap in the file: a table whose entries name clusters of bits.
//!
//! An entry is the offset of a cluster, or 0 for a cluster of clear bits, or 1 for a cluster of set
//! bits. Clusters that are all clear or all set are stored without space.

use super::directory::{OFFSET_MASK, Table};
use super::store::{Bitmaps, ImageServices};
use crate::bitmap::Bits;
use crate::error::{Result, system_words};
use crate::qcow2::alloc::allocator::Reserved;
use crate::qcow2::on_disk::cluster::HostCluster;
use crate::qcow2::on_disk::words::read_words;
use crate::units::HostOffset;

pub(super) const ALL_ONES: u64 = 1;

/// The maximum size of one write, in bytes.
const STEP_BYTES: u64 = 1 << 20;

impl Bitmaps {
    /// Reads the bits of a table. An error describes, as a clause, what is wrong with it.
    pub(super) fn load_bits(
        &self,
        table: Table,
        size: u64,
        granularity_bits: u32,
    ) -> Result<Bits, String> {
        let cluster = self.geometry().cluster_size();
        let bytes = Bits::bytes_for(size, granularity_bits);
        let needed = bytes.div_ceil(cluster);
        if u64::from(table.entries) != needed {
            return Err(format!(
                "its table has {} entries where a disk of {size} bytes needs {needed}",
                table.entries
            ));
        }
        let words = self.table_words(table)?;
        let file_length = self.metadata.file.len().map_err(|error| system_words(&error))?;
        let bits = Bits::new(size, granularity_bits);
        let mut buffer = vec![0; cluster as usize];
        for (index, entry) in words.into_iter().enumerate() {
            let start = index as u64 * cluster;
            match entry {
                0 => {}
                ALL_ONES => bits.load_ones(start, cluster),
                entry if is_cluster(entry, cluster) && entry < file_length => {
                    let read = self.metadata.file.read_at(HostOffset::new(entry), &mut buffer);
                    let read = read
                        .map_err(|error| format!("it cannot be read: {}", system_words(&error)))?;
                    buffer[read..].fill(0);
                    bits.load(start, &buffer[..(bytes - start).min(cluster) as usize]);
                }
                entry => return Err(format!("entry {index} of its table ({entry:#x}) is invalid")),
            }
        }
        Ok(bits)
    }

    /// The entries of a table that is within the file.
    pub(super) fn table_words(&self, table: Table) -> Result<Vec<u64>, String> {
        let length = self.metadata.file.len().map_err(|error| system_words(&error))?;
        let end = table.offset.checked_add(u64::from(table.entries) * 8);
        if end.is_none_or(|end| end.bytes() > length) {
            return Err("its table lies past the end of the file".into());
        }
        read_words(&*self.metadata.file, table.offset, table.entries as usize)
            .map_err(|error| error.to_string())
    }

    /// The clusters of a table, and those that it names.
    pub(super) fn table_clusters(&self, table: Table) -> Result<Vec<HostCluster>, String> {
        let geometry = self.geometry();
        let mut clusters = Vec::new();
        let words = self.table_words(table)?;
        for entry in words.into_iter().filter(|entry| entry & OFFSET_MASK != 0) {
            if !is_cluster(entry, geometry.cluster_size()) {
                return Err(format!("an entry of its table ({entry:#x}) is invalid"));
            }
            clusters.push(geometry.host_cluster(HostOffset::new(entry)));
        }
        let table_bytes = u64::from(table.entries) * 8;
        clusters.extend(geometry.clusters_touched(table.offset, table_bytes));
        Ok(clusters)
    }

    /// Writes bits to new clusters, which are recorded in `reserved` even if that fails.
    pub(super) fn store_bits(
        &self,
        image: &dyn ImageServices,
        bits: &Bits,
        reserved: &mut Vec<Reserved>,
    ) -> Result<Table> {
        let cluster = self.geometry().cluster_size();
        let bytes = bits.words().len() as u64 * 8;
        let length = Bits::bytes_for(bits.size(), bits.granularity_bits());
        let entries = length.div_ceil(cluster);
        let mut words: Vec<u64> = vec![0; entries as usize];
        let step = (STEP_BYTES / cluster).max(1);
        let mut waiting: Vec<(usize, Vec<u8>)> = Vec::new();
        for index in 0..entries {
            let start = index * cluster;
            let mut content = vec![0; cluster as usize];
            let part = (bytes - start).min(cluster) as usize;
            bits.store(start, &mut content[..part]);
            if content.iter().all(|byte| *byte == 0xff) {
                words[index as usize] = ALL_ONES;
            } else if content.iter().any(|byte| *byte != 0) {
                waiting.push((index as usize, content));
            }
            if waiting.len() as u64 == step {
                self.store_clusters(image, &mut waiting, &mut words, reserved)?;
            }
        }
        self.store_clusters(image, &mut waiting, &mut words, reserved)?;
        if words.is_empty() {
            return Ok(Table::default());
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let offset = self.store_whole(image, &bytes, reserved)?;
        Ok(Table { offset, entries: words.len() as u32 })
    }

    fn store_clusters(
        &self,
        image: &dyn ImageServices,
        waiting: &mut Vec<(usize, Vec<u8>)>,
        words: &mut [u64],
        reserved: &mut Vec<Reserved>,
    ) -> Result<()> {
        let cluster = self.geometry().cluster_size();
        let mut rest = &waiting[..];
        while !rest.is_empty() {
            let place = self.clusters.reserve(rest.len() as u64, image)?;
            reserved.push(place);
            let (now, later) = rest.split_at(place.clusters as usize);
            let mut bytes = Vec::with_capacity(now.len() * cluster as usize);
            for (count, (index, content)) in now.iter().enumerate() {
                words[*index] = (place.offset + count as u64 * cluster).bytes();
                bytes.extend_from_slice(content);
            }
            self.metadata.write(place.offset, &bytes)?;
            rest = later;
        }
        waiting.clear();
        Ok(())
    }

    /// Writes bytes to new, contiguous clusters; returns their offset.
    pub(super) fn store_whole(
        &self,
        image: &dyn ImageServices,
        bytes: &[u8],
        reserved: &mut Vec<Reserved>,
    ) -> Result<HostOffset> {
        let geometry = self.geometry();
        let clusters = geometry.clusters_of(bytes.len() as u64).max(1);
        let place = self.clusters.reserve_exact(clusters, image)?;
        reserved.push(place);
        let mut padded = bytes.to_vec();
        padded.resize((clusters << geometry.cluster_bits) as usize, 0);
        self.metadata.write(place.offset, &padded)?;
        Ok(place.offset)
    }
}

/// Whether a table entry is the offset of a cluster and nothing else.
fn is_cluster(entry: u64, cluster: u64) -> bool {
    entry != 0 && entry & !OFFSET_MASK == 0 && entry.is_multiple_of(cluster)
}
