//! Random changes of a qcow2 image do what they do to a row of bytes, and QEMU agrees.

use std::path::Path;

use imgfmt::{Access, Durability, Image, OpenOptions, Speed, TryWrite, ZeroMode};

use crate::common::{self, Random, at, qemu, range};

const SIZE: u64 = 6 * 1024 * 1024 + 512;

fn open(path: &Path) -> Image {
    // A cache of no size makes tables come and go.
    let options = OpenOptions::new().access(Access::ReadWrite).metadata_cache_bytes(0);
    Image::open(path, &options).unwrap()
}

fn assert_same(image: &Image, model: &[u8], what: &str) {
    let mut whole = vec![0xee; model.len()];
    image.read_at(at(0), &mut whole).unwrap();
    if whole == model {
        return;
    }
    if let Some(place) = whole.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{what}: differs from offset {place} on");
    }
}

/// One random operation on both; `alignment` is that of most requests.
fn step(image: &Image, model: &mut [u8], random: &mut Random, what: &str) {
    let size = model.len() as u64;
    let alignment = [1, 512, 4096, 65536][random.below(4) as usize];
    let offset = random.below(size) / alignment * alignment;
    let length = (random.below(400_000) / alignment * alignment).min(size - offset);
    let part = offset as usize..(offset + length) as usize;
    let durability = [Durability::Cached, Durability::Fua][usize::from(random.below(30) == 0)];
    let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
    match random.below(9) {
        0..=3 => {
            let data = vec![random.below(255) as u8 + 1; length as usize];
            let tried = match random.below(2) {
                0 => image.try_write_at(at(offset), &data).unwrap(),
                _ => TryWrite::WouldBlock,
            };
            if tried == TryWrite::WouldBlock {
                image.write_at(at(offset), &data, durability).unwrap();
            }
            model[part].copy_from_slice(&data);
        }
        4 => {
            image.write_zeroes(range(offset, length), mode, Speed::Any, durability).unwrap();
            model[part].fill(0);
        }
        5 => {
            let result =
                image.write_zeroes(range(offset, length), mode, Speed::FastOnly, durability);
            match result {
                Ok(()) => model[part].fill(0),
                Err(error) => assert_eq!(error.kind(), imgfmt::ErrorKind::NotFast, "{error}"),
            }
        }
        6 => {
            image.discard(range(offset, length), durability).unwrap();
            let mut now = vec![0; length as usize];
            image.read_at(at(offset), &mut now).unwrap();
            for (new, old) in now.iter().zip(&mut model[part]) {
                assert!(*new == 0 || new == old, "{what}: a discard shows foreign data");
                *old = *new;
            }
        }
        7 if random.below(4) == 0 => image.flush().unwrap(),
        _ => {
            let mut now = vec![0; length as usize];
            image.read_at(at(offset), &mut now).unwrap();
            assert!(now == model[part], "{what}: {length} bytes at {offset} differ");
        }
    }
}

fn random_changes(path: &Path, random: &mut Random, what: &str) {
    let mut model = qemu::content(path, "qcow2");
    for _ in 0..3 {
        let image = open(path);
        assert_same(&image, &model, what);
        for _ in 0..60 {
            step(&image, &mut model, random, what);
        }
        assert_same(&image, &model, what);
        image.close().unwrap();
        qemu::check(path);
        assert!(qemu::content(path, "qcow2") == model, "{what}: QEMU reads something else");
    }
}

#[test]
fn images_of_every_kind_are_written() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("qcow2 write");
    for options in [
        "",
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=8",
        "cluster_size=2M,refcount_bits=2",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16384",
        "extended_l2=on,preallocation=metadata",
        "data_file=DIR/data.raw",
        "data_file=DIR/data.raw,data_file_raw=on",
    ] {
        let path = directory.path().join("disk.qcow2");
        let _ = std::fs::remove_file(&path);
        let made = options.replace("DIR", common::text(directory.path()));
        qemu::create(&path, &made, &SIZE.to_string());
        random_changes(&path, &mut random, options);
        if options.ends_with("data_file_raw=on") {
            let raw = std::fs::read(directory.path().join("data.raw")).unwrap();
            // QEMU made it a multiple of the cluster size.
            let disk = qemu::content(&path, "qcow2");
            assert!(raw[..disk.len()] == disk, "the raw data file is not the disk");
        }
    }
}

#[test]
fn overlays_are_written_and_their_backing_files_are_not() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("qcow2 overlay");
    for options in ["", "compat=0.10", "extended_l2=on", "cluster_size=4096"] {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base.qcow2");
        qemu::create(&base, "", "3M");
        qemu::io(&base, "qcow2", &qemu::random_commands(&mut random, 3 << 20, 30));
        let before = std::fs::read(&base).unwrap();
        let path = directory.path().join("disk.qcow2");
        qemu::create_overlay(&path, options, &base, "qcow2", &SIZE.to_string());
        random_changes(&path, &mut random, options);
        assert!(std::fs::read(&base).unwrap() == before, "the backing file was changed");
    }
}

#[test]
fn compressed_clusters_are_overwritten() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("qcow2 compressed write");
    let source = directory.path().join("source.raw");
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 777) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    for options in [
        "cluster_size=65536",
        "extended_l2=on",
        "compression_type=zstd,cluster_size=4096",
        "compat=0.10",
    ] {
        let path = directory.path().join("disk.qcow2");
        let (from, to) = (common::text(&source), common::text(&path));
        let arguments = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to];
        common::run("qemu-img", &arguments);
        random_changes(&path, &mut random, options);
    }
}

#[test]
fn snapshots_stay_as_they_were() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("qcow2 snapshots");
    for options in ["", "compat=0.10", "extended_l2=on", "cluster_size=512"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        qemu::create(&path, options, &SIZE.to_string());
        let mut states = Vec::new();
        for name in ["first", "second"] {
            random_changes(&path, &mut random, options);
            states.push((name, qemu::content(&path, "qcow2")));
            common::run("qemu-img", &["snapshot", "-c", name, common::text(&path)]);
        }
        random_changes(&path, &mut random, options);
        for (name, state) in states {
            let image = Image::open(&path, &OpenOptions::new().snapshot(name)).unwrap();
            assert_same(&image, &state, options);
        }
    }
}

#[test]
fn several_threads_write_their_own_parts_of_one_image() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for options in ["", "extended_l2=on", "cluster_size=4096"] {
        let path = directory.path().join("disk.qcow2");
        let _ = std::fs::remove_file(&path);
        qemu::create(&path, options, "8M");
        let image = open(&path);
        // The parts of different threads alternate within clusters.
        const UNIT: u64 = 1536;
        let threads = 4;
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|thread| {
                    let (image, mut random) = (&image, Random::new("thread"));
                    scope.spawn(move || {
                        let mut model = vec![0u8; 8 << 20];
                        for _ in 0..600 {
                            let unit = random.below((8 << 20) / UNIT / threads) * threads + thread;
                            let offset = unit * UNIT;
                            let value = random.below(255) as u8 + 1;
                            let part = offset as usize..(offset + UNIT) as usize;
                            match random.below(6) {
                                0 => {
                                    let zero = range(offset, UNIT);
                                    let mode = ZeroMode::MayUnmap;
                                    image
                                        .write_zeroes(zero, mode, Speed::Any, Durability::Cached)
                                        .unwrap();
                                    model[part].fill(0);
                                }
                                1 => {
                                    let mut now = vec![0; UNIT as usize];
                                    image.read_at(at(offset), &mut now).unwrap();
                                    assert!(now == model[part], "a write got lost at {offset}");
                                }
                                2 if random.below(10) == 0 => image.flush().unwrap(),
                                _ => {
                                    model[part].fill(value);
                                    let data = vec![value; UNIT as usize];
                                    image.write_at(at(offset), &data, Durability::Cached).unwrap();
                                }
                            }
                        }
                        model
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        let whole: Vec<u8> = (0..8 << 20)
            .map(|i| models.get((i as u64 / UNIT % threads) as usize).map_or(0, |model| model[i]))
            .collect();
        assert_same(&image, &whole, options);
        image.close().unwrap();
        qemu::check(&path);
        assert!(qemu::content(&path, "qcow2") == whole, "{options}: QEMU reads something else");
    }
}
