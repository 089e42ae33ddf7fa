//! The log (MS-VHDX, section 2.3): changes of metadata that may not have reached their places.
//!
//! It is a ring of entries of whole 4 KiB. An entry is a header, descriptors, and a sector for each
//! descriptor of data:
//!
//! | header | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 4 | `loge` |
//! | 4 | 4 | CRC-32C of the entry |
//! | 8 | 4 | length of the entry |
//! | 12 | 4 | where in the log the first entry is that was still needed |
//! | 16 | 8 | sequence number |
//! | 24 | 4 | number of descriptors, which begin at 64 |
//! | 32 | 16 | log GUID, as the header of the file has it |
//! | 48 | 8 | the length that the file had at least |
//! | 56 | 8 | the length that the file is to have at least |
//!
//! | descriptor | size | field |
//! | ---: | ---: | --- |
//! | 0 | 4 | `desc`, data; or `zero` |
//! | 4 | 4 | data: the last 4 bytes of the sector |
//! | 8 | 8 | data: the first 8 bytes of the sector; zero: the length |
//! | 16 | 8 | offset in the file |
//! | 24 | 8 | sequence number of the entry |
//!
//! A sector of data is `data`, the upper half of the sequence number, bytes 8 to 4092, and the
//! lower half.
//!
//! The entries that matter are those whose numbers follow each other up to the highest one. What
//! they change is laid over the file in memory; the file itself is not touched.

use std::cell::Cell;
use std::sync::Arc;

use super::crc32c;
use super::header::{Guid, Header, MIB, guid_at};
use super::overlay::{Change, Overlay};
use crate::bytes::{u32_le_at, u64_le_at};
use crate::error::Result;
use crate::formats::file::ImageFile;

/// The unit of entries, descriptors and data, in bytes.
const UNIT: usize = 4096;

/// The longest log in bytes. Hyper-V and QEMU make logs of 1 MiB.
const LENGTH_MAX: u64 = 32 << 20;

/// Of how many bytes checksums are made, in lengths of the log.
const EFFORT_MAX: usize = 8;

const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;

/// The fields of an entry.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where it is in the log, and its length.
    offset: usize,
    length: usize,
    tail: usize,
    sequence: u64,
    descriptors: usize,
    flushed_length: u64,
    last_length: u64,
}

/// Returns what the log changes of the file, if it holds anything.
pub(super) fn replay(header: &Header, file: &ImageFile) -> Result<Option<Overlay>> {
    let Some(guid) = header.log else { return Ok(None) };
    let (offset, length) = (header.log_offset, header.log_length);
    let is_aligned = offset.is_multiple_of(MIB) && length.is_multiple_of(MIB);
    if offset < MIB || length == 0 || !is_aligned || !file.has(offset, length) {
        return Err(file.invalid("its log does not lie where a log can be"));
    }
    if length > LENGTH_MAX {
        return Err(
            file.unsupported(format!("its log of {length} bytes is too long to be replayed"))
        );
    }
    let ring = file.read_up_to(offset, length)?;
    let log = Log { effort: Cell::new(EFFORT_MAX * ring.len()), ring, guid };
    if log.ring.len() as u64 != length {
        return Err(file.invalid("its log is cut off"));
    }
    let Some(entries) = log.active() else {
        let detail = "its log is damaged, and so changes of its metadata are lost: let the program that \
                      wrote it open and repair it";
        return Err(file.invalid(detail));
    };
    let mut changes = Vec::new();
    let mut length = file.len();
    for entry in &entries {
        log.changes_of(entry, &mut changes);
        length = length.max(entry.last_length);
    }
    if entries.last().is_some_and(|head| head.flushed_length > file.len()) {
        return Err(file.invalid("the file was cut off after its log was written"));
    }
    Ok(Some(Overlay::new(Arc::clone(file.storage()), changes, length)))
}

struct Log {
    ring: Vec<u8>,
    guid: Guid,
    /// Of how many more bytes checksums are made: entries may claim to be long and be damaged.
    effort: Cell<usize>,
}

impl Log {
    /// The entries to be replayed, from the first on: of all rows that begin somewhere the one with
    /// the highest number, from the entry on that its last one says.
    fn active(&self) -> Option<Vec<Entry>> {
        let mut best: Option<Vec<Entry>> = None;
        let mut tail = 0;
        // Each entry is looked at once, but for those of a row that goes beyond the end of the
        // ring.
        while tail < self.ring.len() {
            let row = self.row(tail);
            let end = row.iter().map(|entry| entry.length).sum::<usize>() + tail;
            tail = end.max(tail + UNIT);
            let Some(head) = row.last() else { continue };
            let is_better = best
                .as_ref()
                .and_then(|best| best.last())
                .is_none_or(|best| best.sequence < head.sequence);
            let start = row.iter().position(|entry| entry.offset == head.tail);
            if let (true, Some(start)) = (is_better, start) {
                best = Some(row[start..].to_vec());
            }
        }
        // An entry may have been passed over then.
        best.filter(|_| self.effort.get() > 0)
    }

    /// The entries that follow each other from a place in the ring on.
    fn row(&self, start: usize) -> Vec<Entry> {
        let mut row: Vec<Entry> = Vec::new();
        let mut covered = 0;
        while let Some(entry) = self.entry((start + covered) % self.ring.len()) {
            let follows =
                row.last().is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
            covered += entry.length;
            if !follows || covered > self.ring.len() {
                break;
            }
            row.push(entry);
        }
        row
    }

    /// The entry at a place, if there is a sound one.
    fn entry(&self, offset: usize) -> Option<Entry> {
        let header: [u8; ENTRY_HEADER] = self.bytes(offset);
        let length = u32_le_at(&header, 8) as usize;
        let tail = u32_le_at(&header, 12) as usize;
        let descriptors = u32_le_at(&header, 24) as usize;
        let sequence = u64_le_at(&header, 16);
        let is_sound = header.starts_with(b"loge")
            && guid_at(&header, 32) == self.guid
            && sequence > 0
            && length >= UNIT
            && length.is_multiple_of(UNIT)
            && length <= self.ring.len()
            && tail.is_multiple_of(UNIT)
            && tail < self.ring.len()
            && descriptors <= (length - ENTRY_HEADER) / DESCRIPTOR;
        if !is_sound || self.effort.get() == 0 {
            return None;
        }
        self.effort.set(self.effort.get().saturating_sub(length));
        if !crc32c::is_sound(&self.part(offset, length)) {
            return None;
        }
        let entry = Entry {
            offset,
            length,
            tail,
            sequence,
            descriptors,
            flushed_length: u64_le_at(&header, 48),
            last_length: u64_le_at(&header, 56),
        };
        self.are_sound(&entry).then_some(entry)
    }

    /// Whether the descriptors of an entry belong to it, and their data too.
    fn are_sound(&self, entry: &Entry) -> bool {
        let mut data = data_offset(entry);
        self.descriptors(entry).all(|descriptor| {
            let (offset, number) = (u64_le_at(&descriptor, 16), u64_le_at(&descriptor, 24));
            let is_aligned = |number: u64| number.is_multiple_of(UNIT as u64);
            if number != entry.sequence || !is_aligned(offset) {
                return false;
            }
            if descriptor.starts_with(b"zero") {
                let length = u64_le_at(&descriptor, 8);
                return is_aligned(length) && offset.checked_add(length).is_some();
            }
            let place = data;
            data += UNIT;
            if !descriptor.starts_with(b"desc") || data > entry.length || offset > i64::MAX as u64 {
                return false;
            }
            let sector: [u8; UNIT] = self.bytes(entry.offset + place);
            let (upper, lower) = (u32_le_at(&sector, 4), u32_le_at(&sector, UNIT - 4));
            sector.starts_with(b"data")
                && u64::from(upper) << 32 | u64::from(lower) == entry.sequence
        })
    }

    fn descriptors(&self, entry: &Entry) -> impl Iterator<Item = [u8; DESCRIPTOR]> {
        let start = entry.offset + ENTRY_HEADER;
        (0..entry.descriptors).map(move |number| self.bytes(start + number * DESCRIPTOR))
    }

    /// Appends what a sound entry changes.
    fn changes_of(&self, entry: &Entry, changes: &mut Vec<Change>) {
        let mut place = entry.offset + data_offset(entry);
        for descriptor in self.descriptors(entry) {
            let offset = u64_le_at(&descriptor, 16);
            if descriptor.starts_with(b"zero") {
                let length = u64_le_at(&descriptor, 8);
                changes.push(Change { offset, length, data: None });
                continue;
            }
            let mut sector: [u8; UNIT] = self.bytes(place);
            place += UNIT;
            sector[..8].copy_from_slice(&descriptor[8..16]);
            sector[UNIT - 4..].copy_from_slice(&descriptor[4..8]);
            let data = Some(sector.as_slice().into());
            changes.push(Change { offset, length: UNIT as u64, data });
        }
    }

    /// Bytes of the ring, from a place on that may be beyond its end.
    fn bytes<const LENGTH: usize>(&self, offset: usize) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let start = offset % self.ring.len();
        let first = LENGTH.min(self.ring.len() - start);
        bytes[..first].copy_from_slice(&self.ring[start..start + first]);
        bytes[first..].copy_from_slice(&self.ring[..LENGTH - first]);
        bytes
    }

    /// The same for a length of up to the whole ring.
    fn part(&self, offset: usize, length: usize) -> Vec<u8> {
        let first = length.min(self.ring.len() - offset);
        [&self.ring[offset..offset + first], &self.ring[..length - first]].concat()
    }
}

/// Where in an entry the data begins: in the first unit after the descriptors.
fn data_offset(entry: &Entry) -> usize {
    (ENTRY_HEADER + entry.descriptors * DESCRIPTOR).next_multiple_of(UNIT)
}
