//! Changing the name of the backing file in the header, so that a crash leaves the old or the new one.
//!
//! A write is trusted to happen as a whole only within one sector of 512 bytes. So the new name is
//! written where nothing points to, in front of the old name or behind it, and the new format into an
//! extension of a type that readers skip. Then one write of the first sector changes the name's place
//! and length, the types of the formats' extensions and the autoclear bits. A format whose extension
//! begins in a later sector is hidden before and shown after; in between the image names a backing
//! file without a format. Such an image is refused, but never read in the wrong format.
//!
//! Two cases are left in which the cluster is one write: no room for both names at once, and a list
//! of extensions that ends at the old name without a mark.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;

use crate::bytes::{u32_at, u64_at};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::qcow2::metadata::header_edit::{Area, SECTOR, UNUSED, add_extension, remove_extension};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{Header, MAGIC, V2_LENGTH, autoclear, field, incompatible};
use crate::qcow2::on_disk::words::read_error;
use crate::qcow2::purpose::Purpose;
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

const NAME_BYTES_MAX: usize = 1023;
const BACKING_FILE_OFFSET: usize = 8;
const BACKING_FILE_SIZE: usize = 16;

/// Rewrites the header with another backing file's name and format, or without any. All other
/// extensions, known or not, stay as they are.
pub(crate) fn change_backing(
    storage: &dyn Storage,
    backing: Option<(&OsStr, Format)>,
) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    header.refuse_encryption()?;
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
    let whole = rewritten(&header, &first, backing)?;
    if first.len() as u64 > SECTOR && change_in_steps(storage, &header, backing)? {
        return Ok(());
    }
    // One sector, or no room for both names at once: then a crash may tear this write.
    storage
        .write_at(HostOffset::new(0), &whole, Durability::Cached)
        .and_then(|()| storage.sync())
        .map_err(|error| Error::from_io("write the header of", error))
}

/// Where the format of the new backing file is written.
#[derive(Clone, Copy, Debug)]
enum FormatSlot {
    /// It is there already.
    Kept,
    /// Over the old one, which lies within the first sector.
    Replaced(u64),
    /// At the start of the list of features' names, which lies there in so many bytes and has been
    /// copied to the end: there is no other room in the first sector.
    InNames(u64, u64),
    /// In an extension at this place, which is of no known type as yet.
    Hidden(u64),
}

impl FormatSlot {
    fn place(self) -> Option<u64> {
        match self {
            Self::Kept | Self::Replaced(_) => None,
            Self::InNames(place, _) | Self::Hidden(place) => Some(place),
        }
    }

    /// Whether the extension begins in a later sector, so that its type cannot change with the name's
    /// place.
    fn is_beyond(self) -> bool {
        self.place().is_some_and(|place| place >= SECTOR)
    }

    /// Changes the first sector so that this is the format.
    fn show_in(self, sector: &mut [u8], old: impl Iterator<Item = u64>, content: &[u8]) {
        let mut put = |place: u64, bytes: &[u8]| {
            sector[place as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        let mut format = Vec::new();
        extension::push(&mut format, extension::BACKING_FORMAT, content);
        if self.place().is_some() {
            old.filter(|place| *place < SECTOR).for_each(|place| put(place, &UNUSED.to_be_bytes()));
        }
        match self {
            Self::Kept => {}
            Self::Replaced(place) => put(place, &format),
            Self::InNames(place, length) => {
                let rest = length - format.len() as u64;
                format.extend(UNUSED.to_be_bytes());
                format.extend((rest as u32 - 8).to_be_bytes());
                put(place, &format);
            }
            Self::Hidden(place) if place < SECTOR => put(place, &format[..4]),
            Self::Hidden(_) => {}
        }
    }
}

/// Changes the backing file without a moment at which a crash leaves neither the old nor the new
/// one. False, with nothing changed that has a meaning, if there is not enough room.
fn change_in_steps(
    storage: &dyn Storage,
    header: &Header,
    backing: Option<(&OsStr, Format)>,
) -> Result<bool> {
    let cluster_size = header.geometry.cluster_size();
    let area = Area::read(storage, cluster_size)?;
    if area.end + 8 > area.limit {
        return Ok(false); // The list ends at the old name, without a mark.
    }
    if u32_at(&area.bytes, area.end as usize + 4) != 0 {
        // A mark with a length, see `Header::overlong_end`.
        area.write(area.end, &[0; 8])?;
        area.sync()?;
    }
    let Some((name, format)) = backing else {
        return remove(storage, header).map(|()| true);
    };
    let content = format.name().as_bytes();
    let Some(slot) = prepare_format(area, cluster_size, content)? else { return Ok(false) };
    let area = Area::read(storage, cluster_size)?;
    let Some(name_place) = free_room(&area, name.len() as u64) else { return Ok(false) };
    area.write(name_place, name.as_bytes())?;
    area.sync()?;
    let has_name = header.backing_name.is_some();
    change_later_sectors(&area, slot, has_name)?;
    let area = Area::read(storage, cluster_size)?;
    let mut sector = first_sector(&area, header, name_place, name.len());
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

/// Takes the name away, and then the format, which means nothing without a name.
fn remove(storage: &dyn Storage, header: &Header) -> Result<()> {
    let cluster_size = header.geometry.cluster_size();
    let area = Area::read(storage, cluster_size)?;
    area.write(0, &first_sector(&area, header, 0, 0))?;
    area.sync()?;
    clear_old_name(&area)?;
    area.sync()?;
    formats(&area)
        .try_for_each(|_| remove_extension(storage, cluster_size, extension::BACKING_FORMAT))
}

/// Finds or makes a place for the format; readers see no difference yet. None if there is no room.
fn prepare_format(
    mut area: Area<'_>,
    cluster_size: u64,
    content: &[u8],
) -> Result<Option<FormatSlot>> {
    let room = (content.len() as u64).next_multiple_of(8);
    // The last one counts.
    let last = area.extensions.iter().rfind(|(_, kind, _)| *kind == extension::BACKING_FORMAT);
    if let Some(&(place, _, length)) = last {
        if area.content(place, length) == Some(content) {
            return Ok(Some(FormatSlot::Kept));
        }
        if room == length.next_multiple_of(8) && place + 8 + room <= SECTOR {
            return Ok(Some(FormatSlot::Replaced(place)));
        }
    }
    let place = area.find(UNUSED, content.len()).unwrap_or(area.end);
    if place + 8 + room > SECTOR {
        let storage = area.storage;
        if let Some(slot) = copy_names(area, 8 + room)? {
            return Ok(Some(slot));
        }
        area = Area::read(storage, cluster_size)?;
    }
    Ok(has_room(add_extension(area, UNUSED, content))?.map(FormatSlot::Hidden))
}

/// Makes sure that the list of features' names is there a second time, so that `length` bytes of the
/// first can be used for something else. None if it is not in the first sector or has no room.
fn copy_names(area: Area<'_>, length: u64) -> Result<Option<FormatSlot>> {
    let is_names = |it: &&(u64, u32, u64)| it.1 == extension::FEATURE_NAMES;
    let Some(&(place, kind, names_length)) = area.extensions.iter().find(is_names) else {
        return Ok(None);
    };
    let room = 8 + names_length.next_multiple_of(8);
    let Some(names) = area.content(place, names_length).map(<[u8]>::to_vec) else {
        return Ok(None);
    };
    if room < length + 8 || place + length + 8 > SECTOR {
        return Ok(None);
    }
    let others = area.extensions.iter().filter(is_names).skip(1);
    let mut others = others.map(|(place, _, length)| area.content(*place, *length));
    if !others.any(|other| other == Some(&names))
        && has_room(add_extension(area, kind, &names))?.is_none()
    {
        return Ok(None);
    }
    Ok(Some(FormatSlot::InNames(place, room)))
}

/// None instead of an error because there is no room.
fn has_room<T>(added: Result<T>) -> Result<Option<T>> {
    match added {
        Ok(added) => Ok(Some(added)),
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

/// Does what has to happen before the name changes if one write of the first sector cannot change
/// all types of the formats' extensions.
fn change_later_sectors(area: &Area<'_>, slot: FormatSlot, has_name: bool) -> Result<()> {
    let Some(place) = slot.place() else { return Ok(()) };
    if !slot.is_beyond() && formats(area).all(|old| old < SECTOR) {
        return Ok(());
    }
    // In the order of the list: the last one counts as long as there is one.
    for old in formats(area) {
        area.write(old, &UNUSED.to_be_bytes())?;
        area.sync()?;
    }
    if slot.is_beyond() && !has_name {
        // A format without a name means nothing.
        area.write(place, &extension::BACKING_FORMAT.to_be_bytes())?;
        area.sync()?;
    }
    Ok(())
}

/// Where the extensions lie that say a format.
fn formats(area: &Area<'_>) -> impl Iterator<Item = u64> {
    let formats = area.extensions.iter().filter(|(_, kind, _)| *kind == extension::BACKING_FORMAT);
    formats.map(|(place, ..)| *place)
}

/// Where a name of `length` bytes fits in behind the extensions, clear of the name that is there.
fn free_room(area: &Area<'_>, length: u64) -> Option<u64> {
    let start = area.end + 8;
    let old = old_name(area);
    let places = [start, old.end.max(start).next_multiple_of(8)];
    places.into_iter().find(|place| {
        let end = place + length;
        end <= area.bytes.len() as u64 && (end <= old.start || *place >= old.end)
    })
}

/// The bytes of the name in the header; none, at the end of the cluster, if there is no name.
fn old_name(area: &Area<'_>) -> Range<u64> {
    let (end, length) =
        (area.bytes.len() as u64, u64::from(u32_at(&area.bytes, BACKING_FILE_SIZE)));
    match u64_at(&area.bytes, BACKING_FILE_OFFSET) {
        offset if offset != 0 && length != 0 && offset < end => offset..(offset + length).min(end),
        _ => end..end,
    }
}

/// Nothing points to the old name any more, which `area` was read with.
fn clear_old_name(area: &Area<'_>) -> Result<()> {
    let old = old_name(area);
    if old.is_empty() {
        return Ok(());
    }
    area.write(old.start, &vec![0; (old.end - old.start) as usize])
}

/// The first sector with another name and the autoclear bits that we keep up to date.
fn first_sector(area: &Area<'_>, header: &Header, name_place: u64, name_length: usize) -> Vec<u8> {
    let mut sector = area.bytes[..SECTOR as usize].to_vec();
    sector[BACKING_FILE_OFFSET..][..8].copy_from_slice(&name_place.to_be_bytes());
    sector[BACKING_FILE_SIZE..][..4].copy_from_slice(&(name_length as u32).to_be_bytes());
    if header.version >= 3 {
        sector[field::AUTOCLEAR as usize..][..8]
            .copy_from_slice(&header.kept_autoclear().to_be_bytes());
    }
    sector
}

/// The first cluster as it is to be.
fn rewritten(header: &Header, first: &[u8], backing: Option<(&OsStr, Format)>) -> Result<Vec<u8>> {
    let is_v3 = header.version >= 3;
    let header_length = if is_v3 { u32_at(first, 100) as usize } else { V2_LENGTH as usize };
    let mut content = first[..header_length].to_vec();
    if is_v3 {
        // We write, and do not keep up to date what we do not know.
        let at = field::AUTOCLEAR as usize;
        content[at..at + 8].copy_from_slice(&header.kept_autoclear().to_be_bytes());
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
        return Err(invalid("the backing file's name does not fit into the image's header"));
    }
    content[BACKING_FILE_OFFSET..][..8].copy_from_slice(&offset.to_be_bytes());
    content[BACKING_FILE_SIZE..][..4].copy_from_slice(&length.to_be_bytes());
    content.resize(first.len(), 0);
    Ok(content)
}

fn invalid(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "change the backing file of", detail)
}

#[cfg(test)]
mod tests;
