//! The headers of sparse extents of ESX; all numbers are little-endian, offsets and sizes in
//! sectors of 512 bytes.
//!
//! `COWD`, of VMFS 5 and before, with tables of 4096 entries of 4 bytes:
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 4 | 4 | version, 1 |
//! | 12 | 4 | capacity |
//! | 16 | 4 | size of a grain |
//! | 20 | 4 | offset of the directory |
//! | 24 | 4 | entries of the directory |
//!
//! Space-efficient ones, of VMFS 6, with tables of 4096 entries of 8 bytes:
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 16 | magic number and version, 2.1 |
//! | 16 | 8 | capacity |
//! | 24 | 8 | size of a grain, 8 |
//! | 32 | 8 | size of a table, 64 |
//! | 40 | 8 | flags, 0 |
//! | 80 | 8 | offset of the header that changes: at 24 it says whether there is a journal to be replayed |
//! | 128 | 16 | offset and size of the directory |
//! | 144 | 16 | offset and size of the tables |
//! | 192 | 16 | offset and size of the grains |

use std::sync::Arc;

use super::descriptor::SECTOR;
use super::sparse::{Kind, Layout, Sparse};
use crate::bytes::{u32_le_at, u64_le_at};
use crate::error::Result;
use crate::formats::file::ImageFile;

pub(super) const COWD_MAGIC: &[u8] = b"COWD";
/// With the version.
pub(super) const SPACE_EFFICIENT_MAGIC: &[u8] = b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0";

/// What the header that changes begins with.
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;

/// Entries of a table of either kind.
const ENTRIES: u64 = 4096;

pub(super) fn cowd(file: Arc<ImageFile>) -> Result<Sparse> {
    let header: [u8; SECTOR as usize] = file.read(0)?;
    let number = |offset| u64::from(u32_le_at(&header, offset));
    if number(4) != 1 {
        let version = number(4);
        return Err(file.unsupported(format!("its extent is COWD {version}, and only 1 is known")));
    }
    let (capacity, grain) = (number(12), number(16));
    if capacity.div_ceil(grain.max(1) * ENTRIES) > number(24) {
        return Err(file.invalid("its directory is too short for its size"));
    }
    let layout =
        Layout { capacity, grain, entries: ENTRIES, directory: number(20), redundant: None };
    Sparse::new(file, layout, Kind::Plain { has_zeroed: false })
}

pub(super) fn space_efficient(file: Arc<ImageFile>) -> Result<Sparse> {
    let header: [u8; SECTOR as usize] = file.read(0)?;
    let number = |offset| u64_le_at(&header, offset);
    let (grain, table, flags) = (number(24), number(32), number(40));
    if (grain, table, flags) != (8, ENTRIES * 8 / SECTOR, 0) {
        let detail = format!(
            "its grains of {grain} sectors, tables of {table} or flags {flags:x} are not those of version 2.1"
        );
        return Err(file.unsupported(detail));
    }
    let in_bytes = |offset| {
        let bytes: Option<u64> = number(offset).checked_mul(SECTOR);
        bytes.filter(|bytes| *bytes <= i64::MAX as u64)
    };
    let places = in_bytes(80).zip(in_bytes(144)).zip(in_bytes(192));
    let Some(((volatile, tables), grains)) = places else {
        return Err(file.invalid("its header names places that cannot be"));
    };
    let volatile: [u8; 32] = file.read(volatile)?;
    if u64_le_at(&volatile, 0) != VOLATILE_MAGIC {
        return Err(file.invalid("its second header does not begin as it should"));
    }
    if u64_le_at(&volatile, 24) != 0 {
        let detail = "its journal was not replayed: let ESX open and close the disk first";
        return Err(file.unsupported(detail));
    }
    let layout = Layout {
        capacity: number(16),
        grain,
        entries: ENTRIES,
        directory: number(128),
        redundant: None,
    };
    Sparse::new(file, layout, Kind::SpaceEfficient { tables, grains })
}
