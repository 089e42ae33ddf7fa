//! VDI, the format of VirtualBox, version 1.1: dynamic and fixed images.
//!
//! | offset | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 64 | a text for people |
//! | 64 | 4 | signature `0xbeda107f` |
//! | 68 | 4 | version, `0x00010001` |
//! | 72 | 4 | length of the header from here on |
//! | 76 | 4 | type: 1 dynamic, 2 fixed, 3 undo, 4 differencing |
//! | 340 | 4 | offset of the table of blocks |
//! | 344 | 4 | offset of the first block |
//! | 360 | 4 | size of a sector, 512 |
//! | 368 | 8 | size of the disk |
//! | 376 | 4 | size of a block |
//! | 380 | 4 | bytes before each block, 0 |
//! | 384 | 4 | number of blocks of the disk |
//! | 388 | 4 | number of blocks in the file |
//! | 424 | 16 | UUID of the image before this one |
//! | 440 | 16 | UUID of the parent |
//!
//! The table has 4 bytes for each block of the disk: its number in the file, or one of two values
//! for blocks that the file does not have. Blocks of either of these read as zero.

mod new;

use std::ops::RangeInclusive;

pub(super) use self::new::plan;
use super::blocks::{BlockImage, Blocks, Piece, Place};
use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Opening};
use crate::bytes::{u32_le_at, u64_le_at};
use crate::error::Result;
use crate::foreign_info::{FormatDetails, ImageKind, VdiInfo};

const SIGNATURE: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
const SIGNATURE_OFFSET: usize = 64;
const VERSION: u32 = 0x0001_0001;
const SECTOR: u64 = 512;

/// The header with all fields that are used.
const HEADER_LENGTH: usize = 456;

/// The block was never written.
const FREE: u32 = u32::MAX;
/// The block was discarded.
const ZERO: u32 = u32::MAX - 1;

/// Sizes of blocks that make sense, in bytes; VirtualBox and QEMU make 1 MiB.
const BLOCK_SIZES: RangeInclusive<u32> = 4096..=256 << 20;

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.get(SIGNATURE_OFFSET..).is_some_and(|rest| rest.starts_with(&SIGNATURE))
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let file = ImageFile::new(opening.storage, opening.path)?;
    Ok(BlockImage::boxed(Vdi::open(file)?))
}

/// An open image.
#[derive(Debug)]
struct Vdi {
    file: ImageFile,
    size: u64,
    block_size: u64,
    /// Of the table, in the file.
    table: u64,
    /// Of the first block, in the file.
    data: u64,
    /// How many blocks the file has.
    allocated: u32,
    /// Every block has its place, whether it was written or not.
    is_fixed: bool,
}

impl Vdi {
    fn open(file: ImageFile) -> Result<Self> {
        let header: [u8; HEADER_LENGTH] = file.read(0)?;
        let number = |offset| u32_le_at(&header, offset);
        if !starts(&header) {
            return Err(file.invalid("it has no VDI header"));
        }
        if number(68) != VERSION {
            let (major, minor) = (number(68) >> 16, number(68) & 0xffff);
            let detail = format!("its format is VDI {major}.{minor}, and only 1.1 is known");
            return Err(file.unsupported(detail));
        }
        let is_fixed = match number(76) {
            1 => false,
            2 => true,
            3 | 4 => return Err(file.unsupported(DIFFERENCES)),
            other => return Err(file.invalid(format!("its type of image is {other}"))),
        };
        let has = |uuid: usize| header[uuid..uuid + 16].iter().any(|byte| *byte != 0);
        if has(424) || has(440) {
            return Err(file.unsupported(DIFFERENCES));
        }
        if number(380) != 0 {
            return Err(file.unsupported("its blocks have headers of their own"));
        }
        let (block_size, blocks) = (number(376), number(384));
        if number(360) != SECTOR as u32
            || !BLOCK_SIZES.contains(&block_size)
            || !block_size.is_power_of_two()
        {
            let sector = number(360);
            let detail =
                format!("its blocks of {block_size} bytes, or sectors of {sector}, cannot be");
            return Err(file.invalid(detail));
        }
        let stated = u64_le_at(&header, 368);
        let size = stated.checked_next_multiple_of(SECTOR).filter(|size| *size <= i64::MAX as u64);
        let block_size = u64::from(block_size);
        let Some(size) = size.filter(|size| size.div_ceil(block_size) <= u64::from(blocks)) else {
            let detail = format!("its {blocks} blocks do not make a disk of {stated} bytes");
            return Err(file.invalid(detail));
        };
        let (table, data) = (u64::from(number(340)), u64::from(number(344)));
        if !table.is_multiple_of(SECTOR) || !data.is_multiple_of(SECTOR) {
            return Err(file.invalid("its table of blocks or its data do not start at a sector"));
        }
        if !file.has(table, size.div_ceil(block_size) * 4) {
            return Err(file.invalid("its table of blocks lies beyond the end of the file"));
        }
        let allocated = number(388);
        Ok(Self { file, size, block_size, table, data, allocated, is_fixed })
    }
}

impl Blocks for Vdi {
    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn find(&self, cursor: &mut Cursor<'_>, guest: u64) -> Result<Option<Piece>> {
        let (block, within) = (guest / self.block_size, guest % self.block_size);
        let Some(entry) = cursor.u32_le(self.table + block * 4, guest)? else { return Ok(None) };
        let place = match entry {
            FREE | ZERO => Place::Zero,
            entry if entry >= self.allocated => {
                let allocated = self.allocated;
                let detail = format!("its table names block {entry}, and there are {allocated}");
                return Err(self.file.corrupt(detail, guest));
            }
            entry => Place::Stored(self.data + u64::from(entry) * self.block_size + within),
        };
        Ok(Some(Piece { length: self.block_size - within, place }))
    }

    fn is_preallocated(&self) -> bool {
        self.is_fixed
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.block_size)
    }

    fn details(&self) -> Option<FormatDetails> {
        let kind = if self.is_fixed { ImageKind::Fixed } else { ImageKind::Dynamic };
        Some(FormatDetails::Vdi(VdiInfo { kind, allocated_blocks: self.allocated }))
    }
}

const DIFFERENCES: &str = "it has only what changed since another image, which it does not name; make \
                           a whole image with 'VBoxManage clonemedium' first";
