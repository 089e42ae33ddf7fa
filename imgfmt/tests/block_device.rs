//! A raw image on a block device: its size, and requests that are not aligned to its blocks.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

mod common;

use common::{at, has_tool, range, text};
use imgfmt::{Access, Durability, Format, Image, OpenOptions, Speed, ZeroMode};

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
    assert_eq!(image.extents(range(0, 1 << 20), 10).unwrap().len(), 1);
}
