//! Images of VMware: the bytes are those of a sparse extent or of a descriptor.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Format, Image, OpenOptions, OpenPolicy, Storage};

use super::foreign::{LENGTH_MAX, foreign};
use super::look;

/// The size of a grain, and how many a table has.
pub(crate) const GRAIN: usize = 4096;
const ENTRIES: usize = 4;
const SECTOR: usize = 512;

/// An image of VMware: a descriptor, or a sparse extent with a descriptor or one that is named by
/// one.
pub(crate) fn vmdk(data: &[u8]) {
    foreign(Format::Vmdk, data);
    if data.len() > LENGTH_MAX || data.starts_with(b"#") {
        return;
    }
    let storage = Arc::new(MemoryStorage::from_bytes(data));
    let opener = move |_: &str| Ok(Arc::clone(&storage) as Arc<dyn Storage>);
    let options = OpenOptions::new()
        .format(Format::Vmdk)
        .policy(OpenPolicy::deny().allow_scheme("part", Arc::new(opener)));
    let descriptor =
        b"# Disk DescriptorFile\nversion=1\nRW 40 SPARSE \"part:\"\nRW 3 FLAT \"part:\" 0\n";
    let descriptor = Arc::new(MemoryStorage::from_bytes(descriptor));
    if let Ok(image) = Image::from_storage(descriptor, &options) {
        look(&image);
    }
}

/// The seeds of the target: sound images.
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let table = [0, 2, 1, 0, 0, 0, 0, 0, 3, 0, 2];
    let descriptor = "# Disk DescriptorFile\nversion=1\nencoding=\"windows-1252\"\nCID=0000000a\n\
                      parentCID=0000000b\nparentFileNameHint=\"C:\\a b.vmdk\"\n\
                      createType=\"custom\"\nRW 9 ZERO\nRDONLY 5 ZERO\nNOACCESS 3 FLAT \"a \"b\".vmdk\" 7\n";
    vec![
        ("vmdk", "sparse", hosted(&Hosted { flags: 0b101, ..Hosted::new(&table) })),
        ("vmdk", "redundant", hosted(&Hosted { flags: 0b111, ..Hosted::new(&table) })),
        (
            "vmdk",
            "compressed",
            hosted(&Hosted { flags: COMPRESSED, ..Hosted::new(&[2, 0, 0, 2, 3]) }),
        ),
        (
            "vmdk",
            "stream",
            hosted(&Hosted { flags: COMPRESSED, at_end: true, ..Hosted::new(&[0, 0, 2, 3]) }),
        ),
        ("vmdk", "descriptor", descriptor.into()),
        ("vmdk", "cowd", cowd(&[0, 2, 3, 0, 4])),
        ("vmdk", "space_efficient", space_efficient(&[0, 2, 1, 3, 4])),
    ]
}

/// Grains are compressed and have markers.
pub(crate) const COMPRESSED: u32 = 0b11 << 16 | 1;

/// What a hosted sparse extent is made of.
pub(crate) struct Hosted<'h> {
    pub(crate) flags: u32,
    /// What is in each grain: 0 nothing, 1 zeroes by an entry of the table, otherwise bytes of that
    /// value.
    pub(crate) grains: &'h [u8],
    /// The directory is named by a footer.
    pub(crate) at_end: bool,
    pub(crate) descriptor: String,
}

impl<'h> Hosted<'h> {
    pub(crate) fn new(grains: &'h [u8]) -> Self {
        let descriptor = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                          createType=\"monolithicSparse\"\nRW 88 SPARSE \"disk.vmdk\"\n";
        Self { flags: 1, grains, at_end: false, descriptor: descriptor.into() }
    }
}

/// What a grain of a value has: that at the start of each sector.
pub(crate) fn grain_of(value: u8) -> Vec<u8> {
    let mut grain = vec![0; GRAIN];
    grain.iter_mut().step_by(SECTOR).for_each(|byte| *byte = value);
    grain
}

/// Makes a sparse extent with its descriptor.
pub(crate) fn hosted(parts: &Hosted<'_>) -> Vec<u8> {
    let Hosted { flags, grains, at_end, descriptor } = parts;
    let mut image = vec![0; 3 * SECTOR];
    image[SECTOR..SECTOR + descriptor.len()].copy_from_slice(descriptor.as_bytes());
    let tables = grains.len().div_ceil(ENTRIES);
    let mut entries = vec![0u32; tables * ENTRIES];
    for (number, value) in grains.iter().enumerate() {
        if *value < 2 {
            entries[number] = u32::from(*value);
            continue;
        }
        entries[number] = (image.len() / SECTOR) as u32;
        let grain = grain_of(*value);
        if flags & (1 << 16) == 0 {
            image.extend(grain);
        } else {
            let stream = zlib(&grain);
            image.extend((number as u64 * (GRAIN / SECTOR) as u64).to_le_bytes());
            image.extend((stream.len() as u32).to_le_bytes());
            image.extend(stream);
            fill(&mut image);
        }
    }
    let mut directories = [0u64; 2];
    for place in directories.iter_mut().take(if flags & 2 == 0 { 1 } else { 2 }) {
        let mut directory = vec![];
        for table in entries.chunks(ENTRIES) {
            let is_there = table.iter().any(|entry| *entry != 0);
            directory
                .extend((if is_there { image.len() / SECTOR } else { 0 } as u32).to_le_bytes());
            if is_there {
                image.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
                fill(&mut image);
            }
        }
        *place = (image.len() / SECTOR) as u64;
        image.extend(directory);
        fill(&mut image);
    }
    let header = header(parts, directories);
    image[..SECTOR].copy_from_slice(&header);
    if *at_end {
        image[56..64].fill(0xff);
        let mut marker = [0; SECTOR];
        marker[12] = 3;
        image.extend(marker);
        image.extend(header);
        image.extend([0; SECTOR]);
    }
    image
}

fn header(parts: &Hosted<'_>, [directory, redundant]: [u64; 2]) -> [u8; SECTOR] {
    let mut header = [0; SECTOR];
    let mut put = |offset: usize, bytes: &[u8]| {
        header[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"KDMV");
    put(4, &1u32.to_le_bytes());
    put(8, &parts.flags.to_le_bytes());
    for (offset, number) in [
        (12, (parts.grains.len() * GRAIN / SECTOR) as u64),
        (20, (GRAIN / SECTOR) as u64),
        (28, 1),
        (36, 2),
        (48, redundant),
        (56, directory),
        (64, 3),
    ] {
        put(offset, &number.to_le_bytes());
    }
    put(44, &(ENTRIES as u32).to_le_bytes());
    put(73, b"\n \r\n");
    put(77, &u16::from(parts.flags & (1 << 16) != 0).to_le_bytes());
    header
}

/// Fills up a sector.
fn fill(image: &mut Vec<u8>) {
    image.resize(image.len().next_multiple_of(SECTOR), 0);
}

/// A stream of one block that is not compressed.
pub(crate) fn zlib(bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u16;
    let mut stream = vec![0x78, 0x01, 1];
    stream.extend(length.to_le_bytes());
    stream.extend((!length).to_le_bytes());
    stream.extend(bytes);
    let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (b + a) % 65521)
    });
    stream.extend((b << 16 | a).to_be_bytes());
    stream
}

/// A `COWD` extent with one table; grains as [`hosted`] has them.
pub(crate) fn cowd(grains: &[u8]) -> Vec<u8> {
    let mut image = vec![0; (1 + 4096 * 4 / SECTOR + 1) * SECTOR];
    image[..4].copy_from_slice(b"COWD");
    let fields = [1, 3, (grains.len() * GRAIN / SECTOR) as u32, (GRAIN / SECTOR) as u32, 1, 1];
    for (place, field) in image[4..28].chunks_exact_mut(4).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    image[SECTOR..SECTOR + 4].copy_from_slice(&2u32.to_le_bytes());
    for (number, value) in grains.iter().enumerate().filter(|(_, value)| **value > 1) {
        let sector = (image.len() / SECTOR) as u32;
        image[2 * SECTOR + number * 4..][..4].copy_from_slice(&sector.to_le_bytes());
        image.extend(grain_of(*value));
    }
    image
}

/// A space-efficient extent with one table, whose number is 1; of its grains the first are as
/// [`hosted`] has them.
pub(crate) fn space_efficient(grains: &[u8]) -> Vec<u8> {
    const TABLE: usize = 4096 * 8;
    let (volatile, directory, tables) = (SECTOR, 2 * SECTOR, 3 * SECTOR);
    let start = tables + 2 * TABLE;
    let mut image = vec![0; start];
    let mut put = |offset: usize, number: u64| {
        image[offset..offset + 8].copy_from_slice(&number.to_le_bytes());
    };
    put(0, 0xcafe_babe);
    put(8, 0x2_0000_0001);
    put(16, (grains.len() * GRAIN / SECTOR) as u64);
    put(24, 8);
    put(32, 64);
    for (field, place) in [(80, volatile), (128, directory), (144, tables), (192, start)] {
        put(field, (place / SECTOR) as u64);
        put(field + 8, 1);
    }
    put(volatile, 0xcafe_cafe);
    put(directory, 0x1000_0000 << 32 | 1);
    let stored = grains.iter().scan(0, |next, value| {
        let number = *next;
        *next += u64::from(*value > 1);
        Some(number)
    });
    for (place, (value, number)) in grains.iter().zip(stored).enumerate() {
        let entry = match value {
            0 => 0,
            1 => 2 << 60,
            _ => 3 << 60 | (number & 0xfff) << 48 | number >> 12,
        };
        put(tables + TABLE + place * 8, entry);
    }
    image.extend(grains.iter().filter(|value| **value > 1).flat_map(|value| grain_of(*value)));
    image
}
