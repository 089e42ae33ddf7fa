//! Maps that tell holes from data, and when they can be had without waiting.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgfmt::{
    Access, CreateOptions, Durability, ExtentKind, Format, Holes, Image, Lookup, Mapped,
    OpenOptions, Speed, TryRead, ZeroMode,
};

use crate::common::{self, Random, at, has_tool, range, run, text};

const MIB: u64 = 1 << 20;

fn open(path: &Path, format: Format) -> Image {
    Image::open(path, &OpenOptions::new().format(format).access(Access::ReadWrite)).unwrap()
}

/// The parts of a range: length, and whether it is a hole. `None` if that takes waiting.
fn parts(image: &Image, offset: u64, length: u64, lookup: Lookup) -> Option<Vec<(u64, bool)>> {
    let mut next = offset;
    let mut parts: Vec<(u64, bool)> = Vec::new();
    let mapped = image.map(range(offset, length), Holes::Told, lookup, |mapping| {
        assert_eq!(mapping.range.offset().bytes(), next, "no gaps");
        next = mapping.range.end().bytes();
        let (length, is_zero) = (mapping.range.length(), mapping.content.is_zero());
        match parts.last_mut() {
            Some((before, was_zero)) if *was_zero && is_zero => *before += length,
            _ => parts.push((length, is_zero)),
        }
        true
    });
    match mapped.unwrap() {
        Mapped::Complete => assert_eq!(next, offset + length),
        Mapped::Partial => panic!("all was wanted"),
        Mapped::WouldBlock | Mapped::HolesUnknown => return None,
    }
    Some(parts)
}

/// A raw file with a MiB of data at 1 MiB; `None` if there are no holes here.
fn sparse(path: &Path) -> Option<()> {
    let file = File::create(path).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(&[7; 1 << 20], MIB).unwrap();
    let disk = open(path, Format::Raw);
    if disk.extents(range(0, MIB)).next().unwrap().unwrap().kind == ExtentKind::Data {
        println!("skipped: the file system of the temporary directory has no holes");
        return None;
    }
    Some(())
}

#[test]
fn data_of_a_sparse_file_is_remembered_and_holes_are_asked_for_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    if sparse(&path).is_none() {
        return;
    }
    let disk = open(&path, Format::Raw);
    let whole = [(MIB, true), (MIB, false), (2 * MIB, true)];
    assert_eq!(parts(&disk, MIB, MIB, Lookup::CachedOnly), None, "nothing is known at first");
    let mapped = disk.map(range(MIB, MIB), Holes::Told, Lookup::CachedOnly, |_| true).unwrap();
    assert_eq!(mapped, Mapped::HolesUnknown, "no metadata is missing");
    assert_eq!(parts(&disk, 0, 4 * MIB, Lookup::MayRead).unwrap(), whole);
    assert_eq!(parts(&disk, MIB, MIB, Lookup::CachedOnly).unwrap(), [(MIB, false)]);
    assert_eq!(parts(&disk, 0, 4 * MIB, Lookup::CachedOnly), None);
    // Another process may fill a hole at any time.
    let other = File::options().write(true).open(&path).unwrap();
    other.write_all_at(&[7; 4096], 0).unwrap();
    assert_eq!(parts(&disk, 0, 8192, Lookup::MayRead).unwrap(), [(4096, false), (4096, true)]);
}

#[test]
fn what_is_written_is_known_to_be_data_until_it_is_given_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    if sparse(&path).is_none() {
        return;
    }
    let disk = open(&path, Format::Raw);
    parts(&disk, 0, 4 * MIB, Lookup::MayRead);
    disk.write_at(at(2 * MIB), &[0; 65536], Durability::Cached).unwrap();
    assert_eq!(parts(&disk, 2 * MIB, 65536, Lookup::CachedOnly).unwrap(), [(65536, false)]);
    for how in 0..2 {
        let place = range(2 * MIB, 65536);
        match how {
            0 => disk.discard(place, Durability::Cached).unwrap(),
            _ => {
                disk.write_at(place.offset(), &[1; 65536], Durability::Fua).unwrap();
                disk.write_zeroes(place, ZeroMode::MayUnmap, Speed::Any, Durability::Cached)
                    .unwrap();
            }
        }
        assert_eq!(parts(&disk, 2 * MIB, 65536, Lookup::CachedOnly), None);
        assert_eq!(parts(&disk, 2 * MIB, 65536, Lookup::MayRead).unwrap(), [(65536, true)]);
    }
}

#[test]
fn a_file_without_holes_needs_one_look_and_none_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let disk = open(&path, Format::Raw);
    assert_eq!(parts(&disk, 0, 512, Lookup::MayRead).unwrap(), [(512, false)]);
    assert_eq!(parts(&disk, 0, MIB, Lookup::CachedOnly).unwrap(), [(MIB, false)]);
    let mut buffer = [1; 4096];
    let read = disk.try_read_data_at(at(0), &mut buffer).unwrap();
    assert_ne!(read, TryRead::Sparse);
    if read == TryRead::Complete {
        assert_eq!(buffer, [0; 4096], "zeroes that were written are data");
    }
}

#[test]
fn a_read_for_data_says_where_there_is_none_and_a_plain_one_fills_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, MIB)).unwrap();
    let disk = open(&path, Format::Qcow2);
    disk.write_at(at(65536), &[7; 65536], Durability::Cached).unwrap();
    // Whether clusters were allocated before they were written is found out once.
    parts(&disk, 65536, 1, Lookup::MayRead);
    let mut buffer = [9; 1000];
    for offset in [0, 65536 - 999, 2 * 65536 - 1] {
        assert_eq!(disk.try_read_data_at(at(offset), &mut buffer).unwrap(), TryRead::Sparse);
        assert_ne!(disk.try_read_at(at(offset), &mut buffer).unwrap(), TryRead::Sparse);
    }
    assert_ne!(disk.try_read_data_at(at(65536), &mut buffer).unwrap(), TryRead::Sparse);
    let expected = [(65536, true), (65536, false), (MIB - 2 * 65536, true)];
    assert_eq!(parts(&disk, 0, MIB, Lookup::CachedOnly).unwrap(), expected);
}

#[test]
fn the_map_of_images_of_qemu_calls_the_same_bytes_zero_as_their_extents() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let mut random = Random::new("maps of images of QEMU");
    let directory = tempfile::tempdir().unwrap();
    for (number, options) in [
        "cluster_size=512",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,preallocation=metadata",
        "cluster_size=4k,preallocation=falloc",
        "cluster_size=2M,compat=0.10",
    ]
    .iter()
    .enumerate()
    {
        let path = directory.path().join(format!("{number}.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), "8M"]);
        let mut commands = Vec::new();
        for _ in 0..30 {
            let (offset, length) = (random.below(7 * MIB), 1 + random.below(100_000));
            let what =
                ["write -P 7", "write -z -u", "discard", "write -z"][random.below(4) as usize];
            commands.extend(["-c".to_owned(), format!("{what} {offset} {length}")]);
        }
        let mut arguments = vec!["-f", "qcow2"];
        arguments.extend(commands.iter().map(String::as_str));
        arguments.push(text(&path));
        run("qemu-io", &arguments);
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let mut by_extents = vec![false; 8 << 20];
        for extent in common::all_extents(&image, range(0, 8 * MIB)) {
            let (start, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
            by_extents[start as usize..end as usize].fill(extent.kind != ExtentKind::Data);
        }
        let mut by_map = Vec::new();
        for (length, is_zero) in parts(&image, 0, 8 * MIB, Lookup::MayRead).unwrap() {
            by_map.resize(by_map.len() + length as usize, is_zero);
        }
        let difference = by_map.iter().zip(&by_extents).position(|(map, extent)| map != extent);
        assert_eq!(difference, None, "{options} {commands:?}");
    }
}
