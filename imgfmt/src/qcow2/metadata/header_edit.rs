//! Changes header extensions and autoclear bits in place, safely in case of a crash.
//!
//! Only the bytes that change are written, because other fields of the header may change at the
//! same time. Only a write within one sector of 512 bytes is atomic, so longer content is written
//! to a place to which nothing points yet, and then enabled by one write.

use crate::bytes::{u32_at, u64_at};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::field;
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

pub(super) const SECTOR: u64 = 512;
/// Type of an extension without a meaning: it takes the place of a removed one that is followed by
/// others.
pub(super) const UNUSED: u32 = 0x756e_7573;
/// Space, in bytes, that is left for further extensions when the backing file's name is moved.
const SPARE_BYTES: u64 = 256;
const BACKING_FILE_OFFSET: u64 = 8;

/// The first cluster of an image, as far as it is needed here.
pub(super) struct Area<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) bytes: Vec<u8>,
    /// Offset, type and length of the content of each extension; the offset is that of the type.
    pub(super) extensions: Vec<(u64, u32, u64)>,
    /// Offset of the end mark.
    pub(super) end: u64,
    /// Their limit: the offset of the backing file's name, or the end of the cluster.
    pub(super) limit: u64,
}

/// Sets and clears bits of the autoclear features, durably.
pub(in crate::qcow2) fn change_autoclear(
    storage: &dyn Storage,
    set: u64,
    clear: u64,
) -> Result<()> {
    let old = read_autoclear(storage)?;
    if old & !clear | set == old {
        return Ok(());
    }
    rewrite_autoclear(storage, set, clear)
}

/// As [`change_autoclear`], even if the bits in the file are right already: after a failed sync the
/// page cache may have them and the disk may not.
pub(in crate::qcow2) fn rewrite_autoclear(
    storage: &dyn Storage,
    set: u64,
    clear: u64,
) -> Result<()> {
    let new = read_autoclear(storage)? & !clear | set;
    write_within_sector(storage, field::AUTOCLEAR, &new.to_be_bytes())
}

fn read_autoclear(storage: &dyn Storage) -> Result<u64> {
    let mut bytes = [0; 8];
    let offset = HostOffset::new(field::AUTOCLEAR);
    storage.read_exact_at(offset, &mut bytes).map_err(crate::qcow2::on_disk::words::read_error)?;
    Ok(u64::from_be_bytes(bytes))
}

/// Writes fields of the header that are within one sector, durably.
pub(in crate::qcow2) fn write_within_sector(
    storage: &dyn Storage,
    place: u64,
    fields: &[u8],
) -> Result<()> {
    debug_assert!(lies_in_one_sector(place, fields.len() as u64));
    storage
        .write_at(HostOffset::new(place), fields, Durability::Cached)
        .and_then(|()| storage.sync())
        .map_err(write_error)
}

/// Whether [`put_extension`] would replace the content of an extension atomically.
pub(in crate::qcow2) fn replaces_at_once(
    storage: &dyn Storage,
    cluster_size: u64,
    kind: u32,
    length: usize,
) -> Result<bool> {
    let area = Area::read(storage, cluster_size)?;
    let found =
        area.extensions.iter().find(|(_, other, old)| (*other, *old) == (kind, length as u64));
    Ok(found.is_some_and(|(place, ..)| lies_in_one_sector(place + 8, length as u64)))
}

/// Adds an extension or replaces its content, which must not change its length, durably.
///
/// A new one is added atomically. For an old one see [`replaces_at_once`].
pub(in crate::qcow2) fn put_extension(
    storage: &dyn Storage,
    cluster_size: u64,
    kind: u32,
    content: &[u8],
) -> Result<()> {
    let area = Area::read(storage, cluster_size)?;
    if let Some(place) = area.find(kind, content.len()) {
        area.write(place + 8, content)?;
        return area.sync();
    }
    add_extension(area, kind, content).map(|_| ())
}

/// Adds an extension and then removes the old ones of its kind, durably: if interrupted, it leaves
/// the complete old one, the new one, or both.
pub(in crate::qcow2) fn replace_extension(
    storage: &dyn Storage,
    cluster_size: u64,
    kind: u32,
    content: &[u8],
) -> Result<()> {
    let area = Area::read(storage, cluster_size)?;
    let old = area.extensions.iter().filter(|(_, other, _)| *other == kind);
    let old: Vec<u64> = old.map(|(place, ..)| *place).collect();
    add_extension(area, kind, content)?;
    if old.is_empty() {
        return Ok(());
    }
    let area = Area::read(storage, cluster_size)?;
    old.iter().try_for_each(|place| area.write(*place, &UNUSED.to_be_bytes()))?;
    area.sync()
}

/// Adds an extension, in an unused place or at the end, durably and atomically; returns its offset.
/// `Unsupported`, with nothing written, if there is no space.
pub(super) fn add_extension(mut area: Area<'_>, kind: u32, content: &[u8]) -> Result<u64> {
    let length = content.len() as u64;
    if let Some(place) = area.find(UNUSED, content.len()) {
        area.write(place + 8, content)?;
        area.sync()?;
        area.write(place, &start(kind, content))?;
        area.sync()?;
        return Ok(place);
    }
    area.make_room(8 + length.next_multiple_of(8))?;
    // The mark that ends the list stays before the new content until that is on disk.
    let mut behind = content.to_vec();
    behind.resize(content.len().next_multiple_of(8) + 8, 0);
    area.write(area.end + 8, &behind)?;
    area.sync()?;
    area.write(area.end, &start(kind, content))?;
    area.sync()?;
    Ok(area.end)
}

/// Removes an extension if there is one, durably and atomically.
pub(in crate::qcow2) fn remove_extension(
    storage: &dyn Storage,
    cluster_size: u64,
    kind: u32,
) -> Result<()> {
    let area = Area::read(storage, cluster_size)?;
    let Some(index) = area.extensions.iter().position(|(_, other, _)| *other == kind) else {
        return Ok(());
    };
    let place = area.extensions[index].0;
    // Unused places before it are removed as well.
    let unused = area.extensions[..index].iter().rev().take_while(|(_, kind, _)| *kind == UNUSED);
    match index + 1 == area.extensions.len() {
        true => area.write(unused.last().map_or(place, |(place, ..)| *place), &[0; 8])?,
        false => area.write(place, &UNUSED.to_be_bytes())?,
    }
    area.sync()
}

impl<'a> Area<'a> {
    pub(super) fn read(storage: &'a dyn Storage, cluster_size: u64) -> Result<Self> {
        let mut bytes = vec![0; cluster_size as usize];
        storage
            .read_at(HostOffset::new(0), &mut bytes)
            .map_err(crate::qcow2::on_disk::words::read_error)?;
        let header_length = if u32_at(&bytes, 4) < 3 { 72 } else { u64::from(u32_at(&bytes, 100)) };
        let limit = match u64_at(&bytes, BACKING_FILE_OFFSET as usize) {
            0 => cluster_size,
            offset => offset.min(cluster_size),
        };
        let mut area = Self { storage, bytes, extensions: Vec::new(), end: header_length, limit };
        while area.end + 8 <= limit {
            let kind = u32_at(&area.bytes, area.end as usize);
            let length = u64::from(u32_at(&area.bytes, area.end as usize + 4));
            if kind == extension::END {
                break;
            }
            if area.end + 8 + length > limit {
                return Err(no_room());
            }
            area.extensions.push((area.end, kind, length));
            area.end += 8 + length.next_multiple_of(8);
        }
        Ok(area)
    }

    /// The offset of an extension of that kind whose content takes up as much space.
    pub(super) fn find(&self, kind: u32, length: usize) -> Option<u64> {
        let room = (length as u64).next_multiple_of(8);
        let fits =
            |(_, other, old): &&(u64, u32, u64)| *other == kind && old.next_multiple_of(8) == room;
        self.extensions.iter().find(fits).map(|(place, ..)| *place)
    }

    /// The content of the extension at `place`.
    pub(super) fn content(&self, place: u64, length: u64) -> Option<&[u8]> {
        self.bytes.get(place as usize + 8..(place + 8 + length) as usize)
    }

    /// Checks that an extension of `length` bytes and the end mark after it fit.
    fn make_room(&mut self, length: u64) -> Result<()> {
        let needed = self.end + length + 8;
        if self.end + 8 > self.limit {
            return Err(no_room()); // There is no mark that would end the list meanwhile.
        }
        if needed <= self.limit {
            return Ok(());
        }
        let name_length = u64::from(u32_at(&self.bytes, 16));
        let old_end = self.limit + name_length;
        let cluster_size = self.bytes.len() as u64;
        let places = [needed + SPARE_BYTES, needed].map(|end| end.max(old_end).next_multiple_of(8));
        let place = places.into_iter().find(|place| place + name_length <= cluster_size);
        let (Some(place), true) = (place, old_end <= cluster_size) else { return Err(no_room()) };
        self.write(place, &self.bytes[self.limit as usize..old_end as usize])?;
        self.sync()?;
        self.write(BACKING_FILE_OFFSET, &place.to_be_bytes())?;
        self.sync()?;
        self.limit = place;
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.storage
            .write_at(HostOffset::new(offset), bytes, Durability::Cached)
            .map_err(write_error)
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(write_error)
    }
}

/// Type and length of an extension.
fn start(kind: u32, content: &[u8]) -> [u8; 8] {
    (u64::from(kind) << 32 | content.len() as u64).to_be_bytes()
}

fn lies_in_one_sector(offset: u64, length: u64) -> bool {
    offset / SECTOR == (offset + length - 1) / SECTOR
}

fn no_room() -> Error {
    let detail = "its first cluster has no space for another header extension";
    Error::new(ErrorKind::Unsupported, "change", detail)
}

fn write_error(error: std::io::Error) -> Error {
    Error::from_io("write the header of", error)
}
