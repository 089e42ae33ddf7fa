//! The kernel reports only once that it could not write. A sync that failed in one place counts
//! everywhere: nobody who relies on what was written before is told that it is safe.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{FailingStorage, Fault};
use imgfmt::{
    Access, BitmapChange, BitmapDurability, BitmapState, Capabilities, CreateOptions, Durability,
    ErrorKind, Format, HostOffset, Image, OpenOptions, Recording, Speed, Storage, TryRead,
    ZeroMode,
};

use crate::common::{self, at, qemu, range};

const ENOSPC: i32 = 28;

/// In the middle of a write that is awaited, another thread flushes the image, and that fails.
#[derive(Debug)]
struct Meanwhile {
    inner: Arc<FailingStorage>,
    image: Mutex<Weak<Image>>,
    is_armed: AtomicBool,
    /// The write that is awaited contains this.
    pattern: Vec<u8>,
}

impl Storage for Meanwhile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        let is_awaited = data.windows(self.pattern.len()).any(|part| part == self.pattern);
        if !is_awaited || !self.is_armed.swap(false, SeqCst) {
            return self.inner.write_at(offset, data, durability);
        }
        let image = self.image.lock().unwrap().upgrade().unwrap();
        self.inner.lose_at_sync(0)?;
        self.inner.write_at(offset, data, durability)?;
        let flushed = std::thread::spawn(move || image.flush()).join().unwrap();
        assert!(flushed.is_err(), "the sync has failed");
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.punch_hole(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.inner.try_read_at(offset, buffer)
    }
}

/// An image with a bitmap that notes changes, whose writes are watched for a pattern.
fn watched(pattern: &[u8]) -> (Arc<MemoryStorage>, Arc<Meanwhile>, Arc<Image>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "cluster_size=4096", "1M");
    common::run("qemu-img", &["bitmap", "--add", "-g", "4k", common::text(&path), "watched"]);
    let memory = Arc::new(MemoryStorage::from_bytes(&std::fs::read(&path).unwrap()));
    let storage = Arc::new(Meanwhile {
        inner: FailingStorage::new(Arc::clone(&memory) as _),
        image: Mutex::default(),
        is_armed: AtomicBool::new(false),
        pattern: pattern.to_vec(),
    });
    let options = OpenOptions::new()
        .access(Access::ReadWrite)
        .bitmap_durability(BitmapDurability::CleanClose);
    let image = Arc::new(Image::from_storage(Arc::clone(&storage) as _, &options).unwrap());
    *storage.image.lock().unwrap() = Arc::downgrade(&image);
    (memory, storage, image)
}

/// The state of the bitmap as others find it now.
fn found(memory: &Arc<MemoryStorage>) -> Option<BitmapState> {
    let image = Image::from_storage(Arc::clone(memory) as _, &OpenOptions::new()).unwrap();
    image.bitmaps().into_iter().next().map(|bitmap| bitmap.state)
}

/// A storage whose next sync, once, finds no space for what was written before, as one of a network
/// file system does.
#[derive(Debug)]
struct FullLater {
    inner: Arc<FailingStorage>,
    is_armed: AtomicBool,
}

impl Storage for FullLater {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.inner.write_at(offset, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.punch_hole(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        match self.is_armed.swap(false, SeqCst) {
            true => Err(io::Error::from_raw_os_error(ENOSPC)),
            false => self.inner.sync(),
        }
    }
}

#[test]
fn no_change_lacks_space_if_a_sync_has_none_for_what_was_written_before() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = directory.path().join(format.name());
        Image::create(&path, &CreateOptions::new(format, 1 << 20)).unwrap();
        let memory = MemoryStorage::from_bytes(&std::fs::read(&path).unwrap());
        let inner = FailingStorage::new(Arc::new(memory));
        let storage = Arc::new(FullLater { inner, is_armed: AtomicBool::new(false) });
        let options = OpenOptions::new().format(format).access(Access::ReadWrite);
        let image = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
        let (fua, range) = (Durability::Fua, range(0, 65536));
        let changes: [&dyn Fn() -> imgfmt::Result<()>; 3] = [
            &|| image.flush(),
            &|| image.write_zeroes(range, ZeroMode::MayUnmap, Speed::Any, fua),
            &|| image.discard(range, fua),
        ];
        for change in changes {
            image.write_at(at(65536), &[1; 65536], Durability::Cached).unwrap();
            image.write_at(at(0), &[1; 65536], Durability::Cached).unwrap();
            storage.is_armed.store(true, SeqCst);
            let error = change().unwrap_err();
            assert!(!storage.is_armed.load(SeqCst), "{format}: nothing was synced");
            // A client that lacks space tries the change again, which does not bring the data back.
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(error.to_string().contains("no space"), "{error}");
            change().unwrap();
        }
        // Metadata that is not written for want of space is kept in memory.
        if format == Format::Qcow2 {
            image.write_at(at(0), &[1; 65536], Durability::Cached).unwrap();
            let calls = storage.inner.calls();
            storage.inner.set_fault(Some(Fault { calls: calls..calls + 1, code: ENOSPC }));
            assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::NoSpace);
            image.flush().unwrap();
        }
    }
}

#[test]
fn a_write_does_not_go_on_when_the_mark_of_its_bitmap_was_lost() {
    if !qemu::has_qemu() {
        return;
    }
    let (memory, storage, image) = watched(&[0, 0, 0, 3]);
    storage.is_armed.store(true, SeqCst);
    let written = image.write_at(at(0), &[1; 4096], Durability::Cached);
    assert!(!storage.is_armed.load(SeqCst), "the bitmap was not marked");
    let is_marked = || matches!(found(&memory), Some(BitmapState::Inconsistent { .. }));
    assert!(written.is_err() || is_marked(), "the write goes on without the mark");
    image.write_at(at(0), &[1; 4096], Durability::Cached).unwrap();
    assert!(is_marked(), "the next write makes up for it");
}

#[test]
fn the_list_of_bitmaps_does_not_change_when_a_part_of_it_was_lost() {
    if !qemu::has_qemu() {
        return;
    }
    let (memory, storage, image) = watched(b"watched");
    image.write_at(at(0), &[1; 4096], Durability::Fua).unwrap();
    storage.is_armed.store(true, SeqCst);
    let disable = [BitmapChange::Disable { name: "watched".into() }];
    let changed = image.bitmap_transaction(&disable);
    assert!(!storage.is_armed.load(SeqCst), "no directory was written");
    if changed.is_err() {
        assert!(matches!(found(&memory), Some(BitmapState::Inconsistent { .. })), "as before");
        image.bitmap_transaction(&disable).unwrap();
    }
    assert_eq!(found(&memory), Some(BitmapState::Consistent { dirty_bytes: 4096 }));
}

#[test]
fn the_next_flush_says_that_a_sync_of_another_operation_has_failed() {
    if !qemu::has_qemu() {
        return;
    }
    let (_, storage, image) = watched(b"nothing");
    image.flush().unwrap();
    image.write_at(at(0), &[1; 4096], Durability::Cached).unwrap();
    storage.inner.lose_at_sync(0).unwrap();
    let added = image.add_bitmap("another", 4096, Recording::Enabled);
    assert!(added.is_err());
    let error = image.flush().expect_err("nobody has told the writer yet");
    assert!(error.to_string().contains("may be lost"), "{error}");
    image.flush().unwrap();
    image.write_at(at(0), &[1; 4096], Durability::Fua).unwrap();
}
