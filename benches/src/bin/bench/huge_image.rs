//! A qcow2 image of 16 TiB with every cluster mapped, in less than 3 GiB.
//!
//! Its tables are written directly. Many clusters of the disk share one cluster of the file, as
//! after many snapshots. The refcounts match, so the image is valid. Neighbours on the disk are not
//! neighbours in the file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::data::XorShift;

/// Size of the disk.
pub(crate) const DISK_BYTES: u64 = 16 << 40;
/// Where the data begins in the file; the tables precede it.
pub(crate) const DATA_START: u64 = DATA_CLUSTER * CLUSTER;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// A power of two: clusters of the disk are distributed evenly among them.
const DATA_CLUSTERS: u64 = 1 << 13;
const _: () = assert!(L2_ENTRIES.is_multiple_of(DATA_CLUSTERS));
/// Of 8 bytes each, in an L2 table.
const L2_ENTRIES: u64 = CLUSTER / 8;
const L2_TABLES: u64 = DISK_BYTES / CLUSTER / L2_ENTRIES;
const L1_CLUSTERS: u64 = (L2_TABLES * 8).div_ceil(CLUSTER);
/// Of 16 bits each, in a refcount block.
const REFCOUNTS: u64 = CLUSTER / 2;

/// The file, in order: header, refcount table, first refcount block, L1 table, L2 tables and, among
/// them, the second refcount block, data. Each refcount block is in one of the clusters that it
/// counts, where servers put it too. A server may search long for overlaps if a block is anywhere
/// else.
const REFCOUNT_TABLE_CLUSTER: u64 = 1;
const REFCOUNT_BLOCK_CLUSTERS: [u64; 2] = [2, REFCOUNTS];
const L1_CLUSTER: u64 = 3;
const L2_CLUSTER: u64 = L1_CLUSTER + L1_CLUSTERS;
const DATA_CLUSTER: u64 = L2_CLUSTER + L2_TABLES + 1;
const END_CLUSTER: u64 = DATA_CLUSTER + DATA_CLUSTERS;
const _: () = assert!(L2_CLUSTER < REFCOUNTS && REFCOUNTS < DATA_CLUSTER);
const _: () = assert!(END_CLUSTER <= 2 * REFCOUNTS);

/// How many clusters of the disk share one cluster of the file.
const SHARERS: u16 = (DISK_BYTES / CLUSTER / DATA_CLUSTERS) as u16;
/// In an L1 entry: the table's refcount is 1. Data clusters have more references.
const COPIED: u64 = 1 << 63;

/// Writes the image.
///
/// # Errors
///
/// The file cannot be created or written.
pub(crate) fn create(path: &Path) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&padded(header()))?;
    let blocks = REFCOUNT_BLOCK_CLUSTERS.into_iter().map(|block| block * CLUSTER);
    file.write_all(&padded(words(blocks)))?;
    file.write_all(&refcount_block(0))?;
    file.write_all(&words((0..L2_TABLES).map(|table| table_offset(table) | COPIED)))?;
    // The clusters of the file repeat in each table.
    let table = words((0..L2_ENTRIES).map(host_offset));
    for cluster in L2_CLUSTER..DATA_CLUSTER {
        match cluster {
            REFCOUNTS => file.write_all(&refcount_block(1))?,
            _ => file.write_all(&table)?,
        }
    }
    let (mut random, mut buffer) = (XorShift::new(), vec![0; CLUSTER as usize]);
    for _ in 0..DATA_CLUSTERS {
        random.fill(&mut buffer);
        file.write_all(&buffer)?;
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}

/// The fields of version 3, without extensions or features.
fn header() -> Vec<u8> {
    let mut header = b"QFI\xfb".to_vec();
    header.extend(3_u32.to_be_bytes());
    header.extend([0; 12]); // no backing file
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(DISK_BYTES.to_be_bytes());
    header.extend([0; 4]); // no encryption
    header.extend((L2_TABLES as u32).to_be_bytes());
    header.extend((L1_CLUSTER * CLUSTER).to_be_bytes());
    header.extend((REFCOUNT_TABLE_CLUSTER * CLUSTER).to_be_bytes());
    header.extend(1_u32.to_be_bytes()); // clusters of the refcount table
    header.extend([0; 12]); // no snapshots
    header.extend([0; 24]); // no features
    header.extend(4_u32.to_be_bytes()); // refcounts of 1 << 4 bits
    header.extend(104_u32.to_be_bytes()); // length of the header
    header
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(CLUSTER as usize, 0);
    bytes
}

fn words(words: impl Iterator<Item = u64>) -> Vec<u8> {
    words.flat_map(u64::to_be_bytes).collect()
}

fn table_offset(table: u64) -> u64 {
    let cluster = L2_CLUSTER + table;
    (cluster + u64::from(cluster >= REFCOUNTS)) * CLUSTER
}

fn refcount_block(number: u64) -> Vec<u8> {
    let clusters = number * REFCOUNTS..(number + 1) * REFCOUNTS;
    clusters.flat_map(|cluster| refcount(cluster).to_be_bytes()).collect()
}

fn refcount(cluster: u64) -> u16 {
    match cluster {
        0..DATA_CLUSTER => 1,
        DATA_CLUSTER..END_CLUSTER => SHARERS,
        _ => 0,
    }
}

/// The offset in the file of the data of a cluster of the disk. An odd factor permutes the clusters
/// of the file.
fn host_offset(cluster: u64) -> u64 {
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
    (DATA_CLUSTER + cluster.wrapping_mul(FACTOR) % DATA_CLUSTERS) * CLUSTER
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cluster_of_the_file_has_as_many_references_as_its_refcount_says() {
        // The pattern repeats after as many clusters as there are in the file.
        let mut counts = vec![0_u64; DATA_CLUSTERS as usize];
        for cluster in 0..DATA_CLUSTERS {
            counts[(host_offset(cluster) / CLUSTER - DATA_CLUSTER) as usize] += 1;
        }
        assert!(counts.iter().all(|count| *count == 1));
        assert_eq!(host_offset(7), host_offset(7 + DATA_CLUSTERS));
        assert_eq!(u64::from(SHARERS) * DATA_CLUSTERS, DISK_BYTES / CLUSTER);
    }

    #[test]
    fn header_has_its_length_and_tables_avoid_the_refcount_block() {
        assert_eq!(header().len(), 104);
        let tables: Vec<u64> = (0..L2_TABLES).map(table_offset).collect();
        assert!(!tables.contains(&(REFCOUNTS * CLUSTER)));
        assert_eq!(tables.last(), Some(&((DATA_CLUSTER - 1) * CLUSTER)));
    }
}
