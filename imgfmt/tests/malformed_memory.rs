//! However large the tables are that an image claims to have, opening and reading it takes a
//! bounded amount of memory. One test in one process: it looks at the process's peak.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

mod common;
#[path = "../fuzz/src/handmade.rs"]
mod handmade;

use std::path::Path;

use handmade::{COPIED, Handmade, field};
use imgfmt::{CreateOptions, Durability, Format, Image, OpenOptions, OpenPolicy};

/// The peak of the memory this process has taken so far.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Makes, opens and walks through sparse disks of 1 TiB, whose tables have up to 64 MiB.
fn sparse_disks(directory: &Path) {
    const SIZE: u64 = 1 << 40;
    let path = directory.join("sparse");
    for format in [Format::Vmdk, Format::Vhdx] {
        let image = Image::create(&path, &CreateOptions::new(format, SIZE)).unwrap();
        let data = [7; 65536];
        image.write_at(common::at(SIZE / 2), &data, Durability::Cached).unwrap();
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new().format(format)).unwrap();
        image.read_at(common::at(SIZE / 2), &mut [0; 512]).unwrap();
        assert!(image.extents(common::range(0, SIZE)).all(|extent| extent.is_ok()));
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn hostile_and_large_images_take_no_more_memory_than_the_limits_allow() {
    let Some(started) = peak_bytes() else {
        println!("skipped: this system does not tell the peak of a process's memory");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    sparse_disks(directory.path());
    let before = peak_bytes().unwrap();
    println!("peak at the start {started}, after the sparse disks {before}");
    assert!(before - started < 32 << 20, "sparse disks took {} bytes", before - started);
    let path = directory.path().join("disk.qcow2");
    let fields32 = [
        field::BACKING_LENGTH,
        field::CLUSTER_BITS,
        field::L1_SIZE,
        field::REFCOUNT_TABLE_CLUSTERS,
        field::SNAPSHOT_COUNT,
        field::HEADER_LENGTH,
        field::EXTENSIONS + 4,
    ];
    for place in fields32 {
        for value in [u32::MAX, u32::MAX / 2, 1 << 28, 1 << 22, 65536, 21] {
            let mut image = Handmade::new(16, 1 << 20);
            image.put32(field::EXTENSIONS, 0x1234_5678);
            image.put32(place, value);
            // Sparse, so that tables of any size lie within the file.
            std::fs::write(&path, &image.bytes).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(1 << 42).unwrap();
            let options = OpenOptions::new().format(Format::Qcow2).policy(OpenPolicy::deny());
            if let Ok(disk) = Image::open(&path, &options) {
                let mut buffer = [0; 4096];
                let _ = disk.read_at(common::at(0), &mut buffer);
                let _ = disk.extents(common::range(0, disk.size())).bounded(1, 10).count();
            }
        }
    }
    // A disk of 2^60 bytes with all its L1 entries leading to one table.
    let mut image = Handmade::new(21, 1 << 60);
    let entries = (1 << 60) / (1u64 << 39);
    image.put32(field::L1_SIZE, entries as u32);
    let table = image.bytes.len();
    image.put64(field::L1_OFFSET, table as u64);
    for _ in 0..entries {
        image.bytes.extend_from_slice(&((4 << 21) | COPIED).to_be_bytes());
    }
    std::fs::write(&path, &image.bytes).unwrap();
    drop(image);
    let between = peak_bytes().unwrap();
    let disk = Image::open(&path, &OpenOptions::new().format(Format::Qcow2)).unwrap();
    for index in 0..1000 {
        disk.read_at(common::at(index << 39), &mut [0; 512]).unwrap();
    }
    disk.extents(common::range(0, 1 << 42))
        .bounded(1, 10)
        .for_each(|extent| assert!(extent.is_ok()));
    let after = peak_bytes().unwrap();
    println!("peak before {before}, after the headers {between}, after the disk {after}");
    assert!(between - before < 256 << 20, "headers took {} bytes", between - before);
    assert!(after - between < 128 << 20, "the disk took {} bytes", after - between);
}
