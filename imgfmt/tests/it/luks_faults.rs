//! Encrypted disks when something goes wrong or happens at the same time.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{Call, FailingStorage, Fault};
use imgfmt::{
    Access, Durability, ErrorKind, Format, Image, OpenOptions, Shrink, Storage, TryRead, TryWrite,
};

use crate::common::{at, has_tool};
use crate::luks_vs_peers::{QUICK, Volume, content, options};

const MIB: u64 = 1 << 20;
const ENOSPC: i32 = 28;

/// A volume of version 1 in memory whose calls can fail and wait.
fn volume(cipher: &str, bits: &str) -> (Arc<MemoryStorage>, Arc<FailingStorage>, Image) {
    let arguments = ["--type", "luks1", "-c", cipher, "-s", bits, QUICK[0], QUICK[1]];
    let volume = Volume::by_cryptsetup(6 * MIB, &arguments);
    let memory = Arc::new(MemoryStorage::from_bytes(&std::fs::read(&volume.path).unwrap()));
    let storage = FailingStorage::new(Arc::clone(&memory) as _);
    let image = Image::from_storage(Arc::clone(&storage) as _, &options(Access::ReadWrite));
    (memory, storage, image.unwrap())
}

#[test]
fn a_write_that_must_not_wait_is_not_tried() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(6 * MIB, &["--type", "luks1", QUICK[0], QUICK[1]]);
    let image = volume.open(Access::ReadWrite).unwrap();
    for length in [512, 700, 2 << 20] {
        let tried = image.try_write_at(at(0), &vec![1; length]).unwrap();
        assert_eq!(tried, TryWrite::WouldBlock);
    }
}

#[test]
fn a_disk_that_cannot_grow_stays_as_it_was() {
    if !has_tool("cryptsetup") {
        return;
    }
    let (memory, storage, mut image) = volume("aes-xts-plain64", "512");
    let (size, before, length) = (image.size(), content(&image), memory.len().unwrap());
    // The third write, after about a megabyte.
    let call = storage.calls() + 2;
    storage.set_fault(Some(Fault { calls: call..call + 1, code: ENOSPC }));
    let error = image.resize(size + 4 * MIB, Shrink::Refuse).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(storage.failed() > 0 && memory.len().unwrap() == length);
    assert!(content(&image) == before);
    image.resize(size + MIB, Shrink::Refuse).unwrap();
    assert!(content(&image)[before.len()..].iter().all(|byte| *byte == 0));
}

/// Whatever of the growth has happened when power fails, what is there reads as zero.
#[test]
fn a_disk_that_grows_reads_as_zero_at_every_moment() {
    if !has_tool("cryptsetup") {
        return;
    }
    let (memory, storage, mut image) = volume("aes-xts-plain64", "512");
    let (size, length) = (image.size(), memory.len().unwrap());
    storage.hold(Call::Write, length + MIB..u64::MAX);
    std::thread::scope(|scope| {
        let growing = scope.spawn(move || image.resize(size + 4 * MIB, Shrink::Refuse));
        while storage.held() == 0 {
            std::thread::yield_now();
        }
        let mut bytes = vec![0; memory.len().unwrap() as usize];
        memory.read_exact_at(imgfmt::HostOffset::new(0), &mut bytes).unwrap();
        let now = Arc::new(MemoryStorage::from_bytes(&bytes));
        let crashed = Image::from_storage(now as _, &options(Access::ReadOnly)).unwrap();
        assert!(crashed.size() > size && crashed.size() < size + 4 * MIB, "it has grown partly");
        assert!(content(&crashed)[size as usize..].iter().all(|byte| *byte == 0));
        storage.release();
        growing.join().unwrap().unwrap();
    });
}

#[test]
fn sizes_that_are_not_whole_sectors_are_refused_with_the_reason() {
    if !has_tool("cryptsetup") {
        return;
    }
    let (_, _, mut image) = volume("aes-xts-plain64", "512");
    let error = image.resize(5 * MIB + 1, Shrink::Refuse).unwrap_err().to_string();
    assert!(error.contains("a multiple of 512 bytes"), "{error}");
}

#[test]
fn a_sector_of_cbc_is_not_read_while_it_is_written() {
    if !has_tool("cryptsetup") {
        return;
    }
    for (cipher, bits, expected) in [
        ("aes-cbc-essiv:sha256", "256", TryRead::WouldBlock),
        ("aes-xts-plain64", "512", TryRead::Complete),
    ] {
        let (_, storage, image) = volume(cipher, bits);
        image.write_at(at(0), &[7; 4096], Durability::Cached).unwrap();
        storage.hold(Call::Write, 0..u64::MAX);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| image.write_at(at(512), &[8; 512], Durability::Cached));
            while storage.held() == 0 {
                std::thread::yield_now();
            }
            let mut sector = [0; 512];
            let tried = image.try_read_at(at(512), &mut sector).unwrap();
            assert_eq!(tried, expected, "{cipher}");
            storage.release();
            writer.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_file_that_is_not_a_volume_is_refused_as_such() {
    let storage = Arc::new(MemoryStorage::new(8 * MIB));
    let error = Image::from_storage(storage as _, &OpenOptions::new().format(Format::Luks));
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat);
    assert!(error.to_string().contains("does not begin with a LUKS header"), "{error}");
}
