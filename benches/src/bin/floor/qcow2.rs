//! The least that a qcow2 server does that keeps no L2 table: for each read, one `pread` of an
//! entry and one of the data.
//!
//! It takes only images whose every cluster is mapped, and no read that crosses a cluster.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// An image, and its L1 table in memory.
pub(crate) struct Qcow2 {
    file: File,
    cluster_bits: u32,
    l1: Vec<u64>,
}

/// The offset in an entry of either table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// An L1 table for 16 TiB and clusters of 64 KiB, twice.
const L1_ENTRIES_MAX: u32 = 1 << 16;

impl Qcow2 {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut header = [0; 48];
        file.read_exact_at(&mut header, 0)?;
        let cluster_bits = u32::from_be_bytes(part(&header, 20));
        let l1_entries = u32::from_be_bytes(part(&header, 36));
        let l1_offset = u64::from_be_bytes(part(&header, 40));
        let is_right = header.starts_with(b"QFI\xfb")
            && (9..=21).contains(&cluster_bits)
            && l1_entries <= L1_ENTRIES_MAX;
        if !is_right {
            return Err(io::Error::new(ErrorKind::InvalidData, "not an image of the benchmark"));
        }
        let mut bytes = vec![0; l1_entries as usize * 8];
        file.read_exact_at(&mut bytes, l1_offset)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let l1 = entries.iter().map(|entry| u64::from_be_bytes(*entry) & OFFSET).collect();
        Ok(Self { file, cluster_bits, l1 })
    }

    /// The places of all clusters of a disk of `size` bytes, in its order.
    pub(crate) fn places(&self, size: u64) -> io::Result<Vec<u64>> {
        let clusters = size.div_ceil(1 << self.cluster_bits);
        (0..clusters).map(|cluster| self.place(cluster)).collect()
    }

    pub(crate) fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Fills `data` with the bytes of the disk from `offset`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let host = self.place(offset >> self.cluster_bits)?;
        self.file.read_exact_at(data, host + (offset & ((1 << self.cluster_bits) - 1)))
    }

    /// Where a cluster of the disk begins in the file.
    fn place(&self, cluster: u64) -> io::Result<u64> {
        let entries_bits = self.cluster_bits - 3;
        let table = usize::try_from(cluster >> entries_bits).ok().and_then(|at| self.l1.get(at));
        let missing = || io::Error::new(ErrorKind::InvalidData, "a cluster that is not mapped");
        let place = table.ok_or_else(missing)? + (cluster & ((1 << entries_bits) - 1)) * 8;
        let mut entry = [0; 8];
        self.file.read_exact_at(&mut entry, place)?;
        match u64::from_be_bytes(entry) & OFFSET {
            0 => Err(missing()),
            host => Ok(host),
        }
    }
}

fn part<const N: usize>(header: &[u8; 48], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}
