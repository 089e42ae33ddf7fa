//! Tests of files that are written once.

use std::ops::Range;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::pages::give_up_all;
use super::*;
use crate::access::{Access, Locking};
use crate::cache_mode::CacheMode;
use crate::storage::{Durability, FileStorage, Storage as _};
use crate::units::HostOffset;

const MIB: u64 = 1 << 20;
const TMPFS: rustix::fs::FsWord = 0x0102_1994;
const SMALL: Sizes = Sizes { first: MIB, window: MIB, step: 64 * MIB, behind: 2, group: 4 * MIB };

fn small(pages: &Arc<Noting>, backlog: Backlog) -> WriteBehind {
    WriteBehind::with_sizes(Arc::clone(pages) as _, backlog, SMALL)
}

/// Bytes of the file that the page cache holds.
fn cached(path: &std::path::Path) -> Option<u64> {
    let fincore = Command::new("fincore").args(["-b", "-n", "-o", "RES"]).arg(path).output();
    String::from_utf8(fincore.ok()?.stdout).ok()?.trim().parse().ok()
}

#[test]
fn a_long_copy_leaves_little_in_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, b"").unwrap();
    let file_system = rustix::fs::statfs(&path).unwrap();
    if cached(&path).is_none() || file_system.f_type == TMPFS {
        assert!(std::env::var_os("CI").is_none(), "needs fincore, and TMPDIR on a disk");
        eprintln!("skipped: needs fincore, and TMPDIR on a disk");
        return;
    }
    let mut storage = FileStorage::open(&path, Access::ReadWrite, Locking::Off).unwrap();
    let file = Arc::new(std::fs::File::open(&path).unwrap());
    let behind = WriteBehind::with_sizes(file, Backlog::Limited, SMALL);
    storage.write_behind = Some(Box::new(behind));
    let data = vec![7; 1 << 18];
    for offset in (0..64 * MIB).step_by(data.len()) {
        storage.write_at(HostOffset::new(offset), &data, Durability::Cached).unwrap();
    }
    // The thread goes on on its own. A file system may keep some pages, such as those of a
    // large folio.
    let deadline = Instant::now() + Duration::from_secs(60);
    while cached(&path).unwrap() > 16 * MIB {
        let rest = cached(&path).unwrap();
        assert!(Instant::now() < deadline, "{rest} bytes are in the page cache");
        thread::sleep(Duration::from_millis(10));
    }
    let written = std::fs::read(&path).unwrap();
    assert!(written.len() as u64 == 64 * MIB && written.iter().all(|byte| *byte == 7));
}

/// Notes what is given up and waited for, and fails as it is told.
#[derive(Default)]
struct Noting {
    given_up: Mutex<Vec<Range<u64>>>,
    waited: Mutex<usize>,
    failures: Mutex<Vec<i32>>,
}

impl Pages for Noting {
    fn give_up(&self, range: Range<u64>) {
        self.given_up.lock().unwrap().push(range);
    }

    fn wait(&self) -> io::Result<()> {
        *self.waited.lock().unwrap() += 1;
        self.check()
    }

    fn check(&self) -> io::Result<()> {
        let failure = self.failures.lock().unwrap().pop();
        failure.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
    }
}

#[test]
fn windows_are_written_back_at_once_and_given_up_later_and_all_of_a_group_again() {
    let (pages, (windows, received)) = (Noting::default(), channel());
    let window = |number: u64| number * MIB..(number + 1) * MIB;
    for number in 0..9 {
        windows.send(Part { bytes: MIB, range: window(number) }).unwrap();
    }
    drop(windows);
    give_up_all(&pages, SMALL, &received, &AtomicBool::new(false));
    let [w0, w1, w2, w3, w4, w5, w6, w7, w8] = std::array::from_fn(|at| window(at as u64));
    let first = [w0.clone(), w1.clone(), w2.clone(), w0, w3, w1, 0..4 * MIB];
    let second = [w4.clone(), w2, w5.clone(), window(3), w6.clone(), w4, w7, w5, 0..8 * MIB];
    let expected: Vec<_> = first.into_iter().chain(second).chain([w8, w6]).collect();
    assert_eq!(*pages.given_up.lock().unwrap(), expected);
}

#[test]
fn the_first_part_is_left_alone_and_a_long_one_is_given_up_in_steps() {
    let (pages, sizes) = (Arc::<Noting>::default(), Sizes { first: 3 * MIB, step: MIB, ..SMALL });
    let behind = WriteBehind::with_sizes(Arc::clone(&pages) as _, Backlog::OfSystem, sizes);
    assert_eq!(behind.add(0, 2 * MIB), None);
    let first = Part { bytes: 3 * MIB, range: 0..3 * MIB };
    assert_eq!(behind.add(2 * MIB, MIB), Some((first.clone(), false)));
    assert!(behind.add(3 * MIB, MIB).is_some());
    for (is_over, expected) in
        [(false, vec![0..MIB, MIB..2 * MIB, 2 * MIB..3 * MIB]), (true, vec![])]
    {
        let (windows, received) = channel();
        windows.send(first.clone()).unwrap();
        drop(windows);
        give_up_all(&*pages, sizes, &received, &AtomicBool::new(is_over));
        assert_eq!(std::mem::take(&mut *pages.given_up.lock().unwrap()), expected);
    }
}

#[test]
fn writes_out_of_order_and_with_gaps_are_one_window() {
    let pages = Arc::default();
    let behind = small(&pages, Backlog::OfSystem);
    assert_eq!(behind.add(9 * MIB, MIB / 2), None);
    let window = Part { bytes: MIB, range: 5 * MIB..19 * MIB / 2 };
    assert_eq!(behind.add(5 * MIB, MIB / 2), Some((window, false)));
    assert_eq!(behind.add(0, 1), None);
}

#[test]
fn the_thread_ends_with_the_file() {
    let pages = Arc::<Noting>::default();
    let behind = small(&pages, Backlog::OfSystem);
    for number in 0..100 {
        behind.wrote(number * MIB, MIB).unwrap();
    }
    drop(behind);
    assert_eq!(Arc::strong_count(&pages), 1);
}

#[test]
fn a_limited_backlog_waits_for_the_disk_beyond_its_first_part() {
    for (backlog, expected) in [(Backlog::OfSystem, 0), (Backlog::Limited, 2)] {
        let (pages, sizes) = (Arc::<Noting>::default(), Sizes { first: 8 * MIB, ..SMALL });
        let behind = WriteBehind::with_sizes(Arc::clone(&pages) as _, backlog, sizes);
        let waited = || *pages.waited.lock().unwrap();
        for number in 0..11 {
            behind.wrote(number * MIB, MIB).unwrap();
        }
        assert_eq!(waited(), 0, "{backlog:?}");
        for number in 11..16 {
            behind.wrote(number * MIB, MIB).unwrap();
        }
        assert_eq!(waited(), expected, "{backlog:?}");
    }
}

#[test]
fn a_file_whose_data_is_lost_reports_it_although_it_is_never_synced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, b"").unwrap();
    let (access, locking) = (Access::ReadWrite, Locking::Off);
    let storage = FileStorage::open_cached(&path, access, locking, CacheMode::Unsafe).unwrap();
    let mut storage = storage.written_once(Backlog::OfSystem);
    let write = |storage: &FileStorage| {
        storage.write_at(HostOffset::new(0), &[7; MIB as usize], Durability::Cached)
    };
    write(&storage).unwrap();
    storage.sync().unwrap();
    let pages = Arc::<Noting>::default();
    pages.failures.lock().unwrap().push(libc::ENOSPC);
    storage.write_behind = Some(Box::new(small(&pages, Backlog::OfSystem)));
    for failed in [write(&storage), storage.sync()] {
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}

/// Tells an error, once, and only after another caller is done or waits for it.
struct Slow {
    failures: Mutex<Vec<i32>>,
    asked: std::sync::mpsc::SyncSender<()>,
    other: Mutex<Receiver<()>>,
}

impl Pages for Slow {
    fn give_up(&self, _: Range<u64>) {}

    fn wait(&self) -> io::Result<()> {
        self.check()
    }

    fn check(&self) -> io::Result<()> {
        let Some(code) = self.failures.lock().unwrap().pop() else { return Ok(()) };
        self.asked.send(()).unwrap();
        let _ = self.other.lock().unwrap().recv_timeout(Duration::from_millis(100));
        Err(io::Error::from_raw_os_error(code))
    }
}

#[test]
fn a_sync_fails_although_a_write_beside_it_took_the_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, b"").unwrap();
    let (asked, was_asked) = std::sync::mpsc::sync_channel(1);
    let (done, other) = channel();
    let failures = Mutex::new(vec![libc::EIO]);
    let pages = Arc::new(Slow { failures, asked, other: Mutex::new(other) });
    let behind = WriteBehind::with_sizes(pages, Backlog::OfSystem, SMALL);
    let mut storage = FileStorage::open(&path, Access::ReadWrite, Locking::Off).unwrap();
    storage.write_behind = Some(Box::new(behind));
    thread::scope(|scope| {
        let writing = scope
            .spawn(|| storage.write_at(HostOffset::new(0), &[7; MIB as usize], Durability::Cached));
        was_asked.recv().unwrap();
        let synced = storage.sync();
        done.send(()).unwrap();
        assert!(synced.unwrap_err().to_string().contains("Input/output error"));
        assert!(writing.join().unwrap().is_err());
    });
}

#[test]
fn data_that_could_not_be_written_back_is_an_error_of_every_later_call() {
    for backlog in [Backlog::OfSystem, Backlog::Limited] {
        let pages = Arc::default();
        let behind = small(&pages, backlog);
        for number in 0..11 {
            behind.wrote(number * MIB, MIB).unwrap();
        }
        behind.check().unwrap();
        // The system tells it once.
        pages.failures.lock().unwrap().push(libc::EIO);
        for _ in 0..2 {
            let error = behind.wrote(11 * MIB, MIB).unwrap_err();
            assert!(error.to_string().contains("is lost: Input/output error"), "{error}");
            assert!(behind.check().is_err());
        }
    }
}
