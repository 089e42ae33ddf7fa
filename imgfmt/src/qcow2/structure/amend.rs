//! Changing what kind of qcow2 image one is, without touching its data.

use crate::bytes::u64_at;
use crate::create::{Amendment, LazyRefcounts, Qcow2Version};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{Header, V2_LENGTH, compatible, field, incompatible};
use crate::qcow2::on_disk::snapshot;
use crate::qcow2::on_disk::words::read_error;
use crate::qcow2::purpose::Purpose;
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

/// A write of so many aligned bytes happens wholly or not at all.
const SECTOR: usize = 512;
/// Length of the version 3 header that is written, with the field for the kind of compression.
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
        (3, Some(Qcow2Version::V2)) => {
            let detail = "version 3 cannot become version 2; convert it into a new image";
            return Err(Error::new(ErrorKind::Unsupported, "amend", detail));
        }
        (2, Some(Qcow2Version::V3)) => upgrade(storage, &header)?,
        _ => {}
    }
    match amendment.lazy_refcounts {
        Some(lazy) => set_lazy_refcounts(storage, lazy),
        None => Ok(()),
    }
}

fn set_lazy_refcounts(storage: &dyn Storage, lazy: LazyRefcounts) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    if header.version < 3 {
        return match lazy {
            LazyRefcounts::Off => Ok(()),
            LazyRefcounts::On => {
                let detail = "version 2 has no lazy refcounts; make it version 3 as well";
                Err(Error::new(ErrorKind::InvalidInput, "amend", detail))
            }
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
    // What is not known here may be about this: a writer clears it.
    let bytes = [features.to_be_bytes(), header.kept_autoclear().to_be_bytes()].concat();
    write(storage, field::AUTOCLEAR - 8, &bytes)
}

/// Makes a version 2 image version 3: the header becomes longer, and what comes behind it moves.
fn upgrade(storage: &dyn Storage, header: &Header) -> Result<()> {
    refuse_snapshots_without_size(storage, header)?;
    let cluster = header.geometry.cluster_size() as usize;
    let mut first = vec![0; cluster];
    storage.read_at(HostOffset::new(0), &mut first).map_err(read_error)?;
    let name = header.backing_name.as_deref().unwrap_or_default().as_bytes();
    let old_name = u64_at(&first, 8) as usize;
    let area_end = if old_name == 0 { cluster } else { old_name.min(cluster) };
    let area = first.get(V2_LENGTH as usize..area_end).unwrap_or_default();
    let mut content = first[..V2_LENGTH as usize].to_vec();
    content[4..8].copy_from_slice(&3_u32.to_be_bytes());
    // No features of any kind.
    content.extend([0; 24]);
    content.extend(REFCOUNT_ORDER_OF_V2.to_be_bytes());
    content.extend((V3_LENGTH as u32).to_be_bytes());
    content.resize(V3_LENGTH, 0);
    content.extend(extension::without(area, UNUSED_KIND)?);
    content.extend([0; 8]);
    let extensions_end = content.len();
    if extensions_end > SECTOR {
        return Err(no_room());
    }
    let new_name = match name.len() {
        0 => 0,
        length if extensions_end + length <= SECTOR => {
            content.extend(name);
            extensions_end
        }
        _ if old_name >= SECTOR => old_name,
        // Where nothing points to yet.
        length => {
            let place = (old_name + length).next_multiple_of(SECTOR);
            if place + length > cluster {
                return Err(no_room());
            }
            write(storage, place as u64, name)?;
            place
        }
    };
    content[8..16].copy_from_slice(&(new_name as u64).to_be_bytes());
    content.resize(SECTOR, 0);
    write(storage, 0, &content)
}

/// In version 3 each snapshot says how large its disk was.
fn refuse_snapshots_without_size(storage: &dyn Storage, header: &Header) -> Result<()> {
    let snapshots = snapshot::read_table(storage, header)?;
    match snapshots.iter().find(|snapshot| snapshot.extra.len() < 16) {
        None => Ok(()),
        Some(snapshot) => {
            let detail = format!(
                "its snapshot '{}' does not say how large the disk was, which version 3 demands; \
                 delete it first",
                snapshot.name.escape_debug()
            );
            Err(Error::new(ErrorKind::Unsupported, "amend", detail))
        }
    }
}

/// A type that no extension has: all are kept.
const UNUSED_KIND: u32 = 0;

fn write(storage: &dyn Storage, offset: u64, bytes: &[u8]) -> Result<()> {
    storage
        .write_at(HostOffset::new(offset), bytes, Durability::Cached)
        .and_then(|()| storage.sync())
        .map_err(|error| Error::from_io("write the header of", error))
}

fn no_room() -> Error {
    let detail = "its header has no room for the fields of version 3; convert it into a new image";
    Error::new(ErrorKind::Unsupported, "amend", detail)
}
