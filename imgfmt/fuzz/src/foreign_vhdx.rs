//! Images of Hyper-V. They are megabytes long and most of that is nothing, so the bytes are those
//! of its structures, one after the other, and the checksums are made right.

use imgfmt::Format;

use super::foreign;

pub(crate) const MIB: usize = 1 << 20;

/// Where the structures are in the file. What lies from `DATA` on begins with the number of its
/// MiB.
const LOG: usize = MIB;
pub(crate) const BAT: usize = 2 * MIB;
const METADATA: usize = 3 * MIB;
const ITEMS: usize = METADATA + (64 << 10);
pub(crate) const DATA: usize = 4 * MIB;
const BITMAP: usize = 6 * MIB;
const END: usize = 7 * MIB;

/// Entry of the table of blocks for the first bitmap, with sectors of 512 bytes and blocks of 1
/// MiB.
const BITMAP_ENTRY: usize = 4096;

/// States of blocks.
pub(crate) const ZERO: u64 = 2;
pub(crate) const PRESENT: u64 = 6;
pub(crate) const PARTIAL: u64 = 7;

const BAT_GUID: &[u8] = b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
const METADATA_GUID: &[u8] = b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const VHDX_PARENT: &[u8] = b"\xb7\xef\x4a\xb0\x9e\xd1\x81\x4a\xb7\x89\x25\xb8\xe9\x44\x59\x13";

/// GUIDs, offsets in `ITEMS` and lengths.
const ITEM_TABLE: [(&[u8], u32, u32); 6] = [
    (b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b", 0, 8),
    (b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8", 8, 8),
    (b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f", 16, 4),
    (b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56", 20, 4),
    (b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46", 24, 16),
    (b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c", 64, 400),
];

/// The log GUID of images whose log is to be replayed.
pub(crate) const LOG_GUID: [u8; 16] = [0xa5; 16];

/// The structures of an image.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) header: [u8; 96],
    pub(crate) regions: [u8; 144],
    pub(crate) table: [u8; 256],
    pub(crate) items: [u8; 512],
    /// The last entry is that of the first bitmap.
    pub(crate) bat: [u8; 33 * 8],
    pub(crate) bitmap: [u8; 64],
    pub(crate) log: Vec<u8>,
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

impl Parts {
    /// A sound image with blocks of 1 MiB in these states.
    pub(crate) fn new(size: u64, sector: u32, blocks: &[u64]) -> Self {
        let mut parts = Self {
            header: [0; 96],
            regions: [0; 144],
            table: [0; 256],
            items: [0; 512],
            bat: [0; 33 * 8],
            bitmap: [0; 64],
            log: Vec::new(),
        };
        put(&mut parts.header, 0, b"head");
        put(&mut parts.header, 8, &5u64.to_le_bytes());
        put(&mut parts.header, 32, &[0x5a; 16]);
        put(&mut parts.header, 66, &1u16.to_le_bytes());
        put(&mut parts.header, 68, &(MIB as u32).to_le_bytes());
        put(&mut parts.header, 72, &(LOG as u64).to_le_bytes());
        put(&mut parts.regions, 0, b"regi");
        put(&mut parts.regions, 8, &2u32.to_le_bytes());
        for (entry, guid, offset) in [(16, BAT_GUID, BAT), (48, METADATA_GUID, METADATA)] {
            put(&mut parts.regions, entry, guid);
            put(&mut parts.regions, entry + 16, &(offset as u64).to_le_bytes());
            put(&mut parts.regions, entry + 24, &(MIB as u32).to_le_bytes());
            put(&mut parts.regions, entry + 28, &1u32.to_le_bytes());
        }
        put(&mut parts.table, 0, b"metadata");
        put(&mut parts.table, 10, &5u16.to_le_bytes());
        for (number, (guid, offset, length)) in ITEM_TABLE.iter().enumerate() {
            let entry = 32 + number * 32;
            put(&mut parts.table, entry, guid);
            put(&mut parts.table, entry + 16, &((ITEMS - METADATA) as u32 + offset).to_le_bytes());
            put(&mut parts.table, entry + 20, &length.to_le_bytes());
            put(&mut parts.table, entry + 24, &6u32.to_le_bytes());
        }
        put(&mut parts.items, 0, &(MIB as u32).to_le_bytes());
        put(&mut parts.items, 8, &size.to_le_bytes());
        put(&mut parts.items, 16, &sector.to_le_bytes());
        put(&mut parts.items, 20, &4096u32.to_le_bytes());
        for (number, state) in blocks.iter().enumerate() {
            put(&mut parts.bat, number * 8, &state.to_le_bytes());
        }
        parts
    }

    /// The same over a parent; the bits of a bitmap say which sectors it has.
    pub(crate) fn over(mut self, pairs: &[(&str, &str)], bitmap: &[u8]) -> Self {
        self.table[10] = 6;
        self.items[4] |= 2;
        put(&mut self.items, 64, VHDX_PARENT);
        self.items[64 + 18] = pairs.len() as u8;
        let mut end = 20 + 12 * pairs.len();
        for (number, (key, value)) in pairs.iter().enumerate() {
            for (field, text) in [(0, key), (1, value)] {
                let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let entry = 64 + 20 + 12 * number;
                put(&mut self.items, entry + field * 4, &(end as u32).to_le_bytes());
                put(&mut self.items, entry + 8 + field * 2, &(units.len() as u16).to_le_bytes());
                put(&mut self.items, 64 + end, &units);
                end += units.len();
            }
        }
        put(&mut self.bat, 32 * 8, &block(BITMAP, PRESENT).to_le_bytes());
        put(&mut self.bitmap, 0, bitmap);
        self
    }

    /// Appends an entry to the log: what is to be in 4 KiB of the file, or how many bytes are to be
    /// zero there.
    pub(crate) fn logged(
        mut self,
        sequence: u64,
        tail: u32,
        changes: &[(u64, Result<[u8; 4096], u64>)],
    ) -> Self {
        put(&mut self.header, 48, &LOG_GUID);
        let data: Vec<&[u8; 4096]> =
            changes.iter().filter_map(|(_, change)| change.as_ref().ok()).collect();
        let mut entry = vec![0; 4096 * (1 + data.len())];
        put(&mut entry, 0, b"loge");
        let length = entry.len() as u32;
        put(&mut entry, 8, &length.to_le_bytes());
        put(&mut entry, 12, &tail.to_le_bytes());
        put(&mut entry, 16, &sequence.to_le_bytes());
        put(&mut entry, 24, &(changes.len() as u32).to_le_bytes());
        put(&mut entry, 32, &LOG_GUID);
        put(&mut entry, 48, &(END as u64).to_le_bytes());
        put(&mut entry, 56, &(END as u64).to_le_bytes());
        for (number, (offset, change)) in changes.iter().enumerate() {
            let place = 64 + number * 32;
            match change {
                Ok(sector) => {
                    put(&mut entry, place, b"desc");
                    put(&mut entry, place + 4, &sector[4092..]);
                    put(&mut entry, place + 8, &sector[..8]);
                }
                Err(length) => {
                    put(&mut entry, place, b"zero");
                    put(&mut entry, place + 8, &length.to_le_bytes());
                }
            }
            put(&mut entry, place + 16, &offset.to_le_bytes());
            put(&mut entry, place + 24, &sequence.to_le_bytes());
        }
        for (number, sector) in data.iter().enumerate() {
            let place = 4096 * (1 + number);
            put(&mut entry, place, *sector);
            put(&mut entry, place, b"data");
            put(&mut entry, place + 4, &((sequence >> 32) as u32).to_le_bytes());
            put(&mut entry, place + 4092, &(sequence as u32).to_le_bytes());
        }
        self.log.extend(entry);
        self
    }

    /// The first 4 KiB of the table of blocks.
    pub(crate) fn bat_sector(&self) -> [u8; 4096] {
        let mut sector = [0; 4096];
        put(&mut sector, 0, &self.bat[..32 * 8]);
        sector
    }

    /// The bytes that the target is given.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let Self { header, regions, table, items, bat, bitmap, log } = self;
        [&header[..], regions, table, items, bat, bitmap, log].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut parts = Self::new(0, 0, &[]);
        let mut rest = bytes;
        let fixed: [&mut [u8]; 6] = [
            &mut parts.header,
            &mut parts.regions,
            &mut parts.table,
            &mut parts.items,
            &mut parts.bat,
            &mut parts.bitmap,
        ];
        for part in fixed {
            let length = part.len().min(rest.len());
            part[..length].copy_from_slice(&rest[..length]);
            rest = &rest[length..];
        }
        parts.log = rest[..rest.len().min(16 << 12)].to_vec();
        parts
    }

    /// The file.
    pub(crate) fn image(&self) -> Vec<u8> {
        let mut image = vec![0; END];
        put(&mut image, 0, b"vhdxfile");
        put(&mut image, 64 << 10, &self.header);
        seal(&mut image[64 << 10..][..4096]);
        put(&mut image, 192 << 10, &self.regions);
        seal(&mut image[192 << 10..][..64 << 10]);
        put(&mut image, METADATA, &self.table);
        put(&mut image, ITEMS, &self.items);
        let (blocks, bitmap) = self.bat.split_at(32 * 8);
        put(&mut image, BAT, blocks);
        put(&mut image, BAT + BITMAP_ENTRY * 8, bitmap);
        for place in (DATA..END).step_by(MIB) {
            image[place..place + MIB].iter_mut().step_by(512).for_each(|byte| {
                *byte = (place / MIB) as u8;
            });
        }
        put(&mut image, BITMAP, &[0; 4096]);
        put(&mut image, BITMAP, &self.bitmap);
        put(&mut image, LOG, &self.log);
        let mut place = LOG;
        while image[place..].starts_with(b"loge") && place < LOG + self.log.len() {
            let length: [u8; 4] = std::array::from_fn(|byte| image[place + 8 + byte]);
            let length = (u32::from_le_bytes(length) as usize).clamp(64, LOG + MIB - place);
            seal(&mut image[place..place + length]);
            place += length;
            if place + 64 > LOG + MIB {
                break;
            }
        }
        image
    }
}

/// An entry of the table of blocks.
pub(crate) fn block(offset: usize, state: u64) -> u64 {
    ((offset / MIB) as u64) << 20 | state
}

/// Sets the checksum of a structure, CRC-32C.
pub(crate) fn seal(structure: &mut [u8]) {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut bit = 0;
        while bit < 8 * 256 {
            let crc = if bit % 8 == 0 { bit as u32 / 8 } else { table[bit / 8] };
            table[bit / 8] = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
            bit += 1;
        }
        table
    };
    structure[4..8].fill(0);
    let mut crc = u32::MAX;
    for byte in &*structure {
        crc = crc >> 8 ^ TABLE[(crc as u8 ^ *byte) as usize];
    }
    structure[4..8].copy_from_slice(&(!crc).to_le_bytes());
}

/// An image of Hyper-V.
pub(crate) fn vhdx(data: &[u8]) {
    foreign::open(Format::Vhdx, &Parts::from_bytes(data).image());
}

/// The seeds of the target: sound images.
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let dynamic = [block(DATA, PRESENT), 0, ZERO, 1, 3, block(DATA + MIB, PRESENT)];
    let partial = [block(DATA, PARTIAL), 0, ZERO, block(DATA + MIB, PRESENT)];
    let linkage = ("parent_linkage", "{83ED0EC3-24C8-49A6-A959-5E4BF1288BFB}");
    let below = [linkage, ("relative_path", ".\\base.vhdx")];
    let size = 6 * MIB as u64 - 4096;
    let plain = Parts::new(size, 512, &dynamic);
    let mut fixed = plain.clone();
    fixed.items[4] = 1;
    let changed = Parts::new(size, 512, &[0, block(DATA, PRESENT)]).bat_sector();
    let logged = plain.clone().logged(7, 0, &[(BAT as u64, Ok(changed))]);
    let logged = logged.logged(8, 0, &[(DATA as u64, Err(4096))]);
    let child = Parts::new(size, 512, &partial).over(&below, &[0xf0, 0xff, 1, 0, 0x80]);
    vec![
        ("vhdx", "dynamic", plain.bytes()),
        ("vhdx", "fixed", fixed.bytes()),
        ("vhdx", "large_sectors", Parts::new(size, 4096, &dynamic).bytes()),
        ("vhdx", "differencing", child.bytes()),
        ("vhdx", "logged", logged.bytes()),
    ]
}
