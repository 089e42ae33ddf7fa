//! Closing an image: every change is synced, and nothing is synced twice.

use std::sync::Arc;

use imgfmt::testing::{FailingStorage, Fault, RecordingStorage};
use imgfmt::{
    Access, BitmapDurability, CreateOptions, DataFile, Durability, Format, Image, OpenOptions,
    OpenPolicy, Qcow2Version, Recording, Shrink, Speed, Storage, ZeroMode,
};

use crate::common::{at, range};

const SIZE: u64 = 8 << 20;
const CLUSTER: u64 = 4096;

/// A kind of image.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Version2,
    WithBitmap,
    WithDataFile,
}

const KINDS: [Kind; 4] = [Kind::Plain, Kind::Version2, Kind::WithBitmap, Kind::WithDataFile];

/// A change of an open image.
type Change = (&'static str, fn(&mut Image) -> imgfmt::Result<()>);

const CHANGES: [Change; 14] = [
    ("nothing", |_| Ok(())),
    ("a write to a new cluster", |image| write(image, 5 << 20, 100)),
    ("a write in place", |image| write(image, 1000, 100)),
    ("writes with FUA", |image| {
        image.write_at(at(6 << 20), &[3; 10], Durability::Fua)?;
        image.write_at(at(6 << 20), &[4; 10], Durability::Fua)
    }),
    ("a compressed write", |image| image.write_compressed(at(4 << 20), &[5; CLUSTER as usize])),
    ("zeroes", |image| zero(image, 0, ZeroMode::MayUnmap)),
    ("zeroes that take up space", |image| zero(image, 3 << 20, ZeroMode::KeepAllocated)),
    ("a discard", |image| image.discard(range(0, 2 * CLUSTER), Durability::Cached)),
    ("a larger disk", |image| image.resize(2 * SIZE, Shrink::Refuse)),
    ("a smaller disk", |image| image.resize(SIZE / 2, Shrink::Allow)),
    ("snapshots", |image| {
        image.create_snapshot("first")?;
        write(image, 0, 3)?;
        image.apply_snapshot("first")?;
        image.delete_snapshot("first")
    }),
    ("a new bitmap", |image| image.add_bitmap("new", 65536, Recording::Enabled)),
    ("a new bitmap that is removed", |image| {
        image.add_bitmap("new", 65536, Recording::Enabled)?;
        write(image, 0, 3)?;
        image.remove_bitmap("new")
    }),
    ("a disk that is overwritten", |image| {
        image.begin_overwrite()?;
        write(image, 0, 5)?;
        image.complete_overwrite()
    }),
];

fn write(image: &Image, offset: u64, length: usize) -> imgfmt::Result<()> {
    image.write_at(at(offset), &vec![7; length], Durability::Cached)
}

fn zero(image: &Image, offset: u64, mode: ZeroMode) -> imgfmt::Result<()> {
    image.write_zeroes(range(offset, 3 * CLUSTER), mode, Speed::Any, Durability::Cached)
}

/// An image on storages that record.
struct Trial {
    recorder: imgfmt::testing::Recorder,
    file: Arc<RecordingStorage>,
    data: Option<Arc<RecordingStorage>>,
}

impl Trial {
    /// An image that has some data.
    fn new(kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let mut options = CreateOptions::new(Format::Qcow2, SIZE);
        options.cluster_size = CLUSTER;
        if kind == Kind::Version2 {
            options.version = Qcow2Version::V2;
        }
        if kind == Kind::WithDataFile {
            options.data_file = Some(("trial_data".into(), DataFile::Plain));
        }
        let image = Image::create(&path, &options).unwrap();
        write(&image, 0, 100_000).unwrap();
        if kind == Kind::WithBitmap {
            image.add_bitmap("old", 65536, Recording::Enabled).unwrap();
        }
        image.close().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(at) = bytes[..4096].windows(10).position(|part| part == b"trial_data") {
            bytes[at + 5] = b':';
        }
        let recorder = imgfmt::testing::Recorder::new();
        let data = std::fs::read(directory.path().join("trial_data")).ok();
        Self {
            file: recorder.storage(&bytes),
            data: data.map(|data| recorder.storage(&data)),
            recorder,
        }
    }

    fn open_on(&self, file: Arc<dyn Storage>) -> Image {
        let data = self.data.clone();
        let opener = move |_: &str| Ok(Arc::clone(data.as_ref().unwrap()) as Arc<dyn Storage>);
        let options = OpenOptions::new()
            .format(Format::Qcow2)
            .access(Access::ReadWrite)
            .bitmap_durability(BitmapDurability::CleanClose)
            .policy(OpenPolicy::any_file().allow_scheme("trial", Arc::new(opener)));
        Image::from_storage(file, &options).unwrap()
    }

    fn open(&self) -> Image {
        self.open_on(Arc::clone(&self.file) as _)
    }

    fn storages(&self) -> impl Iterator<Item = &Arc<RecordingStorage>> {
        [Some(&self.file), self.data.as_ref()].into_iter().flatten()
    }

    fn needless_syncs(&self, since: usize) -> usize {
        self.storages().map(|storage| storage.needless_syncs(since)).sum()
    }

    fn unsynced_changes(&self) -> usize {
        self.storages().map(|storage| storage.unsynced_changes()).sum()
    }
}

#[test]
fn closing_after_a_flush_syncs_nothing_that_has_not_changed_since() {
    for kind in KINDS {
        for (name, change) in CHANGES {
            let trial = Trial::new(kind);
            let mut image = trial.open();
            let what = format!("{kind:?}, {name}: {:?}", change(&mut image));
            image.flush().unwrap();
            let flushed = trial.recorder.position();
            image.close().unwrap();
            assert_eq!(trial.needless_syncs(flushed), 0, "{what}");
            assert_eq!(trial.unsynced_changes(), 0, "{what}");
        }
    }
}

#[test]
fn every_change_is_synced_when_the_image_is_closed_or_dropped() {
    for kind in KINDS {
        for (name, change) in CHANGES {
            for is_dropped in [false, true] {
                let trial = Trial::new(kind);
                let mut image = trial.open();
                let what = format!("{kind:?}, {name}, {is_dropped}: {:?}", change(&mut image));
                let changed = trial.recorder.position();
                match is_dropped {
                    true => drop(image),
                    false => image.close().unwrap(),
                }
                assert_eq!(trial.unsynced_changes(), 0, "{what}");
                assert_eq!(trial.needless_syncs(changed), 0, "{what}");
            }
        }
    }
}

#[test]
fn an_image_that_nothing_was_written_to_is_synced_once_for_writers_before() {
    for kind in KINDS {
        let trial = Trial::new(kind);
        trial.open().close().unwrap();
        // The sync is the only thing that happens.
        assert_eq!(trial.recorder.position(), trial.storages().count(), "{kind:?}");
    }
}

#[test]
fn a_flush_that_fails_is_made_up_for_when_the_image_is_closed() {
    for (name, change) in CHANGES {
        let trial = Trial::new(Kind::Plain);
        let failing = FailingStorage::new(Arc::clone(&trial.file) as _);
        let mut image = trial.open_on(Arc::clone(&failing) as _);
        let what = format!("{name}: {:?}", change(&mut image));
        failing.set_fault(Some(Fault { calls: 0..u64::MAX, code: libc::EIO }));
        image.flush().unwrap_err();
        failing.set_fault(None);
        image.close().unwrap();
        assert_eq!(trial.unsynced_changes(), 0, "{what}");
        let position = trial.recorder.position();
        assert!(position > 0, "{what}: the sync that failed is not repeated");
    }
}

/// Only the flush at the start of a change, the one that lets leases end, and those around the
/// COPIED flags find nothing to do.
#[test]
fn a_new_table_is_flushed_once_before_the_header_names_it() {
    let needless = |kind, change: fn(&mut Image) -> imgfmt::Result<()>| {
        let trial = Trial::new(kind);
        let mut image = trial.open();
        image.flush().unwrap();
        let begin = trial.recorder.position();
        change(&mut image).unwrap();
        assert_eq!(trial.unsynced_changes(), 0, "{kind:?}");
        trial.needless_syncs(begin)
    };
    let grow = |image: &mut Image| image.resize(1 << 34, Shrink::Refuse);
    let create = |image: &mut Image| image.create_snapshot("first");
    let create_and_delete = |image: &mut Image| {
        image.create_snapshot("first")?;
        image.delete_snapshot("first")
    };
    let found = [
        needless(Kind::Plain, grow),
        needless(Kind::WithDataFile, grow),
        needless(Kind::Plain, create),
        needless(Kind::Plain, create_and_delete),
    ];
    assert_eq!(found, [2, 3, 4, 8]);
}
