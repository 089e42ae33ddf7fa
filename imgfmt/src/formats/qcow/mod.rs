//! The first version of QEMU's copy-on-write format: two levels of tables, compressed clusters, and
//! a backing file.
//!
//! | offset | size | field, big-endian |
//! | ---: | ---: | --- |
//! | 0 | 4 | `QFI\xfb` |
//! | 4 | 4 | version, 1 |
//! | 8 | 12 | name of the backing file: offset (8), length (4) |
//! | 24 | 8 | size of the disk |
//! | 32 | 1 | a cluster has 2 to this power bytes |
//! | 33 | 1 | an L2 table has 2 to this power entries |
//! | 36 | 4 | encryption: 0 none, 1 AES |
//! | 40 | 8 | offset of the L1 table |
//!
//! Entries of both tables are offsets of 8 bytes, and 0 is nothing. Those of compressed clusters
//! have bit 63 set and, below it, as many bits for the length as clusters have.

use std::io::Read as _;
use std::sync::Arc;

use super::blocks::{BlockImage, Blocks, Piece, Place};
use super::decoded::Decoded;
use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Opening, Parent};
use crate::bytes::{u32_at, u64_at};
use crate::decompression;
use crate::error::Result;
use crate::mapping::Encoded;
use crate::units::HostOffset;

const HEADER_LENGTH: usize = 48;

/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.starts_with(b"QFI\xfb\0\0\0\x01")
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let file = ImageFile::new(opening.storage, opening.path)?;
    Ok(BlockImage::boxed(Qcow::open(file)?))
}

/// An open image.
#[derive(Debug)]
struct Qcow {
    file: ImageFile,
    size: u64,
    cluster_bits: u32,
    /// How many entries an L2 table has.
    entries: u64,
    l1: u64,
    parent: Option<Parent>,
    decoded: Decoded,
}

impl Qcow {
    fn open(file: ImageFile) -> Result<Self> {
        let header: [u8; HEADER_LENGTH] = file.read(0)?;
        if !starts(&header) {
            return Err(file.invalid("it has no header of the first version of qcow"));
        }
        match u32_at(&header, 36) {
            0 => {}
            1 => return Err(file.unsupported("it is encrypted, with the old AES of qcow")),
            other => return Err(file.invalid(format!("its kind of encryption is {other}"))),
        }
        let (cluster_bits, l2_bits) = (u32::from(header[32]), u32::from(header[33]));
        if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) {
            let detail = format!(
                "clusters of 2^{cluster_bits} bytes, or tables of 2^{l2_bits} entries, cannot be"
            );
            return Err(file.invalid(detail));
        }
        let size = u64_at(&header, 24);
        let l1 = u64_at(&header, 40);
        if size > i64::MAX as u64 {
            return Err(file.invalid(format!("a disk of {size} bytes cannot be")));
        }
        let l1_entries = size.div_ceil(1 << (cluster_bits + l2_bits));
        if l1 < HEADER_LENGTH as u64 || !file.has(l1, l1_entries.saturating_mul(8)) {
            return Err(file.invalid("its L1 table lies beyond the end of the file"));
        }
        let parent = parent(&file, &header)?;
        let entries = 1 << l2_bits;
        Ok(Self { file, size, cluster_bits, entries, l1, parent, decoded: Decoded::default() })
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn decompress(&self, encoded: Encoded, guest: u64) -> Result<Arc<[u8]>> {
        // At most a cluster.
        let mut input = vec![0; encoded.length as usize];
        let read = self.file.storage().read_at(encoded.offset, &mut input);
        let read = read.map_err(|error| self.file.io("read", error, guest))?;
        let mut cluster = vec![0; self.cluster() as usize];
        let _begun = decompression::begin();
        flate2::read::DeflateDecoder::new(&input[..read])
            .read_exact(&mut cluster)
            .map_err(|_| self.file.corrupt("a compressed cluster is damaged", guest))?;
        Ok(cluster.into())
    }
}

fn parent(file: &ImageFile, header: &[u8; HEADER_LENGTH]) -> Result<Option<Parent>> {
    let (offset, length) = (u64_at(header, 8), u32_at(header, 16));
    if offset == 0 {
        return Ok(None);
    }
    let name = file.backing_name(offset, length)?;
    Ok(Some(Parent { names: vec![name], format: None, identity: None }))
}

impl Blocks for Qcow {
    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.cluster())
    }

    fn find(&self, cursor: &mut Cursor<'_>, guest: u64) -> Result<Option<Piece>> {
        let number = guest >> self.cluster_bits;
        let within = guest % self.cluster();
        let (first, second) = (number / self.entries, number % self.entries);
        let Some(l2) = cursor.u64_be(self.l1 + first * 8, guest)? else { return Ok(None) };
        if l2 == 0 {
            let length = (self.entries - second) * self.cluster() - within;
            return Ok(Some(Piece { length, place: Place::Absent }));
        }
        self.file.check_place(l2, 1, self.entries * 8, guest)?;
        let Some(entry) = cursor.u64_be(l2 + second * 8, guest)? else { return Ok(None) };
        let place = match entry {
            0 => Place::Absent,
            entry if entry & COMPRESSED != 0 => {
                let offset_bits = 63 - self.cluster_bits;
                let length = (entry & !COMPRESSED) >> offset_bits;
                let offset = entry & ((1 << offset_bits) - 1);
                self.file.check_place(offset, 1, length, guest)?;
                Place::Encoded(Encoded::compressed(HostOffset::new(offset), length))
            }
            entry => {
                self.file.check_place(entry, 1, 1, guest)?;
                Place::Stored(entry + within)
            }
        };
        Ok(Some(Piece { length: self.cluster() - within, place }))
    }

    fn encoded_block(&self) -> u64 {
        self.cluster()
    }

    fn decode(&self, encoded: Encoded, guest: u64) -> Result<Arc<[u8]>> {
        if let Some(cluster) = self.decoded.get(encoded) {
            return Ok(cluster);
        }
        let cluster = self.decompress(encoded, guest)?;
        self.decoded.keep(encoded, &cluster);
        Ok(cluster)
    }

    fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }
}
