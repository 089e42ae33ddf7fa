//! A block device as an export.

use std::path::PathBuf;
use std::process::Command as Process;

use nbd_proto::transmission::{Command, Durability, Speed, ZeroMode};

use crate::support::{
    Client, MODES, Random, TestServer, allocated_bytes, disk_file, image_export, skip,
};

/// A loop device, given back when dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(file: &std::path::Path) -> Option<Self> {
        let output = match Process::new("losetup").arg("--find").arg("--show").arg(file).output() {
            Ok(output) => output,
            Err(error) => return Self::missing(&format!("losetup: {error}")),
        };
        if !output.status.success() {
            return Self::missing(&String::from_utf8_lossy(&output.stderr));
        }
        Some(Self(String::from_utf8_lossy(&output.stdout).trim().into()))
    }

    fn missing(why: &str) -> Option<Self> {
        // Only root has these, also where everything else is installed.
        println!("skipped: no loop device: {why}");
        None
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Process::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_read_written_zeroed_and_discarded() {
    const SIZE: u64 = 8 << 20;
    let mut random = Random::new();
    let mut model = random.bytes(SIZE as usize);
    let file = disk_file(&model);
    let Some(device) = LoopDevice::new(file.path()) else { return };
    if let Err(error) = std::fs::OpenOptions::new().write(true).open(&device.0) {
        return skip(&format!("{} cannot be opened: {error}", device.0.display()));
    }
    let server = TestServer::of(image_export(&device.0));
    let mut client = Client::connect(&server, MODES[2]);
    assert_eq!(client.negotiated.size, SIZE);
    assert!(client.read(0, SIZE) == model);

    // Also what is not a multiple of the device's sectors.
    for (offset, length) in [(0, 512), (1000, 1), (4095, 8194), (1 << 20, 1 << 20)] {
        let data = random.bytes(length);
        assert_eq!(client.write(offset as u64, &data), Ok(()));
        model[offset..offset + length].copy_from_slice(&data);
    }
    let zeroes = Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Fua);
    for (offset, length) in [(2 << 20, 1 << 20), (3_500_001, 777)] {
        assert_eq!(client.request(offset as u64, length as u64, &zeroes).result, Ok(()));
        model[offset..offset + length].fill(0);
    }
    assert!(client.read(0, SIZE) == model);

    assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
    assert!(std::fs::read(file.path()).unwrap() == model, "it is on the disk");
    let before = allocated_bytes(file.path());
    let trim = Command::Trim(Durability::Fua);
    assert_eq!(client.request(4 << 20, 4 << 20, &trim).result, Ok(()));
    let after = allocated_bytes(file.path());
    assert!(after + (3 << 20) < before, "the discard reached the disk: {before}, then {after}");
    assert!(client.read(0, 4 << 20) == model[..4 << 20]);
    assert!(server.stop().is_ok());
}
