//! VHDX: what only it has. Its log, parents, checksums; and images as QEMU makes them.

use std::path::Path;

use imgfmt::{
    BackingFile, Error, ErrorKind, ExtentKind, Format, FormatDetails, Image, OpenOptions, Repair,
};

use crate::bodies::foreign_vhdx::{
    BAT, DATA, MIB, PARTIAL, PRESENT, Parts, ZERO, block, seal, seeds, vhdx,
};
use crate::chains_vs_qemu::{Layer, compare_data, compare_parts};
use crate::common::{Random, all_extents, at, has_tool, qemu, range, run, text};

fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Vhdx)
}

fn write(directory: &Path, name: &str, image: &[u8]) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, image).unwrap();
    path
}

/// The first byte of each of the blocks of 1 MiB.
fn blocks(path: &Path) -> Vec<u8> {
    let image = Image::open(path, &options()).unwrap();
    (0..image.size().div_ceil(MIB as u64))
        .map(|block| {
            let mut byte = [0xee];
            image.read_at(at(block * MIB as u64), &mut byte).unwrap();
            byte[0]
        })
        .collect()
}

fn open_error(image: &[u8]) -> Error {
    let directory = tempfile::tempdir().unwrap();
    Image::open(write(directory.path(), "disk.vhdx", image), &options()).unwrap_err()
}

fn plain() -> Parts {
    let states = [block(DATA, PRESENT), 0, ZERO, 1, 3, block(DATA + MIB, PRESENT)];
    Parts::new(6 * MIB as u64 - 4096, 512, &states)
}

#[test]
fn random_images_are_read_as_qemu_does() {
    if !["qemu-img", "qemu-io"].into_iter().all(has_tool) {
        return;
    }
    let mut random = Random::new("vhdx");
    for kind in ["block_size=1M", "subformat=fixed", "block_size=2M,block_state_zero=off"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.vhdx");
        // QEMU writes whole MiB.
        let size = (random.below(30) + 2) * MIB as u64;
        run(
            "qemu-img",
            &["create", "-q", "-f", "vhdx", "-o", kind, text(&path), &size.to_string()],
        );
        let commands: Vec<String> = (0..12)
            .map(|_| {
                let offset = random.below(size / 512) * 512;
                let length = ((random.below(300) + 1) * 512).min(size - offset);
                format!("write -P {} {offset} {length}", random.below(255) + 1)
            })
            .collect();
        qemu::io(&path, "vhdx", &commands);
        let layer = Layer { path: path.clone(), format: "vhdx", size, how: kind.into() };
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        assert_eq!((image.format(), image.size()), (Format::Vhdx, size), "{kind}");
        compare_data(&image, &layer, &mut random, kind);
        compare_parts(&image, &mut random, kind);
        // QEMU tells no holes of this format; what is one reads as zero.
        let content = qemu::content(&path, "vhdx");
        for extent in all_extents(&image, range(0, size)) {
            let (start, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
            let is_zero = content[start as usize..end as usize].iter().all(|byte| *byte == 0);
            assert!(extent.depth == 1, "{kind}: {extent:?}");
            assert!(extent.kind == ExtentKind::Data || is_zero, "{kind}: {extent:?}");
        }
    }
}

#[test]
fn blocks_are_stored_zeroed_absent_and_discarded() {
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "disk.vhdx", &plain().image());
    assert_eq!(blocks(&path), [4, 0, 0, 0, 0, 5]);
    let image = Image::open(&path, &options()).unwrap();
    let data = all_extents(&image, range(0, image.size()));
    let data = data.iter().filter(|extent| extent.kind == ExtentKind::Data);
    let data: Vec<_> = data.map(|extent| extent.range.offset().bytes() as usize / MIB).collect();
    assert_eq!(data, [0, 5]);
    if has_tool("qemu-img") {
        let mut content = vec![0xee; image.size() as usize];
        image.read_at(at(0), &mut content).unwrap();
        assert!(qemu::content(&path, "vhdx") == content);
    }
}

#[test]
fn the_log_is_replayed_in_memory_and_the_file_stays_as_it_is() {
    let changed = Parts::new(0, 512, &[0, block(DATA, PRESENT), block(DATA + MIB, PRESENT)]);
    let changed = changed.bat_sector();
    let other = Parts::new(0, 512, &[block(DATA, PRESENT); 6]).bat_sector();
    let zeroes = (DATA as u64, Err(4096));
    let table = |sector| (BAT as u64, Ok(sector));
    let after_one = [0, 4, 5, 0, 0, 0];
    for (what, parts, expected) in [
        ("one entry", plain().logged(7, 0, &[table(changed)]), after_one),
        ("two", plain().logged(7, 0, &[table(other)]).logged(8, 0, &[table(changed)]), after_one),
        (
            "with zeroes",
            plain().logged(7, 0, &[table(changed)]).logged(8, 0, &[zeroes]),
            [0, 0, 5, 0, 0, 0],
        ),
        (
            "entries before the tail are done",
            plain().logged(7, 0, &[zeroes]).logged(8, 4096, &[table(changed)]),
            after_one,
        ),
        (
            "an older row",
            plain().logged(7, 0, &[table(changed)]).logged(5, 8192, &[zeroes]),
            after_one,
        ),
        (
            "a newer row",
            plain().logged(5, 0, &[zeroes]).logged(9, 4096, &[table(changed)]),
            after_one,
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let before = parts.image();
        let path = write(directory.path(), "disk.vhdx", &before);
        assert_eq!(blocks(&path), expected, "{what}");
        assert!(std::fs::read(&path).unwrap() == before, "{what}: it was changed");
        // QEMU replays into the file. It takes entries before the tail and of other rows, too,
        // which the specification does not.
        if has_tool("qemu-img") && !what.contains("row") && !what.contains("tail") {
            let copy = write(directory.path(), "copy.vhdx", &before);
            run("qemu-img", &["check", "-q", "-r", "all", "-f", "vhdx", text(&copy)]);
            let content = qemu::content(&copy, "vhdx");
            let found: Vec<u8> = content.chunks(MIB).map(|block| block[0]).collect();
            assert_eq!(found, expected, "{what}: QEMU");
        }
    }
}

#[test]
fn a_repair_makes_the_changes_of_the_log() {
    let changed = Parts::new(0, 512, &[0, block(DATA, PRESENT), block(DATA + MIB, PRESENT)]);
    let table = (BAT as u64, Ok(changed.bat_sector()));
    let zeroes = (DATA as u64, Err(4096));
    let image = plain().logged(7, 0, &[table]).logged(8, 0, &[zeroes]).image();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "disk.vhdx", &image);
    let expected = blocks(&path);
    assert_eq!(expected, [0, 0, 5, 0, 0, 0]);
    for repair in [Repair::None, Repair::Leaks] {
        let report = Image::check_file(&path, &options(), repair).unwrap();
        assert_eq!((report.corruptions, report.corruptions_repaired), (0, 0), "{repair:?}");
        assert!(std::fs::read(&path).unwrap() == image, "{repair:?}");
    }
    for repaired in [1, 0] {
        let report = Image::check_file(&path, &options(), Repair::All).unwrap();
        assert_eq!((report.corruptions, report.corruptions_repaired), (0, repaired));
        assert_eq!(report.other_format, Some(Format::Vhdx));
        assert_eq!(blocks(&path), expected);
    }
    let info = Image::inspect_file(&path, &options()).unwrap();
    assert!(matches!(info.details, Some(FormatDetails::Vhdx(it)) if !it.log_is_in_use));
    // Either header will do: neither has a log.
    let bytes = std::fs::read(&path).unwrap();
    for header in [64 << 10, 128 << 10] {
        let mut one = bytes.clone();
        one[header] ^= 1;
        assert_eq!(blocks(&write(directory.path(), "one.vhdx", &one)), expected);
    }
    if has_tool("qemu-img") {
        let content = qemu::content(&path, "vhdx");
        let found: Vec<u8> = content.chunks(MIB).map(|block| block[0]).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn a_log_that_would_make_the_image_unreadable_is_not_written_into_it() {
    let region_tables = [192 << 10, 256 << 10].map(|table| (table, Err(4096)));
    let image = plain().logged(7, 0, &region_tables).image();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "disk.vhdx", &image);
    assert!(Image::check_file(&path, &options(), Repair::All).is_err());
    assert!(std::fs::read(&path).unwrap() == image);
}

#[test]
fn a_check_finds_every_block_that_lies_past_the_end() {
    let past = block(DATA + 100 * MIB, PRESENT);
    let states = [past, block(DATA, PRESENT), past, 0, block(DATA + MIB, PRESENT), 4];
    let image = Parts::new(6 * MIB as u64 - 4096, 512, &states).image();
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "disk.vhdx", &image);
    for repair in [Repair::None, Repair::All] {
        let report = Image::check_file(&path, &options(), repair).unwrap();
        assert_eq!((report.corruptions, report.messages.len()), (3, 3), "{report:?}");
        assert!(std::fs::read(&path).unwrap() == image);
    }
}

#[test]
fn a_row_of_entries_may_go_round_the_end_of_the_log() {
    let changed = Parts::new(0, 512, &[0, block(DATA, PRESENT)]).bat_sector();
    let last = (MIB - 8192) as u32;
    let one = plain().logged(7, last, &[(BAT as u64, Ok(changed))]);
    let mut parts = plain().logged(8, last, &[(DATA as u64, Err(0))]);
    parts.log.resize(last as usize, 0);
    parts.log.extend(&one.log);
    let mut image = parts.image();
    seal(&mut image[MIB + last as usize..2 * MIB]);
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "disk.vhdx", &image);
    assert_eq!(blocks(&path), [0, 4, 0, 0, 0, 0]);
}

#[test]
fn a_log_that_is_damaged_is_not_replayed_in_part() {
    let changed = Parts::new(0, 512, &[0, block(DATA, PRESENT)]).bat_sector();
    let good = plain().logged(7, 0, &[(BAT as u64, Ok(changed))]);
    // The header, a descriptor, and the number in the data.
    for place in [32, 64, 64 + 24, 4096, 8188] {
        let mut bad = good.clone();
        bad.log[place] ^= 1;
        let error = open_error(&bad.image());
        assert!(error.to_string().contains("its log is damaged"), "{place}: {error}");
    }
    let mut image = good.image();
    image[MIB + 5000] ^= 1;
    assert!(open_error(&image).to_string().contains("its log is damaged"), "checksum");
    let mut cut = good.clone();
    cut.log[48..56].copy_from_slice(&(u64::MAX / 4).to_le_bytes());
    assert!(open_error(&cut.image()).to_string().contains("cut off"));
}

#[test]
fn entries_that_claim_to_be_long_do_not_keep_it_busy() {
    let mut parts = plain().logged(7, 0, &[]);
    let mut entry = parts.log.clone();
    entry[8..12].copy_from_slice(&(MIB as u32).to_le_bytes());
    parts.log = entry.repeat(MIB / 4096);
    let mut image = parts.image();
    image[MIB + 4] ^= 1;
    assert!(open_error(&image).to_string().contains("its log is damaged"));
}

#[test]
fn sectors_are_those_of_the_image_or_of_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let guid = "{5A5A5A5A-5a5a-5a5a-5a5a-5a5a5a5a5a5a}";
    let states = [block(DATA, PARTIAL), 0, ZERO, block(DATA + MIB, PRESENT)];
    let size = 4 * MIB as u64;
    let base = Parts::new(size, 512, &[block(DATA + MIB, PRESENT); 4]);
    write(directory.path(), "base.vhdx", &base.image());
    for (what, pairs) in [
        ("relative", [("parent_linkage", guid), ("relative_path", ".\\base.vhdx")]),
        (
            "absolute",
            [("parent_linkage", guid), ("absolute_win32_path", "\\\\?\\c:\\vm\\base.vhdx")],
        ),
        ("volume", [("volume_path", "\\\\?\\Volume{26}\\vm\\base.vhdx"), ("parent_linkage", guid)]),
    ] {
        let bitmap = [0b1111_0001, 0xff, 0, 1];
        let child = Parts::new(size, 512, &states).over(&pairs, &bitmap);
        let path = write(directory.path(), "disk.vhdx", &child.image());
        let image = Image::open(&path, &options()).unwrap();
        let mut content = vec![0xee; size as usize];
        image.read_at(at(0), &mut content).unwrap();
        for sector in 0..64 {
            let is_own = bitmap.get(sector / 8).is_some_and(|byte| byte >> (sector % 8) & 1 == 1);
            assert_eq!(content[sector * 512], if is_own { 4 } else { 5 }, "{what}: {sector}");
        }
        assert_eq!([content[MIB], content[2 * MIB], content[3 * MIB]], [5, 0, 5], "{what}");
        let extents = all_extents(&image, range(0, size));
        let firsts: Vec<_> = extents
            .iter()
            .map(|extent| (extent.range.offset().bytes() / 512, extent.depth))
            .collect();
        assert_eq!(firsts[..5], [(0, 1), (1, 2), (4, 1), (16, 2), (24, 1)], "{what}");
    }
    // The parent was written to since.
    let pairs = [("parent_linkage", guid), ("relative_path", ".\\base.vhdx")];
    let child = Parts::new(size, 512, &states).over(&pairs, &[1]);
    let path = write(directory.path(), "disk.vhdx", &child.image());
    let mut other = base;
    other.header[32] = 0;
    write(directory.path(), "base.vhdx", &other.image());
    let error = Image::open(&path, &options()).unwrap_err();
    assert!(error.to_string().contains("was changed since"), "{error}");
    let outside = [("parent_linkage", guid), ("relative_path", "..\\..\\base.vhdx")];
    std::fs::remove_file(directory.path().join("base.vhdx")).unwrap();
    let child = Parts::new(size, 512, &states).over(&outside, &[1]);
    let path = write(directory.path(), "disk.vhdx", &child.image());
    assert!(Image::open(&path, &options()).is_err());
}

#[test]
fn runs_of_sectors_end_within_words_of_the_bitmap_and_between_them() {
    let directory = tempfile::tempdir().unwrap();
    let size = MIB as u64;
    let base = Parts::new(size, 512, &[block(DATA + MIB, PRESENT)]);
    write(directory.path(), "base.vhdx", &base.image());
    let guid = "{5A5A5A5A-5a5a-5a5a-5a5a-5a5a5a5a5a5a}";
    let pairs = [("parent_linkage", guid), ("relative_path", ".\\base.vhdx")];
    // A word has 64 bits, and the bitmap 512.
    let runs = [3, 61, 64, 128, 1, 62, 2, 63, 1, 31, 2, 30, 63];
    for is_first_own in [true, false] {
        let owners = runs.iter().enumerate().flat_map(|(number, length)| {
            std::iter::repeat_n((number % 2 == 0) == is_first_own, *length)
        });
        let mut owners: Vec<bool> = owners.collect();
        let mut bitmap = [0; 64];
        for (sector, is_own) in owners.iter().enumerate() {
            bitmap[sector / 8] |= u8::from(*is_own) << (sector % 8);
        }
        owners.resize(600, false);
        let child = Parts::new(size, 512, &[block(DATA, PARTIAL)]).over(&pairs, &bitmap);
        let image =
            Image::open(write(directory.path(), "disk.vhdx", &child.image()), &options()).unwrap();
        for (sector, is_own) in owners.iter().enumerate() {
            let mut byte = [0xee];
            let offset = sector as u64 * 512;
            image.read_at(at(offset), &mut byte).unwrap();
            assert_eq!(byte, [if *is_own { 4 } else { 5 }], "{is_first_own}: {sector}");
            let length = owners[sector..].iter().take_while(|other| *other == is_own).count();
            let extent = &all_extents(&image, range(offset, 600 * 512 - offset))[0];
            let found = (extent.range.length(), extent.depth == 1);
            assert_eq!(found, (length as u64 * 512, *is_own), "{is_first_own}: {sector}");
        }
    }
}

#[test]
fn the_newer_header_counts_and_either_copy_will_do() {
    let directory = tempfile::tempdir().unwrap();
    let good = plain().image();
    let (first, second, table) = (64 << 10, 128 << 10, 192 << 10);
    let mut newer = good.clone();
    newer.copy_within(first..first + 4096, second);
    newer[first + 48] = 9;
    seal(&mut newer[first..first + 4096]);
    newer[second + 8] = 6;
    seal(&mut newer[second..second + 4096]);
    assert_eq!(blocks(&write(directory.path(), "a", &newer))[0], 4, "the newer one has no log");
    newer[second + 9] ^= 1;
    assert!(
        open_error(&newer).to_string().contains("its log is damaged"),
        "the only sound one has"
    );
    let mut copy = good.clone();
    copy.copy_within(table..table + (64 << 10), table + (64 << 10));
    copy[table + 100] ^= 1;
    assert_eq!(blocks(&write(directory.path(), "b", &copy))[0], 4, "the second table");
    let mut bad = good;
    bad[first + 100] ^= 1;
    assert_eq!(open_error(&bad).kind(), ErrorKind::InvalidFormat);
}

#[test]
fn what_must_be_known_and_is_not_is_refused() {
    let with = |change: fn(&mut Parts)| {
        let mut parts = plain();
        change(&mut parts);
        open_error(&parts.image())
    };
    let region = with(|parts| {
        parts.regions[8] = 3;
        parts.regions[80] = 1;
        parts.regions[80 + 28] = 1;
    });
    assert!(region.to_string().contains("region that is not known"), "{region}");
    let item = with(|parts| {
        parts.table[10] = 6;
        parts.table[32 + 5 * 32] ^= 1;
    });
    assert!(item.to_string().contains("metadata that is not known"), "{item}");
    for (what, change) in [
        ("version", (|parts| parts.header[66] = 2) as fn(&mut Parts)),
        ("blocks", |parts| parts.items[1] = 1),
        ("sectors", |parts| parts.items[17] = 1),
        ("too short", |parts| parts.items[8..16].copy_from_slice(&(63u64 << 40).to_le_bytes())),
    ] {
        let error = with(change);
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

#[test]
fn a_block_that_lies_past_all_offsets_is_damage() {
    for state in [PRESENT, PARTIAL] {
        let mut states = [0; 17];
        (states[0], states[16]) = (u64::MAX << 20 | state, block(6 * MIB, PRESENT));
        let pairs = [
            ("parent_linkage", "{5A5A5A5A-5a5a-5a5a-5a5a-5a5a5a5a5a5a}"),
            ("relative_path", "base.vhdx"),
        ];
        let mut parts = Parts::new(512 << 20, 512, &states).over(&pairs, &[0xff; 64]);
        // Blocks of 256 MiB.
        parts.items[..4].copy_from_slice(&(256u32 << 20).to_le_bytes());
        let mut image = parts.image();
        image[6 * MIB..7 * MIB].fill(0xff);
        let directory = tempfile::tempdir().unwrap();
        let path = write(directory.path(), "disk.vhdx", &image);
        let image = Image::open(path, &options().backing(BackingFile::Ignored)).unwrap();
        for offset in [0, MIB as u64, (256 << 20) - 512] {
            let error = image.read_at(at(offset), &mut [0; 512]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
        vhdx(&parts.bytes());
    }
}

#[test]
fn every_damaged_word_and_every_cut_is_survived() {
    for (_, name, good) in seeds() {
        println!("{name}: {} bytes", good.len());
        let words = good.chunks_exact(4).enumerate();
        let places = words.filter(|(_, word)| **word != [0; 4]);
        let mut random = Random::new("damage of vhdx");
        for (place, _) in places {
            let value = [0, 1, u32::MAX, 0x8000_0000, 0x7fff_ffff, random.next() as u32];
            let mut bad = good.clone();
            let value = value[random.below(6) as usize];
            bad[place * 4..place * 4 + 4].copy_from_slice(&value.to_le_bytes());
            vhdx(&bad);
        }
        for length in (0..good.len()).step_by(1201) {
            vhdx(&good[..length]);
        }
    }
}
