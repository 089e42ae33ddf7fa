//! Parallels, in both forms of its images, the old one with offsets in sectors and the extended one
//! with offsets in clusters.
//!
//! | offset | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 16 | `WithoutFreeSpace`, or `WithouFreSpacExt` for the extended form |
//! | 16 | 4 | version, 2 |
//! | 28 | 4 | sectors of a cluster |
//! | 32 | 4 | entries of the table |
//! | 36 | 8 | sectors of the disk; 4 bytes in the old form |
//! | 64 | | the table: 4 bytes for each cluster, its offset, or 0 |
//!
//! The flag at 52 that says that the disk is empty is not trusted: programs leave it behind.

use super::blocks::{BlockImage, Blocks, Piece, Place};
use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Opening};
use crate::bytes::{u32_le_at, u64_le_at};
use crate::error::Result;

const OLD: &[u8] = b"WithoutFreeSpace";
const EXTENDED: &[u8] = b"WithouFreSpacExt";
const SECTOR: u64 = 512;
const HEADER_LENGTH: usize = 64;

/// Most sectors of a cluster: 1 GiB.
const CLUSTER_SECTORS_MAX: u32 = 1 << 21;

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.starts_with(OLD) || start.starts_with(EXTENDED)
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let file = ImageFile::new(opening.storage, opening.path)?;
    Ok(BlockImage::boxed(Parallels::open(file)?))
}

/// An open image.
#[derive(Debug)]
struct Parallels {
    file: ImageFile,
    size: u64,
    cluster: u64,
    /// What an entry counts, in bytes.
    unit: u64,
}

impl Parallels {
    fn open(file: ImageFile) -> Result<Self> {
        let header: [u8; HEADER_LENGTH] = file.read(0)?;
        if !starts(&header) {
            return Err(file.invalid("it has no Parallels header"));
        }
        let version = u32_le_at(&header, 16);
        if version != 2 {
            return Err(file.unsupported(format!("its format is Parallels {version}, not 2")));
        }
        let sectors = u32_le_at(&header, 28);
        if sectors == 0 || sectors > CLUSTER_SECTORS_MAX {
            return Err(file.invalid(format!("clusters of {sectors} sectors cannot be")));
        }
        let cluster = u64::from(sectors) * SECTOR;
        let is_extended = header.starts_with(EXTENDED);
        let stated = match is_extended {
            true => u64_le_at(&header, 36),
            false => u64::from(u32_le_at(&header, 36)),
        };
        let entries = u64::from(u32_le_at(&header, 32));
        let size = stated.checked_mul(SECTOR).filter(|size| *size <= i64::MAX as u64);
        let Some(size) = size.filter(|size| size.div_ceil(cluster) <= entries) else {
            let detail = format!("its {entries} clusters do not make a disk of {stated} sectors");
            return Err(file.invalid(detail));
        };
        if !file.has(HEADER_LENGTH as u64, entries * 4) {
            return Err(file.invalid("its table lies beyond the end of the file"));
        }
        let unit = if is_extended { cluster } else { SECTOR };
        Ok(Self { file, size, cluster, unit })
    }
}

impl Blocks for Parallels {
    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.cluster)
    }

    fn find(&self, cursor: &mut Cursor<'_>, guest: u64) -> Result<Option<Piece>> {
        let (number, within) = (guest / self.cluster, guest % self.cluster);
        let entry = cursor.u32_le(HEADER_LENGTH as u64 + number * 4, guest)?;
        let place = match entry {
            None => return Ok(None),
            Some(0) => Place::Absent,
            // At most 2^32 times 2^30.
            Some(entry) => Place::Stored(u64::from(entry) * self.unit + within),
        };
        Ok(Some(Piece { length: self.cluster - within, place }))
    }
}
