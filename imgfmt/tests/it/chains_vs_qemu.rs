//! Chains of every shape that qemu-img and qemu-io make are read and mapped exactly as qemu-nbd
//! does: data, `base:allocation` and `qemu:allocation-depth`, extent by extent.
//!
//! `IMGFMT_CHAIN_ROUNDS` sets how many chains.

use std::path::{Path, PathBuf};

use imgfmt::{Extent, ExtentKind, Format, Image, OpenOptions};

use crate::common::{self, Random, all_extents, at, qemu, range, run, text};
use crate::judge::subjects::rounds;

const SECTOR: u64 = 512;

/// One layer, from the base up.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) format: &'static str,
    pub(crate) size: u64,
    /// How it was made, for messages.
    pub(crate) how: String,
}

const OPTIONS: [&str; 12] = [
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=65536",
    "cluster_size=2M",
    "compat=0.10",
    "compat=0.10,cluster_size=1024",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16384",
    "refcount_bits=1,cluster_size=8192",
    "refcount_bits=64",
    "compression_type=zstd",
    "compression_type=zstd,extended_l2=on,cluster_size=32768",
];

fn random_size(random: &mut Random) -> u64 {
    (random.below(5000) + 1) * SECTOR
}

/// Writes, zeroes, discards and compressed writes.
fn use_layer(layer: &Layer, random: &mut Random) {
    let mut commands = qemu::random_commands(random, layer.size, 12);
    let cluster = cluster_size(&layer.how);
    if layer.format == "qcow2" && layer.size >= cluster {
        for _ in 0..4 {
            let offset = random.below(layer.size / cluster) * cluster;
            commands.insert(0, format!("write -c -P {} {offset} {cluster}", random.below(255) + 1));
        }
    }
    qemu_io(layer, &commands);
}

/// qemu-io, where a compressed write onto a cluster that is there already may fail.
fn qemu_io(layer: &Layer, commands: &[String]) {
    let mut arguments = vec!["-f", layer.format, "-d", "unmap"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(text(&layer.path));
    let _ = std::process::Command::new("qemu-io").args(&arguments).output().unwrap();
}

fn cluster_size(options: &str) -> u64 {
    let Some((_, rest)) = options.split_once("cluster_size=") else { return 65536 };
    let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let number: u64 = number.parse().unwrap();
    if rest[1..].starts_with('M') { number << 20 } else { number }
}

fn make_base(directory: &Path, random: &mut Random) -> Layer {
    let size = random_size(random);
    let format = if random.below(2) == 0 { "raw" } else { "qcow2" };
    let layer =
        Layer { path: directory.join("layer0"), format, size, how: format!("{format} {size}") };
    run("qemu-img", &["create", "-q", "-f", format, text(&layer.path), &size.to_string()]);
    use_layer(&layer, random);
    layer
}

fn make_overlay(below: &Layer, number: u64, random: &mut Random) -> Layer {
    let options = OPTIONS[random.below(12) as usize];
    // Shorter, longer or just as long.
    let size = if random.below(3) == 0 { below.size } else { random_size(random) };
    let path = below.path.with_file_name(format!("layer{number}"));
    qemu::create_overlay(&path, options, &below.path, below.format, &size.to_string());
    let layer = Layer { path, format: "qcow2", size, how: format!("{options} {size}") };
    // Some layers stay empty.
    if random.below(5) > 0 {
        use_layer(&layer, random);
    }
    layer
}

/// What a context would show, joined where it does not change.
pub(crate) fn joined(extents: &[Extent], value: impl Fn(&Extent) -> u32) -> Vec<(u64, u64, u32)> {
    let mut list: Vec<(u64, u64, u32)> = Vec::new();
    for extent in extents {
        let value = value(extent);
        match list.last_mut() {
            Some(last) if last.2 == value => last.1 += extent.range.length(),
            _ => list.push((extent.range.offset().bytes(), extent.range.length(), value)),
        }
    }
    list
}

/// The flags of `base:allocation`: 1 hole, 2 zero.
pub(crate) fn allocation(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => 2,
        ExtentKind::Hole => 3,
    }
}

pub(crate) fn compare_maps(image: &Image, layer: &Layer, what: &str) {
    let whole = range(0, image.size());
    let extents = all_extents(image, whole);
    let peer = qemu::Nbd::serve(&layer.path, layer.format);
    assert_eq!(
        joined(&extents, |extent| extent.depth),
        peer.map("qemu:allocation-depth"),
        "{what}: depth"
    );
    assert_eq!(joined(&extents, allocation), peer.map("base:allocation"), "{what}: allocation");
}

/// Extents of a part are those of the whole, clipped, however few are asked for at a time.
pub(crate) fn compare_parts(image: &Image, random: &mut Random, what: &str) {
    let whole = all_extents(image, range(0, image.size()));
    for _ in 0..20 {
        let offset = random.below(image.size());
        let length = random.below(image.size() - offset) + 1;
        let wanted: Vec<Extent> = whole
            .iter()
            .map(|extent| {
                let mut part = *extent;
                part.range = range(offset, length).intersection(extent.range);
                part
            })
            .filter(|extent| !extent.range.is_empty())
            .collect();
        let mut found: Vec<Extent> = Vec::new();
        let mut position = offset;
        while position < offset + length {
            let rest = range(position, offset + length - position);
            let max_count = random.below(3) as usize + 1;
            let part: Vec<Extent> =
                image.extents(rest).bounded(1, max_count).map(Result::unwrap).collect();
            assert!(!part.is_empty() && part.len() <= max_count, "{what}: {part:?}");
            position = part.last().unwrap().range.end().bytes();
            found.extend(part);
        }
        let key = |extent: &Extent| extent.depth * 4 + allocation(extent);
        assert_eq!(joined(&found, key), joined(&wanted, key), "{what}: {length} at {offset}");
    }
}

pub(crate) fn compare_data(image: &Image, layer: &Layer, random: &mut Random, what: &str) {
    let expected = qemu::content(&layer.path, layer.format);
    let mut whole = vec![0xee; expected.len()];
    image.read_at(at(0), &mut whole).unwrap();
    assert!(whole == expected, "{what}: the content differs");
    for _ in 0..10 {
        let offset = random.below(image.size());
        let length = random.below(image.size() - offset) + 1;
        let mut part = vec![0xee; length as usize];
        image.read_at(at(offset), &mut part).unwrap();
        let expected = &expected[offset as usize..(offset + length) as usize];
        assert!(part == expected, "{what}: {length} bytes at {offset} differ");
    }
}

#[test]
fn random_chains_are_read_and_mapped_as_qemu_does() {
    let tools = ["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"];
    if !tools.into_iter().all(common::has_tool) {
        return;
    }
    let mut random = Random::new("chains");
    for round in 0..rounds("IMGFMT_CHAIN_ROUNDS", 8) {
        let directory = tempfile::tempdir().unwrap();
        let mut layers = vec![make_base(directory.path(), &mut random)];
        for number in 1..=random.below(5) {
            layers.push(make_overlay(layers.last().unwrap(), number, &mut random));
        }
        let how: Vec<&str> = layers.iter().map(|layer| layer.how.as_str()).collect();
        let what = format!("round {round}: {}", how.join(" <- "));
        println!("{what}");
        let top = layers.last().unwrap();
        let format = Format::from_name(top.format).unwrap();
        let image = Image::open(&top.path, &OpenOptions::new().format(format)).unwrap();
        compare_data(&image, top, &mut random, &what);
        compare_parts(&image, &mut random, &what);
        compare_maps(&image, top, &what);
    }
}

#[test]
fn the_part_behind_a_shorter_layer_belongs_to_it() {
    let tools = ["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"];
    if !tools.into_iter().all(common::has_tool) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("layer0");
    run("qemu-img", &["create", "-q", "-f", "raw", text(&base), &(1 << 20).to_string()]);
    let mut below = Layer { path: base, format: "raw", size: 1 << 20, how: "raw".into() };
    for number in 1..3u64 {
        let size = (number + 1) << 20;
        let path = directory.path().join(format!("layer{number}"));
        qemu::create_overlay(&path, "", &below.path, below.format, &size.to_string());
        below = Layer { path, format: "qcow2", size, how: "qcow2".into() };
    }
    let image = Image::open(&below.path, &OpenOptions::new()).unwrap();
    let extents = all_extents(&image, range(0, image.size()));
    let depths = joined(&extents, |extent| extent.depth);
    assert_eq!(depths, [(0, 2 << 20, 3), (2 << 20, 1 << 20, 2)]);
    compare_maps(&image, &below, "three layers");
}
