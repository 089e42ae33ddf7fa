//! A crashed image on a disk that is full: it is read, space is freed in it, and no bit is lost.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use imgfmt::testing::Loss;
use imgfmt::{
    BitmapChange, BitmapDurability, Durability, ErrorKind, HostOffset, Recording, Storage,
};

use crate::common::bitmaps::dirty;
use crate::common::{Random, at, qemu, range};
use crate::judge::joint::{BOOT, Files, Joint};
use crate::judge::subjects::{Start, Subject, Tolerance, qemu_check};

const SIZE: u64 = 1 << 20;
const ENOSPC: i32 = 28;
const CACHED: Durability = Durability::Cached;

/// The file cannot grow beyond a length.
#[derive(Debug)]
pub(crate) struct FullDisk {
    pub(crate) inner: Arc<dyn Storage>,
    pub(crate) limit: Arc<AtomicU64>,
}

impl FullDisk {
    fn refuse(&self, end: u64) -> io::Result<()> {
        match end > self.limit.load(Relaxed) && end > self.inner.len()? {
            true => Err(io::Error::from_raw_os_error(ENOSPC)),
            false => Ok(()),
        }
    }
}

impl Storage for FullDisk {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.refuse(offset.bytes() + data.len() as u64)?;
        self.inner.write_at(offset, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.refuse(length)?;
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.punch_hole(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn identity(&self) -> Option<imgfmt::storage::FileIdentity> {
        self.inner.identity()
    }
}

/// An image without a free cluster that was left by a crash, and its dirty bits.
fn crashed(durability: BitmapDurability, directory: &Path) -> (Joint, Vec<(u64, u64)>) {
    let mut random = Random::new("full disk");
    let made = Subject::new("cluster_size=4096", Start::Used).make(directory, SIZE, &mut random);
    let joint = Joint::new(&Files { image: made.bytes, sidecar: None }, durability, BOOT);
    let image = joint.open().unwrap();
    let add = BitmapChange::Add {
        name: "daily".into(),
        granularity: 4096,
        recording: Recording::Enabled,
    };
    image.bitmap_transaction(&[add]).unwrap();
    for offset in (0..SIZE).step_by(3 * 4096) {
        image.write_at(at(offset), &[9; 4096], CACHED).unwrap();
    }
    image.flush().unwrap();
    let dirty = dirty(&image, "daily");
    let files = joint.crash(joint.recorder.position(), Loss::Nothing, &mut random);
    (Joint::new(&files, durability, BOOT), dirty)
}

#[test]
fn a_crashed_image_on_a_full_disk_is_opened_and_loses_no_bit() {
    if !qemu::has_qemu() {
        return;
    }
    for durability in [BitmapDurability::ProcessDeath, BitmapDurability::PowerLoss] {
        let directory = tempfile::tempdir().unwrap();
        let (joint, bits) = crashed(durability, directory.path());
        let limit = Arc::new(AtomicU64::new(0));
        let open = || {
            let above = |inner| Arc::new(FullDisk { inner, limit: Arc::clone(&limit) }) as _;
            joint.open_through(above)
        };
        // Whatever place the crash left free is taken, so that nothing can be stored.
        let image = open().unwrap();
        assert_eq!(dirty(&image, "daily"), bits, "{durability:?}");
        // Nothing was changed: it cannot be closed in order, and the next one finds it as this one
        // did.
        if image.close().is_err() {
            let image = open().unwrap();
            assert_eq!(dirty(&image, "daily"), bits, "{durability:?}, once more");
            drop(image);
        }
        // Space is freed, and what frees it is noted.
        let image = open().unwrap();
        image.discard(range(4096, 4096), CACHED).unwrap();
        image.flush().unwrap();
        limit.store(u64::MAX, Relaxed);
        let found = dirty(&image, "daily");
        assert!(found.iter().any(|(start, length)| *start <= 4096 && 8192 <= start + length));
        image.close().unwrap();
        let image = joint.open().unwrap();
        assert_eq!(dirty(&image, "daily"), found, "{durability:?}, closed and opened");
        drop(image);
    }
}

#[test]
fn a_second_crash_after_changes_on_a_full_disk_costs_no_bit() {
    if !qemu::has_qemu() {
        return;
    }
    for durability in [BitmapDurability::ProcessDeath, BitmapDurability::PowerLoss] {
        let directory = tempfile::tempdir().unwrap();
        let (joint, _) = crashed(durability, directory.path());
        let limit = Arc::new(AtomicU64::new(0));
        let above = |inner| Arc::new(FullDisk { inner, limit: Arc::clone(&limit) }) as _;
        let image = joint.open_through(above).unwrap();
        image.discard(range(4096, 4096), CACHED).unwrap();
        image.write_at(at(0), &[5; 4096], CACHED).unwrap();
        image.flush().unwrap();
        let bits = dirty(&image, "daily");
        let position = joint.recorder.position();
        let files = joint.crash(position, Loss::Nothing, &mut Random::new("second crash"));
        let again = Joint::new(&files, durability, BOOT);
        let image = again.open().unwrap();
        assert_eq!(dirty(&image, "daily"), bits, "{durability:?}");
        image.close().unwrap();
        let image = again.open().unwrap();
        assert_eq!(dirty(&image, "daily"), bits, "{durability:?}, closed and opened");
        drop(image);
    }
}

/// Refcounts and COPIED bits are as before, without any repair.
#[test]
fn a_snapshot_that_finds_no_space_changes_nothing() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("snapshots on a full disk");
    let directory = tempfile::tempdir().unwrap();
    let options = "cluster_size=4096";
    let made = Subject::new(options, Start::Used).make(directory.path(), SIZE, &mut random);
    let files = Files { image: made.bytes.clone(), sidecar: None };
    for room in 0..2 {
        let joint = Joint::new(&files, BitmapDurability::PowerLoss, BOOT);
        let limit = Arc::new(AtomicU64::new(u64::MAX));
        let above = |inner| Arc::new(FullDisk { inner, limit: Arc::clone(&limit) }) as _;
        let mut image = joint.open_through(above).unwrap();
        image.create_snapshot("first").unwrap();
        image.flush().unwrap();
        let length = || {
            let position = joint.recorder.position();
            joint.crash(position, Loss::Nothing, &mut Random::seeded(1)).image.len() as u64
        };
        // Every free cluster becomes one that the disk does not share.
        limit.store(0, Relaxed);
        let mut offsets = (0..SIZE).step_by(4096);
        while offsets.any(|to| image.write_at(at(to), &[3; 4096], CACHED).is_ok()) {}
        limit.store(u64::MAX, Relaxed);
        image.write_at(at(SIZE - 4096), &[3; 4096], CACHED).unwrap();
        image.flush().unwrap();
        limit.store(length() + room * 4096, Relaxed);
        let error = image.create_snapshot("second").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        let check = |what: &str| {
            let position = joint.recorder.position();
            let files = joint.crash(position, Loss::Nothing, &mut Random::seeded(1));
            files.put_down(&made.path, BOOT);
            qemu_check(&made.path, Tolerance::Leaks, &format!("{what}, room {room}"));
        };
        image.close().unwrap();
        check("a snapshot was not created");
        let mut image = joint.open_through(above).unwrap();
        if let Err(error) = image.apply_snapshot("first") {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        }
        image.close().unwrap();
        check("a snapshot was not applied");
        limit.store(u64::MAX, Relaxed);
        let mut image = joint.open_through(above).unwrap();
        image.create_snapshot("with room").unwrap();
        image.apply_snapshot("first").unwrap();
        image.close().unwrap();
        check("there is room again");
    }
}
