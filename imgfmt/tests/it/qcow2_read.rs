//! Images made by QEMU, in every combination of features, are read as QEMU reads them.

use std::path::Path;

use imgfmt::{Content, ExtentKind, Format, Image, OpenOptions, TryRead};

use crate::common::{self, Random, at, qemu, range};

const SIZE: u64 = 4 * 1024 * 1024 + 512;

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new().format(Format::Qcow2)).unwrap()
}

/// Reads an image whole, in random parts, without blocking, and by its mappings.
fn assert_content(image: &Image, expected: &[u8], random: &mut Random, what: &str) {
    assert_eq!(image.size(), expected.len() as u64, "{what}");
    let mut whole = vec![0xee; expected.len()];
    image.read_at(at(0), &mut whole).unwrap();
    assert!(whole == expected, "{what}: whole content differs");
    for _ in 0..50 {
        let offset = random.below(image.size());
        let length = random.below(200_000).min(image.size() - offset);
        let expected = &expected[offset as usize..(offset + length) as usize];
        let mut part = vec![0xee; length as usize];
        image.read_at(at(offset), &mut part).unwrap();
        assert!(part == expected, "{what}: {length} bytes at {offset} differ");
        part.fill(0xee);
        if image.try_read_at(at(offset), &mut part).unwrap() == TryRead::Complete {
            assert!(part == expected, "{what}: {length} bytes at {offset} differ, not blocking");
        }
    }
    let map = image.map_read(range(0, image.size())).unwrap();
    let mut position = 0;
    for mapping in map.mappings() {
        let part = mapping.range;
        assert_eq!(part.offset().bytes(), position, "{what}: a gap in the mappings");
        position = part.end().bytes();
        let mut bytes = vec![0; part.length() as usize];
        match mapping.content {
            Content::File(span) => span.storage.read_exact_at(span.offset, &mut bytes).unwrap(),
            Content::Hole | Content::Zero => {}
            _ => image.read_at(part.offset(), &mut bytes).unwrap(),
        }
        let expected = &expected[part.offset().bytes() as usize..position as usize];
        assert!(bytes == expected, "{what}: {part} differ when read by their mapping");
    }
    assert_eq!(position, image.size());
    for extent in common::all_extents(image, range(0, image.size())) {
        let part = extent.range.offset().bytes() as usize..extent.range.end().bytes() as usize;
        if extent.kind != ExtentKind::Data {
            assert!(expected[part].iter().all(|byte| *byte == 0), "{what}: {extent:?} is not zero");
        }
    }
}

#[test]
fn every_combination_of_features_is_read() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("qcow2 features");
    for options in [
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "compat=1.1",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=4096,refcount_bits=64",
        "cluster_size=2M",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16384",
        "extended_l2=on,cluster_size=2M,preallocation=metadata",
        "compression_type=zstd",
        "data_file=DIR/data.raw",
        "data_file=DIR/data.raw,data_file_raw=on",
    ] {
        let path = directory.path().join("disk.qcow2");
        let _ = std::fs::remove_file(&path);
        let made = options.replace("DIR", common::text(directory.path()));
        qemu::create(&path, &made, &SIZE.to_string());
        qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, SIZE, 60));
        let expected = qemu::content(&path, "qcow2");
        assert_content(&open(&path), &expected, &mut random, options);
        if common::has_tool("qemu-nbd") && common::has_tool("nbdinfo") {
            assert_map(&path, options);
        }
    }
}

#[test]
fn compressed_clusters_are_read() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("qcow2 compressed");
    let source = directory.path().join("source.raw");
    let mut bytes: Vec<u8> = (0..SIZE).map(|i| (i / 777) as u8).collect();
    bytes[70_000..200_000].copy_from_slice(&random.bytes(130_000));
    bytes[1_000_000..2_000_000].fill(0);
    std::fs::write(&source, &bytes).unwrap();
    for options in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=4096",
        "extended_l2=on",
        "compat=0.10",
    ] {
        let path = directory.path().join("disk.qcow2");
        let (from, to) = (common::text(&source), common::text(&path));
        common::run(
            "qemu-img",
            &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to],
        );
        assert_content(&open(&path), &bytes, &mut random, options);
    }
}

#[test]
fn a_snapshot_is_read_as_the_disk_was() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut random = Random::new("qcow2 snapshots");
    qemu::create(&path, "", "3M");
    let mut states = Vec::new();
    for name in ["first", "second"] {
        qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, 3 << 20, 20));
        states.push((name, qemu::content(&path, "qcow2")));
        common::run("qemu-img", &["snapshot", "-c", name, common::text(&path)]);
    }
    qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, 3 << 20, 20));
    common::run("qemu-img", &["resize", "-q", common::text(&path), "5M"]);
    for (name, expected) in &states {
        let image = Image::open(&path, &OpenOptions::new().snapshot(*name)).unwrap();
        assert_content(&image, expected, &mut random, name);
    }
    assert_content(&open(&path), &qemu::content(&path, "qcow2"), &mut random, "present");
    let error = Image::open(&path, &OpenOptions::new().snapshot("third")).unwrap_err();
    assert!(error.to_string().contains("first, second"), "{error}");
}

/// Compares extents with what qemu-nbd reports.
fn assert_map(path: &Path, what: &str) {
    let image = open(path);
    let extents = common::all_extents(&image, range(0, image.size()));
    let mut depths: Vec<(u64, u64, u32)> = Vec::new();
    let mut states: Vec<(u64, u64, u32)> = Vec::new();
    for extent in &extents {
        let state = match extent.kind {
            ExtentKind::Data => 0,
            ExtentKind::Zero => 2,
            ExtentKind::Hole => 3,
        };
        for (list, value) in [(&mut depths, extent.depth), (&mut states, state)] {
            match list.last_mut() {
                Some(last) if last.2 == value => last.1 += extent.range.length(),
                _ => list.push((extent.range.offset().bytes(), extent.range.length(), value)),
            }
        }
    }
    drop(image);
    let peer = qemu::Nbd::serve(path, "qcow2");
    assert_eq!(depths, peer.map("qemu:allocation-depth"), "{what}: depth");
    assert_eq!(states, peer.map("base:allocation"), "{what}: allocation");
}

#[test]
fn chains_of_any_length_are_read_and_mapped_as_qemu_does() {
    if !qemu::has_qemu() || !common::has_tool("qemu-nbd") || !common::has_tool("nbdinfo") {
        return;
    }
    let mut random = Random::new("qcow2 chains");
    for round in 0..6 {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base");
        let base_format = if round % 2 == 0 { "raw" } else { "qcow2" };
        let mut size = (random.below(60) + 4) * 65536 + random.below(128) * 512;
        common::run(
            "qemu-img",
            &["create", "-q", "-f", base_format, common::text(&base), &size.to_string()],
        );
        qemu::io(&base, base_format, &qemu::random_commands(&mut random, size, 15));
        let mut below = (base, base_format);
        for layer in 0..=random.below(4) {
            let path = directory.path().join(format!("layer{layer}.qcow2"));
            size = (random.below(60) + 4) * 65536 + random.below(128) * 512;
            let options = ["", "cluster_size=4096", "extended_l2=on", "compat=0.10"]
                [random.below(4) as usize];
            qemu::create_overlay(&path, options, &below.0, below.1, &size.to_string());
            qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, size, 15));
            below = (path, "qcow2");
            let what = format!("round {round}, layer {layer} ({options})");
            let expected = qemu::content(&below.0, "qcow2");
            assert_content(&open(&below.0), &expected, &mut random, &what);
            assert_map(&below.0, &what);
        }
    }
}
