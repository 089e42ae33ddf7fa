//! New VHD images.

use std::time::{Duration, SystemTime};

use super::{
    DYNAMIC, FIXED, FOOTER_CHECKSUM, FOOTER_LENGTH, HEADER_CHECKSUM, SECTOR, UNUSED, VERSION,
    checksum,
};
use crate::error::Result;
use crate::foreign_options::VhdSize;
use crate::formats::block_table::{Numbers, TableShape};
use crate::formats::new::{InOrder, NewForeign, Planned, random, too_large};
use crate::formats::new_blocks::{NewBlocks, NewImage, Part, Shape};

const BLOCK_SIZE: u64 = 2 << 20;

/// Before each block: a bit for each of its sectors. A block that is written has all of them.
const BITMAP_LENGTH: usize = (BLOCK_SIZE / SECTOR / 8) as usize;

/// The largest disk in sectors: 2040 GiB.
const SECTORS_MAX: u64 = 0xff00_0000;

/// The dynamic header follows the copy of the footer, and the table follows it.
const HEADER: u64 = 512;
const TABLE: u64 = HEADER + 1024;

/// 1 January 2000, from which times are counted.
const EPOCH: Duration = Duration::from_secs(946_684_800);

/// Cylinders, heads, and sectors of a track.
type Geometry = (u64, u64, u64);

/// Disks with this geometry or more have a size of their own.
const GEOMETRY_MAX: Geometry = (65535, 16, 255);

/// The footer, with a copy at the start unless the image is fixed.
#[derive(Debug)]
struct Vpc {
    footer: Vec<u8>,
    data: u64,
}

impl NewBlocks for Vpc {
    fn free(&self, _: u64) -> u64 {
        UNUSED.into()
    }

    fn stored(&self, _: u64, offset: u64) -> u64 {
        offset / SECTOR
    }

    fn number(&self, entry: u64) -> Option<u64> {
        let offset = (entry != u64::from(UNUSED)).then_some(entry * SECTOR)?;
        Some(offset.checked_sub(self.data)? / (BLOCK_SIZE + BITMAP_LENGTH as u64))
    }

    fn ending(&self, _: u64, end: u64) -> Vec<Part> {
        vec![(end, self.footer.clone())]
    }
}

pub(in crate::formats) fn plan(new: &NewForeign<'_>) -> Result<Planned> {
    let (size, geometry) = disk(new)?;
    let is_fixed = new.is_fixed("VHD")?;
    let footer = footer(size, geometry, is_fixed)?;
    let blocks = size.div_ceil(BLOCK_SIZE);
    let table_length = (blocks * 4).next_multiple_of(SECTOR);
    let table = TableShape { place: TABLE, copy: None, entries: blocks, numbers: Numbers::Big32 };
    let shape = match is_fixed {
        true => Shape {
            size,
            block_size: BLOCK_SIZE,
            before: Vec::new(),
            data: 0,
            blocks_max: blocks,
            table: None,
            is_fixed,
            parts: Vec::new(),
            start: 0,
            backing: None,
        },
        false => Shape {
            size,
            block_size: BLOCK_SIZE,
            before: vec![0xff; BITMAP_LENGTH],
            data: TABLE + table_length,
            blocks_max: blocks,
            table: Some(table),
            is_fixed,
            parts: vec![(0, footer.clone()), (HEADER, dynamic_header(blocks))],
            start: 0,
            backing: None,
        },
    };
    let data = shape.data;
    let in_order = match is_fixed {
        true => InOrder::Disk(footer.clone()),
        false => InOrder::No("make a fixed one (subformat=fixed)"),
    };
    Ok(NewImage::plan(Vpc { footer, data }, shape, FOOTER_LENGTH as u64, in_order))
}

/// The size of the disk in bytes, and what the footer says of its geometry.
fn disk(new: &NewForeign<'_>) -> Result<(u64, Option<Geometry>)> {
    let unit = match new.options.vhd_size {
        VhdSize::WholeMebibytes => 1 << 20,
        VhdSize::Exact | VhdSize::Geometry => SECTOR,
    };
    let size = new.size_in(unit)?;
    let sectors = size / SECTOR;
    if sectors > SECTORS_MAX {
        return Err(too_large(size, "VHD", "2040 GiB"));
    }
    if new.options.vhd_size != VhdSize::Geometry {
        return Ok((size, None));
    }
    let mut wanted = sectors;
    loop {
        let geometry = geometry(wanted);
        let (cylinders, heads, track) = geometry;
        if geometry == GEOMETRY_MAX {
            return Ok((size, Some(geometry)));
        }
        if cylinders * heads * track >= sectors {
            return Ok((cylinders * heads * track * SECTOR, Some(geometry)));
        }
        wanted += 1;
    }
}

/// The geometry of a disk (Virtual Hard Disk Image Format Specification, "CHS Calculation").
fn geometry(sectors: u64) -> Geometry {
    let (most, heads_most, track_most) = GEOMETRY_MAX;
    if sectors >= most * heads_most * track_most {
        return GEOMETRY_MAX;
    }
    if sectors >= most * heads_most * 63 {
        return (sectors / track_most / heads_most, heads_most, track_most);
    }
    let (mut track, mut tracks) = (17, sectors / 17);
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (track, heads, tracks) = (31, 16, sectors / 31);
    }
    if tracks >= heads * 1024 {
        (track, heads, tracks) = (63, 16, sectors / 63);
    }
    (tracks / heads, heads, track)
}

/// The footer; without a geometry, the size alone counts.
fn footer(size: u64, geometry: Option<Geometry>, is_fixed: bool) -> Result<Vec<u8>> {
    let mut footer = vec![0; FOOTER_LENGTH];
    footer[..8].copy_from_slice(b"conectix");
    // Reserved, always set.
    footer[8..12].copy_from_slice(&2_u32.to_be_bytes());
    footer[12..16].copy_from_slice(&VERSION.to_be_bytes());
    let header = if is_fixed { u64::MAX } else { HEADER };
    footer[16..24].copy_from_slice(&header.to_be_bytes());
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.saturating_sub(EPOCH).as_secs();
    footer[24..28].copy_from_slice(&(seconds as u32).to_be_bytes());
    // Readers decide by this whether the size or the geometry counts, and know the codes of QEMU.
    footer[28..32].copy_from_slice(if geometry.is_some() { b"qemu" } else { b"qem2" });
    footer[32..36].copy_from_slice(&0x0005_0003_u32.to_be_bytes());
    footer[36..40].copy_from_slice(b"Wi2k");
    // Once, and now.
    for offset in [40, 48] {
        footer[offset..offset + 8].copy_from_slice(&size.to_be_bytes());
    }
    let (cylinders, heads, track) = geometry.unwrap_or(GEOMETRY_MAX);
    footer[56..58].copy_from_slice(&(cylinders as u16).to_be_bytes());
    (footer[58], footer[59]) = (heads as u8, track as u8);
    let kind = if is_fixed { FIXED } else { DYNAMIC };
    footer[60..64].copy_from_slice(&kind.to_be_bytes());
    footer[68..84].copy_from_slice(&random()?);
    let sum = checksum(&footer, FOOTER_CHECKSUM);
    footer[FOOTER_CHECKSUM..FOOTER_CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
    Ok(footer)
}

fn dynamic_header(blocks: u64) -> Vec<u8> {
    let mut header = vec![0; (TABLE - HEADER) as usize];
    header[..8].copy_from_slice(b"cxsparse");
    // There is no other structure.
    header[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
    header[16..24].copy_from_slice(&TABLE.to_be_bytes());
    header[24..28].copy_from_slice(&VERSION.to_be_bytes());
    header[28..32].copy_from_slice(&(blocks as u32).to_be_bytes());
    header[32..36].copy_from_slice(&(BLOCK_SIZE as u32).to_be_bytes());
    let sum = checksum(&header, HEADER_CHECKSUM);
    header[HEADER_CHECKSUM..HEADER_CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign_options::ForeignOptions;

    #[test]
    fn the_size_by_geometry_is_never_smaller_and_little_larger() {
        let options = ForeignOptions { vhd_size: VhdSize::Geometry, ..ForeignOptions::default() };
        for exponent in 0..41 {
            for size in [1_u64 << exponent, (1 << exponent) + 513, 3 << exponent >> 1] {
                let new = NewForeign { size, name: "disk".into(), options: &options, parent: None };
                let (found, geometry) = disk(&new).unwrap();
                let (cylinders, heads, track) = geometry.unwrap();
                assert!(found >= size && found - size < 3 << 20, "{size}: {found}");
                let is_exact = geometry == Some(GEOMETRY_MAX);
                assert!(is_exact || found == cylinders * heads * track * SECTOR, "{size}");
            }
        }
    }

    #[test]
    fn a_size_is_rounded_up_as_wanted_and_refused_beyond_the_limit() {
        let mut options = ForeignOptions::default();
        let mut size = |size: u64, vhd_size| {
            options.vhd_size = vhd_size;
            let new = NewForeign { size, name: "disk".into(), options: &options, parent: None };
            disk(&new).map(|(size, _)| size)
        };
        assert_eq!(size((5 << 20) + 1, VhdSize::WholeMebibytes).unwrap(), 6 << 20);
        assert_eq!(size((5 << 20) + 1, VhdSize::Exact).unwrap(), (5 << 20) + 512);
        assert_eq!(size(2040 << 30, VhdSize::WholeMebibytes).unwrap(), 2040 << 30);
        for wanted in [VhdSize::WholeMebibytes, VhdSize::Exact, VhdSize::Geometry] {
            let error = size((2040 << 30) + 1, wanted).unwrap_err();
            assert!(error.to_string().contains("2040 GiB"), "{error}");
        }
    }
}
