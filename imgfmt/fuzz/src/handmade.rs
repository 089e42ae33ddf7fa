//! Small qcow2 images made by hand, field by field, for the fuzz targets and for tests of what no
//! tool would make.

/// An image with one L2 table. Clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1 table,
/// 4 L2 table, then data.
#[derive(Clone)]
pub(crate) struct Handmade {
    pub(crate) bytes: Vec<u8>,
    pub(crate) cluster_bits: u32,
    entry_length: usize,
}

/// Offsets of header fields.
#[allow(dead_code)]
pub(crate) mod field {
    pub(crate) const VERSION: usize = 4;
    pub(crate) const BACKING_OFFSET: usize = 8;
    pub(crate) const BACKING_LENGTH: usize = 16;
    pub(crate) const CLUSTER_BITS: usize = 20;
    pub(crate) const SIZE: usize = 24;
    pub(crate) const CRYPT_METHOD: usize = 32;
    pub(crate) const L1_SIZE: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(crate) const SNAPSHOT_COUNT: usize = 60;
    pub(crate) const SNAPSHOTS_OFFSET: usize = 64;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const COMPATIBLE: usize = 80;
    pub(crate) const AUTOCLEAR: usize = 88;
    pub(crate) const REFCOUNT_ORDER: usize = 96;
    pub(crate) const HEADER_LENGTH: usize = 100;
    pub(crate) const COMPRESSION_TYPE: usize = 104;
    pub(crate) const EXTENSIONS: usize = 112;
}

pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
const TABLES: usize = 5;

#[allow(dead_code)]
impl Handmade {
    /// A version 3 image with 16-bit refcounts for a disk of `size` bytes, all of it unallocated.
    pub(crate) fn new(cluster_bits: u32, size: u64) -> Self {
        let cluster = 1 << cluster_bits;
        let mut image = Self { bytes: vec![0; TABLES * cluster], cluster_bits, entry_length: 8 };
        image.bytes[..4].copy_from_slice(b"QFI\xfb");
        image.put32(field::VERSION, 3);
        image.put32(field::CLUSTER_BITS, cluster_bits);
        image.put64(field::SIZE, size);
        image.put32(field::L1_SIZE, 1);
        image.put64(field::L1_OFFSET, 3 * cluster as u64);
        image.put64(field::REFCOUNT_TABLE_OFFSET, cluster as u64);
        image.put32(field::REFCOUNT_TABLE_CLUSTERS, 1);
        image.put32(field::REFCOUNT_ORDER, 4);
        image.put32(field::HEADER_LENGTH, 112);
        image.put64(cluster, 2 * cluster as u64);
        image.put64(3 * cluster, (4 * cluster as u64) | COPIED);
        (0..TABLES).for_each(|number| image.set_refcount(number, 1));
        image
    }

    /// Makes it an image with subclusters.
    pub(crate) fn extended(mut self) -> Self {
        self.put64(field::INCOMPATIBLE, 1 << 4);
        self.entry_length = 16;
        self
    }

    pub(crate) fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    pub(crate) fn put32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put64(&mut self, offset: usize, value: u64) {
        self.bytes[offset..offset + 8].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn set_refcount(&mut self, cluster_number: usize, count: u16) {
        let offset = 2 * self.cluster() + cluster_number * 2;
        self.bytes[offset..offset + 2].copy_from_slice(&count.to_be_bytes());
    }

    /// Where in the file the L2 entry of a guest cluster is.
    pub(crate) fn entry(&self, guest_cluster: usize) -> usize {
        4 * self.cluster() + guest_cluster * self.entry_length
    }

    pub(crate) fn set_entry(&mut self, guest_cluster: usize, entry: u64) {
        self.put64(self.entry(guest_cluster), entry);
    }

    pub(crate) fn set_bitmap(&mut self, guest_cluster: usize, bitmap: u64) {
        self.put64(self.entry(guest_cluster) + 8, bitmap);
    }

    /// Appends a cluster filled with a byte and maps a guest cluster to it.
    pub(crate) fn add_data(&mut self, guest_cluster: usize, fill: u8) {
        let offset = self.bytes.len();
        self.set_refcount(offset >> self.cluster_bits, 1);
        self.bytes.resize(offset + self.cluster(), fill);
        self.set_entry(guest_cluster, offset as u64 | COPIED);
        if self.entry_length == 16 {
            self.set_bitmap(guest_cluster, 0xffff_ffff);
        }
    }

    /// Appends a stream, cut to what one entry can tell of, as the compressed form of a cluster.
    pub(crate) fn add_compressed(&mut self, guest_cluster: usize, stream: &[u8]) {
        let length_bits = self.cluster_bits - 8;
        let stream = &stream[..stream.len().clamp(0, 512 << length_bits)];
        let offset = self.bytes.len();
        let sectors = (stream.len().div_ceil(512) as u64).max(1) - 1;
        let clusters = stream.len().div_ceil(self.cluster()).max(1);
        for number in 0..clusters {
            self.set_refcount((offset >> self.cluster_bits) + number, 1);
        }
        self.bytes.extend_from_slice(stream);
        self.bytes.resize(offset + clusters * self.cluster(), 0);
        let offset_bits = 62 - length_bits;
        self.set_entry(guest_cluster, COMPRESSED | (sectors << offset_bits) | offset as u64);
    }
}
