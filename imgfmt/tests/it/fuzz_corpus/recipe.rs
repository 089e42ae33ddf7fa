//! The seeds of the corpus.

use super::bodies::bitmaps::entry;
use super::bodies::handmade::{COMPRESSED, COPIED, Handmade, field};
use super::bodies::{archives, foreign, foreign_vhdx, foreign_vmdk, luks};

type Seed = (&'static str, &'static str, Vec<u8>);

pub(super) fn seeds() -> Vec<Seed> {
    let mut seeds = headers();
    seeds.extend(walks());
    seeds.extend(counts());
    seeds.extend(streams());
    seeds.extend(operations());
    seeds.extend(bitmaps());
    seeds.extend(sidecars());
    seeds.extend(damaged());
    seeds.extend(foreign::seeds());
    seeds.extend(foreign_vmdk::seeds());
    seeds.extend(foreign_vhdx::seeds());
    seeds.extend(luks::seeds());
    seeds.extend(archives::seeds());
    seeds
}

/// The first 512 bytes of an image of the kind that the target makes.
fn header(change: impl FnOnce(&mut Handmade)) -> Vec<u8> {
    let mut image = Handmade::new(9, 1 << 15);
    change(&mut image);
    image.bytes[..512].to_vec()
}

fn headers() -> Vec<Seed> {
    let extension = |kind: u32, content: &'static [u8]| {
        header(move |image| {
            image.put32(field::EXTENSIONS, kind);
            image.put32(field::EXTENSIONS + 4, content.len() as u32);
            image.bytes[field::EXTENSIONS + 8..][..content.len()].copy_from_slice(content);
        })
    };
    let version_2 = header(|image| {
        image.put32(field::VERSION, 2);
        image.bytes[72..112].fill(0);
    });
    let backing = header(|image| {
        image.put64(field::BACKING_OFFSET, 400);
        image.put32(field::BACKING_LENGTH, 4);
        image.bytes[400..404].copy_from_slice(b"base");
        image.put32(field::EXTENSIONS, 0xe279_2aca);
        image.put32(field::EXTENSIONS + 4, 3);
        image.bytes[field::EXTENSIONS + 8..][..3].copy_from_slice(b"raw");
    });
    let snapshots = header(|image| {
        image.put32(field::SNAPSHOT_COUNT, 1);
        image.put64(field::SNAPSHOTS_OFFSET, 1024);
    });
    vec![
        ("header", "plain", header(|_| {})),
        ("header", "version_2", version_2),
        ("header", "backing_file", backing),
        ("header", "snapshots", snapshots),
        ("header", "data_file", extension(0x4441_5441, b"data.raw")),
        ("header", "feature_names", extension(0x6803_f857, &[b'x'; 96])),
        ("header", "bitmaps", extension(0x2385_2875, &[0; 24])),
        ("header", "unknown_extension", extension(0x1234_5678, b"something")),
        ("header", "zstd", header(|image| image.put64(field::INCOMPATIBLE, 1 << 3))),
        ("header", "dirty", header(|image| image.put64(field::INCOMPATIBLE, 1))),
        ("header", "autoclear", header(|image| image.put64(field::AUTOCLEAR, u64::MAX))),
    ]
}

fn words(choice: u8, words: &[u64]) -> Vec<u8> {
    let mut bytes = vec![choice];
    bytes.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    bytes
}

fn walks() -> Vec<Seed> {
    let data = |cluster: u64| COPIED | (5 * cluster);
    vec![
        ("l2_walk", "small", words(0, &[data(512), 1, data(512) | 1, 0, COMPRESSED | 2560])),
        ("l2_walk", "usual", words(1, &[data(4096), data(4096) + 4096, COMPRESSED | 20_480])),
        ("l2_walk", "subclusters", words(2, &[data(16_384), 0xffff, 0, 0xffff << 32])),
        ("l2_walk", "version_2", words(0x80, &[data(512), 0, 2560])),
        ("l2_walk", "l1", words(0x40, &[COPIED | 2048, data(512), 1])),
    ]
}

fn counts() -> Vec<Seed> {
    let mut sound = vec![0; 32];
    sound[..8].copy_from_slice(&1024u64.to_be_bytes());
    let mut free = sound.clone();
    for number in 0..6 {
        sound.extend(u16::to_be_bytes(if number < 6 { 1 } else { 0 }));
    }
    free.extend([0; 64]);
    vec![("refcounts", "sound", sound), ("refcounts", "all_free", free)]
}

fn streams() -> Vec<Seed> {
    // A stored block and a block of fixed codes of deflate, and a zstd frame of one repeated byte.
    let mut stored = vec![1, 0x00, 0x10, 0xff, 0xef];
    stored.extend([5; 4096]);
    let fixed = vec![0x63, 0x60, 0x60, 0x18, 0x05, 0xa3, 0x60, 0x14, 0x0c, 0x77, 0x00, 0x00];
    let zstd = vec![0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x0f, 0x4d, 0x00, 0x00, 0x10, 0x05, 0x05];
    vec![
        ("decompress", "stored", stored),
        ("decompress", "fixed", fixed),
        ("decompress", "zstd", zstd),
        ("decompress", "nothing", vec![0; 16]),
    ]
}

fn operations() -> Vec<Seed> {
    let mixed = |choice: u8| {
        let mut bytes = vec![choice];
        for step in 0..40u8 {
            let kind = (step.wrapping_mul(7) % 15) | ((step % 4) << 6);
            let place = u16::from(step).wrapping_mul(1_777).to_be_bytes();
            let length = u16::from(step).wrapping_mul(977).to_be_bytes();
            bytes.extend([kind, place[0], place[1], length[0], length[1]]);
        }
        bytes.extend([15, 0, 0, 0, 0]);
        bytes
    };
    vec![
        ("operations", "small_clusters", mixed(0)),
        ("operations", "usual_clusters", mixed(1)),
        ("operations", "subclusters", mixed(2)),
    ]
}

/// A directory, 64 bytes of a table, and bits.
fn bitmaps() -> Vec<Seed> {
    let with = |directory: &[Vec<u8>], table: u64| {
        let mut bytes = vec![directory.len() as u8, (directory.concat().len() / 8) as u8];
        bytes.extend(directory.concat());
        bytes.extend(table.to_be_bytes());
        bytes.extend([0; 56]);
        bytes.extend([0b1010_0101; 8]);
        bytes
    };
    const BITS: u64 = 8 * 512;
    let named = |name: u8, flags: u32| {
        let mut bytes = entry(flags);
        bytes[24] = name;
        bytes
    };
    let without_table = |name: u8| {
        let mut bytes = named(name, 2);
        bytes[..12].fill(0);
        bytes
    };
    let coarse = |bits: u8| {
        let mut bytes = entry(2);
        bytes[17] = bits;
        bytes
    };
    vec![
        ("bitmaps", "enabled", with(&[entry(2)], BITS)),
        ("bitmaps", "in_use", with(&[entry(3)], BITS)),
        ("bitmaps", "disabled", with(&[entry(0)], 1)),
        ("bitmaps", "shared", with(&[named(b'a', 2), named(b'b', 0)], BITS)),
        ("bitmaps", "same_name", with(&[entry(2), entry(2)], 0)),
        ("bitmaps", "too_short", with(&[without_table(b'a'), named(b'b', 2)], BITS)),
        ("bitmaps", "over_metadata", with(&[entry(2)], 512)),
        ("bitmaps", "over_itself", with(&[entry(2)], 7 * 512)),
        ("bitmaps", "coarse", with(&[coarse(31)], BITS)),
        ("bitmaps", "too_coarse", with(&[coarse(64)], BITS)),
    ]
}

/// Which checksums are right and so on; then what differs from a sound one.
fn sidecars() -> Vec<Seed> {
    let changed = |choice: u8, changes: &[(usize, u8)]| {
        let mut bytes = vec![0; 1 + 140 + 64 + 32 + 16];
        bytes[0] = choice;
        changes.iter().for_each(|(place, change)| bytes[1 + place] = *change);
        bytes
    };
    vec![
        ("sidecar", "same_boot", changed(0, &[])),
        ("sidecar", "other_boot", changed(8, &[])),
        ("sidecar", "lower_level", changed(16, &[])),
        ("sidecar", "lower_level_other_boot", changed(24, &[])),
        ("sidecar", "wrong_checksums", changed(7, &[(0, 1)])),
        ("sidecar", "cut_off", changed(32, &[(0, 200)])),
        ("sidecar", "many_bitmaps", changed(8, &[(101, 0xff)])),
        ("sidecar", "huge_disk", changed(8, &[(54, 0x7f)])),
        ("sidecar", "small_extents", changed(8, &[(56, 22 ^ 9)])),
        ("sidecar", "full_slot", changed(8, &[(140 + 4, 121)])),
        ("sidecar", "far_extent", changed(8, &[(140 + 35, 0xff)])),
        ("sidecar", "long_name", changed(0, &[(204 + 5, 4)])),
        ("sidecar", "many_bits", changed(0, &[(204 + 14, 0xff)])),
    ]
}

/// Images of every kind, not damaged, with operations; and some with a few words changed.
fn damaged() -> Vec<Seed> {
    let input = |choice: u8, changes: &[[u8; 4]]| {
        let mut bytes = vec![choice, changes.len() as u8];
        bytes.extend(changes.as_flattened());
        for operation in [0, 5, 8, 10, 11, 1, 13, 12, 14, 2, 15, 0] {
            bytes.extend([operation, operation, 3, 40, operation]);
        }
        bytes
    };
    vec![
        ("damaged", "plain", input(0, &[])),
        ("damaged", "version_2", input(1, &[])),
        ("damaged", "subclusters", input(2, &[])),
        ("damaged", "narrow_refcounts", input(3, &[])),
        ("damaged", "wide_refcounts", input(4, &[])),
        ("damaged", "repaired_plain", input(0x80, &[])),
        ("damaged", "repaired_subclusters", input(0x80 + 2, &[])),
        ("damaged", "repaired_shared", input(0x80, &[[0, 60, 5, 61], [0, 70, 5, 71]])),
        ("damaged", "repaired_narrow", input(0x80 + 3, &[[0, 40, 6, 1]])),
    ]
}
