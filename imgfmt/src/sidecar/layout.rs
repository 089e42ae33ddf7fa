//! The bytes of a sidecar. All numbers are little-endian; see the table in `DESIGN.md`.

use crate::access::BitmapDurability;

pub(super) const MAGIC: [u8; 8] = *b"IMGDIRTY";
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 512;
/// The word that holds the time of the last change.
pub(super) const LIVENESS_WORD: usize = 64;
pub(super) const LOG_OFFSET: u64 = 4096;
pub(super) const SLOT_BYTES: usize = 512;
/// Maximum number of slots of the log, with [`SLOT_EXTENTS`] extents each.
pub(super) const SLOTS_MAX: usize = 10;
pub(super) const SLOT_EXTENTS: usize = 120;
pub(super) const DESCRIPTORS_OFFSET: u64 = 12288;
pub(super) const DESCRIPTOR_BYTES: usize = 1056;
pub(super) const BOOT_ID_BYTES: usize = 36;
const PAGE_BYTES: u64 = 4096;
const NAME_BYTES_MAX: usize = 1023;
const BITMAPS_MAX: usize = 65535;
/// The maximum size of a bitmap of a qcow2 image, in bytes.
const BITMAP_BYTES_MAX: u64 = 512 << 20;
/// An extent of the log covers 4 MiB, or more if the disk would have too many of them.
const EXTENT_BITS_MIN: u32 = 22;
const EXTENTS_MAX: u64 = 1 << 20;

/// Identifies a session of an image; its sidecar has the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uuid: [u8; 16],
    pub(crate) generation: u64,
}

/// The properties of an image file by which changes are recognised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) inode: u64,
    /// Length in bytes; writes never make a file shorter.
    pub(crate) length: u64,
    /// Modification time, nanoseconds since 1970; 0 if the file's clock is not ours.
    pub(crate) modified: u64,
    /// CRC-32 of the parts of the image's header that are not changed while it is open.
    pub(crate) header_crc: u32,
}

/// A bitmap that records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BitmapDescriptor {
    pub(crate) name: Vec<u8>,
    pub(crate) granularity_bits: u32,
    pub(crate) bit_count: u64,
}

impl BitmapDescriptor {
    pub(crate) fn word_count(&self) -> u64 {
        self.bit_count.div_ceil(64)
    }
}

/// The capacity of the activity log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogShape {
    /// The size of an extent in bytes, as a power of two.
    pub(crate) extent_bits: u32,
    pub(crate) slots: usize,
}

impl LogShape {
    /// The default capacity: 1200 extents of 4 MiB.
    pub(crate) fn for_disk(size: u64) -> Self {
        let mut extent_bits = EXTENT_BITS_MIN;
        while size.div_ceil(1 << extent_bits) > EXTENTS_MAX {
            extent_bits += 1;
        }
        Self { extent_bits, slots: SLOTS_MAX }
    }

    pub(super) fn is_possible(self, disk_size: u64) -> bool {
        (9..=43).contains(&self.extent_bits)
            && disk_size.div_ceil(1 << self.extent_bits) <= EXTENTS_MAX
            && (1..=SLOTS_MAX).contains(&self.slots)
    }
}

/// Everything in a sidecar except bits and log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) durability: BitmapDurability,
    pub(crate) identity: Identity,
    /// Distinguishes the files of one session.
    pub(crate) epoch: u64,
    pub(crate) disk_size: u64,
    pub(crate) log: LogShape,
    /// Empty if unknown: then it never equals another one.
    pub(crate) boot_id: String,
    pub(crate) image: Fingerprint,
    pub(crate) bitmaps: Vec<BitmapDescriptor>,
}

/// The offsets of the parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) word_offsets: Vec<u64>,
    pub(super) length: u64,
}

impl Layout {
    /// `None` if the bitmaps are too many or too large, or do not belong to the disk.
    pub(super) fn of(description: &Description) -> Option<Self> {
        let bitmaps = &description.bitmaps;
        let descriptors = (bitmaps.len() * DESCRIPTOR_BYTES) as u64;
        let mut end = DESCRIPTORS_OFFSET + descriptors.next_multiple_of(PAGE_BYTES);
        let mut word_offsets = Vec::new();
        for bitmap in bitmaps {
            let bytes = bitmap.word_count().checked_mul(8)?;
            let is_possible = (9..=31).contains(&bitmap.granularity_bits)
                && bitmap.name.len() <= NAME_BYTES_MAX
                && bytes <= BITMAP_BYTES_MAX
                && bitmap.bit_count == description.disk_size.div_ceil(1 << bitmap.granularity_bits);
            if !is_possible {
                return None;
            }
            word_offsets.push(end);
            end = end.checked_add(bytes.next_multiple_of(PAGE_BYTES))?;
        }
        (bitmaps.len() <= BITMAPS_MAX).then_some(Self { word_offsets, length: end })
    }
}

/// The header, to be written at offset 0.
pub(super) fn encode_header(description: &Description, length: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let mut put = |offset: usize, field: &[u8]| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0, &MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(12, &level_number(description.durability).to_le_bytes());
    put(16, &description.identity.uuid);
    put(32, &description.identity.generation.to_le_bytes());
    put(40, &description.epoch.to_le_bytes());
    put(48, &description.disk_size.to_le_bytes());
    put(56, &description.log.extent_bits.to_le_bytes());
    put(60, &(description.log.slots as u32).to_le_bytes());
    let boot_id = description.boot_id.as_bytes();
    if boot_id.len() == BOOT_ID_BYTES {
        put(64, boot_id);
    }
    put(100, &(description.bitmaps.len() as u32).to_le_bytes());
    put(104, &description.image.inode.to_le_bytes());
    put(112, &description.image.length.to_le_bytes());
    put(120, &description.image.modified.to_le_bytes());
    put(128, &description.image.header_crc.to_le_bytes());
    put(132, &crc32fast::hash(&encode_descriptors(description)).to_le_bytes());
    put(136, &length.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The descriptors, to be written at [`DESCRIPTORS_OFFSET`].
pub(super) fn encode_descriptors(description: &Description) -> Vec<u8> {
    let mut bytes = Vec::new();
    for bitmap in &description.bitmaps {
        let end = bytes.len() + DESCRIPTOR_BYTES;
        bytes.extend(bitmap.granularity_bits.to_le_bytes());
        bytes.extend((bitmap.name.len() as u32).to_le_bytes());
        bytes.extend(bitmap.bit_count.to_le_bytes());
        bytes.extend(&bitmap.name);
        bytes.resize(end, 0);
    }
    bytes
}

/// The damage of a header or of descriptors, as a clause.
pub(super) type Damage = &'static str;

/// The header's fields; `bitmaps` is still empty. Also returns the number of bitmaps, the CRC-32 of
/// their descriptors, and the length that the file must have.
pub(super) fn decode_header(bytes: &[u8]) -> Result<(Description, usize, u32, u64), Damage> {
    if bytes.len() < HEADER_BYTES || bytes[..8] != MAGIC {
        return Err("it has no header");
    }
    if crc32fast::hash(&bytes[..HEADER_BYTES - 4]) != u32_at(bytes, HEADER_BYTES - 4) {
        return Err("the checksum of its header is wrong");
    }
    if u32_at(bytes, 8) != VERSION {
        return Err("it was written by another version of this program");
    }
    let durability = match u32_at(bytes, 12) {
        1 => BitmapDurability::ProcessDeath,
        2 => BitmapDurability::PowerLoss,
        _ => return Err("its level does not exist"),
    };
    let disk_size = u64_at(bytes, 48);
    let count = u32_at(bytes, 100) as usize;
    let log = LogShape { extent_bits: u32_at(bytes, 56), slots: u32_at(bytes, 60) as usize };
    let is_possible =
        disk_size <= i64::MAX as u64 && log.is_possible(disk_size) && count <= BITMAPS_MAX;
    if !is_possible {
        return Err("its header contradicts itself");
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&bytes[16..32]);
    let boot_id = std::str::from_utf8(&bytes[64..64 + BOOT_ID_BYTES]).unwrap_or_default();
    let description = Description {
        durability,
        identity: Identity { uuid, generation: u64_at(bytes, 32) },
        epoch: u64_at(bytes, 40),
        disk_size,
        log,
        boot_id: boot_id.trim_end_matches('\0').to_owned(),
        image: Fingerprint {
            inode: u64_at(bytes, 104),
            length: u64_at(bytes, 112),
            modified: u64_at(bytes, 120),
            header_crc: u32_at(bytes, 128),
        },
        bitmaps: Vec::new(),
    };
    Ok((description, count, u32_at(bytes, 132), u64_at(bytes, 136)))
}

/// Decodes the descriptors.
pub(super) fn decode_descriptors(bytes: &[u8], crc: u32) -> Result<Vec<BitmapDescriptor>, Damage> {
    if crc32fast::hash(bytes) != crc {
        return Err("the checksum of its list of bitmaps is wrong");
    }
    let one = |bytes: &[u8]| {
        let name = bytes[16..].get(..u32_at(bytes, 4) as usize)?;
        Some(BitmapDescriptor {
            name: name.to_vec(),
            granularity_bits: u32_at(bytes, 0),
            bit_count: u64_at(bytes, 8),
        })
    };
    let bitmaps: Option<Vec<_>> = bytes.chunks_exact(DESCRIPTOR_BYTES).map(one).collect();
    bitmaps.ok_or("a bitmap's name is too long")
}

/// One slot of the log.
pub(super) fn encode_slot(sequence: u64, epoch: u64, extents: &[u32]) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[4..8].copy_from_slice(&(extents.len() as u32).to_le_bytes());
    bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
    bytes[16..24].copy_from_slice(&epoch.to_le_bytes());
    for (field, extent) in bytes[32..].chunks_exact_mut(4).zip(extents) {
        field.copy_from_slice(&extent.to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The extents that a slot names.
pub(super) fn decode_slot(bytes: &[u8], epoch: u64) -> Result<Vec<u32>, Damage> {
    if bytes.len() != SLOT_BYTES || crc32fast::hash(&bytes[4..]) != u32_at(bytes, 0) {
        return Err("the checksum of a slot of its log is wrong");
    }
    let count = u32_at(bytes, 4) as usize;
    if count > SLOT_EXTENTS || u64_at(bytes, 16) != epoch {
        return Err("a slot of its log does not belong to it");
    }
    Ok(bytes[32..].chunks_exact(4).take(count).map(|field| u32_at(field, 0)).collect())
}

fn level_number(durability: BitmapDurability) -> u32 {
    match durability {
        BitmapDurability::CleanClose => 0,
        BitmapDurability::ProcessDeath => 1,
        BitmapDurability::PowerLoss => 2,
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes.get(offset..offset + 4);
    field.and_then(|field| field.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes.get(offset..offset + 8);
    field.and_then(|field| field.try_into().ok()).map_or(0, u64::from_le_bytes)
}
