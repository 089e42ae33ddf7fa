//! Sparse disks of 1 TiB in other programs' formats: what is read to open them, to read a part, and
//! to walk through all of their tables.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use imgfmt::storage::FileStorage;
use imgfmt::{
    Access, CreateOptions, Durability, ExtentKind, Format, HostOffset, Image, Locking, OpenOptions,
    Storage, TryRead,
};

use crate::common::{all_extents, at, range};

const SIZE: u64 = 1 << 40;
const PLACE: u64 = SIZE / 2;
const DATA: u64 = 1 << 20;
/// In what pieces tables are read.
const PAGE: u64 = 4096;
/// What is read at most to open an image: headers, descriptors, small tables.
const OPENING_MAX: u64 = 512 << 10;

/// A disk with data in the middle.
fn sparse_disk(path: &Path, format: Format) {
    let image = Image::create(path, &CreateOptions::new(format, SIZE)).unwrap();
    image.write_at(at(PLACE), &vec![7; DATA as usize], Durability::Cached).unwrap();
    image.close().unwrap();
}

/// Counts what is read.
#[derive(Debug)]
struct Counting {
    file: FileStorage,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Counting {
    fn count(&self, buffer: &[u8]) {
        self.reads.fetch_add(1, Relaxed);
        self.bytes.fetch_add(buffer.len() as u64, Relaxed);
    }

    /// Reads and bytes since the last call.
    fn take(&self) -> (u64, u64) {
        (self.reads.swap(0, Relaxed), self.bytes.swap(0, Relaxed))
    }
}

impl Storage for Counting {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.count(buffer);
        self.file.read_at(offset, buffer)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.count(buffer);
        self.file.try_read_at(offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sparse_disk_of_1_tib_is_opened_and_read_with_few_reads_and_its_tables_are_read_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    // The length of all tables: of 4 bytes for 64 KiB, and of 8 bytes for 1 MiB at least.
    for (format, tables) in [
        (Format::Vmdk, SIZE / (64 << 10) * 4),
        (Format::Vhdx, SIZE / (1 << 20) * 8),
        (Format::Vpc, SIZE / (2 << 20) * 4),
        (Format::Vdi, SIZE / (1 << 20) * 4),
    ] {
        sparse_disk(&path, format);
        let file = FileStorage::open(&path, Access::ReadOnly, Locking::On).unwrap();
        let storage =
            Arc::new(Counting { file, reads: AtomicU64::new(0), bytes: AtomicU64::new(0) });
        let options = OpenOptions::new().format(format);
        let image = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
        let (reads, bytes) = storage.take();
        assert!(reads <= 32 && bytes <= OPENING_MAX, "{format} opened: {reads} reads, {bytes}");

        for (offset, value) in [(0, 0), (PLACE, 7), (SIZE - 512, 0)] {
            let mut sector = [0xee; 512];
            image.read_at(at(offset), &mut sector).unwrap();
            assert_eq!(sector, [value; 512], "{format} at {offset}");
            let (reads, bytes) = storage.take();
            assert!(reads <= 6 && bytes <= 6 * PAGE, "{format} at {offset}: {reads}, {bytes}");
        }

        let extents = all_extents(&image, range(0, SIZE));
        let data = extents.iter().filter(|extent| extent.kind == ExtentKind::Data);
        let data: u64 = data.map(|extent| extent.range.length()).sum();
        assert!((DATA..=64 << 20).contains(&data), "{format}: {data} bytes of data");
        let (reads, bytes) = storage.take();
        // With the directories, and what is looked up again between two parts of the walk.
        let most = tables + tables / 8 + (1 << 20);
        assert!(bytes <= most && reads <= most / PAGE, "{format}: {reads} reads, {bytes}");
        std::fs::remove_file(&path).unwrap();
    }
}
