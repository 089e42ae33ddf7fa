//! Where the metadata of a qcow2 image lies: every word that points somewhere, and every kind of
//! cluster that it could point to.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
pub const DIRTY: u8 = 1;

/// A word of 64 bits that says where something is.
#[derive(Clone, Debug)]
pub struct Pointer {
    pub name: String,
    /// Where it lies in the file.
    pub place: usize,
    /// The bits of it that are the offset.
    pub mask: u64,
}

/// The structure of a sound image.
#[derive(Debug, Default)]
pub struct Structure {
    pub cluster: u64,
    pub pointers: Vec<Pointer>,
    /// One cluster or more of each kind: what it is, and where.
    pub clusters: Vec<(String, u64)>,
    /// Where the fields of the header and the tables lie: start and end.
    pub tables: Vec<(String, usize, usize)>,
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |word| u64::from_be_bytes(word.try_into().unwrap()))
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |word| u32::from_be_bytes(word.try_into().unwrap()))
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    bytes
        .get(at..at + 2)
        .map_or(0, |word| usize::from(u16::from_be_bytes(word.try_into().unwrap())))
}

impl Structure {
    pub fn of(bytes: &[u8]) -> Self {
        let mut found = Self { cluster: 1 << u32_at(bytes, 20), ..Self::default() };
        let is_v3 = u32_at(bytes, 4) >= 3;
        found.table("header", 0, if is_v3 { 112 } else { 72 });
        found.clusters.push(("the header".into(), 0));
        let entry_bytes = if is_v3 && u64_at(bytes, 72) & 1 << 4 != 0 { 16 } else { 8 };
        found.point("header: L1 table", 40, u64::MAX);
        found.tree(bytes, "L1", u64_at(bytes, 40), u32_at(bytes, 36), entry_bytes);
        found.refcounts(bytes);
        if u32_at(bytes, 60) > 0 {
            found.snapshots(bytes, entry_bytes);
        }
        if is_v3 {
            found.bitmaps(bytes);
        }
        let end = (bytes.len() as u64).next_multiple_of(found.cluster);
        found.clusters.push(("just behind the end".into(), end));
        found.clusters.push(("far behind the end".into(), end + 1000 * found.cluster));
        found
    }

    fn point(&mut self, name: impl Into<String>, place: usize, mask: u64) {
        self.pointers.push(Pointer { name: name.into(), place, mask });
    }

    fn table(&mut self, name: &str, start: usize, length: usize) {
        self.tables.push((name.into(), start, start + length));
    }

    /// The first pointers of a kind are enough, and the last.
    fn is_listed(&self, name: &str) -> bool {
        self.pointers.iter().filter(|pointer| pointer.name == name).count() < 2
    }

    fn tree(&mut self, bytes: &[u8], name: &str, offset: u64, entries: u32, entry_bytes: usize) {
        self.table(name, offset as usize, entries as usize * 8);
        self.clusters.push((format!("the table {name}"), offset));
        for index in 0..entries as usize {
            let place = offset as usize + index * 8;
            let table = u64_at(bytes, place) & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            self.point(format!("{name} entry"), place, OFFSET_MASK);
            self.clusters.push((format!("an L2 table of {name}"), table));
            self.table(&format!("L2 of {name}"), table as usize, self.cluster as usize);
            self.entries(bytes, name, table as usize, entry_bytes);
        }
    }

    fn entries(&mut self, bytes: &[u8], name: &str, table: usize, entry_bytes: usize) {
        for place in (table..table + self.cluster as usize).step_by(entry_bytes) {
            let word = u64_at(bytes, place);
            if word & !COPIED == 0 {
                continue;
            }
            let (kind, mask, offset) = if word & COMPRESSED != 0 {
                let mask = (1 << (70 - self.cluster.trailing_zeros())) - 1;
                ("compressed cluster", mask, word & mask & !(self.cluster - 1))
            } else if word & 1 != 0 && entry_bytes == 8 {
                ("zero cluster", OFFSET_MASK, 0)
            } else {
                ("data cluster", OFFSET_MASK, word & OFFSET_MASK)
            };
            let pointer = format!("{name}: L2 entry of a {kind}");
            let target = format!("a {kind} of {name}");
            if self.is_listed(&pointer) {
                self.point(pointer, place, mask);
            }
            let known = self.clusters.iter().filter(|(what, _)| *what == target).count();
            if offset != 0 && known < 2 && !self.clusters.iter().any(|(_, at)| *at == offset) {
                self.clusters.push((target, offset));
            }
        }
    }

    fn refcounts(&mut self, bytes: &[u8]) {
        self.point("header: refcount table", 48, u64::MAX);
        let table = u64_at(bytes, 48);
        self.clusters.push(("the refcount table".into(), table));
        self.table("refcount table", table as usize, self.cluster as usize);
        let length = u64::from(u32_at(bytes, 56)) * self.cluster;
        for place in (table..table + length).step_by(8) {
            let block = u64_at(bytes, place as usize);
            let is_first = place == table;
            if block != 0 || (is_first || place == table + 8) {
                self.point("refcount table entry", place as usize, !511);
            }
            if block != 0 {
                self.clusters.push(("a refcount block".into(), block));
                self.table("refcount block", block as usize, self.cluster as usize);
            }
        }
    }

    fn snapshots(&mut self, bytes: &[u8], entry_bytes: usize) {
        let table = u64_at(bytes, 64) as usize;
        self.point("header: snapshot table", 64, u64::MAX);
        self.clusters.push(("the snapshot table".into(), table as u64));
        self.point("snapshot table: L1 table", table, u64::MAX);
        let mut at = table;
        for number in 0..u32_at(bytes, 60) {
            let names = u16_at(bytes, at + 12) + u16_at(bytes, at + 14);
            let length = 40 + u32_at(bytes, at + 36) as usize + names;
            let name = format!("snapshot {number}'s L1");
            self.tree(bytes, &name, u64_at(bytes, at), u32_at(bytes, at + 8), entry_bytes);
            at += length.next_multiple_of(8);
        }
        self.table("snapshot table", table, at - table);
    }

    fn bitmaps(&mut self, bytes: &[u8]) {
        let mut at = u32_at(bytes, 100) as usize;
        while at < self.cluster as usize && u32_at(bytes, at) != 0 {
            let length = u32_at(bytes, at + 4) as usize;
            if u32_at(bytes, at) == 0x2385_2875 {
                self.point("header extension: bitmap directory", at + 24, u64::MAX);
                self.table("bitmap extension", at, 32);
                let directory = u64_at(bytes, at + 24) as usize;
                self.clusters.push(("the bitmap directory".into(), directory as u64));
                self.directory(bytes, directory, u64_at(bytes, at + 16) as usize);
            }
            at += 8 + length.next_multiple_of(8);
        }
    }

    fn directory(&mut self, bytes: &[u8], directory: usize, length: usize) {
        self.table("bitmap directory", directory, length);
        let mut at = directory;
        while at < directory + length {
            self.point("bitmap directory: table", at, u64::MAX);
            let table = u64_at(bytes, at);
            self.clusters.push(("a bitmap's table".into(), table));
            for index in 0..u32_at(bytes, at + 8) as usize {
                let place = table as usize + index * 8;
                let bits = u64_at(bytes, place) & OFFSET_MASK;
                if bits != 0 {
                    self.point("bitmap table: bits", place, OFFSET_MASK);
                    self.clusters.push(("a bitmap's bits".into(), bits));
                }
            }
            let names = u16_at(bytes, at + 18) + u32_at(bytes, at + 20) as usize;
            at += (24 + names).next_multiple_of(8);
        }
    }
}

/// The image with one word aimed elsewhere.
pub fn aim(bytes: &[u8], pointer: &Pointer, target: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let word = u64_at(&bytes, pointer.place) & !pointer.mask | target & pointer.mask;
    if pointer.place + 8 <= bytes.len() {
        bytes[pointer.place..pointer.place + 8].copy_from_slice(&word.to_be_bytes());
    }
    bytes
}
