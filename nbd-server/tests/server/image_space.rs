//! TRIM and WRITE_ZEROES on an image, and what they do with the space on disk.

use nbd_proto::transmission::{Command, Durability, Speed, ZeroMode};
use nbd_proto::wire::Errno;
use tempfile::NamedTempFile;

use crate::support::{
    Client, MODES, Script, Scripted, TestServer, allocated_bytes, disk_file, image_export, skip,
};

const LENGTH: u64 = 4 << 20;

/// A full disk on a file system that can punch holes, or why there is none.
fn full_disk() -> Option<(NamedTempFile, TestServer)> {
    let file = disk_file(&vec![0xab; LENGTH as usize]);
    file.as_file().sync_all().unwrap();
    let probe = disk_file(&[1; 65536]);
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    if let Err(error) = rustix::fs::fallocate(probe.as_file(), flags, 0, 65536) {
        skip(&format!("the file system of the temporary directory punches no holes: {error}"));
        return None;
    }
    let server = TestServer::of(image_export(file.path()));
    Some((file, server))
}

const fn zeroes(mode: ZeroMode, speed: Speed) -> Command {
    Command::WriteZeroes(mode, speed, Durability::Cached)
}

#[test]
fn trim_gives_the_blocks_back() {
    for mode in MODES {
        let Some((file, server)) = full_disk() else { return };
        let mut client = Client::connect(&server, mode);
        let before = allocated_bytes(file.path());
        let trim = Command::Trim(Durability::Fua);
        assert_eq!(client.request(1 << 20, 2 << 20, &trim).result, Ok(()));
        let after = allocated_bytes(file.path());
        assert!(after + (2 << 20) <= before + 65536, "{before} bytes, then {after}");
        assert!(client.read(0, 1 << 20) == vec![0xab; 1 << 20]);
        assert!(client.read(3 << 20, 1 << 20) == vec![0xab; 1 << 20]);
        assert_eq!(file.as_file().metadata().unwrap().len(), LENGTH, "the size stays");
    }
}

#[test]
fn zeroes_give_the_blocks_back_unless_told_not_to() {
    let Some((file, server)) = full_disk() else { return };
    let mut client = Client::connect(&server, MODES[2]);
    let before = allocated_bytes(file.path());
    let keep = zeroes(ZeroMode::KeepAllocated, Speed::Any);
    assert_eq!(client.request(1 << 20, 1 << 20, &keep).result, Ok(()));
    assert!(client.read(1 << 20, 1 << 20) == vec![0; 1 << 20]);
    assert!(allocated_bytes(file.path()) >= before, "NO_HOLE keeps the space");
    let punch = zeroes(ZeroMode::MayUnmap, Speed::Any);
    assert_eq!(client.request(1 << 20, 2 << 20, &punch).result, Ok(()));
    assert!(client.read(1 << 20, 2 << 20) == vec![0; 2 << 20]);
    let after = allocated_bytes(file.path());
    assert!(after + (2 << 20) <= before + 65536, "{before} bytes, then {after}");
}

#[test]
fn zeroes_of_any_alignment_touch_nothing_beside_them() {
    let Some((_file, server)) = full_disk() else { return };
    let mut client = Client::connect(&server, MODES[1]);
    let mut model = vec![0xab; LENGTH as usize];
    for (offset, length) in [(1, 1), (4095, 2), (10_000, 100_001), (500_000, 4096), (1 << 21, 513)]
    {
        for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
            let offset = if mode == ZeroMode::KeepAllocated { offset + (1 << 20) } else { offset };
            assert_eq!(client.request(offset, length, &zeroes(mode, Speed::Any)).result, Ok(()));
            model[offset as usize..(offset + length) as usize].fill(0);
        }
    }
    assert!(client.read(0, LENGTH) == model);
}

#[test]
fn fast_zero_is_fast_or_refused_with_nothing_changed() {
    let directories = [std::env::temp_dir(), "/dev/shm".into()];
    for directory in directories.iter().filter(|directory| directory.is_dir()) {
        let file = NamedTempFile::new_in(directory).unwrap();
        std::fs::write(file.path(), vec![0xab; 1 << 20]).unwrap();
        let server = TestServer::of(image_export(file.path()));
        let mut client = Client::connect(&server, MODES[2]);
        for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
            let offset = if mode == ZeroMode::KeepAllocated { 1 << 19 } else { 0 };
            let outcome = client.request(offset, 1 << 18, &zeroes(mode, Speed::FastOnly));
            let expected = match outcome.result {
                Ok(()) => 0,
                Err(error) => {
                    assert_eq!(error.errno, Errno::ENOTSUP);
                    0xab
                }
            };
            assert!(
                client.read(offset, 1 << 18) == vec![expected; 1 << 18],
                "{directory:?} {mode:?}"
            );
        }
    }
}

#[test]
fn an_export_that_is_not_fast_says_so_and_the_connection_lives() {
    let server = TestServer::with(Default::default(), Scripted::new(1 << 20, Script::default()));
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        assert_eq!(client.write(0, &[5; 512]), Ok(()));
        let fast = zeroes(ZeroMode::KeepAllocated, Speed::FastOnly);
        let error = client.request(0, 512, &fast).result.unwrap_err();
        assert_eq!(error.errno, Errno::ENOTSUP);
        assert_eq!(client.read(0, 512), [5; 512]);
        let slow = zeroes(ZeroMode::KeepAllocated, Speed::Any);
        assert_eq!(client.request(0, 512, &slow).result, Ok(()));
        assert_eq!(client.read(0, 512), [0; 512]);
    }
}
