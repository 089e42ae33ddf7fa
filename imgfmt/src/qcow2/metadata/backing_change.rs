//! Changes the name of the backing file in the header, so that a crash leaves the old or the new
//! one.
//!
//! Only a write within one sector of 512 bytes is atomic. So the new name is written to a place to
//! which nothing points, before or after the old name, and the new format into an extension of a
//! type that readers skip. Then one write of the first sector changes the name's place and length,
//! the types of the formats' extensions and the autoclear bits. A format whose extension begins in
//! a later sector is hidden before that write and shown after it. In between, the image names a
//! backing file without a format. Such an image is refused, but never read in the wrong format.
//!
//! If the header has no space for both names at once, or the list of extensions ends at the old
//! name without an end mark, the old name is removed first. In between, the image has an
//! incompatible bit, so that no program reads it without its backing file; repeating the change
//! completes it. Version 2 has no such bit: there the cluster is written in one piece.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;

use crate::bytes::{u32_at, u64_at};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::qcow2::metadata::backing_format::{change_later_sectors, formats, prepare_format};
use crate::qcow2::metadata::header_edit::{Area, SECTOR, UNUSED, remove_extension};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{Header, MAGIC, V2_LENGTH, autoclear, field, incompatible};
use crate::qcow2::on_disk::words::read_error;
use crate::storage::{Durability, MemoryStorage, Storage};
use crate::units::HostOffset;

/// Whether the image is open. Then its first sector is locked, its features are as they have to be,
/// and its header must never be torn or incomplete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Open,
    Closed,
}

const NAME_BYTES_MAX: usize = 1023;
const BACKING_FILE_OFFSET: usize = 8;
const BACKING_FILE_SIZE: usize = 16;

/// Rewrites the header with another backing file's name and format, or without any. All other
/// extensions, known or not, stay as they are.
pub(crate) fn change_backing(
    storage: &dyn Storage,
    backing: Option<(&OsStr, Format)>,
    used: Use,
) -> Result<()> {
    let header = Header::read_to_name(storage)?;
    if header.incompatible & incompatible::CORRUPT != 0 {
        let detail = "it is marked as damaged; check and repair it first";
        return Err(Error::new(ErrorKind::Corrupt, "change", detail));
    }
    if backing.is_some() && header.autoclear & autoclear::RAW_DATA_FILE != 0 {
        return Err(invalid("an image with a raw data file cannot have a backing file"));
    }
    if let Some((_, format)) = backing
        && !format.is_supported()
    {
        let detail = format!("a {} image cannot be a backing file", format.description());
        return Err(Error::new(ErrorKind::Unsupported, "change the backing file of", detail));
    }
    let mut first = vec![0; header.geometry.cluster_size() as usize];
    let read = storage.read_at(HostOffset::new(0), &mut first).map_err(read_error)?;
    debug_assert!(first[..read].starts_with(&MAGIC));
    // Refuses what does not fit before anything is written.
    let whole = rewritten(&header, &first, backing, used)?;
    if first.len() as u64 > SECTOR {
        if change_in_steps(storage, &header, backing, used)? {
            return Ok(());
        }
        if used == Use::Open {
            return Err(no_room_while_open());
        }
        if header.version >= 3 {
            return change_marked(storage, &header, backing);
        }
    }
    // One sector, or version 2 without space for both names: then a crash may tear this write.
    storage
        .write_at(HostOffset::new(0), &whole, Durability::Cached)
        .and_then(|()| storage.sync())
        .map_err(|error| Error::from_io("write the header of", error))
}

/// Changes the backing file of a version 3 image in which the new name has no space until the old
/// one is removed. In between, the image is marked.
fn change_marked(
    storage: &dyn Storage,
    header: &Header,
    backing: Option<(&OsStr, Format)>,
) -> Result<()> {
    let area = Area::read(storage, header.geometry.cluster_size())?;
    // Remove the old name only if the new one is known to fit then.
    if !give_name_up(&MemoryStorage::from_bytes(&area.bytes), header, backing)? {
        return Err(no_room());
    }
    give_name_up(storage, header, backing).map(|_| ())
}

/// Removes the old name, and then writes the new one. Returns false if there is no space for it.
fn give_name_up(
    storage: &dyn Storage,
    header: &Header,
    backing: Option<(&OsStr, Format)>,
) -> Result<bool> {
    let area = Area::read(storage, header.geometry.cluster_size())?;
    if area.end + 8 > area.bytes.len() as u64 {
        return Ok(false);
    }
    let mut marked = header.clone();
    marked.backing_name = None;
    marked.incompatible |= incompatible::NAME_UNFINISHED;
    // The list of extensions still ends where the old name began.
    let mut sector = first_sector(&area, &marked, (area.limit, 0), Use::Closed);
    let features = marked.incompatible.to_be_bytes();
    sector[field::INCOMPATIBLE as usize..][..8].copy_from_slice(&features);
    area.write(0, &sector)?;
    area.sync()?;
    end_list(&area)?;
    change_in_steps(storage, &marked, backing, Use::Closed)
}

/// Changes the backing file so that a crash leaves the old or the new one. Returns false, with no
/// effective change, if there is not enough space.
fn change_in_steps(
    storage: &dyn Storage,
    header: &Header,
    backing: Option<(&OsStr, Format)>,
    used: Use,
) -> Result<bool> {
    let cluster_size = header.geometry.cluster_size();
    let mut area = Area::read(storage, cluster_size)?;
    if has_mark(&area) && u32_at(&area.bytes, area.end as usize + 4) != 0 {
        // A mark with a length, see `Header::overlong_end`.
        area.write(area.end, &[0; 8])?;
        area.sync()?;
    }
    let Some((name, format)) = backing else {
        return remove(storage, header, used).map(|()| true);
    };
    if !has_mark(&area) {
        if !add_mark(&area)? {
            return Ok(false);
        }
        area = Area::read(storage, cluster_size)?;
    }
    let content = format.name().as_bytes();
    let Some(slot) = prepare_format(area, cluster_size, content)? else { return Ok(false) };
    let area = Area::read(storage, cluster_size)?;
    let Some(name_place) = free_room(&area, name.len() as u64) else { return Ok(false) };
    area.write(name_place, name.as_bytes())?;
    area.sync()?;
    let has_name = header.backing_name.is_some();
    change_later_sectors(&area, slot, has_name)?;
    let area = Area::read(storage, cluster_size)?;
    let mut sector = first_sector(&area, header, (name_place, name.len()), used);
    let old = formats(&area).filter(|place| Some(*place) != slot.place());
    slot.show_in(&mut sector, old, content);
    area.write(0, &sector)?;
    area.sync()?;
    if let (Some(place), true, true) = (slot.place(), slot.is_beyond(), has_name) {
        area.write(place, &extension::BACKING_FORMAT.to_be_bytes())?;
    }
    clear_old_name(&area)?;
    area.sync()?;
    Ok(true)
}

/// Whether a mark ends the list of extensions. Otherwise it ends where the old name begins.
fn has_mark(area: &Area<'_>) -> bool {
    area.end + 8 <= area.limit
}

/// Ends the list of extensions with a mark instead of the offset of the removed name. Nothing is
/// changed if the cluster ends there.
fn end_list(area: &Area<'_>) -> Result<()> {
    if area.end + 8 > area.bytes.len() as u64 {
        return Ok(());
    }
    area.write(area.end, &[0; 8])?;
    area.sync()?;
    area.write(BACKING_FILE_OFFSET as u64, &[0; 8])?;
    area.sync()
}

/// Adds the mark to a list of extensions that ends at the old name without one: the name moves
/// away. Returns false, with nothing changed, if there is no space or the mark would not be in the
/// first sector.
fn add_mark(area: &Area<'_>) -> Result<bool> {
    let old = old_name(area);
    let (cluster_size, mark_end) = (area.bytes.len() as u64, area.end + 8);
    if old.is_empty() {
        end_list(area)?;
        return Ok(mark_end <= cluster_size);
    }
    let place = old.end.max(mark_end).next_multiple_of(8);
    if mark_end > SECTOR || place + (old.end - old.start) > cluster_size {
        return Ok(false);
    }
    area.write(place, &area.bytes[old.start as usize..old.end as usize])?;
    area.sync()?;
    // Including the copy, if that is in the first sector too.
    let mut sector = Area::read(area.storage, cluster_size)?.bytes;
    sector.truncate(SECTOR as usize);
    sector[BACKING_FILE_OFFSET..][..8].copy_from_slice(&place.to_be_bytes());
    sector[area.end as usize..mark_end as usize].fill(0);
    area.write(0, &sector)?;
    area.sync()?;
    Ok(true)
}

/// Removes the name, and then the format, which has no meaning without a name.
fn remove(storage: &dyn Storage, header: &Header, used: Use) -> Result<()> {
    let cluster_size = header.geometry.cluster_size();
    let area = Area::read(storage, cluster_size)?;
    let list_end = if has_mark(&area) { 0 } else { area.limit };
    area.write(0, &first_sector(&area, header, (list_end, 0), used))?;
    area.sync()?;
    if list_end != 0 {
        end_list(&area)?;
    }
    clear_old_name(&area)?;
    area.sync()?;
    formats(&area)
        .try_for_each(|_| remove_extension(storage, cluster_size, extension::BACKING_FORMAT))
}

/// The offset after the extensions at which a name of `length` bytes fits without overlapping the
/// present name.
fn free_room(area: &Area<'_>, length: u64) -> Option<u64> {
    let start = area.end + 8;
    let old = old_name(area);
    let places = [start, old.end.max(start).next_multiple_of(8)];
    places.into_iter().find(|place| {
        let end = place + length;
        end <= area.bytes.len() as u64 && (end <= old.start || *place >= old.end)
    })
}

/// The range of the name in the header; empty, at the end of the cluster, if there is no name.
fn old_name(area: &Area<'_>) -> Range<u64> {
    let (end, length) =
        (area.bytes.len() as u64, u64::from(u32_at(&area.bytes, BACKING_FILE_SIZE)));
    match u64_at(&area.bytes, BACKING_FILE_OFFSET) {
        offset if offset != 0 && length != 0 && offset < end => offset..(offset + length).min(end),
        _ => end..end,
    }
}

/// Clears the old name, to which nothing points any more. `area` was read before.
fn clear_old_name(area: &Area<'_>) -> Result<()> {
    let old = old_name(area);
    if old.is_empty() {
        return Ok(());
    }
    area.write(old.start, &vec![0; (old.end - old.start) as usize])
}

/// The first sector with another name, and with only those autoclear bits that this crate
/// maintains.
fn first_sector(
    area: &Area<'_>,
    header: &Header,
    (name_place, name_length): (u64, usize),
    used: Use,
) -> Vec<u8> {
    let mut sector = area.bytes[..SECTOR as usize].to_vec();
    sector[BACKING_FILE_OFFSET..][..8].copy_from_slice(&name_place.to_be_bytes());
    sector[BACKING_FILE_SIZE..][..4].copy_from_slice(&(name_length as u32).to_be_bytes());
    if header.version >= 3 && used == Use::Closed {
        set_features(&mut sector, header);
    }
    sector
}

/// The first cluster with the new name and format.
fn rewritten(
    header: &Header,
    first: &[u8],
    backing: Option<(&OsStr, Format)>,
    used: Use,
) -> Result<Vec<u8>> {
    let is_v3 = header.version >= 3;
    let header_length = if is_v3 { u32_at(first, 100) as usize } else { V2_LENGTH as usize };
    let mut content = first[..header_length].to_vec();
    if is_v3 && used == Use::Closed {
        // This is a write: unknown structures are not kept up to date.
        set_features(&mut content, header);
    }
    let old_name = u64_at(first, BACKING_FILE_OFFSET) as usize;
    let area_end = if old_name == 0 { first.len() } else { old_name.min(first.len()) };
    let area = first.get(header_length..area_end).unwrap_or_default();
    let kept = extension::without(area, extension::BACKING_FORMAT)?;
    content.extend(extension::without(&kept, UNUSED)?);
    let (mut offset, mut length) = (0, 0);
    if let Some((name, format)) = backing {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(invalid("the backing file's name has 1 to 1023 bytes"));
        }
        extension::push(&mut content, extension::BACKING_FORMAT, format.name().as_bytes());
        content.extend([0; 8]);
        (offset, length) = (content.len() as u64, name.len() as u32);
        content.extend(name.as_bytes());
    } else {
        content.extend([0; 8]);
    }
    if content.len() > first.len() {
        return Err(no_room());
    }
    content[BACKING_FILE_OFFSET..][..8].copy_from_slice(&offset.to_be_bytes());
    content[BACKING_FILE_SIZE..][..4].copy_from_slice(&length.to_be_bytes());
    content.resize(first.len(), 0);
    Ok(content)
}

/// The feature bits of a version 3 header that names its backing file.
fn set_features(bytes: &mut [u8], header: &Header) {
    let incompatible = header.incompatible & !incompatible::NAME_UNFINISHED;
    for (place, bits) in
        [(field::INCOMPATIBLE, incompatible), (field::AUTOCLEAR, header.kept_autoclear())]
    {
        bytes[place as usize..][..8].copy_from_slice(&bits.to_be_bytes());
    }
}

fn no_room_while_open() -> Error {
    let detail = "its header has no space for both names of backing files, so the name can be changed \
                  only while the image is not in use: stop the server and use 'nbd-cli image stream'";
    Error::new(ErrorKind::Unsupported, "change the backing file of", detail)
}

fn no_room() -> Error {
    invalid("the backing file's name does not fit into the image's header")
}

fn invalid(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "change the backing file of", detail)
}

#[cfg(test)]
mod tests;
