//! `OpenOptions::cache`: whether flushes and durable writes ask the kernel for stable storage.
//!
//! A file of /proc tells: it can be written, and every sync of it fails.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use imgfmt::storage::FileStorage;
use imgfmt::{
    Access, CacheMode, CreateOptions, Durability, ErrorKind, Format, HostOffset, Image, Locking,
    OpenOptions, Speed, Storage, ZeroMode,
};

use crate::common::{at, range};

/// Who is killed first when memory runs out. What is written to it here is what it holds.
const NEVER_SYNCED: &str = "/proc/self/oom_score_adj";

/// The writer of that file: a process has only one for each file.
static WRITER: Mutex<()> = Mutex::new(());

/// The only writer of that file, if syncs of it fail here, as they do on Linux.
fn writer_that_can_tell() -> Option<MutexGuard<'static, ()>> {
    let writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    let file = std::fs::OpenOptions::new().write(true).open(NEVER_SYNCED);
    let tells = file.is_ok_and(|file| file.sync_data().is_err());
    if !tells {
        println!("skipped: {NEVER_SYNCED} cannot be written, or it can be synced");
    }
    tells.then_some(writer)
}

fn options(cache: CacheMode) -> OpenOptions {
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    options.locking(Locking::Off).cache(cache)
}

#[test]
fn a_flush_syncs_the_file_unless_told_not_to() {
    let Some(_writer) = writer_that_can_tell() else { return };
    let image = Image::open(NEVER_SYNCED, &options(CacheMode::Writeback)).unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Io, "it is synced");
    drop(image);
    let image = Image::open(NEVER_SYNCED, &options(CacheMode::Unsafe)).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
}

#[test]
fn a_durable_write_syncs_the_file_unless_told_not_to() {
    let Some(_writer) = writer_that_can_tell() else { return };
    let open = |cache| {
        let path = Path::new(NEVER_SYNCED);
        FileStorage::open_cached(path, Access::ReadWrite, Locking::Off, cache).unwrap()
    };
    let held = std::fs::read(NEVER_SYNCED).unwrap();
    let write =
        |file: FileStorage, durability| file.write_at(HostOffset::new(0), &held, durability);
    write(open(CacheMode::Writeback), Durability::Cached).unwrap();
    write(open(CacheMode::Writeback), Durability::Fua).unwrap_err();
    write(open(CacheMode::Unsafe), Durability::Fua).unwrap();
}

#[test]
fn an_image_that_is_not_synced_is_complete_when_it_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = directory.path().join(format.name());
        Image::create(&path, &CreateOptions::new(format, 1 << 20)).unwrap();
        let mut unsynced = options(CacheMode::Unsafe);
        unsynced.format = Some(format);
        let image = Image::open(&path, &unsynced).unwrap();
        image.write_at(at(70_000), &[7; 100_000], Durability::Fua).unwrap();
        let zeroes = range(80_000, 1000);
        image.write_zeroes(zeroes, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap();
        image.flush().unwrap();
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new().format(format)).unwrap();
        let mut found = vec![1; 100_000];
        image.read_at(at(70_000), &mut found).unwrap();
        let mut expected = vec![7; 100_000];
        expected[10_000..11_000].fill(0);
        assert!(found == expected, "{format}");
    }
}
