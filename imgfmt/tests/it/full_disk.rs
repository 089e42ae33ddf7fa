//! A crashed image on a disk that is full: it is read, space is freed in it, and no bit is lost.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use imgfmt::testing::Loss;
use imgfmt::{BitmapChange, BitmapDurability, Durability, HostOffset, Recording, Storage};

use crate::common::bitmaps::dirty;
use crate::common::{Random, at, qemu, range};
use crate::judge::joint::{BOOT, Files, Joint};
use crate::judge::subjects::{Start, Subject};

const SIZE: u64 = 1 << 20;
const ENOSPC: i32 = 28;
const CACHED: Durability = Durability::Cached;

/// The file cannot grow as long as this is so.
#[derive(Debug)]
struct FullDisk {
    inner: Arc<dyn Storage>,
    is_full: Arc<AtomicBool>,
}

impl FullDisk {
    fn refuse(&self, end: u64) -> io::Result<()> {
        match self.is_full.load(Relaxed) && end > self.inner.len()? {
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
        let is_full = Arc::new(AtomicBool::new(true));
        let open = || {
            let above = |inner| Arc::new(FullDisk { inner, is_full: Arc::clone(&is_full) }) as _;
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
        is_full.store(false, Relaxed);
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
        let is_full = Arc::new(AtomicBool::new(true));
        let above = |inner| Arc::new(FullDisk { inner, is_full: Arc::clone(&is_full) }) as _;
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
