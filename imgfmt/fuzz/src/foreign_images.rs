//! Small images of other programs' formats, made by hand as their specifications have them. Each
//! stored block begins with a byte of its own.

/// An image with blocks of 4 KiB: its type, the size of the disk, and the start of its table. The
/// first byte of a block is its number in the file, plus one.
pub(crate) fn vdi(kind: u32, size: u64, table: &[u32]) -> Vec<u8> {
    const BLOCK: usize = 4096;
    let blocks = size.div_ceil(BLOCK as u64) as usize;
    let stored = table.iter().filter(|entry| **entry < u32::MAX - 1).count();
    let mut image = vec![0; 1024 + stored * BLOCK];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"<<< a disk >>>\n");
    for (offset, field) in [
        (64, 0xbeda_107f),
        (68, 0x0001_0001),
        (72, 400),
        (76, kind),
        (340, 512),
        (344, 1024),
        (360, 512),
        (376, BLOCK as u32),
        (384, blocks as u32),
        (388, stored as u32),
    ] {
        put(offset, &u32::to_le_bytes(field));
    }
    put(368, &size.to_le_bytes());
    for block in 0..blocks {
        let entry = table.get(block).copied().unwrap_or(u32::MAX);
        put(512 + block * 4, &entry.to_le_bytes());
    }
    for block in 0..stored {
        put(1024 + block * BLOCK, &[block as u8 + 1]);
    }
    image
}

/// The footer of an image of a type with this size.
fn vhd_footer(kind: u32, size: u64, header: u64, uuid: u8) -> Vec<u8> {
    let mut footer = vec![0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[8..16].copy_from_slice(&[0, 0, 0, 2, 0, 1, 0, 0]);
    footer[16..24].copy_from_slice(&header.to_be_bytes());
    footer[28..32].copy_from_slice(b"win ");
    footer[40..48].copy_from_slice(&size.to_be_bytes());
    footer[48..56].copy_from_slice(&size.to_be_bytes());
    footer[60..64].copy_from_slice(&kind.to_be_bytes());
    footer[68..84].fill(uuid);
    seal(&mut footer, 64);
    footer
}

/// Sets the checksum at this place.
fn seal(bytes: &mut [u8], place: usize) {
    bytes[place..place + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[place..place + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A fixed image of this many bytes of 5.
pub(crate) fn vpc_fixed(size: u64) -> Vec<u8> {
    let mut image = vec![5; size as usize];
    image.extend(vhd_footer(2, size, u64::MAX, 1));
    image
}

/// A dynamic or differencing VHD with blocks of 4 KiB.
pub(crate) struct Vhd {
    kind: u32,
    size: u64,
    uuid: u8,
    parent: Option<(String, u8)>,
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Vhd {
    const BLOCK: u64 = 4096;

    pub(crate) fn new(kind: u32, size: u64) -> Self {
        Self { kind, size, uuid: 2, parent: None, blocks: Vec::new() }
    }

    /// The UUID consists of this byte.
    #[allow(dead_code)]
    pub(crate) fn uuid(self, uuid: u8) -> Self {
        Self { uuid, ..self }
    }

    /// Has a parent of this name, with the UUID of 1.
    pub(crate) fn over(self, name: &str) -> Self {
        Self { parent: Some((name.to_owned(), 1)), ..self }
    }

    /// Has a block whose sectors are filled with its number in the file, plus 0x40; the bitmap says
    /// which are there.
    pub(crate) fn block(mut self, number: u64, bitmap: &[u8]) -> Self {
        self.blocks.push((number, bitmap.to_vec()));
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let footer = vhd_footer(self.kind, self.size, 512, self.uuid);
        let blocks = self.size.div_ceil(Self::BLOCK) as usize;
        // The footer's copy, the header, the table, a name of the parent.
        let mut image = footer.clone();
        image.resize(2560, 0);
        let mut table = vec![0xff; blocks * 4];
        for (index, (number, bitmap)) in self.blocks.iter().enumerate() {
            let sector = (image.len() / 512) as u32;
            table[*number as usize * 4..][..4].copy_from_slice(&sector.to_be_bytes());
            let start = image.len();
            image.extend(bitmap);
            image.resize(start + 512, 0);
            image.resize(start + 512 + Self::BLOCK as usize, index as u8 + 0x40);
        }
        image[1536..1536 + table.len()].copy_from_slice(&table);
        let header = self.header(blocks as u32, &mut image);
        image[512..1536].copy_from_slice(&header);
        image.extend(footer);
        image
    }

    fn header(&self, blocks: u32, image: &mut [u8]) -> Vec<u8> {
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[8..16].fill(0xff);
        header[16..24].copy_from_slice(&1536_u64.to_be_bytes());
        header[24..28].copy_from_slice(&[0, 1, 0, 0]);
        header[28..32].copy_from_slice(&blocks.to_be_bytes());
        header[32..36].copy_from_slice(&(Self::BLOCK as u32).to_be_bytes());
        if let Some((name, uuid)) = &self.parent {
            header[40..56].fill(*uuid);
            let relative: Vec<u8> =
                format!(".\\{name}").encode_utf16().flat_map(u16::to_le_bytes).collect();
            header[576..580].copy_from_slice(b"W2ru");
            header[580..584].copy_from_slice(&512_u32.to_be_bytes());
            header[584..588].copy_from_slice(&(relative.len() as u32).to_be_bytes());
            header[592..600].copy_from_slice(&2048_u64.to_be_bytes());
            image[2048..2048 + relative.len()].copy_from_slice(&relative);
        }
        seal(&mut header, 36);
        header
    }
}

fn put(image: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if image.len() < offset + bytes.len() {
        image.resize(offset + bytes.len(), 0);
    }
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// A QED image with clusters of 4 KiB: the size of the disk and the start of its L2 table, which is
/// the third cluster; those it names begin with a 7.
pub(crate) fn qed(size: u64, table: &[u64], backing: Option<&str>) -> Vec<u8> {
    let mut image = b"QED\0".to_vec();
    for (offset, field) in [(4, 4096_u32), (8, 1), (12, 1)] {
        put(&mut image, offset, &field.to_le_bytes());
    }
    let features = if backing.is_some() { 1 | 4 } else { 0_u64 };
    for (offset, field) in [(16, features), (40, 4096), (48, size), (4096, 8192)] {
        put(&mut image, offset, &field.to_le_bytes());
    }
    if let Some(name) = backing {
        put(&mut image, 56, &64_u32.to_le_bytes());
        put(&mut image, 60, &(name.len() as u32).to_le_bytes());
        put(&mut image, 64, name.as_bytes());
    }
    put(&mut image, 12_287, &[0]);
    for (index, entry) in table.iter().enumerate() {
        put(&mut image, 8192 + index * 8, &entry.to_le_bytes());
        if *entry > 1 {
            put(&mut image, *entry as usize, &[7; 4096]);
        }
    }
    image
}

/// An image of the first version of qcow with clusters of 512 bytes: the size of the disk and the
/// start of its L2 table, which lies at 1024; those that are not compressed begin with an 8.
pub(crate) fn qcow(size: u64, table: &[u64], backing: Option<&str>) -> Vec<u8> {
    /// 512 bytes of 9, deflated.
    const STREAM: [u8; 12] = [0xe3, 0xe4, 0x1c, 0x05, 0xa3, 0x60, 0x14, 0x0c, 0x77, 0, 0, 0];
    let mut image = b"QFI\xfb\0\0\0\x01".to_vec();
    put(&mut image, 24, &size.to_be_bytes());
    put(&mut image, 32, &[9, 6]);
    put(&mut image, 40, &512_u64.to_be_bytes());
    if let Some(name) = backing {
        put(&mut image, 8, &48_u64.to_be_bytes());
        put(&mut image, 16, &(name.len() as u32).to_be_bytes());
        put(&mut image, 48, name.as_bytes());
    }
    put(&mut image, 512, &1024_u64.to_be_bytes());
    put(&mut image, 1535, &[0]);
    for (index, entry) in table.iter().enumerate() {
        put(&mut image, 1024 + index * 8, &entry.to_be_bytes());
        if *entry >> 63 == 1 {
            put(&mut image, (*entry & 0xffff_ffff) as usize, &STREAM);
        } else if *entry > 0 {
            put(&mut image, *entry as usize, &[8; 512]);
        }
    }
    image
}

/// A Parallels image with clusters of 4 KiB: its magic, the size of the disk and the start of its
/// table.
pub(crate) fn parallels(magic: &[u8; 16], size: u64, table: &[u32]) -> Vec<u8> {
    let mut image = magic.to_vec();
    let clusters = size.div_ceil(4096) as u32;
    let sectors = (size / 512) as u32;
    for (offset, field) in [(16, 2), (28, 8), (32, clusters), (36, sectors)] {
        put(&mut image, offset, &u32::to_le_bytes(field));
    }
    put(&mut image, 4095, &[0]);
    let unit = if magic.ends_with(b"Ext") { 4096 } else { 512 };
    for (index, entry) in table.iter().enumerate() {
        put(&mut image, 64 + index * 4, &entry.to_le_bytes());
        if *entry > 0 {
            put(&mut image, *entry as usize * unit, &[index as u8 + 1; 4096]);
        }
    }
    image
}
