//! Images past the page cache get space ahead of their writes: it does not outlive them, and a
//! killed program leaves nothing else.

use std::fs;
use std::path::Path;

use imgfmt::{Access, CacheMode, CreateOptions, Durability, Format, Image, OpenOptions};

use crate::common::{at, qemu};
use crate::direct_io::open_direct;
use crate::judge::subjects::{Tolerance, qemu_check};

const SIZE: u64 = 1 << 30;
const CLUSTER: u64 = 64 << 10;
const WRITES: u64 = 40;

fn opened(path: &Path, cache: CacheMode) -> Image {
    Image::open(path, &OpenOptions::new().access(Access::ReadWrite).cache(cache)).unwrap()
}

/// A new image at `path`, with a block in every second cluster.
fn written(path: &Path, cache: CacheMode) -> Image {
    Image::create(path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let image = opened(path, cache);
    for number in 0..WRITES {
        let block = [number as u8 + 1; 4096];
        image.write_at(at(number * 2 * CLUSTER + 8192), &block, Durability::Cached).unwrap();
    }
    image.flush().unwrap();
    image
}

fn check_content(image: &Image, what: &str) {
    for number in 0..WRITES {
        let mut found = vec![0xee; 2 * CLUSTER as usize];
        image.read_at(at(number * 2 * CLUSTER), &mut found).unwrap();
        let mut expected = vec![0; 2 * CLUSTER as usize];
        expected[8192..12288].fill(number as u8 + 1);
        assert!(found == expected, "{what}: block {number}");
    }
}

#[test]
fn space_that_was_taken_ahead_is_given_back_when_the_image_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let [plain, direct] = ["plain", "direct"].map(|name| directory.path().join(name));
    written(&plain, CacheMode::Writeback).close().unwrap();
    if open_direct(&plain).is_none() {
        return;
    }
    let length = fs::metadata(&plain).unwrap().len();
    let image = written(&direct, CacheMode::None);
    assert!(fs::metadata(&direct).unwrap().len() > length, "it was taken");
    image.close().unwrap();
    assert_eq!(fs::metadata(&direct).unwrap().len(), length);
    check_content(&opened(&direct, CacheMode::Writeback), "closed");
    if qemu::has_qemu() {
        qemu_check(&direct, Tolerance::Nothing, "closed");
    }
}

#[test]
fn a_killed_writer_leaves_space_that_is_not_a_part_of_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let [path, left] = ["disk", "left"].map(|name| directory.path().join(name));
    fs::write(&path, [0; 4096]).unwrap();
    if open_direct(&path).is_none() {
        return;
    }
    fs::remove_file(&path).unwrap();
    let image = written(&path, CacheMode::None);
    // What is on disk while the image is open is what a killed program leaves.
    fs::copy(&path, &left).unwrap();
    drop(image);
    if qemu::has_qemu() {
        qemu_check(&left, Tolerance::Nothing, "killed");
    }
    for cache in [CacheMode::None, CacheMode::Writeback] {
        let image = opened(&left, cache);
        check_content(&image, "killed");
        // These go to the space that was left.
        let start = WRITES * 2 * CLUSTER + u64::from(cache == CacheMode::None) * 64 * CLUSTER;
        for number in 0..16 {
            image
                .write_at(at(start + number * CLUSTER + 512), &[9; 512], Durability::Cached)
                .unwrap();
        }
        let mut found = vec![0xee; CLUSTER as usize];
        image.read_at(at(start + CLUSTER), &mut found).unwrap();
        assert!(
            found
                .iter()
                .enumerate()
                .all(|(place, byte)| { *byte == if (512..1024).contains(&place) { 9 } else { 0 } })
        );
        image.close().unwrap();
    }
    check_content(&opened(&left, CacheMode::Writeback), "used on");
    if qemu::has_qemu() {
        qemu_check(&left, Tolerance::Nothing, "used on");
    }
}
