//! The table of internal snapshots.

use std::fmt;

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::header::{Header, SNAPSHOTS_MAX};
use crate::qcow2::on_disk::words::{invalid, read_error};
use crate::storage::Storage;
use crate::units::HostOffset;

const ENTRY_LENGTH: usize = 40;
const EXTRA_LENGTH_MAX: usize = 1024;
/// Version 3 requires two sizes.
const EXTRA_LENGTH_MIN: usize = 16;
/// The maximum size of the complete table.
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Largest L1 table of a snapshot.
const L1_BYTES_MAX: u64 = 32 << 20;

/// An internal snapshot: an earlier state of the disk in the same file.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Identifies it within the image, usually a number.
    pub id: String,
    /// The name the user gave.
    pub name: String,
    /// Time of creation, in seconds since 1970.
    pub date_s: u32,
    /// Nanoseconds of the time of creation.
    pub date_ns: u32,
    /// Run time of the guest, in nanoseconds.
    pub vm_clock_ns: u64,
    /// Size of the saved state of the virtual machine, in bytes; 0 if there is none.
    pub vm_state_size: u64,
    /// Size of the disk at that time, in bytes.
    pub disk_size: u64,
    pub(crate) l1_offset: HostOffset,
    pub(crate) l1_entries: u32,
    pub(crate) extra: Vec<u8>,
    /// Id and name in the file, which need not be UTF-8.
    pub(crate) raw_id: Vec<u8>,
    pub(crate) raw_name: Vec<u8>,
}

impl Snapshot {
    /// Returns how many instructions the guest had executed, if it was run with a counter of them.
    #[must_use]
    pub fn instruction_count(&self) -> Option<u64> {
        let count = (self.extra.len() >= 24).then(|| u64_at(&self.extra, 16))?;
        (count != u64::MAX).then_some(count)
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot {} '{}' of {} bytes", self.id, self.name, self.disk_size)
    }
}

/// Reads and checks the table of snapshots.
pub(crate) fn read_table(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    let file_length = storage.len().map_err(read_error)?;
    let mut offset = header.snapshots_offset;
    for _ in 0..header.snapshot_count {
        let (snapshot, length) = read_entry(storage, header, offset, file_length)?;
        snapshots.push(snapshot);
        // Cannot overflow: the offset is inside the file and an entry is below 200 KiB.
        offset += length.next_multiple_of(8);
        if offset - header.snapshots_offset > TABLE_BYTES_MAX {
            return Err(invalid("its table of snapshots is too large"));
        }
    }
    Ok(snapshots)
}

/// A table of snapshots that may be damaged.
pub(crate) struct DamagedTable {
    pub(crate) snapshots: Vec<Snapshot>,
    /// Defects of the table that are repaired by writing `snapshots` as a new table.
    pub(crate) damages: Vec<String>,
    /// The length of the table in bytes.
    pub(crate) length: u64,
}

/// Reads the readable part of the table of snapshots. The places of their L1 tables are not
/// checked.
pub(crate) fn read_damaged_table(storage: &dyn Storage, header: &Header) -> Result<DamagedTable> {
    let (mut snapshots, mut damages) = (Vec::new(), Vec::new());
    let file_length = storage.len().map_err(read_error)?;
    let mut length = 0;
    for number in 0..header.snapshot_count {
        let offset = header.snapshots_offset + length;
        let (mut snapshot, extra_length) = read_damaged_entry(storage, header, offset)?;
        let name_lengths = snapshot.raw_id.len() + snapshot.raw_name.len();
        // After the last snapshot the cluster is empty. An entry without a name has no known end
        // from which the next one could be found.
        let is_empty =
            name_lengths == 0 && snapshot.l1_offset.bytes() == 0 && snapshot.l1_entries == 0;
        let reason = match () {
            () if number >= SNAPSHOTS_MAX => "are more than there may be",
            () if offset.bytes() >= file_length => "lie past the end of the file",
            () if length > TABLE_BYTES_MAX => "make the table too large",
            () if is_empty => "are empty",
            () => "",
        };
        if !reason.is_empty() {
            let count = header.snapshot_count - number;
            damages.push(format!("the last {count} snapshots of the table {reason}"));
            break;
        }
        length += (ENTRY_LENGTH as u64 + extra_length + name_lengths as u64).next_multiple_of(8);
        let name = snapshot.name.escape_debug();
        if extra_length > EXTRA_LENGTH_MAX as u64 {
            damages.push(format!("the snapshot '{name}' has {extra_length} bytes of extra data"));
        } else if snapshot.extra.len() < EXTRA_LENGTH_MIN && header.version >= 3 {
            damages.push(format!("the entry of the snapshot '{name}' is incomplete"));
            snapshot.extra = snapshot.vm_state_size.to_be_bytes().to_vec();
            snapshot.extra.extend(snapshot.disk_size.to_be_bytes());
        }
        snapshots.push(snapshot);
    }
    Ok(DamagedTable { snapshots, damages, length })
}

/// The snapshot of this id or else of this name.
pub(crate) fn find<'a>(snapshots: &'a [Snapshot], name: &str) -> Result<&'a Snapshot> {
    let by_id = snapshots.iter().find(|snapshot| snapshot.id == name);
    let found = by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == name));
    found.ok_or_else(|| {
        let names: Vec<_> = snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        let names = if names.is_empty() { "none".into() } else { names.join(", ") };
        let detail = format!("it has no snapshot '{name}'; it has: {}", names.escape_debug());
        Error::new(ErrorKind::NotFound, "find a snapshot in", detail)
    })
}

/// The bytes of the table.
pub(crate) fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        bytes.extend(snapshot.l1_offset.bytes().to_be_bytes());
        bytes.extend(snapshot.l1_entries.to_be_bytes());
        bytes.extend((snapshot.raw_id.len() as u16).to_be_bytes());
        bytes.extend((snapshot.raw_name.len() as u16).to_be_bytes());
        bytes.extend(snapshot.date_s.to_be_bytes());
        bytes.extend(snapshot.date_ns.to_be_bytes());
        bytes.extend(snapshot.vm_clock_ns.to_be_bytes());
        bytes.extend(u32::try_from(snapshot.vm_state_size).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend((snapshot.extra.len() as u32).to_be_bytes());
        bytes.extend(&snapshot.extra);
        bytes.extend(&snapshot.raw_id);
        bytes.extend(&snapshot.raw_name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Length in bytes of the table that holds these snapshots.
pub(crate) fn table_length(snapshots: &[Snapshot]) -> u64 {
    encode_table(snapshots).len() as u64
}

fn read_entry(
    storage: &dyn Storage,
    header: &Header,
    offset: HostOffset,
    file_length: u64,
) -> Result<(Snapshot, u64)> {
    let mut fixed = [0; ENTRY_LENGTH];
    storage.read_exact_at(offset, &mut fixed).map_err(read_error)?;
    let name_lengths = usize::from(u16_at(&fixed, 12)) + usize::from(u16_at(&fixed, 14));
    let extra_length = u32_at(&fixed, 36) as usize;
    if extra_length > EXTRA_LENGTH_MAX {
        return Err(invalid(format!("a snapshot has {extra_length} bytes of extra data")));
    }
    let mut rest = vec![0; extra_length + name_lengths];
    let rest_offset = offset + ENTRY_LENGTH as u64;
    storage.read_exact_at(rest_offset, &mut rest).map_err(read_error)?;
    let (extra, names) = rest.split_at(extra_length);
    let snapshot = decode_entry(&fixed, extra, names, header);
    check_entry(&snapshot, header, file_length)?;
    Ok((snapshot, (ENTRY_LENGTH + rest.len()) as u64))
}

/// Reads an entry that may be damaged: bytes past the end of the file are zero, and at most the
/// permitted amount of extra data is kept. Also returns the amount that the entry claims.
fn read_damaged_entry(
    storage: &dyn Storage,
    header: &Header,
    offset: HostOffset,
) -> Result<(Snapshot, u64)> {
    let read = |offset: HostOffset, length: usize| {
        let mut bytes = vec![0; length];
        let done = storage.read_at(offset, &mut bytes).map_err(read_error)?;
        bytes[done..].fill(0);
        Ok::<_, Error>(bytes)
    };
    let fixed = read(offset, ENTRY_LENGTH)?;
    let name_lengths = usize::from(u16_at(&fixed, 12)) + usize::from(u16_at(&fixed, 14));
    let extra_length = u64::from(u32_at(&fixed, 36));
    let extra_offset = offset + ENTRY_LENGTH as u64;
    let extra = read(extra_offset, extra_length.min(EXTRA_LENGTH_MAX as u64) as usize)?;
    let names = read(extra_offset + extra_length, name_lengths)?;
    Ok((decode_entry(&fixed, &extra, &names, header), extra_length))
}

fn decode_entry(fixed: &[u8], extra: &[u8], names: &[u8], header: &Header) -> Snapshot {
    let (id, name) = names.split_at(usize::from(u16_at(fixed, 12)).min(names.len()));
    let large = |at: usize| (extra.len() >= at + 8).then(|| u64_at(extra, at));
    Snapshot {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        date_s: u32_at(fixed, 16),
        date_ns: u32_at(fixed, 20),
        vm_clock_ns: u64_at(fixed, 24),
        vm_state_size: large(0).unwrap_or_else(|| u64::from(u32_at(fixed, 32))),
        disk_size: large(8).unwrap_or(header.size) & !511,
        l1_offset: HostOffset::new(u64_at(fixed, 0)),
        l1_entries: u32_at(fixed, 8),
        extra: extra.to_vec(),
        raw_id: id.to_vec(),
        raw_name: name.to_vec(),
    }
}

/// The reason why the L1 table of a snapshot cannot be read, if there is one.
pub(crate) fn l1_damage(snapshot: &Snapshot, geometry: Geometry) -> Option<String> {
    let is_possible = geometry.in_cluster(snapshot.l1_offset) == 0
        && u64::from(snapshot.l1_entries) * 8 <= L1_BYTES_MAX;
    (!is_possible).then(|| {
        let name = snapshot.name.escape_debug();
        format!("the L1 table of the snapshot '{name}' is not aligned or too large")
    })
}

fn check_entry(snapshot: &Snapshot, header: &Header, file_length: u64) -> Result<()> {
    let geometry = header.geometry;
    let bytes = u64::from(snapshot.l1_entries) * 8;
    let file_end = file_length.checked_next_multiple_of(geometry.cluster_size());
    let end = snapshot.l1_offset.checked_add(bytes);
    let fits = bytes <= L1_BYTES_MAX
        && geometry.in_cluster(snapshot.l1_offset) == 0
        && end.zip(file_end).is_some_and(|(end, file_end)| end.bytes() <= file_end)
        && snapshot.disk_size <= i64::MAX as u64
        && geometry.l1_entries_for(snapshot.disk_size) <= u64::from(snapshot.l1_entries);
    if fits {
        Ok(())
    } else {
        Err(invalid(format!(
            "the L1 table of snapshot '{}' is too large, too small, not aligned or outside the file",
            snapshot.name.escape_debug()
        )))
    }
}
