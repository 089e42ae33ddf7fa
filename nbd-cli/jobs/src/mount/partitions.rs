//! The partitions of a disk: GPT, and MBR with logical partitions.
//!
//! Tables are bytes of a guest, so they are read with checked arithmetic and bounds. The crates for
//! them write tables too, allocate what a header says, and know only one kind each.

use std::ops::Range;

/// Most partitions that are shown: the number in a GPT as it is usually made.
const MAX_PARTITIONS: u32 = 128;
/// Sizes of sectors: a GPT does not say which of them its units are.
const SECTOR_SIZES: [u64; 2] = [512, 4096];
/// Longest array of entries that is read: 128 entries of 4 KiB.
const MAX_ARRAY_LEN: u64 = 512 << 10;
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A part of a disk with its number: `p1` has 1. Logical partitions of an MBR begin at 5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    pub(super) number: u32,
    /// In bytes, inside the disk and not empty.
    pub(super) range: Range<u64>,
}

/// Reads bytes of the disk; the range is inside it.
pub(super) type Read<'a> = dyn Fn(u64, &mut [u8]) -> imgfmt::Result<()> + 'a;

/// Finds the partitions of a disk of `size` bytes. A disk without a valid table has none. What is
/// outside the disk is cut off.
///
/// # Errors
///
/// If the disk cannot be read.
pub(super) fn partitions(read: &Read<'_>, size: u64) -> imgfmt::Result<Vec<Partition>> {
    let disk = Disk { read, size };
    // What is left of an older GPT, at the end of the disk for example, counts for nothing: the
    // first sector says whether there is one, as it does for Linux.
    let sector = disk.bytes(0, 512)?;
    let entries = sector.as_deref().and_then(MbrEntry::of);
    let is_protective = |entry: &MbrEntry| entry.kind == PROTECTIVE;
    if !entries.is_some_and(|entries| entries.iter().any(is_protective)) {
        return disk.mbr();
    }
    for sector_size in SECTOR_SIZES {
        if let Some(found) = disk.gpt(sector_size)? {
            return Ok(found);
        }
    }
    disk.mbr()
}

struct Disk<'a> {
    read: &'a Read<'a>,
    size: u64,
}

/// The parts of a GPT header that are used.
struct GptHeader {
    entries_at: u64,
    count: u32,
    entry_len: u32,
    array_sum: u32,
}

impl Disk<'_> {
    /// Reads `length` bytes; `None` if they are not all inside the disk.
    fn bytes(&self, offset: u64, length: u64) -> imgfmt::Result<Option<Vec<u8>>> {
        let is_inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
        let (true, Ok(count)) = (is_inside, usize::try_from(length)) else { return Ok(None) };
        let mut bytes = vec![0; count];
        (self.read)(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Finds the partitions of a GPT: the one at the start, or the one at the end if that is
    /// damaged.
    fn gpt(&self, sector_size: u64) -> imgfmt::Result<Option<Vec<Partition>>> {
        let last = (self.size / sector_size).saturating_sub(1);
        for sector in [1, last] {
            let Some(at) = sector.checked_mul(sector_size) else { continue };
            let Some(bytes) = self.bytes(at, sector_size)? else { continue };
            let Some(header) = GptHeader::parse(&bytes, sector) else { continue };
            if let Some(found) = self.gpt_entries(&header, sector_size)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn gpt_entries(
        &self,
        header: &GptHeader,
        sector_size: u64,
    ) -> imgfmt::Result<Option<Vec<Partition>>> {
        let array_len = u64::from(header.count) * u64::from(header.entry_len);
        if array_len > MAX_ARRAY_LEN {
            return Ok(None);
        }
        let Some(at) = header.entries_at.checked_mul(sector_size) else { return Ok(None) };
        let Some(array) = self.bytes(at, array_len)? else { return Ok(None) };
        if crc32fast::hash(&array) != header.array_sum {
            return Ok(None);
        }
        // A valid header has entries of at least 128 bytes.
        let entries = array.chunks_exact(header.entry_len as usize);
        let found = (1..=MAX_PARTITIONS).zip(entries).filter_map(|(number, entry)| {
            let kind = entry.get(..16)?;
            if kind.iter().all(|byte| *byte == 0) {
                return None;
            }
            let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
            let count = last.checked_sub(first)?.checked_add(1)?;
            self.partition(number, first, count, sector_size)
        });
        Ok(Some(found.collect()))
    }

    /// Finds the partitions of an MBR. The first sector of a file system without a table has the
    /// same mark at its end: its entries make no sense.
    fn mbr(&self) -> imgfmt::Result<Vec<Partition>> {
        let Some(sector) = self.bytes(0, 512)? else { return Ok(Vec::new()) };
        let Some(entries) = MbrEntry::of(&sector) else { return Ok(Vec::new()) };
        let makes_sense = |entry: &MbrEntry| {
            entry.count == 0 || (entry.first > 0 && u64::from(entry.first) < self.size / 512)
        };
        if !entries.iter().all(makes_sense) {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for (number, entry) in (1..).zip(&entries) {
            if EXTENDED.contains(&entry.kind) {
                self.logical(u64::from(entry.first), &mut found)?;
            } else if entry.kind != 0 && entry.kind != PROTECTIVE {
                let (first, count) = (entry.first.into(), entry.count.into());
                found.extend(self.partition(number, first, count, 512));
            }
        }
        found.sort_by_key(|partition| partition.number);
        Ok(found)
    }

    /// Follows the chain of logical partitions; `extended` is the first sector of it.
    fn logical(&self, extended: u64, found: &mut Vec<Partition>) -> imgfmt::Result<()> {
        let mut at = extended;
        let number_of_last = found.iter().map(|partition| partition.number).max().unwrap_or(0);
        // A chain that returns to itself ends here.
        for number in (number_of_last.max(4) + 1)..=MAX_PARTITIONS {
            let Some(offset) = at.checked_mul(512) else { break };
            let Some(sector) = self.bytes(offset, 512)? else { break };
            let Some([data, next, ..]) = MbrEntry::of(&sector) else { break };
            if data.kind != 0
                && let Some(first) = at.checked_add(data.first.into())
            {
                found.extend(self.partition(number, first, data.count.into(), 512));
            }
            if !EXTENDED.contains(&next.kind) || next.first == 0 {
                break;
            }
            let Some(sector) = extended.checked_add(next.first.into()) else { break };
            at = sector;
        }
        Ok(())
    }

    /// Makes a partition of sectors, cut at the end of the disk; `None` if it is outside.
    fn partition(
        &self,
        number: u32,
        first: u64,
        count: u64,
        sector_size: u64,
    ) -> Option<Partition> {
        let start = first.checked_mul(sector_size)?;
        let end = start.saturating_add(count.saturating_mul(sector_size)).min(self.size);
        (start < end).then_some(Partition { number, range: start..end })
    }
}

impl GptHeader {
    /// Parses the header in `sector`; `None` if it is not a valid one.
    fn parse(bytes: &[u8], sector: u64) -> Option<Self> {
        if bytes.get(..8)? != b"EFI PART" || u64_at(bytes, 24)? != sector {
            return None;
        }
        let length = usize::try_from(u32_at(bytes, 12)?).ok()?;
        let mut summed = bytes.get(..length)?.to_vec();
        summed.get_mut(16..20)?.fill(0);
        if length < 92 || crc32fast::hash(&summed) != u32_at(bytes, 16)? {
            return None;
        }
        let header = Self {
            entries_at: u64_at(bytes, 72)?,
            count: u32_at(bytes, 80)?,
            entry_len: u32_at(bytes, 84)?,
            array_sum: u32_at(bytes, 88)?,
        };
        (header.entry_len >= 128).then_some(header)
    }
}

struct MbrEntry {
    kind: u8,
    first: u32,
    count: u32,
}

impl MbrEntry {
    /// Parses the four entries of a sector; `None` if it has no table.
    fn of(sector: &[u8]) -> Option<[Self; 4]> {
        if sector.get(510..512)? != [0x55, 0xaa] {
            return None;
        }
        let entry = |index: usize| {
            let bytes = sector.get(446 + 16 * index..)?;
            // Active or not: nothing else is a table.
            if ![0, 0x80].contains(bytes.first()?) {
                return None;
            }
            Some(Self { kind: *bytes.get(4)?, first: u32_at(bytes, 8)?, count: u32_at(bytes, 12)? })
        };
        Some([entry(0)?, entry(1)?, entry(2)?, entry(3)?])
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(disk: &[u8]) -> Vec<(u32, Range<u64>)> {
        let read = |offset: u64, buffer: &mut [u8]| {
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&disk[at..at + buffer.len()]);
            Ok(())
        };
        let found = partitions(&read, disk.len() as u64).unwrap();
        found.into_iter().map(|partition| (partition.number, partition.range)).collect()
    }

    fn entry(sector: &mut [u8], index: usize, kind: u8, first: u32, count: u32) {
        let bytes = &mut sector[446 + 16 * index..][..16];
        bytes[4] = kind;
        bytes[8..12].copy_from_slice(&first.to_le_bytes());
        bytes[12..].copy_from_slice(&count.to_le_bytes());
        sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn logical_partitions_are_numbered_from_5_and_a_chain_that_returns_ends() {
        let mut disk = vec![0; 64 << 10];
        entry(&mut disk, 0, 0x83, 1, 7);
        entry(&mut disk, 1, 0x05, 16, 112);
        entry(&mut disk[16 * 512..], 0, 0x83, 1, 3);
        entry(&mut disk[16 * 512..], 1, 0x05, 8, 8);
        entry(&mut disk[24 * 512..], 0, 0x83, 2, 1000);
        let expected = [(1, 512..4096), (5, 17 * 512..20 * 512), (6, 26 * 512..64 << 10)];
        assert_eq!(found(&disk), expected);
        entry(&mut disk[24 * 512..], 1, 0x05, 8, 8);
        let looped = found(&disk);
        assert_eq!(looped.len(), 125);
        assert_eq!(looped.last().unwrap().0, MAX_PARTITIONS);
    }

    #[test]
    fn bytes_that_are_no_table_have_no_partitions() {
        assert!(found(&[]).is_empty());
        assert!(found(&[0; 511]).is_empty());
        assert!(found(&[0; 1 << 16]).is_empty());
        assert!(found(&[0xff; 1 << 16]).is_empty());
        // A boot sector of a file system: its text is where a table would have its entries.
        let mut disk = vec![b'x'; 1 << 16];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(found(&disk).is_empty());
    }

    /// A disk with one partition of a GPT, from sector 40 to 50.
    fn gpt() -> Vec<u8> {
        let mut disk = vec![0; 64 << 10];
        entry(&mut disk, 0, PROTECTIVE, 1, 127);
        disk[1024..1040].fill(7);
        disk[1056..1064].copy_from_slice(&40_u64.to_le_bytes());
        disk[1064..1072].copy_from_slice(&50_u64.to_le_bytes());
        let array_sum = crc32fast::hash(&disk[1024..1024 + 512]);
        let header = &mut disk[512..1024];
        header[..8].copy_from_slice(b"EFI PART");
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        header[24..32].copy_from_slice(&1_u64.to_le_bytes());
        header[72..80].copy_from_slice(&2_u64.to_le_bytes());
        header[80..84].copy_from_slice(&4_u32.to_le_bytes());
        header[84..88].copy_from_slice(&128_u32.to_le_bytes());
        header[88..92].copy_from_slice(&array_sum.to_le_bytes());
        let sum = crc32fast::hash(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        disk
    }

    #[test]
    fn a_gpt_is_believed_only_with_its_sums() {
        let disk = gpt();
        assert_eq!(found(&disk), [(1, 40 * 512..51 * 512)]);
        for byte in (512..604).chain(1024..1536) {
            let mut damaged = disk.clone();
            damaged[byte] ^= 1;
            assert!(found(&damaged).is_empty(), "byte {byte}");
        }
    }

    /// Linux ignores the rest of a GPT over which an image with an MBR was written.
    #[test]
    fn a_gpt_that_the_first_sector_does_not_announce_is_none() {
        let mut disk = gpt();
        entry(&mut disk, 0, 0x83, 8, 16);
        assert_eq!(found(&disk), [(1, 8 * 512..24 * 512)]);
        disk[510..512].fill(0);
        assert!(found(&disk).is_empty());
    }
}
