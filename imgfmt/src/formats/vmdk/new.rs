//! New VMDK images: one file with everything (`monolithicSparse`), and extents of others.
//!
//! The header is followed by the descriptor, a directory with its tables, which are a copy, and the
//! directory and the tables that count. The tables follow each other, so they are one table.

use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;

use super::descriptor::{NO_PARENT, SECTOR};
use super::sparse::{HOSTED_MAGIC, LINE_ENDS};
use crate::bytes::u32_le_at;
use crate::create_options::invalid;
use crate::error::Result;
use crate::foreign_options::VmdkAdapter;
use crate::formats::block_table::{Numbers, TableShape};
use crate::formats::new::{InOrder, NewForeign, OTHER_FORMATS, Planned, random, too_large};
use crate::formats::new_blocks::{NewBlocks, NewImage, Shape};

/// The size of a grain in bytes, and the grains of a table.
pub(super) const GRAIN: u64 = 64 << 10;
pub(super) const TABLE_GRAINS: u64 = 512;

/// The length of a table in sectors.
const TABLE_SECTORS: u64 = TABLE_GRAINS * 4 / SECTOR;

/// Where the descriptor is, and its length with the space for changes; in sectors.
pub(super) const DESCRIPTOR: u64 = 1;
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;

/// The limit of entries of tables, in sectors, and that of the disk: 2 TiB.
pub(super) const SECTORS_MAX: u64 = 1 << 32;

#[derive(Debug)]
struct Vmdk {
    data: u64,
}

impl NewBlocks for Vmdk {
    const IS_FREE_ZERO: bool = true;

    fn stored(&self, _: u64, offset: u64) -> u64 {
        offset / SECTOR
    }

    fn number(&self, entry: u64) -> Option<u64> {
        Some((entry * SECTOR).checked_sub(self.data)? / GRAIN)
    }
}

/// Plans an image that is a single file.
pub(super) fn plan(new: &NewForeign<'_>, size: u64) -> Result<Planned> {
    let text = descriptor(new, size, "monolithicSparse", &extent_line(new, size))?;
    fits(&text)?;
    sparse(new, (0, size), Some(text))
}

/// Plans a sparse extent, from an offset of the disk on and of a length. With the descriptor it is
/// an image; without it, only the descriptor that names it makes one of it.
pub(super) fn sparse(
    new: &NewForeign<'_>,
    (start, size): (u64, u64),
    text: Option<Vec<u8>>,
) -> Result<Planned> {
    let tables = size.div_ceil(GRAIN * TABLE_GRAINS);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let copy = DESCRIPTOR + DESCRIPTOR_SECTORS;
    let directory = copy + directory_sectors + tables * TABLE_SECTORS;
    let end = directory + directory_sectors + tables * TABLE_SECTORS;
    let data = (end * SECTOR).next_multiple_of(GRAIN);
    // When the disk is full.
    if data + size.next_multiple_of(GRAIN) > SECTORS_MAX * SECTOR {
        let most = "2 TiB with the tables of the disk: 2198754295808 bytes";
        return Err(too_large(size, "VMDK in one file", most));
    }
    let mut header = Header::new(size, if new.options.zeroed_grains { 2 } else { 1 });
    header.set_flags(if new.options.zeroed_grains { 0b111 } else { 0b11 });
    header.set_places(Some(copy), directory, data / SECTOR);
    if text.is_none() {
        header.set_no_descriptor();
    }
    let text = text.map(|text| (DESCRIPTOR * SECTOR, text));
    let parts = [
        (0, header.0),
        (copy * SECTOR, directory_of(copy + directory_sectors, tables)),
        (directory * SECTOR, directory_of(directory + directory_sectors, tables)),
    ];
    let parts = parts.into_iter().chain(text).collect();
    let table = TableShape {
        place: (directory + directory_sectors) * SECTOR,
        copy: Some((copy + directory_sectors) * SECTOR),
        entries: tables * TABLE_GRAINS,
        numbers: Numbers::Little32,
    };
    let shape = Shape {
        size,
        block_size: GRAIN,
        before: Vec::new(),
        data,
        blocks_max: (SECTORS_MAX * SECTOR - data) / GRAIN,
        table: Some(table),
        is_fixed: false,
        parts,
        start,
        backing: new.backing(),
    };
    let otherwise = "make one of compressed grains (subformat=streamOptimized)";
    Ok(NewImage::plan(Vmdk { data }, shape, 0, InOrder::No(otherwise)))
}

/// Plans an extent with the bytes of the disk as they are.
pub(super) fn flat((start, size): (u64, u64)) -> Planned {
    let shape = Shape {
        size,
        block_size: size,
        before: Vec::new(),
        data: 0,
        blocks_max: 1,
        table: None,
        is_fixed: true,
        parts: Vec::new(),
        start,
        backing: None,
    };
    NewImage::plan(Vmdk { data: 0 }, shape, 0, InOrder::No(OTHER_FORMATS))
}

/// The sectors of tables that follow each other.
pub(super) fn directory_of(first: u64, tables: u64) -> Vec<u8> {
    let sectors = (0..tables).map(|table| first + table * TABLE_SECTORS);
    sectors.flat_map(|sector| (sector as u32).to_le_bytes()).collect()
}

/// The header of a hosted sparse extent; its fields are described in [`sparse`](super::sparse).
#[derive(Debug)]
pub(super) struct Header(pub(super) Vec<u8>);

impl Header {
    pub(super) fn new(size: u64, version: u32) -> Self {
        let mut header = vec![0; SECTOR as usize];
        header[..4].copy_from_slice(&HOSTED_MAGIC);
        header[4..8].copy_from_slice(&version.to_le_bytes());
        header[12..20].copy_from_slice(&(size / SECTOR).to_le_bytes());
        header[20..28].copy_from_slice(&(GRAIN / SECTOR).to_le_bytes());
        header[28..36].copy_from_slice(&DESCRIPTOR.to_le_bytes());
        header[36..44].copy_from_slice(&DESCRIPTOR_SECTORS.to_le_bytes());
        header[44..48].copy_from_slice(&(TABLE_GRAINS as u32).to_le_bytes());
        let (place, line_ends) = LINE_ENDS;
        header[place..place + 4].copy_from_slice(&line_ends);
        Self(header)
    }

    pub(super) fn set_flags(&mut self, flags: u32) {
        self.0[8..12].copy_from_slice(&flags.to_le_bytes());
    }

    /// Sets the sectors of the redundant directory, of the directory, and of the first grain.
    pub(super) fn set_places(&mut self, copy: Option<u64>, directory: u64, data: u64) {
        for (offset, sector) in [(48, copy.unwrap_or(0)), (56, directory), (64, data)] {
            self.0[offset..offset + 8].copy_from_slice(&sector.to_le_bytes());
        }
    }

    /// Says that the descriptor is elsewhere.
    fn set_no_descriptor(&mut self) {
        self.0[28..44].fill(0);
    }

    /// Says that grains are compressed (deflate).
    pub(super) fn set_compressed(&mut self) {
        self.0[77..79].copy_from_slice(&1_u16.to_le_bytes());
    }
}

/// The line of the only extent, which is in the file with the descriptor, whatever its name is.
pub(super) fn extent_line(new: &NewForeign<'_>, size: u64) -> Vec<u8> {
    let name = Some(new.name().as_bytes()).filter(|name| is_quotable(name));
    let start = format!("RW {} SPARSE \"", size / SECTOR);
    [start.as_bytes(), name.unwrap_or(b"disk.vmdk"), b"\"\n"].concat()
}

/// Whether a descriptor can have this name.
pub(super) fn is_quotable(name: &[u8]) -> bool {
    name.iter().all(|byte| !matches!(byte, b'"' | b'\n' | b'\r' | 0))
}

/// Checks that a descriptor fits into a file with data.
pub(super) fn fits(text: &[u8]) -> Result<()> {
    match text.len() as u64 <= DESCRIPTOR_SECTORS * SECTOR {
        true => Ok(()),
        false => Err(invalid("the name or a version is too long for the descriptor of a VMDK")),
    }
}

/// The descriptor of a disk with these lines for its extents.
pub(super) fn descriptor(
    new: &NewForeign<'_>,
    size: u64,
    kind: &str,
    extents: &[u8],
) -> Result<Vec<u8>> {
    let sectors = size / SECTOR;
    let (adapter, heads) = match new.options.adapter {
        VmdkAdapter::Ide => ("ide", 16),
        VmdkAdapter::LsiLogic => ("lsilogic", 255),
        VmdkAdapter::BusLogic => ("buslogic", 255),
        VmdkAdapter::LegacyEsx => ("legacyESX", 255),
    };
    let hardware = new.options.hardware_version.as_deref().unwrap_or("4");
    // The largest there is: which tools the guest has is not known.
    let tools = new.options.tools_version.as_deref().unwrap_or("2147483647");
    let is_word = |word: &str| {
        word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
    };
    if !is_word(hardware) || !is_word(tools) {
        return Err(invalid(
            "a version of hardware or tools consists of letters, digits, dots, hyphens and underscores",
        ));
    }
    // All ones and the value before it have meanings of their own.
    let id = u32_le_at(&random()?, 0) & 0x7fff_ffff;
    let (parent, hint) = parent_of(new)?;
    let start = format!(
        "# Disk DescriptorFile\nversion=1\nCID={id:08x}\nparentCID={parent:08x}\n\
         createType=\"{kind}\"\n"
    );
    let mut rest = "\n# The Disk Data Base\n#DDB\n\n".to_owned();
    let cylinders = (sectors / (63 * heads)).to_string();
    let heads = heads.to_string();
    for (key, value) in [
        ("virtualHWVersion", hardware),
        ("geometry.cylinders", &cylinders),
        ("geometry.heads", &heads),
        ("geometry.sectors", "63"),
        ("adapterType", adapter),
        ("toolsVersion", tools),
    ] {
        // A String takes everything.
        let _ = writeln!(rest, "ddb.{key} = \"{value}\"");
    }
    let head = b"\n# Extent description\n";
    Ok([start.as_bytes(), &hint, head, extents, rest.as_bytes()].concat())
}

/// The content identifier of the image below, and the line with its name.
fn parent_of(new: &NewForeign<'_>) -> Result<(u32, Vec<u8>)> {
    let Some(parent) = &new.parent else { return Ok((NO_PARENT, Vec::new())) };
    let Some(identity) = parent.identity else {
        return Err(invalid("the backing file has no content identifier that could be recorded"));
    };
    let name = parent.name.as_bytes();
    if !is_quotable(name) {
        return Err(invalid(
            "a VMDK cannot record a name of a backing file with quotes or line ends",
        ));
    }
    let hint = [b"parentFileNameHint=\"".as_slice(), name, b"\"\n"].concat();
    Ok((u32_le_at(&identity.0, 0), hint))
}
