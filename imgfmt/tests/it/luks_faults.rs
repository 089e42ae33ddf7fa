//! Encrypted disks when something goes wrong or happens at the same time.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{Call, FailingStorage, Fault};
use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, Format, Image, NewKey, OpenOptions, Passphrase,
    Shrink, Storage, TryRead, TryWrite,
};

use crate::common::{at, has_tool};
use crate::luks_vs_peers::{PASSPHRASE, QUICK, Volume, content, options};

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

/// A new image with the passphrase of [`options`].
fn new(path: &Path, format: Format) -> Image {
    let key = NewKey::new(Passphrase::new(PASSPHRASE.into())).iteration_time(Duration::ZERO);
    let mut create = CreateOptions::new(format, 6 * MIB);
    create.encryption = Some(key);
    drop(Image::create(path, &create).unwrap());
    Image::open(path, &options(Access::ReadWrite).format(format)).unwrap()
}

#[test]
fn a_write_that_must_not_wait_is_tried_in_whole_sectors_of_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Luks, Format::Qcow2] {
        let path = directory.path().join(format.to_string());
        let image = new(&path, format);
        // A cluster that is allocated, and one that is not.
        image.write_at(at(0), &[7; 128 << 10], Durability::Cached).unwrap();
        let mut expected = content(&image);
        for (offset, length, outcome) in [
            (512, 512, TryWrite::Complete),
            (4096, 4096, TryWrite::Complete),
            (0, 64 << 10, TryWrite::Complete),
            (0, (64 << 10) + 512, TryWrite::WouldBlock),
            (512, 700, TryWrite::WouldBlock),
            (100, 512, TryWrite::WouldBlock),
        ] {
            let data = vec![(offset / 512 + length) as u8; length as usize];
            assert_eq!(
                image.try_write_at(at(offset), &data).unwrap(),
                outcome,
                "{offset} {length}"
            );
            if outcome == TryWrite::Complete {
                expected[offset as usize..(offset + length) as usize].copy_from_slice(&data);
            }
            assert!(content(&image) == expected, "{format}: {offset} {length}");
        }
        if format == Format::Qcow2 {
            let tried = image.try_write_at(at(MIB), &[1; 4096]).unwrap();
            assert_eq!(tried, TryWrite::WouldBlock, "it allocates");
        }
        image.close().unwrap();
        let again = Image::open(&path, &options(Access::ReadOnly).format(format)).unwrap();
        assert!(content(&again) == expected, "{format}");
    }
}

/// Blocks of CBC depend on each other, so that writes of a sector must exclude reads of it.
#[test]
fn a_write_in_cbc_is_never_tried() {
    if !has_tool("cryptsetup") {
        return;
    }
    let arguments = ["--type", "luks1", "-c", "aes-cbc-essiv:sha256", QUICK[0], QUICK[1]];
    let volume = Volume::by_cryptsetup(6 * MIB, &arguments);
    let image = volume.open(Access::ReadWrite).unwrap();
    assert_eq!(image.try_write_at(at(0), &[1; 512]).unwrap(), TryWrite::WouldBlock);
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
