//! Sparse extents: a directory of tables, and tables of grains.
//!
//! Hosted sparse extents, versions 1 to 3; all numbers are little-endian, offsets and sizes in
//! sectors of 512 bytes:
//!
//! | offset | size | field |
//! | ---: | ---: | --- |
//! | 0 | 4 | `KDMV` |
//! | 4 | 4 | version |
//! | 8 | 4 | flags: 0 the bytes from 73 on are as stated, 1 there is a redundant directory, 2 grains may be zeroed, 16 grains are compressed, 17 they have markers |
//! | 12 | 8 | capacity |
//! | 20 | 8 | size of a grain |
//! | 28 | 16 | offset and size of the descriptor |
//! | 44 | 4 | entries of a table |
//! | 48 | 8 | offset of the redundant directory |
//! | 56 | 8 | offset of the directory, or all ones: a copy of the header 1024 bytes before the end has it |
//! | 64 | 8 | offset of the first grain |
//! | 73 | 4 | `\n \r\n`, so that transfers as text are noticed |
//! | 77 | 2 | compression: 0 none, 1 deflate |
//!
//! Entries of the directory and of tables are 4-byte offsets. Of a table 0 is a grain that is not
//! there, and 1 a zeroed one.

use std::sync::Arc;

use super::descriptor::SECTOR;
use crate::bytes::{u16_le_at, u32_le_at, u64_le_at};
use crate::error::Result;
use crate::formats::blocks::{Piece, Place};
use crate::formats::file::{Cursor, ImageFile};
use crate::mapping::{Encoded, Lookup};
use crate::units::HostOffset;

pub(super) const HOSTED_MAGIC: [u8; 4] = *b"KDMV";

/// In place of the directory's offset: it is in the footer.
pub(super) const DIRECTORY_AT_END: u64 = u64::MAX;
/// From the end of the file to the footer, in bytes.
const FOOTER_FROM_END: u64 = 1024;

/// Bytes that a transfer as text changes, and where they are.
pub(super) const LINE_ENDS: (usize, [u8; 4]) = (73, *b"\n \r\n");

/// The largest grain in bytes, and the largest that may be compressed.
const GRAIN_MAX: u64 = 1 << 30;
const COMPRESSED_GRAIN_MAX: u64 = 2 << 20;

/// Most entries of a table of a hosted extent.
const TABLE_MAX: u32 = 512;

/// The length of what may be before each compressed grain, in bytes.
pub(super) const MARKER_LENGTH: usize = 12;

const ABSENT: u32 = 0;
const ZEROED: u32 = 1;

/// Entries of space-efficient extents, by their upper bits.
mod upper {
    /// A directory has the table whose number the lower bits are.
    pub(super) const TABLE: u64 = 0x1000_0000;
    /// The guest discarded the grain.
    pub(super) const UNMAPPED: u64 = 1;
    pub(super) const ZEROED: u64 = 2;
    pub(super) const STORED: u64 = 3;
}

/// An open sparse extent.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) file: Arc<ImageFile>,
    /// In bytes, as all sizes and offsets here.
    pub(super) capacity: u64,
    pub(super) grain: u64,
    /// How many grains a table covers.
    entries: u64,
    directory: u64,
    redundant: Option<u64>,
    kind: Kind,
}

/// Sizes and places in sectors, as a header has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) capacity: u64,
    pub(super) grain: u64,
    pub(super) entries: u64,
    pub(super) directory: u64,
    pub(super) redundant: Option<u64>,
}

/// What the kinds of sparse extents do not share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain {
        has_zeroed: bool,
    },
    Compressed {
        has_zeroed: bool,
        /// Before each grain is written which one it is, and how long.
        has_markers: bool,
    },
    /// Entries of 8 bytes, which count from here on, in bytes.
    SpaceEfficient {
        tables: u64,
        grains: u64,
    },
}

/// The header of a hosted extent, as far as it is used.
#[derive(Debug)]
pub(super) struct HostedHeader([u8; SECTOR as usize]);

impl HostedHeader {
    /// Reads it from the start of the file, or from the end if that one is to be used.
    pub(super) fn read(file: &ImageFile) -> Result<Self> {
        let header = Self(file.read(0)?);
        if header.u64(56) != DIRECTORY_AT_END {
            return Ok(header);
        }
        let length = file.len() / SECTOR * SECTOR;
        let footer = Self(file.read(length.saturating_sub(FOOTER_FROM_END))?);
        if !footer.0.starts_with(&HOSTED_MAGIC) || footer.u64(56) == DIRECTORY_AT_END {
            return Err(file.invalid(CUT_OFF));
        }
        Ok(footer)
    }

    fn u32(&self, offset: usize) -> u32 {
        u32_le_at(&self.0, offset)
    }

    fn u64(&self, offset: usize) -> u64 {
        u64_le_at(&self.0, offset)
    }

    /// In sectors; 0 if the file only has a descriptor, which names others.
    pub(super) fn capacity(&self) -> u64 {
        self.u64(12)
    }

    /// Where the descriptor is, and its length, in bytes; `None` if there is none.
    pub(super) fn descriptor(&self) -> Option<(u64, u64)> {
        let (offset, length) = (self.u64(28), self.u64(36));
        let place = offset.checked_mul(SECTOR).zip(length.checked_mul(SECTOR));
        place.filter(|(offset, length)| *offset > 0 && *length > 0)
    }
}

impl Sparse {
    pub(super) fn hosted(file: Arc<ImageFile>, header: &HostedHeader) -> Result<Self> {
        let (version, flags) = (header.u32(4), header.u32(8));
        if !(1..=3).contains(&version) {
            let detail = format!("its extent has the version {version}, and only 1 to 3 are known");
            return Err(file.unsupported(detail));
        }
        let flag = |bit: u32| flags & (1 << bit) != 0;
        let (place, line_ends) = LINE_ENDS;
        if flag(0) && header.0[place..place + 4] != line_ends {
            let detail =
                "it was copied as a text, which changed its line ends: copy it again as it is";
            return Err(file.invalid(detail));
        }
        let kind = match u16_le_at(&header.0, 77) {
            0 => Kind::Plain { has_zeroed: flag(2) },
            1 => Kind::Compressed { has_zeroed: flag(2), has_markers: flag(17) },
            other => {
                let detail =
                    format!("its grains are compressed in a way that is not known, {other}");
                return Err(file.unsupported(detail));
            }
        };
        // Grains come after all tables, also if there are none yet.
        if header.u64(64) > file.len().div_ceil(SECTOR) {
            return Err(file.invalid("the file ends before its grains begin: it was cut off"));
        }
        let entries = header.u32(44);
        if entries == 0 || entries > TABLE_MAX {
            return Err(file.invalid(format!("its tables have {entries} entries")));
        }
        let layout = Layout {
            capacity: header.capacity(),
            grain: header.u64(20),
            entries: u64::from(entries),
            directory: header.u64(56),
            redundant: if flag(1) { Some(header.u64(48)) } else { None },
        };
        Self::new(file, layout, kind)
    }

    /// Checks what a header says. A table has up to 4096 entries.
    pub(super) fn new(file: Arc<ImageFile>, layout: Layout, kind: Kind) -> Result<Self> {
        let in_bytes =
            |sectors: u64| sectors.checked_mul(SECTOR).filter(|bytes| *bytes <= i64::MAX as u64);
        let grain_max = match kind {
            Kind::Compressed { .. } => COMPRESSED_GRAIN_MAX,
            _ => GRAIN_MAX,
        };
        let grain =
            in_bytes(layout.grain).filter(|grain| *grain <= grain_max && grain.is_power_of_two());
        let Some(grain) = grain else {
            return Err(file.invalid(format!("its grains of {} sectors cannot be", layout.grain)));
        };
        let Some(capacity) = in_bytes(layout.capacity) else {
            return Err(file.invalid(format!("its {} sectors cannot be", layout.capacity)));
        };
        let entries = layout.entries;
        let length = capacity.div_ceil(grain * entries) * kind.entry_length();
        // Either directory has all.
        let places = [Some(layout.directory), layout.redundant].into_iter().flatten();
        let mut places = places.filter_map(in_bytes).filter(|place| file.has(*place, length));
        let Some(directory) = places.next() else { return Err(file.invalid(CUT_OFF)) };
        let redundant = places.next();
        Ok(Self { file, capacity, grain, entries, directory, redundant, kind })
    }

    /// What there is from an offset of the extent on, which is `guest` on the disk.
    pub(super) fn find(
        &self,
        lookups: &mut Lookups<'_>,
        offset: u64,
        guest: u64,
    ) -> Result<Option<Piece>> {
        let (grain, inside) = (offset / self.grain, offset % self.grain);
        let (table, entry) = (grain / self.entries, grain % self.entries);
        let coverage = self.grain * self.entries;
        let absent = Piece { length: coverage - offset % coverage, place: Place::Absent };
        let Some(found) = self.table_entry(lookups, table, entry, guest)? else { return Ok(None) };
        let Some(entry_place) = found else { return Ok(Some(absent)) };
        let place = match self.kind {
            Kind::SpaceEfficient { grains, .. } => {
                let entry = lookups.tables.u64_le(entry_place, guest)?;
                entry.map(|entry| self.space_efficient(entry, grains, inside, guest)).transpose()?
            }
            _ => {
                let entry = lookups.tables.u32_le(entry_place, guest)?;
                entry.map(|entry| self.place(entry, inside, guest)).transpose()?
            }
        };
        let grains = match place {
            // Most grains of a large disk: not each entry for itself.
            Some(Place::Absent) => {
                let length = self.kind.entry_length();
                lookups.tables.zeroes(entry_place, (self.entries - entry) * length) / length
            }
            _ => 1,
        };
        let length = self.grain * grains.max(1) - inside;
        Ok(place.map(|place| Piece { length, place }))
    }

    /// What an entry of 4 bytes means.
    fn place(&self, entry: u32, inside: u64, guest: u64) -> Result<Place> {
        let offset = u64::from(entry) * SECTOR;
        Ok(match (entry, self.kind) {
            (ABSENT, _) => Place::Absent,
            (
                ZEROED,
                Kind::Plain { has_zeroed: true } | Kind::Compressed { has_zeroed: true, .. },
            ) => Place::Zero,
            (ZEROED, _) => {
                return Err(self.file.corrupt("its table takes the header for a grain", guest));
            }
            (_, Kind::Compressed { .. }) => Place::Encoded(Encoded::compressed(
                HostOffset::new(offset),
                2 * self.grain + MARKER_LENGTH as u64,
            )),
            _ => Place::Stored(offset + inside),
        })
    }

    /// What an entry of 8 bytes means: of the number of a grain the upper 12 bits come last.
    fn space_efficient(&self, entry: u64, grains: u64, inside: u64, guest: u64) -> Result<Place> {
        let number = entry >> 48 & 0xfff | (entry & 0xffff_ffff_ffff) << 12;
        let stored = || number.checked_mul(self.grain)?.checked_add(grains)?.checked_add(inside);
        match (entry >> 60, stored()) {
            (0, _) if entry == 0 => Ok(Place::Absent),
            (upper::UNMAPPED | upper::ZEROED, _) => Ok(Place::Zero),
            (upper::STORED, Some(place)) => Ok(Place::Stored(place)),
            _ => {
                let detail = format!("its table has {entry:#x}, which means nothing");
                Err(self.file.corrupt(detail, guest))
            }
        }
    }

    pub(super) fn is_compressed(&self) -> bool {
        matches!(self.kind, Kind::Compressed { .. })
    }

    /// Whether before each compressed grain is written which one it is.
    pub(super) fn has_markers(&self) -> bool {
        matches!(self.kind, Kind::Compressed { has_markers: true, .. })
    }

    /// Where an entry of a table is, if the table exists; `None` if that would take waiting.
    fn table_entry(
        &self,
        lookups: &mut Lookups<'_>,
        table: u64,
        entry: u64,
        guest: u64,
    ) -> Result<Option<Option<u64>>> {
        let length = self.kind.entry_length();
        for directory in [Some(self.directory), self.redundant].into_iter().flatten() {
            let place = directory + table * length;
            let start = match self.kind {
                Kind::SpaceEfficient { tables, .. } => {
                    let Some(found) = lookups.directory.u64_le(place, guest)? else {
                        return Ok(None);
                    };
                    let number = found & 0xffff_ffff;
                    match found >> 32 {
                        0 if found == 0 => return Ok(Some(None)),
                        upper::TABLE => Some(tables.saturating_add(number * self.entries * length)),
                        _ => None,
                    }
                }
                _ => match lookups.directory.u32_le(place, guest)? {
                    None => return Ok(None),
                    Some(ABSENT) => return Ok(Some(None)),
                    Some(sector) => Some(u64::from(sector) * SECTOR),
                },
            };
            let place = start.map(|start| start.saturating_add(entry * length));
            if let Some(place) = place.filter(|place| self.file.has(*place, length)) {
                return Ok(Some(Some(place)));
            }
        }
        Err(self.file.corrupt("its directory names a table that cannot be", guest))
    }
}

impl Kind {
    /// The length of an entry of the directory or a table, in bytes.
    fn entry_length(self) -> u64 {
        match self {
            Self::SpaceEfficient { .. } => 8,
            _ => 4,
        }
    }
}

/// Reads entries of the directory and of tables.
#[derive(Debug)]
pub(super) struct Lookups<'f> {
    directory: Cursor<'f>,
    tables: Cursor<'f>,
}

impl<'f> Lookups<'f> {
    pub(super) fn new(file: &'f ImageFile, lookup: Lookup) -> Self {
        Self { directory: Cursor::new(file, lookup), tables: Cursor::new(file, lookup) }
    }
}

const CUT_OFF: &str = "its directory of grains lies beyond the end of the file, which was cut off";
