//! The content of a new, empty image.
//!
//! ```text
//! cluster 0      header, extensions, the backing file's name
//! cluster 1..    refcount table
//! then           refcount blocks
//! then           L1 table
//! then           LUKS header of an encrypted image
//! ```

use std::os::unix::ffi::OsStrExt as _;

use crate::create_options::{
    CompressionType, CreateOptions, DataFile, L2Entries, LazyRefcounts, Qcow2Version, invalid,
};
use crate::error::Result;
use crate::luks::NEW_HEADER_LENGTH;
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::header::{ENCRYPTION_LUKS, MAGIC, autoclear, compatible, incompatible};
use crate::qcow2::on_disk::refcount_entry::write_entry;

const HEADER_LENGTH: u32 = 112;
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// Names of the feature bits, for readers that do not know them: kind, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The number of clusters of each part.
#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    luks: u64,
}

impl Layout {
    fn total(self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1 + self.luks
    }
}

/// The parts of a new image with a disk of `size` bytes: offset and content. The last one of an
/// encrypted image is the place of the LUKS header, which is empty.
pub(crate) fn layout(size: u64, options: &CreateOptions) -> Result<Vec<(u64, Vec<u8>)>> {
    let geometry = geometry(options)?;
    let cluster = geometry.cluster_size();
    let size =
        size.checked_next_multiple_of(512).ok_or_else(|| invalid("the disk is too large"))?;
    let l1_entries = geometry.l1_entries_for(size);
    if l1_entries * 8 > L1_BYTES_MAX {
        return Err(invalid(format!(
            "a disk of {size} bytes is too large for clusters of {cluster} bytes; choose larger ones"
        )));
    }
    let luks_length = options.encryption.as_ref().map_or(0, |_| NEW_HEADER_LENGTH);
    let l1_clusters = geometry.clusters_of(l1_entries * 8);
    let luks = geometry.clusters_of(luks_length);
    let mut layout = Layout { l1: l1_clusters, luks, ..Layout::default() };
    // The blocks count themselves and the table that lists them: repeat until nothing changes.
    loop {
        let blocks = layout.total().div_ceil(geometry.block_entries());
        let table = geometry.clusters_of(blocks * 8);
        if (blocks, table) == (layout.refcount_blocks, layout.refcount_table) {
            break;
        }
        (layout.refcount_blocks, layout.refcount_table) = (blocks, table);
    }
    if layout.refcount_table * cluster > REFCOUNT_TABLE_BYTES_MAX {
        return Err(invalid("the refcount table would be too large"));
    }
    let blocks_start = 1 + layout.refcount_table;
    let table =
        (0..layout.refcount_blocks).flat_map(|i| ((blocks_start + i) * cluster).to_be_bytes());
    let table = padded(table.collect(), layout.refcount_table * cluster);
    let mut blocks = vec![0; (layout.refcount_blocks * cluster) as usize];
    for used in 0..layout.total() as usize {
        write_entry(&mut blocks, used, geometry.refcount_order, 1);
    }
    let blocks_end = blocks_start + layout.refcount_blocks;
    let l1_offset = if layout.l1 == 0 { 0 } else { blocks_end * cluster };
    let luks_offset = (blocks_end + layout.l1) * cluster;
    let places = (l1_offset, luks_offset);
    let mut parts = vec![
        (0, header(size, places, l1_entries, layout, geometry, options)?),
        (cluster, table),
        (blocks_start * cluster, blocks),
    ];
    if layout.l1 > 0 {
        // The rest of its last cluster is left out, as in QEMU: a new file reads as zero there.
        parts.push((l1_offset, vec![0; (l1_entries * 8) as usize]));
    }
    if layout.luks > 0 {
        parts.push((luks_offset, vec![0; (layout.luks * cluster) as usize]));
    }
    Ok(parts)
}

/// Refuses invalid sizes of clusters and refcounts.
pub(crate) fn check_sizes(options: &CreateOptions) -> Result<()> {
    let size = options.cluster_size;
    if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
        return Err(invalid(format!(
            "clusters of {size} bytes are not possible; choose a power of two from 512 to 2 MiB"
        )));
    }
    let bits = options.refcount_bits;
    if !bits.is_power_of_two() || bits > 64 {
        return Err(invalid(format!(
            "refcounts of {bits} bits are not possible; choose a power of two from 1 to 64"
        )));
    }
    Ok(())
}

fn geometry(options: &CreateOptions) -> Result<Geometry> {
    check_sizes(options)?;
    let (size, bits) = (options.cluster_size, options.refcount_bits);
    let extended_l2 = options.l2_entries == L2Entries::Extended;
    if extended_l2 && size < 16384 {
        return Err(invalid("subclusters need clusters of at least 16 KiB"));
    }
    let needs_v3 = bits != 16
        || extended_l2
        || options.data_file.is_some()
        || options.lazy_refcounts == LazyRefcounts::On
        || options.compression != CompressionType::Zlib;
    if options.version == Qcow2Version::V2 && needs_v3 {
        return Err(invalid("version 2 has neither other refcounts than 16 bits nor new features"));
    }
    Ok(Geometry {
        cluster_bits: size.trailing_zeros(),
        extended_l2,
        refcount_order: bits.trailing_zeros(),
    })
}

fn header(
    size: u64,
    (l1_offset, luks_offset): (u64, u64),
    l1_entries: u64,
    layout: Layout,
    geometry: Geometry,
    options: &CreateOptions,
) -> Result<Vec<u8>> {
    let is_v3 = options.version == Qcow2Version::V3;
    let mut bytes = Vec::with_capacity(512);
    bytes.extend(MAGIC);
    bytes.extend(if is_v3 { 3u32 } else { 2 }.to_be_bytes());
    bytes.extend([0; 12]); // backing_file_offset and backing_file_size: see below
    bytes.extend(geometry.cluster_bits.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    let is_encrypted = options.encryption.is_some();
    bytes.extend(if is_encrypted { ENCRYPTION_LUKS } else { 0 }.to_be_bytes());
    bytes.extend((l1_entries as u32).to_be_bytes());
    bytes.extend(l1_offset.to_be_bytes());
    bytes.extend(geometry.cluster_size().to_be_bytes()); // refcount_table_offset
    bytes.extend((layout.refcount_table as u32).to_be_bytes());
    bytes.extend([0; 12]); // nb_snapshots and snapshots_offset
    if is_v3 {
        push_v3_fields(&mut bytes, geometry, options);
    }
    if let Some((_, format)) = &options.backing {
        extension::push(&mut bytes, extension::BACKING_FORMAT, format.name().as_bytes());
    }
    if let Some((name, _)) = &options.data_file {
        extension::push(&mut bytes, extension::DATA_FILE_NAME, name.as_bytes());
    }
    if is_encrypted {
        let place = [luks_offset, NEW_HEADER_LENGTH].map(u64::to_be_bytes).concat();
        extension::push(&mut bytes, extension::ENCRYPTION_HEADER, &place);
    }
    if is_v3 && geometry.cluster_size() > 4096 {
        let mut names = Vec::new();
        for (kind, bit, name) in FEATURE_NAMES {
            let end = names.len() + 48;
            names.extend([kind, bit]);
            names.extend(name.as_bytes());
            names.resize(end, 0);
        }
        extension::push(&mut bytes, extension::FEATURE_NAMES, &names);
    }
    bytes.extend([0; 8]); // the end of the extensions
    if let Some((name, _)) = &options.backing {
        let (offset, length) = (bytes.len() as u64, name.len() as u32);
        bytes[8..16].copy_from_slice(&offset.to_be_bytes());
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        bytes.extend(name.as_bytes());
        if name.is_empty() || name.len() > 1023 || bytes.len() as u64 > geometry.cluster_size() {
            return Err(invalid("the backing file's name is empty or too long for the header"));
        }
    }
    if bytes.len() as u64 > geometry.cluster_size() {
        return Err(invalid("the names do not fit into the header; choose larger clusters"));
    }
    Ok(padded(bytes, geometry.cluster_size()))
}

/// Appends the fields that only version 3 has: features, refcount width, compression.
fn push_v3_fields(bytes: &mut Vec<u8>, geometry: Geometry, options: &CreateOptions) {
    let zstd = options.compression == CompressionType::Zstd;
    let data_file = options.data_file.as_ref().map(|(_, kind)| *kind);
    let features = [
        (data_file.is_some(), incompatible::DATA_FILE),
        (zstd, incompatible::COMPRESSION),
        (geometry.extended_l2, incompatible::EXTENDED_L2),
    ];
    let incompatible: u64 = features.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum();
    bytes.extend(incompatible.to_be_bytes());
    let compatible = match options.lazy_refcounts {
        LazyRefcounts::Off => 0,
        LazyRefcounts::On => compatible::LAZY_REFCOUNTS,
    };
    bytes.extend(compatible.to_be_bytes());
    let is_raw = data_file == Some(DataFile::Raw);
    bytes.extend(if is_raw { autoclear::RAW_DATA_FILE } else { 0 }.to_be_bytes());
    bytes.extend(geometry.refcount_order.to_be_bytes());
    bytes.extend(HEADER_LENGTH.to_be_bytes());
    bytes.push(u8::from(zstd));
    bytes.resize(HEADER_LENGTH as usize, 0);
}

fn padded(mut bytes: Vec<u8>, length: u64) -> Vec<u8> {
    bytes.resize(length as usize, 0);
    bytes
}
