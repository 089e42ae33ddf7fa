//! Disks whose tables do not fit into the memory that tables may take up.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use imgfmt::storage::FileStorage;
use imgfmt::testing::{Call, FailingStorage};
use imgfmt::{
    Access, CacheMode, CreateOptions, Durability, Format, HostOffset, Image, Locking, OpenOptions,
    Repair, Storage, TryRead,
};
use tempfile::TempDir;

use crate::common::{Random, at, wait_until};

const CLUSTER_BITS: u32 = 21;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const SIZE: u64 = 16 << 40;
/// What one L2 table maps.
const COVERAGE: u64 = CLUSTER / 8 * CLUSTER;
const TABLES: u64 = SIZE / COVERAGE;
const TABLES_START: u64 = 4 * CLUSTER;
const TABLES_END: u64 = TABLES_START + TABLES * CLUSTER;
/// The disk is mapped to so many clusters again and again.
const DATA_CLUSTERS: u64 = 256;
/// In what pieces tables are read.
const SLICE: u64 = 4096;
const SLICE_COVERAGE: u64 = SLICE / 8 * CLUSTER;

/// A qcow2 image of 16 TiB, every cluster of which is mapped. The first bytes of a cluster of the
/// disk tell which of the clusters with data it is.
fn mapped_disk(directory: &Path) -> PathBuf {
    let path = directory.join("large.qcow2");
    let file = File::create(&path).unwrap();
    let mut header = Vec::new();
    let words: [u32; 26] = [
        0x5146_49fb,
        3,
        0,
        0,
        0,
        CLUSTER_BITS,
        (SIZE >> 32) as u32,
        SIZE as u32,
        0,
        TABLES as u32,
        0,
        3 * CLUSTER as u32,
        0,
        CLUSTER as u32,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    ];
    header.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    file.write_all_at(&header, 0).unwrap();
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER).unwrap();
    let references = SIZE / CLUSTER / DATA_CLUSTERS;
    let counts = std::iter::repeat_n(1_u16, (4 + TABLES) as usize)
        .chain(std::iter::repeat_n(u16::try_from(references).unwrap(), DATA_CLUSTERS as usize));
    let counts: Vec<u8> = counts.flat_map(u16::to_be_bytes).collect();
    file.write_all_at(&counts, 2 * CLUSTER).unwrap();
    let data = |index: u64| TABLES_END + index % DATA_CLUSTERS * CLUSTER;
    let part: Vec<u8> = (0..DATA_CLUSTERS).flat_map(|index| data(index).to_be_bytes()).collect();
    let table = part.repeat((CLUSTER / 8 / DATA_CLUSTERS) as usize);
    for number in 0..TABLES {
        let offset = TABLES_START + number * CLUSTER;
        file.write_all_at(&(offset | 1 << 63).to_be_bytes(), 3 * CLUSTER + number * 8).unwrap();
        file.write_all_at(&table, offset).unwrap();
    }
    for index in 0..DATA_CLUSTERS {
        file.write_all_at(&(index + 1).to_be_bytes(), data(index)).unwrap();
    }
    file.set_len(data(DATA_CLUSTERS - 1) + CLUSTER).unwrap();
    path
}

fn file_at(path: &Path, access: Access) -> Arc<FileStorage> {
    Arc::new(FileStorage::open(path, access, Locking::Off).unwrap())
}

fn stamp_at(image: &Image, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    image.read_at(at(offset), &mut bytes).unwrap();
    u64::from_be_bytes(bytes)
}

fn expected_at(offset: u64) -> u64 {
    offset / CLUSTER % DATA_CLUSTERS + 1
}

/// Counts what is read of L2 tables.
#[derive(Debug)]
struct Counting {
    file: Arc<FileStorage>,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Counting {
    fn count(&self, offset: HostOffset, buffer: &[u8]) {
        if (TABLES_START..TABLES_END).contains(&offset.bytes()) {
            self.reads.fetch_add(1, Relaxed);
            self.bytes.fetch_add(buffer.len() as u64, Relaxed);
        }
    }
}

impl Storage for Counting {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.count(offset, buffer);
        self.file.read_at(offset, buffer)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.count(offset, buffer);
        self.file.try_read_at(offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_random_read_of_a_disk_of_16_tib_reads_one_piece_of_a_table_at_most() {
    const READS: u64 = 300;
    let directory = tempfile::tempdir().unwrap();
    let path = mapped_disk(directory.path());
    let file = file_at(&path, Access::ReadOnly);
    let storage = Arc::new(Counting { file, reads: AtomicU64::new(0), bytes: AtomicU64::new(0) });
    // More than fits into the smallest cache, less than fits into the one by default.
    let open =
        |options: OpenOptions| Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    let image = open(OpenOptions::new().format(Format::Qcow2));
    let mut random = Random::new("large_disks");
    let offsets: Vec<u64> = (0..READS).map(|_| random.below(SIZE / CLUSTER) * CLUSTER).collect();
    let read_all = |image: &Image| {
        for offset in &offsets {
            assert_eq!(stamp_at(image, *offset), expected_at(*offset), "at {offset}");
        }
        (storage.reads.swap(0, Relaxed), storage.bytes.swap(0, Relaxed))
    };
    let (reads, bytes) = read_all(&image);
    assert!(reads <= READS && bytes <= reads * SLICE, "{reads} reads of {bytes} bytes");
    assert_eq!(read_all(&image), (0, 0), "all of that fits into memory");
    let image = open(OpenOptions::new().format(Format::Qcow2).metadata_cache_bytes(0));
    for _ in 0..2 {
        let (reads, bytes) = read_all(&image);
        assert!(reads <= READS && bytes <= reads * SLICE, "{reads} reads of {bytes} bytes");
        assert!(reads > READS / 2, "the memory is bounded");
    }
    let image = open(OpenOptions::new().format(Format::Qcow2).metadata_cache_bytes(64 << 20));
    // All tables fit: they are read in larger pieces.
    let (reads, bytes) = read_all(&image);
    assert!(bytes == reads << 16, "{reads} reads of {bytes} bytes");
}

#[test]
fn a_piece_of_a_table_that_is_read_slowly_delays_only_who_needs_it_and_is_read_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = mapped_disk(directory.path());
    let storage = FailingStorage::new(file_at(&path, Access::ReadOnly) as _);
    let options = OpenOptions::new().format(Format::Qcow2);
    let image = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    let slow = 5 * COVERAGE + 3 * SLICE_COVERAGE;
    let start = TABLES_START + 5 * CLUSTER + 3 * SLICE;
    storage.hold(Call::Read, start..start + SLICE);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|number| {
                let image = &image;
                scope.spawn(move || stamp_at(image, slow + number * CLUSTER))
            })
            .collect();
        wait_until("a read of the table", || storage.held() == 1);
        // Everybody else goes on, in the same table too.
        for offset in (0..TABLES).map(|table| table * COVERAGE).chain([slow - SLICE_COVERAGE]) {
            assert_eq!(stamp_at(&image, offset), expected_at(offset));
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(storage.held(), 1, "nobody else reads the same");
        storage.release();
        for (number, waiting) in (0..).zip(waiting) {
            assert_eq!(waiting.join().unwrap(), expected_at(slow + number * CLUSTER));
        }
    });
}

#[test]
fn a_table_in_the_page_cache_is_looked_up_without_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let path = mapped_disk(directory.path());
    let file = file_at(&path, Access::ReadOnly);
    if file.try_read_at(HostOffset::new(TABLES_START), &mut [0; 8]).unwrap() != TryRead::Complete {
        println!("skipped: this file system cannot read without waiting");
        return;
    }
    let image = Image::from_storage(file, &OpenOptions::new().format(Format::Qcow2)).unwrap();
    let mut bytes = [0; 8];
    let offset = 7 * COVERAGE + 9 * CLUSTER;
    assert_eq!(image.try_read_at(at(offset), &mut bytes).unwrap(), TryRead::Complete);
    assert_eq!(u64::from_be_bytes(bytes), expected_at(offset));
}

const BLOCK: usize = 4096;
const GRID: u64 = 32 << 20;
const GRID_POINTS: u64 = 256;

/// A disk of 8 GiB whose tables, of 1 MiB, have to share 256 KiB.
fn disk_of_many_tables() -> (TempDir, PathBuf, OpenOptions) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, GRID * GRID_POINTS)).unwrap();
    let options = OpenOptions::new().access(Access::ReadWrite).metadata_cache_bytes(0);
    (directory, path, options.cache(CacheMode::Unsafe))
}

fn write_stamp(image: &Image, writer: u64, point: u64, number: u64) {
    let block = number.to_be_bytes().repeat(BLOCK / 8);
    let offset = point * GRID + writer * (64 << 10);
    image.write_at(at(offset), &block, Durability::Cached).unwrap();
}

fn read_stamp(image: &Image, writer: u64, point: u64) -> u64 {
    stamp_at(image, point * GRID + writer * (64 << 10) + BLOCK as u64 - 8)
}

#[test]
fn writers_readers_flushes_and_tables_that_give_way_lose_nothing() {
    const WRITERS: u64 = 3;
    const WRITES: u64 = 500;
    let (_directory, path, options) = disk_of_many_tables();
    let image = Image::open(&path, &options).unwrap();
    let written: Vec<AtomicU64> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let ended = AtomicU64::new(0);
    let expected: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (image, written, ended) = (&image, &written, &ended);
                scope.spawn(move || {
                    let mut random = Random::seeded(writer * 2 + 1);
                    let mut last = vec![0; GRID_POINTS as usize];
                    for number in 1..=WRITES {
                        let point = random.below(GRID_POINTS);
                        assert_eq!(read_stamp(image, writer, point), last[point as usize]);
                        written[writer as usize].store(number, Relaxed);
                        write_stamp(image, writer, point, number);
                        last[point as usize] = number;
                    }
                    ended.fetch_add(1, Relaxed);
                    last
                })
            })
            .collect();
        scope.spawn(|| {
            while ended.load(Relaxed) < WRITERS {
                image.flush().unwrap();
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        scope.spawn(|| {
            let mut random = Random::seeded(99);
            while ended.load(Relaxed) < WRITERS {
                let (writer, point) = (random.below(WRITERS), random.below(GRID_POINTS));
                let stamp = read_stamp(&image, writer, point);
                let newest = written[writer as usize].load(Relaxed);
                assert!(stamp <= newest, "{stamp} was not written yet: {newest}");
            }
        });
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    let check = |image: &Image| {
        for (writer, last) in (0..).zip(&expected) {
            for (point, number) in (0..).zip(last) {
                assert_eq!(read_stamp(image, writer, point), *number, "{writer} at {point}");
            }
        }
    };
    check(&image);
    image.close().unwrap();
    check(&Image::open(&path, &OpenOptions::new()).unwrap());
    let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}
