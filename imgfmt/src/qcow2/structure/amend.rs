//! Changing the version and the features of a qcow2 image, without touching its data.

use crate::bytes::u32_at;
use crate::create_options::{Amendment, LazyRefcounts, Qcow2Version};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::metadata::header_edit::write_within_sector;
use crate::qcow2::metadata::header_start::HeaderStart;
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{
    Header, V2_LENGTH, autoclear, compatible, field, incompatible,
};
use crate::qcow2::on_disk::snapshot;
use crate::qcow2::purpose::Purpose;
use crate::storage::Storage;

/// Length of the version 3 header that is written, including the field for the compression type.
const V3_LENGTH: usize = 112;
const REFCOUNT_ORDER_OF_V2: u32 = 4;

/// Changes the header. Each change is one write within a sector.
pub(crate) fn amend(storage: &dyn Storage, amendment: &Amendment) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    if header.incompatible & (incompatible::CORRUPT | incompatible::DIRTY) != 0 {
        let detail = "it is marked as damaged or as not closed; check and repair it first";
        return Err(Error::new(ErrorKind::Corrupt, "amend", detail));
    }
    match (header.version, amendment.version) {
        (3, Some(Qcow2Version::V2)) => downgrade(storage, &header)?,
        (2, Some(Qcow2Version::V3)) => upgrade(storage, &header)?,
        _ => {}
    }
    match amendment.lazy_refcounts {
        Some(lazy) => set_lazy_refcounts(storage, lazy),
        None => Ok(()),
    }
}

/// The place and the length of the LUKS header, in bytes, if the data is encrypted with it.
pub(crate) fn luks_place(storage: &dyn Storage) -> Result<Option<(u64, u64)>> {
    let place = Header::read(storage, Purpose::Use)?.luks_header()?;
    Ok(place.map(|(offset, length)| (offset.bytes(), length)))
}

fn set_lazy_refcounts(storage: &dyn Storage, lazy: LazyRefcounts) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    if header.version < 3 {
        return match lazy {
            LazyRefcounts::Off => Ok(()),
            LazyRefcounts::On => Err(no_lazy_refcounts()),
        };
    }
    let others = header.compatible & !compatible::LAZY_REFCOUNTS;
    let features = match lazy {
        LazyRefcounts::Off => others,
        LazyRefcounts::On => others | compatible::LAZY_REFCOUNTS,
    };
    if features == header.compatible {
        return Ok(());
    }
    // Unknown autoclear bits may depend on what changes: a writer clears them.
    let bytes = [features.to_be_bytes(), header.kept_autoclear().to_be_bytes()].concat();
    write_within_sector(storage, field::AUTOCLEAR - 8, &bytes)
}

/// Refuses an impossible amendment before anything is changed.
pub(crate) fn refuse_amendment(storage: &dyn Storage, amendment: &Amendment) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    let version = amendment.version.unwrap_or(match header.version {
        2 => Qcow2Version::V2,
        _ => Qcow2Version::V3,
    });
    let bits = amendment.refcount_bits.unwrap_or(1 << header.geometry.refcount_order);
    if !bits.is_power_of_two() || bits > 64 {
        let detail = format!(
            "refcounts of {bits} bits are not possible; choose a power of two from 1 to 64"
        );
        return Err(Error::new(ErrorKind::InvalidInput, "amend", detail));
    }
    if version == Qcow2Version::V3 {
        return Ok(());
    }
    if bits != 16 {
        let detail = "version 2 has refcounts of 16 bits only; change their width as well";
        return Err(Error::new(ErrorKind::InvalidInput, "amend", detail));
    }
    if amendment.lazy_refcounts == Some(LazyRefcounts::On) {
        return Err(no_lazy_refcounts());
    }
    if header.version == 2 { Ok(()) } else { refuse_downgrade(&header) }
}

/// Refuses version 2 for an image with features that version 2 lacks.
fn refuse_downgrade(header: &Header) -> Result<()> {
    let has = |bit: u64| header.incompatible & bit != 0;
    let what = if has(incompatible::DATA_FILE) {
        "its data is in a separate file"
    } else if has(incompatible::EXTENDED_L2) {
        "its clusters have subclusters"
    } else if has(incompatible::COMPRESSION) {
        "its clusters are compressed in another way than with zlib"
    } else if header.autoclear & autoclear::BITMAPS != 0 || header.bitmaps().is_some() {
        "it has dirty bitmaps: remove them first"
    } else if header.snapshot_count > 0 {
        "it has snapshots, which may hold more than version 2 can: delete them first"
    } else {
        return Ok(());
    };
    let detail =
        format!("it cannot become version 2 because {what}; or convert it into a new image");
    Err(Error::new(ErrorKind::Unsupported, "amend", detail))
}

/// Converts an image of version 3 to version 2. No cluster is marked as zero any more.
fn downgrade(storage: &dyn Storage, header: &Header) -> Result<()> {
    refuse_downgrade(header)?;
    let start = HeaderStart::read(storage, header)?;
    let mut content = start.bytes()[..V2_LENGTH as usize].to_vec();
    content[4..8].copy_from_slice(&2_u32.to_be_bytes());
    let length = u32_at(start.bytes(), 100) as usize;
    // Without features, the table of their names has no meaning.
    let extensions = extension::without(start.extensions(length), extension::FEATURE_NAMES)?;
    start.replace(content, &extensions)?.ok_or_else(no_room)
}

/// Converts an image of version 2 to version 3: the header becomes longer, and the extensions and
/// the name after it move.
fn upgrade(storage: &dyn Storage, header: &Header) -> Result<()> {
    refuse_snapshots_without_size(storage, header)?;
    let start = HeaderStart::read(storage, header)?;
    let mut content = start.bytes()[..V2_LENGTH as usize].to_vec();
    content[4..8].copy_from_slice(&3_u32.to_be_bytes());
    // No features of any kind.
    content.extend([0; 24]);
    content.extend(REFCOUNT_ORDER_OF_V2.to_be_bytes());
    content.extend((V3_LENGTH as u32).to_be_bytes());
    content.resize(V3_LENGTH, 0);
    let area = start.extensions(V2_LENGTH as usize);
    let extensions = extension::without(area, UNUSED_KIND)?;
    start.replace(content, &extensions)?.ok_or_else(no_room)
}

/// In version 3 each snapshot records the size of its disk.
fn refuse_snapshots_without_size(storage: &dyn Storage, header: &Header) -> Result<()> {
    let snapshots = snapshot::read_table(storage, header)?;
    match snapshots.iter().find(|snapshot| snapshot.extra.len() < 16) {
        None => Ok(()),
        Some(snapshot) => {
            let detail = format!(
                "its snapshot '{}' does not say how large the disk was, which version 3 requires; \
                 delete it first",
                snapshot.name.escape_debug()
            );
            Err(Error::new(ErrorKind::Unsupported, "amend", detail))
        }
    }
}

/// A type that no extension has, so that all are kept.
const UNUSED_KIND: u32 = 0;

fn no_lazy_refcounts() -> Error {
    let detail = "version 2 has no lazy refcounts; make it version 3 as well";
    Error::new(ErrorKind::InvalidInput, "amend", detail)
}

fn no_room() -> Error {
    let detail =
        "its header has no space for the fields of that version; convert it into a new image";
    Error::new(ErrorKind::Unsupported, "amend", detail)
}

#[cfg(test)]
mod tests;
