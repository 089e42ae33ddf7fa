//! A raw image on a block device: its size, and requests that are not aligned to its blocks.

use imgfmt::{Access, CreateOptions, Durability, Format, Image, OpenOptions, Speed, ZeroMode};

use crate::common::{self, all_extents, at, has_tool, range, text};

/// A loop device that is detached when the test ends.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(path: &std::path::Path) -> Option<Self> {
        let output =
            std::process::Command::new("losetup").args(["--find", "--show"]).arg(path).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            Ok(output) => {
                println!("skipped: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_takes_any_alignment_and_keeps_its_size() {
    if !has_tool("losetup") {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xaa; 1 << 20]).unwrap();
    println!("backing file {}", text(file.path()));
    let Some(device) = LoopDevice::attach(file.path()) else { return };
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    let image = Image::open(&device.0, &options).unwrap();
    assert_eq!(image.size(), 1 << 20);
    image.write_at(at(1001), b"unaligned", Durability::Fua).unwrap();
    for (mode, start) in [(ZeroMode::MayUnmap, 5001), (ZeroMode::KeepAllocated, 200_001)] {
        image.write_zeroes(range(start, 9999), mode, Speed::Any, Durability::Fua).unwrap();
        let mut bytes = vec![1; 10_001];
        image.read_at(at(start - 1), &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[10_000]), (0xaa, 0xaa));
        assert!(bytes[1..10_000].iter().all(|byte| *byte == 0));
    }
    image.discard(range(300_001, 9999), Durability::Cached).unwrap();
    let mut bytes = [0; 9];
    image.read_at(at(1001), &mut bytes).unwrap();
    assert_eq!(&bytes, b"unaligned");
    let error = image.write_at(at((1 << 20) - 1), b"xy", Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), imgfmt::ErrorKind::OutOfBounds);
    assert_eq!(all_extents(&image, range(0, 1 << 20)).len(), 1);
}

#[test]
fn a_qcow2_image_on_a_full_device_shows_no_garbage_and_stays_sound() {
    if !has_tool("losetup") || !common::qemu::has_qemu() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xaa; 4 << 20]).unwrap();
    let Some(device) = LoopDevice::attach(file.path()) else { return };
    common::qemu::create(std::path::Path::new(&device.0), "", "8M");
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let image = Image::open(&device.0, &options).unwrap();
    let mut model = vec![0; 8 << 20];
    let mut failure = None;
    for cluster in 0..100 {
        let offset = cluster * 65536 + 1000;
        match image.write_at(at(offset), &[7; 5000], Durability::Cached) {
            Ok(()) => model[offset as usize..offset as usize + 5000].fill(7),
            Err(error) => {
                failure = Some(error.kind());
                break;
            }
        }
    }
    assert_eq!(failure, Some(imgfmt::ErrorKind::NoSpace));
    // What is there can still be changed, and freed space used again.
    image.discard(range(0, 65536), Durability::Fua).unwrap();
    model[..65536].fill(0);
    image.write_at(at(7 << 20), &[8; 100], Durability::Fua).unwrap();
    model[7 << 20..(7 << 20) + 100].fill(8);
    let mut content = vec![1; 8 << 20];
    image.read_at(at(0), &mut content).unwrap();
    assert!(content == model, "the device's old content shows");
    image.close().unwrap();
    common::qemu::check(std::path::Path::new(&device.0));
}

#[test]
fn an_image_created_on_a_device_is_open_and_shows_nothing_old() {
    if !has_tool("losetup") {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xaa; 4 << 20]).unwrap();
    let Some(device) = LoopDevice::attach(file.path()) else { return };
    for format in [Format::Raw, Format::Qcow2] {
        let image = Image::create(&device.0, &CreateOptions::new(format, 1 << 20)).unwrap();
        assert_eq!((image.access(), image.format()), (Access::ReadWrite, format));
        let mut start = vec![1; 4096];
        image.read_at(at(0), &mut start).unwrap();
        assert!(start.iter().all(|byte| *byte == 0), "{format}");
        image.write_at(at(70_000), b"first", Durability::Cached).unwrap();
        image.close().unwrap();
        let image = Image::open(&device.0, &OpenOptions::new().format(format)).unwrap();
        let mut found = [0; 5];
        image.read_at(at(70_000), &mut found).unwrap();
        assert_eq!(&found, b"first");
    }
}
