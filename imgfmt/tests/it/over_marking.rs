//! How much more is dirty after a recovery than has changed, with extents of the usual size. Prints
//! the figures that `DESIGN.md` cites: `cargo test -p imgfmt --test it over_marking --
//! --nocapture`.

use std::sync::Arc;

use imgfmt::testing::{Loss, RecordedDirectory, Recorder};
use imgfmt::{
    Access, BitmapChange, BitmapDurability, Durability, Image, OpenOptions, Recording,
    RecoveryPrecision,
};

use crate::common::bitmaps::dirty;
use crate::common::{Random, at, qemu};

const SIZE: u64 = 8 << 30;
const GRANULARITY: u64 = 65536;
const BOOT: &str = "11111111-aaaa-bbbb-cccc-dddddddddddd";
const OTHER_BOOT: &str = "22222222-aaaa-bbbb-cccc-dddddddddddd";
/// The log names no more: 1200 extents of 4 MiB.
const LOG_BYTES_MAX: u64 = 1200 * (4 << 20);

/// What is written before the crash.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// So many writes of 4 KiB at random places of the first so many bytes.
    Random { writes: u64, within: u64 },
    /// So many bytes, one behind the other.
    Stream { length: u64 },
    /// As the first, then a backup that clears the bitmap, then as many writes again in a hundredth
    /// of the place.
    AfterBackup { writes: u64, within: u64 },
}

fn write_random(image: &Image, writes: u64, within: u64, random: &mut Random) {
    for _ in 0..writes {
        let offset = random.below(within / 4096) * 4096;
        image.write_at(at(offset), &[7; 4096], Durability::Cached).unwrap();
    }
}

fn write(image: &Image, load: Load, random: &mut Random) {
    match load {
        Load::Random { writes, within } => write_random(image, writes, within, random),
        Load::Stream { length } => {
            for offset in (0..length).step_by(1 << 18) {
                image.write_at(at(offset), &[7; 1 << 18], Durability::Cached).unwrap();
            }
        }
        Load::AfterBackup { writes, within } => {
            write_random(image, writes, within, random);
            image.bitmap_transaction(&[BitmapChange::Clear { name: "backup".into() }]).unwrap();
            write_random(image, writes, within / 100, random);
        }
    }
}

/// How many bytes are dirty without a crash, and after one.
fn measure(made: &[u8], load: Load, durability: BitmapDurability, boot: &str) -> (u64, u64) {
    let mut random = Random::seeded(0x9e37_79b9_7f4a_7c15);
    let recorder = Recorder::new();
    let storage = recorder.storage(made);
    let directory = Arc::new(RecordedDirectory::new(&recorder, BOOT, None));
    let options = OpenOptions::new().access(Access::ReadWrite).bitmap_durability(durability);
    let here = options.clone().sidecar_directory(&directory);
    let image = Image::from_storage(Arc::clone(&storage) as _, &here).unwrap();
    image.add_bitmap("backup", GRANULARITY, Recording::Enabled).unwrap();
    write(&image, load, &mut random);
    let exact = dirty(&image, "backup");
    let mut below = |bound| random.below(bound);
    let position = recorder.position();
    let bytes = storage.after_crash(position, Loss::Nothing, &mut below);
    let sidecar = directory.after_crash(position, Loss::Nothing, &mut below).unwrap();

    // The image is the first storage again, which makes it the same inode.
    let later = Recorder::new();
    let storage = later.storage(&bytes);
    let directory = Arc::new(RecordedDirectory::new(&later, boot, Some(&sidecar)));
    let there = options.sidecar_directory(&directory);
    let image = Image::from_storage(storage, &there).unwrap();
    let status = image.bitmap_durability();
    assert_eq!(status.recovered, ["backup"]);
    assert_eq!(status.precision == RecoveryPrecision::Exact, boot == BOOT);
    let recovered = dirty(&image, "backup");
    let covers = |part: &(u64, u64)| {
        recovered
            .iter()
            .any(|(start, length)| *start <= part.0 && part.0 + part.1 <= start + length)
    };
    assert!(exact.iter().all(covers), "{load:?}: bits are missing");
    let total = |parts: &[(u64, u64)]| parts.iter().map(|(_, length)| length).sum();
    (total(&exact), total(&recovered))
}

#[test]
fn no_more_is_dirty_after_a_recovery_than_the_log_can_name() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "cluster_size=4096", &SIZE.to_string());
    let made = std::fs::read(&path).unwrap();
    println!("MiB dirty: exactly; after the death of the process; after a loss of power");
    for load in [
        Load::Stream { length: 32 << 20 },
        Load::Random { writes: 500, within: 256 << 20 },
        Load::Random { writes: 500, within: 1 << 30 },
        Load::Random { writes: 500, within: SIZE },
        Load::AfterBackup { writes: 300, within: SIZE },
    ] {
        let (exact, after_death) = measure(&made, load, BitmapDurability::ProcessDeath, BOOT);
        assert_eq!(after_death, exact, "{load:?}");
        let (same, after_death) = measure(&made, load, BitmapDurability::PowerLoss, BOOT);
        assert_eq!((same, after_death), (exact, exact), "{load:?}");
        let (_, after_loss) = measure(&made, load, BitmapDurability::PowerLoss, OTHER_BOOT);
        assert!(after_loss <= exact + LOG_BYTES_MAX, "{load:?}: {after_loss}");
        let ratio = after_loss as f64 / exact as f64;
        let [exact, after_loss] = [exact, after_loss].map(|bytes| bytes as f64 / (1 << 20) as f64);
        println!("{exact:8.1} {exact:8.1} {after_loss:8.1} ({ratio:.2} times)  {load:?}");
    }
}
