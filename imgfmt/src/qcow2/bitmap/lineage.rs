//! The backup after which each bitmap began.
//!
//! It is stored in the header extension `0x6c696e65`, which other programs preserve. They clear
//! autoclear bit 62 when they open the image for writing; while it is set, no bitmap was cleared
//! without an update of the extension. A change of the list of bitmaps writes the extension
//! *before* the list, in a form that is right with the old list and with the new one:
//!
//! | change | written | with the old list | with the new one |
//! | --- | --- | --- | --- |
//! | freeze for backup Y | began after X, Y pending | after X | frozen bits: back after X |
//! | drop frozen bits | began after Y | all bits since X: more than since Y | after Y |
//! | thaw | nothing | after X | after X |
//! | clear, remove, disable, add | nothing is known | refused | refused |

use crate::backup::{BeganAfter, Uuid};
use crate::bitmap::BitmapChange;
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::qcow2::on_disk::header::{Header, autoclear};

const VERSION: u32 = 1;
const FIXED_LENGTH: usize = 40;
const RECORD_LENGTH: usize = 36;
/// Lengths are multiples of this, in bytes, so that the space of earlier versions can be reused.
const STEP: usize = 64;

/// The record of one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) began_after: Option<Uuid>,
    /// The backup after which it will have begun, once its frozen bits are dropped.
    pub(super) pending: Option<Uuid>,
}

/// The records of all bitmaps of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lineage {
    /// The identity of the disk.
    pub(super) disk: Option<Uuid>,
    /// The sequence number of the extension; the highest one is valid.
    pub(super) sequence: u64,
    pub(super) records: Vec<Record>,
    /// Whether another program has had the image open for writing since this was written.
    pub(super) is_doubtful: bool,
}

impl Lineage {
    /// Reads the records from the header.
    pub(super) fn of(header: &Header) -> Self {
        let found = header.extensions.lineages.iter().filter_map(|content| decode(content));
        let mut newest = found.max_by_key(|found| found.sequence).unwrap_or_default();
        newest.is_doubtful = header.autoclear & autoclear::LINEAGE == 0;
        newest
    }

    pub(super) fn began_after(&self, name: &str) -> BeganAfter {
        let record = self.records.iter().find(|record| record.name == name);
        match (record.and_then(|record| record.began_after), self.is_doubtful) {
            (None, _) => BeganAfter::Unknown,
            (Some(id), false) => BeganAfter::Backup(id),
            (Some(id), true) => BeganAfter::PerhapsBackup(id),
        }
    }

    fn forget(&mut self, name: &str) {
        self.records.retain(|record| record.name != name);
    }

    /// Updates the records, before a change of the list is made.
    pub(super) fn change(&mut self, change: &BitmapChange) {
        match change {
            BitmapChange::Add { name, .. }
            | BitmapChange::Remove { name }
            | BitmapChange::Clear { name }
            | BitmapChange::Disable { name } => self.forget(name),
            BitmapChange::Freeze { name, backup } => {
                let found = self.records.iter_mut().find(|record| record.name == *name);
                match (found, backup) {
                    (Some(record), backup) => record.pending = *backup,
                    (None, None) => {}
                    (None, pending @ Some(_)) => self.records.push(Record {
                        name: name.clone(),
                        began_after: None,
                        pending: *pending,
                    }),
                }
            }
            BitmapChange::DropFrozen { name } => {
                for record in self.records.iter_mut().filter(|record| record.name == *name) {
                    record.began_after = record.pending.take();
                }
                self.records
                    .retain(|record| record.began_after.is_some() || record.pending.is_some());
            }
            // Additional dirty ranges keep the record true, and thawed bits belong to it.
            _ => {}
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let uuid = |uuid: Option<Uuid>| uuid.map_or([0; 16], Uuid::bytes);
        let mut content = Vec::new();
        content.extend(VERSION.to_be_bytes());
        content.extend([0; 4]); // the checksum
        content.extend(self.sequence.to_be_bytes());
        content.extend(uuid(self.disk));
        content.extend((self.records.len() as u32).to_be_bytes());
        content.extend([0; 4]);
        for record in &self.records {
            content.extend(uuid(record.began_after));
            content.extend(uuid(record.pending));
            content.extend([0; 2]);
            content.extend((record.name.len() as u16).to_be_bytes());
            content.extend(record.name.as_bytes());
        }
        content.resize(content.len().next_multiple_of(STEP), 0);
        let checksum = crc32fast::hash(&content[8..]);
        content[4..8].copy_from_slice(&checksum.to_be_bytes());
        content
    }
}

fn decode(content: &[u8]) -> Option<Lineage> {
    if content.len() < FIXED_LENGTH
        || u32_at(content, 0) != VERSION
        || u32_at(content, 4) != crc32fast::hash(&content[8..])
    {
        return None;
    }
    let uuid = |bytes: &[u8]| Uuid::from_bytes(bytes.try_into().ok()?);
    let mut rest = &content[FIXED_LENGTH..];
    let mut records = Vec::new();
    for _ in 0..u32_at(content, 32) {
        let (fixed, behind) = rest.split_at_checked(RECORD_LENGTH)?;
        let (name, behind) = behind.split_at_checked(usize::from(u16_at(fixed, 34)))?;
        records.push(Record {
            name: std::str::from_utf8(name).ok()?.to_owned(),
            began_after: uuid(&fixed[..16]),
            pending: uuid(&fixed[16..32]),
        });
        rest = behind;
    }
    let (disk, sequence) = (uuid(&content[16..32]), u64_at(content, 8));
    Some(Lineage { disk, sequence, records, is_doubtful: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lineage() -> Lineage {
        let uuid = || Some(Uuid::random().unwrap());
        let record = |name: &str, began_after, pending| Record {
            name: name.to_owned(),
            began_after,
            pending,
        };
        Lineage {
            disk: uuid(),
            sequence: 7,
            records: vec![record("daily", uuid(), None), record("weekly", None, uuid())],
            is_doubtful: false,
        }
    }

    #[test]
    fn what_is_known_is_read_as_it_is_written_and_damage_makes_it_unknown() {
        let lineage = lineage();
        let content = lineage.encode();
        assert_eq!(content.len() % STEP, 0);
        assert_eq!(decode(&content), Some(lineage));
        assert_eq!(decode(&Lineage::default().encode()), Some(Lineage::default()));
        for length in 0..content.len() {
            assert_eq!(decode(&content[..length]), None);
        }
        for index in 0..content.len() {
            let mut damaged = content.clone();
            damaged[index] ^= 64;
            assert_eq!(decode(&damaged), None, "byte {index}");
        }
    }

    #[test]
    fn numbers_that_lie_are_refused_without_work() {
        let mut content = lineage().encode();
        content[32..36].copy_from_slice(&u32::MAX.to_be_bytes());
        let checksum = crc32fast::hash(&content[8..]);
        content[4..8].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(decode(&content), None);
    }
}
