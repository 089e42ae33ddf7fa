//! VHD, the format of Virtual PC and Hyper-V, version 1.0: fixed, dynamic and differencing images.
//!
//! A footer of 512 bytes ends every image. Fixed images have nothing else besides the disk; the
//! others begin with a copy of it, a dynamic header, and a table with the sector of each block. A
//! block begins with a bitmap of its sectors: those that are not set were never written.
//!
//! | offset | size | field of the footer, big-endian |
//! | ---: | ---: | --- |
//! | 0 | 8 | `conectix` |
//! | 12 | 4 | version, `0x00010000` |
//! | 16 | 8 | offset of the dynamic header |
//! | 28 | 4 | the program that made the image |
//! | 48 | 8 | size of the disk |
//! | 56 | 4 | cylinders (2), heads (1), sectors of a track (1) |
//! | 60 | 4 | type: 2 fixed, 3 dynamic, 4 differencing |
//! | 64 | 4 | checksum: the complement of the sum of all other bytes |
//! | 68 | 16 | UUID |
//!
//! | offset | size | field of the dynamic header |
//! | ---: | ---: | --- |
//! | 0 | 8 | `cxsparse` |
//! | 16 | 8 | offset of the table of blocks |
//! | 24 | 4 | version, `0x00010000` |
//! | 28 | 4 | entries of the table |
//! | 32 | 4 | size of a block |
//! | 36 | 4 | checksum, as above |
//! | 40 | 16 | UUID of the parent |
//! | 64 | 512 | name of the parent, UTF-16 |
//! | 576 | 192 | eight places of other names of the parent |

mod new;
mod parent;

use std::ops::RangeInclusive;

pub(super) use self::new::plan;
use self::parent::HEADER_LENGTH;
use super::blocks::{BlockImage, Blocks, Piece, Place};
use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Identity, Opening, Parent};
use crate::backup::Uuid;
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::error::Result;
use crate::foreign_info::{FormatDetails, ImageKind, VpcInfo};

const SECTOR: u64 = 512;
const FOOTER_LENGTH: usize = 512;
const VERSION: u32 = 0x0001_0000;
/// Of the disk, in the footer.
const SIZE: usize = 48;
const FOOTER_CHECKSUM: usize = 64;
const HEADER_CHECKSUM: usize = 36;

/// A block that was never written.
const UNUSED: u32 = u32::MAX;

/// Sizes of blocks that make sense, in bytes; the usual one is 2 MiB.
const BLOCK_SIZES: RangeInclusive<u32> = 4096..=1 << 28;

/// The largest geometry: disks of that size and more do not depend on it.
const GEOMETRY_MAX: u64 = 65535 * 16 * 255 * SECTOR;

/// How many bits of a block's bitmap are looked at for one piece.
const SECTORS_MAX: u64 = 1 << 14;

const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.starts_with(b"conectix")
}

/// Whether a file of that length that ends so is one. Guests can write what is at the end of a raw
/// disk, so its name has to say so too. Without a copy at the start only a fixed image is opened,
/// which names no file, and only if nothing of the file but the footer is missing from its disk.
pub(super) fn ends(end: &[u8; FOOTER_LENGTH], length: u64) -> bool {
    let footer = if is_footer(end) { &end[..] } else { &end[1..] };
    is_footer(footer) && (u32_at(footer, 60) != FIXED || is_whole(footer, length))
}

/// Whether a fixed image with this footer at its end has this length.
fn is_whole(footer: &[u8], length: u64) -> bool {
    u64_at(footer, SIZE).checked_add(footer.len() as u64) == Some(length)
}

fn is_footer(footer: &[u8]) -> bool {
    footer.starts_with(b"conectix") && is_sound(footer, FOOTER_CHECKSUM)
}

/// Whether the checksum at that place is right.
fn is_sound(bytes: &[u8], place: usize) -> bool {
    u32_at(bytes, place) == checksum(bytes, place)
}

/// The checksum for that place: the one's complement of the sum of all other bytes.
fn checksum(bytes: &[u8], place: usize) -> u32 {
    let is_other = |other: &usize| !(place..place + 4).contains(other);
    let other = bytes.iter().enumerate().filter(|(place, _)| is_other(place));
    !other.fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let file = ImageFile::new(opening.storage, opening.path)?;
    Ok(BlockImage::boxed(Vpc::open(file)?))
}

/// An open image.
#[derive(Debug)]
struct Vpc {
    file: ImageFile,
    size: u64,
    identity: Identity,
    details: VpcInfo,
    /// `None`: the file is the disk, up to the footer.
    table: Option<BlockTable>,
    parent: Option<Parent>,
}

#[derive(Clone, Copy, Debug)]
struct BlockTable {
    offset: u64,
    block_size: u64,
    /// Of the bitmap before each block, in bytes.
    bitmap_length: u64,
}

impl Vpc {
    fn open(file: ImageFile) -> Result<Self> {
        let footer = Footer::read(&file)?;
        let size = footer.disk_size();
        if size > i64::MAX as u64 {
            return Err(file.invalid(format!("a disk of {size} bytes cannot be")));
        }
        let (table, parent) = match footer.kind {
            Kind::Fixed => (None, None),
            Kind::Sparse { header, is_differencing } => {
                let (table, parent) = read_header(&file, header, size, is_differencing)?;
                (Some(table), parent)
            }
        };
        let details = footer.details();
        Ok(Self { file, size, identity: footer.identity, details, table, parent })
    }

    /// Where a block's data of which `within` bytes are skipped is, by its bitmap.
    fn find_in_block(
        &self,
        table: &BlockTable,
        cursor: &mut Cursor<'_>,
        (start, guest): (u64, u64),
    ) -> Result<Option<Piece>> {
        let within = guest % table.block_size;
        let first = within / SECTOR;
        let end = (table.block_size / SECTOR).min(first + SECTORS_MAX);
        let mut sector = first;
        let mut is_first_set = None;
        while sector < end {
            // Bitmaps are padded to whole sectors.
            let word = cursor.u64_be(start + sector / 64 * 8, guest)?;
            let Some(word) = word else { return Ok(None) };
            let bits = word << (sector % 64);
            let is_set = *is_first_set.get_or_insert(bits >> 63 != 0);
            let same = if is_set { bits.leading_ones() } else { bits.leading_zeros() };
            let rest = 64 - sector % 64;
            sector += u64::from(same).min(rest);
            if u64::from(same) < rest {
                break;
            }
        }
        let length = sector.min(end) * SECTOR - within;
        let place = match is_first_set {
            Some(true) => Place::Stored(start + table.bitmap_length + within),
            _ => self.nothing(),
        };
        Ok(Some(Piece { length, place }))
    }

    /// What was never written.
    fn nothing(&self) -> Place {
        if self.parent.is_some() { Place::Absent } else { Place::Zero }
    }
}

impl Blocks for Vpc {
    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn find(&self, cursor: &mut Cursor<'_>, guest: u64) -> Result<Option<Piece>> {
        let Some(table) = &self.table else {
            return Ok(Some(Piece { length: self.size - guest, place: Place::Stored(guest) }));
        };
        let block = guest / table.block_size;
        let entry = cursor.u32_be(table.offset + block * 4, guest)?;
        let Some(entry) = entry else { return Ok(None) };
        if entry == UNUSED {
            let length = table.block_size - guest % table.block_size;
            return Ok(Some(Piece { length, place: self.nothing() }));
        }
        self.find_in_block(table, cursor, (u64::from(entry) * SECTOR, guest))
    }

    fn is_preallocated(&self) -> bool {
        self.table.is_none()
    }

    fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    fn block_size(&self) -> Option<u64> {
        self.table.map(|table| table.block_size)
    }

    fn details(&self) -> Option<FormatDetails> {
        Some(FormatDetails::Vpc(self.details.clone()))
    }

    fn identity(&self) -> Option<Identity> {
        Some(self.identity)
    }
}

/// What an image is in its footer's words.
struct Footer {
    kind: Kind,
    /// As the footer says.
    size: u64,
    /// Cylinders, heads, and sectors of a track.
    geometry: (u16, u8, u8),
    /// The program that made the image.
    creator: [u8; 4],
    identity: Identity,
}

enum Kind {
    Fixed,
    Sparse { header: u64, is_differencing: bool },
}

impl Footer {
    /// Reads the copy at the start, which fixed images do not have, or else the footer at the end.
    fn read(file: &ImageFile) -> Result<Self> {
        let start: [u8; FOOTER_LENGTH] = file.read(0)?;
        if is_footer(&start) && u32_at(&start, 60) != FIXED {
            return Self::parse(file, &start, true);
        }
        let end: [u8; FOOTER_LENGTH] = match file.len().checked_sub(FOOTER_LENGTH as u64) {
            Some(offset) => file.read(offset)?,
            None => start,
        };
        // Old versions of Virtual PC wrote a byte less.
        let footer = if is_footer(&end) { &end[..] } else { &end[1..] };
        match is_footer(footer) {
            true => Self::parse(file, footer, starts(&start)),
            false if starts(&start) || starts(&end) => {
                Err(file.invalid("the checksums of its footers are wrong: they are damaged"))
            }
            false => Err(file.invalid("it has no VHD footer")),
        }
    }

    /// `has_copy`: the file begins as images do that are not fixed.
    fn parse(file: &ImageFile, footer: &[u8], has_copy: bool) -> Result<Self> {
        let version = u32_at(footer, 12);
        if version >> 16 != VERSION >> 16 {
            return Err(file.unsupported(format!("its format is VHD {}, not 1", version >> 16)));
        }
        let kind = match u32_at(footer, 60) {
            FIXED if is_whole(footer, file.len()) => Kind::Fixed,
            FIXED => {
                let detail = format!(
                    "its footer says that the disk has {} bytes, which the length of the file \
                     contradicts",
                    u64_at(footer, SIZE)
                );
                return Err(file.invalid(detail));
            }
            kind @ (DYNAMIC | DIFFERENCING) if has_copy => {
                Kind::Sparse { header: u64_at(footer, 16), is_differencing: kind == DIFFERENCING }
            }
            DYNAMIC | DIFFERENCING => {
                return Err(file.invalid("the copy of its footer at the start is missing"));
            }
            other => return Err(file.invalid(format!("its type of image is {other}"))),
        };
        let (mut identity, mut creator) = ([0; 16], [0; 4]);
        identity.copy_from_slice(&footer[68..84]);
        creator.copy_from_slice(&footer[28..32]);
        Ok(Self {
            kind,
            size: u64_at(footer, SIZE) / SECTOR * SECTOR,
            geometry: (u16_at(footer, 56), footer[58], footer[59]),
            creator,
            identity: Identity(identity),
        })
    }

    fn disk_size(&self) -> u64 {
        let (cylinders, heads, sectors) = self.geometry;
        let size = u64::from(cylinders) * u64::from(heads) * u64::from(sectors) * SECTOR;
        // Others, as Hyper-V and Azure, go by the size.
        let goes_by_geometry = matches!(&self.creator, b"vpc " | b"qemu");
        match goes_by_geometry && (1..GEOMETRY_MAX).contains(&size) && size <= self.size {
            true => size,
            false => self.size,
        }
    }

    fn details(&self) -> VpcInfo {
        VpcInfo {
            kind: match self.kind {
                Kind::Fixed => ImageKind::Fixed,
                Kind::Sparse { is_differencing: false, .. } => ImageKind::Dynamic,
                Kind::Sparse { is_differencing: true, .. } => ImageKind::Differencing,
            },
            geometry: self.geometry,
            current_size: self.size,
            creator: self.creator,
            uuid: Uuid::from_bytes(self.identity.0),
        }
    }
}

fn read_header(
    file: &ImageFile,
    offset: u64,
    size: u64,
    is_differencing: bool,
) -> Result<(BlockTable, Option<Parent>)> {
    if !file.has(offset, HEADER_LENGTH as u64) {
        return Err(file.invalid("its dynamic header lies beyond the end of the file"));
    }
    let header: [u8; HEADER_LENGTH] = file.read(offset)?;
    if !header.starts_with(b"cxsparse") || !is_sound(&header, HEADER_CHECKSUM) {
        return Err(file.invalid("its dynamic header is damaged"));
    }
    if u32_at(&header, 24) >> 16 != VERSION >> 16 {
        return Err(file.unsupported("the version of its dynamic header is not 1"));
    }
    let (entries, block_size) = (u32_at(&header, 28), u32_at(&header, 32));
    if !BLOCK_SIZES.contains(&block_size) || !block_size.is_power_of_two() {
        return Err(file.invalid(format!("blocks of {block_size} bytes cannot be")));
    }
    let block_size = u64::from(block_size);
    let blocks = size.div_ceil(block_size);
    if blocks > u64::from(entries) {
        let detail = format!("its table of {entries} blocks is too short for {size} bytes of disk");
        return Err(file.invalid(detail));
    }
    let table = u64_at(&header, 16);
    if !file.has(table, blocks * 4) {
        return Err(file.invalid("its table of blocks lies beyond the end of the file"));
    }
    let parent = match is_differencing {
        true => Some(parent::read(file, &header)?),
        false => None,
    };
    let bitmap_length = (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
    Ok((BlockTable { offset: table, block_size, bitmap_length }, parent))
}
