//! The format of a backing file in the header: the place of a new one while the old one is valid.
//!
//! It is written into an extension of a type that readers skip; one write of the first sector then
//! changes that type.

use crate::error::{ErrorKind, Result};
use crate::qcow2::metadata::header_edit::{Area, SECTOR, UNUSED, add_extension};
use crate::qcow2::on_disk::extension;

/// Where the format of the new backing file is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum FormatSlot {
    /// It is in the header already.
    Kept,
    /// Over the old one, which is within the first sector.
    Replaced(u64),
    /// At the start of the list of features' names, at this offset and with this length, which has
    /// been copied to the end: there is no other space in the first sector.
    InNames(u64, u64),
    /// In an extension at this offset, whose type is still one that readers skip.
    Hidden(u64),
}

impl FormatSlot {
    pub(super) fn place(self) -> Option<u64> {
        match self {
            Self::Kept | Self::Replaced(_) => None,
            Self::InNames(place, _) | Self::Hidden(place) => Some(place),
        }
    }

    /// Whether the extension begins in a later sector, so that its type cannot change with the
    /// name's place.
    pub(super) fn is_beyond(self) -> bool {
        self.place().is_some_and(|place| place >= SECTOR)
    }

    /// Changes the first sector so that this is the format.
    pub(super) fn show_in(self, sector: &mut [u8], old: impl Iterator<Item = u64>, content: &[u8]) {
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

/// Finds or creates a place for the format; readers see no difference yet. `None` if there is no
/// space.
pub(super) fn prepare_format(
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

/// Makes sure that there is a second list of features' names, so that `length` bytes of the first
/// can be reused. `None` if it is not in the first sector or there is no space.
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

/// `None` in place of the error for lack of space.
fn has_room<T>(added: Result<T>) -> Result<Option<T>> {
    match added {
        Ok(added) => Ok(Some(added)),
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

/// Prepares the change of the name if one write of the first sector cannot change all types of the
/// formats' extensions.
pub(super) fn change_later_sectors(
    area: &Area<'_>,
    slot: FormatSlot,
    has_name: bool,
) -> Result<()> {
    let Some(place) = slot.place() else { return Ok(()) };
    if !slot.is_beyond() && formats(area).all(|old| old < SECTOR) {
        return Ok(());
    }
    // In the order of the list: the last remaining one counts.
    for old in formats(area) {
        area.write(old, &UNUSED.to_be_bytes())?;
        area.sync()?;
    }
    if slot.is_beyond() && !has_name {
        // A format without a name has no meaning.
        area.write(place, &extension::BACKING_FORMAT.to_be_bytes())?;
        area.sync()?;
    }
    Ok(())
}

/// Offsets of the extensions that contain a format.
pub(super) fn formats(area: &Area<'_>) -> impl Iterator<Item = u64> {
    let formats = area.extensions.iter().filter(|(_, kind, _)| *kind == extension::BACKING_FORMAT);
    formats.map(|(place, ..)| *place)
}
