//! Images of every kind, made by QEMU, with a few words changed.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod verdict;

use std::path::Path;

use crate::common::{Random, qemu, run, text};
use crate::structure::{OFFSET_MASK, Structure, u64_at};

/// Options of `qemu-img create`, the size of the disk, and whether there is a bitmap and a
/// snapshot.
pub const KINDS: [(&str, u64, bool, bool); 9] = [
    ("cluster_size=4096", 3 << 20, true, true),
    ("cluster_size=512", 96 << 10, true, true),
    ("cluster_size=65536", 4 << 20, false, true),
    ("cluster_size=4096,compat=0.10", 3 << 20, false, true),
    ("cluster_size=512,refcount_bits=1", 96 << 10, true, false),
    ("cluster_size=512,refcount_bits=64", 96 << 10, false, true),
    ("cluster_size=16384,extended_l2=on", 5 << 20, true, true),
    ("cluster_size=4096,refcount_bits=8", 3 << 20, true, false),
    ("cluster_size=4096,compression_type=zstd", 3 << 20, false, false),
];

/// A word of 64 bits that is another.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    pub place: usize,
    pub word: u64,
}

/// A sound image.
pub struct Base {
    pub name: String,
    pub bytes: Vec<u8>,
    pub structure: Structure,
    pub has_snapshot: bool,
    has_backing: bool,
}

impl Base {
    /// Makes an image of this kind; always the same one.
    pub fn make(directory: &Path, kind: usize) -> Self {
        let (options, size, has_bitmap, has_snapshot) = KINDS[kind];
        let path = directory.join("base.qcow2");
        let backing = directory.join("backing.raw");
        let _ = std::fs::remove_file(&path);
        std::fs::write(&backing, vec![0xbb; size as usize / 2]).unwrap();
        match kind {
            2 => qemu::create_overlay(&path, options, &backing, "raw", &size.to_string()),
            _ => qemu::create(&path, options, &size.to_string()),
        }
        let mut random = Random::seeded(kind as u64 + 77);
        let part = size / 8 / 4096 * 4096;
        let commands = |random: &mut Random, count| {
            let mut commands = Vec::new();
            for _ in 0..count {
                let offset = random.below(size / 512) * 512;
                let length = ((random.below(60) + 1) * 512).min(size - offset);
                commands.push(match random.below(6) {
                    0 => format!("write -z {offset} {length}"),
                    1 => format!("discard {offset} {length}"),
                    _ => format!("write -P {} {offset} {length}", random.below(255) + 1),
                });
            }
            commands
        };
        qemu::io(&path, "qcow2", &commands(&mut random, 12));
        // Where nothing is yet compressed clusters can be written.
        let cluster: u64 = 1 << crate::structure::u32_at(&std::fs::read(&path).unwrap(), 20);
        let place = (part * 3).next_multiple_of(cluster);
        qemu::io(&path, "qcow2", &[format!("discard {place} {}", cluster * 4)]);
        let _ = std::process::Command::new("qemu-io")
            .args([
                "-f",
                "qcow2",
                "-c",
                &format!("write -c -P 9 {place} {}", cluster * 2),
                text(&path),
            ])
            .output();
        if has_snapshot {
            run("qemu-img", &["snapshot", "-c", "one", text(&path)]);
            qemu::io(&path, "qcow2", &commands(&mut random, 5));
        }
        if has_bitmap {
            run("qemu-img", &["bitmap", "--add", "-g", "512", text(&path), "bits"]);
            qemu::io(&path, "qcow2", &commands(&mut random, 3));
        }
        let bytes = std::fs::read(&path).unwrap();
        let structure = Structure::of(&bytes);
        Self { name: options.into(), bytes, structure, has_snapshot, has_backing: kind == 2 }
    }

    /// One to four words of the tables, changed in ways in which words go wrong.
    pub fn damage(&self, random: &mut Random) -> Vec<Patch> {
        let count = random.below(4) + 1;
        (0..count).map(|_| self.damaged_word(random)).collect()
    }

    fn damaged_word(&self, random: &mut Random) -> Patch {
        let (_, start, end) =
            &self.structure.tables[random.below(self.structure.tables.len() as u64) as usize];
        // Mostly words that say something.
        let mut place = *start;
        for _ in 0..20 {
            place = start + random.below(((end - start) as u64).div_ceil(8)) as usize * 8;
            // Which file it names, and whether the name lies within the header, is not what a check
            // looks at.
            let names_backing = self.has_backing && ((8..24).contains(&place) || place == 96);
            if u64_at(&self.bytes, place) != 0 && !names_backing {
                break;
            }
        }
        let old = u64_at(&self.bytes, place);
        let clusters = self.bytes.len() as u64 / self.structure.cluster;
        let target = random.below(clusters + 3) * self.structure.cluster;
        let word = match random.below(7) {
            0 => old ^ 1 << random.below(64),
            1 => old & !OFFSET_MASK | target,
            2 => target,
            3 => old ^ random.below(256) << (8 * random.below(8)),
            4 => 0,
            5 => u64_at(&self.bytes, random.below(self.bytes.len() as u64 / 8) as usize * 8),
            _ => old
                .wrapping_add(random.below(3).wrapping_sub(1).wrapping_mul(self.structure.cluster)),
        };
        Patch { place, word }
    }

    pub fn patched(&self, patches: &[Patch]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for patch in patches.iter().filter(|patch| patch.place + 8 <= self.bytes.len()) {
            bytes[patch.place..patch.place + 8].copy_from_slice(&patch.word.to_be_bytes());
        }
        bytes
    }

    /// Which word a patch changes, and how.
    pub fn describe(&self, patch: &Patch) -> String {
        let tables = &self.structure.tables;
        let table = tables.iter().find(|(_, start, end)| (*start..*end).contains(&patch.place));
        let (name, start) = table.map_or(("?", 0), |(name, start, _)| (name.as_str(), *start));
        let old = u64_at(&self.bytes, patch.place);
        format!(
            "{name} +{} at {:#x}: {old:#x} -> {:#x}",
            patch.place - start,
            patch.place,
            patch.word
        )
    }
}
