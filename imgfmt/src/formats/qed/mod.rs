//! QED, QEMU enhanced disk: two levels of tables, with a backing file.
//!
//! | offset | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 4 | `QED\0` |
//! | 4 | 4 | size of a cluster, 4 KiB to 64 MiB |
//! | 8 | 4 | size of a table in clusters, 1 to 16 |
//! | 12 | 4 | size of the header in clusters |
//! | 16 | 8 | features without which it cannot be read: 1 backing file, 2 to be checked, 4 the backing file is raw |
//! | 40 | 8 | offset of the L1 table |
//! | 48 | 8 | size of the disk |
//! | 56 | 8 | name of the backing file: offset (4), length (4) |
//!
//! Entries of both tables are offsets of 8 bytes. 0 is nothing; 1 in an L2 table is a cluster of
//! zeroes.

use super::blocks::{BlockImage, Blocks, Piece, Place};
use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Opening, Parent};
use crate::bytes::{u32_le_at, u64_le_at};
use crate::error::Result;
use crate::format::Format;

const HEADER_LENGTH: usize = 64;

/// Features without which an image cannot be read.
mod feature {
    pub(super) const BACKING_FILE: u64 = 1;
    /// It was not closed. Entries are checked when they are used, so it can be read.
    pub(super) const NEED_CHECK: u64 = 2;
    pub(super) const BACKING_IS_RAW: u64 = 4;
}

/// A cluster of zeroes.
const ZERO_CLUSTER: u64 = 1;

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.starts_with(b"QED\0")
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let file = ImageFile::new(opening.storage, opening.path)?;
    Ok(BlockImage::boxed(Qed::open(file)?))
}

/// An open image.
#[derive(Debug)]
struct Qed {
    file: ImageFile,
    size: u64,
    cluster: u64,
    /// How many entries a table has.
    entries: u64,
    l1: u64,
    parent: Option<Parent>,
}

impl Qed {
    fn open(file: ImageFile) -> Result<Self> {
        let header: [u8; HEADER_LENGTH] = file.read(0)?;
        if !starts(&header) {
            return Err(file.invalid("it has no QED header"));
        }
        let (cluster, table) = (u32_le_at(&header, 4), u32_le_at(&header, 8));
        if !cluster.is_power_of_two() || !(1 << 12..=1 << 26).contains(&cluster) {
            return Err(file.invalid(format!("clusters of {cluster} bytes cannot be")));
        }
        if !table.is_power_of_two() || table > 16 {
            return Err(file.invalid(format!("tables of {table} clusters cannot be")));
        }
        let features = u64_le_at(&header, 16);
        let known = feature::BACKING_FILE | feature::NEED_CHECK | feature::BACKING_IS_RAW;
        if features & !known != 0 {
            let unknown = features & !known;
            return Err(
                file.unsupported(format!("it has features that are not known ({unknown:#x})"))
            );
        }
        let cluster = u64::from(cluster);
        let table_length = u64::from(table) * cluster;
        let entries = table_length / 8;
        let size = u64_le_at(&header, 48);
        let size_max = u128::from(entries) * u128::from(entries) * u128::from(cluster);
        if u128::from(size) > size_max || size > i64::MAX as u64 {
            return Err(file.invalid(format!("its tables do not make a disk of {size} bytes")));
        }
        let l1 = u64_le_at(&header, 40);
        if !l1.is_multiple_of(cluster) || l1 == 0 || !file.has(l1, table_length) {
            return Err(
                file.invalid("its L1 table lies beyond the end of the file, or not at a cluster")
            );
        }
        let parent = match features & feature::BACKING_FILE {
            0 => None,
            _ => Some(parent(&file, &header, features)?),
        };
        Ok(Self { file, size, cluster, entries, l1, parent })
    }
}

fn parent(file: &ImageFile, header: &[u8; HEADER_LENGTH], features: u64) -> Result<Parent> {
    let name = file.backing_name(u32_le_at(header, 56).into(), u32_le_at(header, 60))?;
    let format = (features & feature::BACKING_IS_RAW != 0).then_some(Format::Raw);
    Ok(Parent { names: vec![name], format, identity: None })
}

impl Blocks for Qed {
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
        let number = guest / self.cluster;
        let within = guest % self.cluster;
        let (first, second) = (number / self.entries, number % self.entries);
        let Some(l2) = cursor.u64_le(self.l1 + first * 8, guest)? else { return Ok(None) };
        if l2 == 0 {
            let length = (self.entries - second) * self.cluster - within;
            return Ok(Some(Piece { length, place: Place::Absent }));
        }
        self.file.check_place(l2, self.cluster, self.entries * 8, guest)?;
        let Some(entry) = cursor.u64_le(l2 + second * 8, guest)? else { return Ok(None) };
        let place = match entry {
            0 => Place::Absent,
            ZERO_CLUSTER => Place::Zero,
            entry => {
                self.file.check_place(entry, self.cluster, 1, guest)?;
                Place::Stored(entry + within)
            }
        };
        Ok(Some(Piece { length: self.cluster - within, place }))
    }

    fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }
}
