//! A repair that is interrupted, or that finds no room, leaves an image in which everything that
//! was readable still is, and which can be repaired again.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{FailingStorage, Fault, Loss, Recorder};
use imgfmt::{Access, ErrorKind, Format, Image, OpenOptions, Repair, Storage};

use crate::common::{Random, at};
use crate::handmade::{COPIED, Handmade, field};

const CLUSTER: u64 = 512;
const SIZE: u64 = 16 << 10;
const ENOSPC: i32 = 28;

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(access)
}

fn base() -> Handmade {
    let mut image = Handmade::new(9, SIZE);
    (0..20).for_each(|number| image.add_data(number, number as u8 + 1));
    image
}

/// What the repair has to do, and an image that needs it.
fn damaged() -> Vec<(&'static str, Handmade)> {
    let cluster = CLUSTER as usize;
    let mut cases = Vec::new();
    for (what, block) in [("the L1 table", 3), ("the L2 table", 4), ("data", 9)] {
        let mut image = base();
        image.put64(cluster, block * CLUSTER);
        cases.push((what, image));
    }
    let mut image = base();
    image.put32(field::REFCOUNT_TABLE_CLUSTERS, 0);
    cases.push(("no refcount table", image));
    let mut image = base();
    // Guest clusters 20 and 0 share one; the cluster of 1 has no reference.
    image.set_entry(20, (5 * CLUSTER) | COPIED);
    image.set_refcount(6, 0);
    cases.push(("refcounts that are too low", image));
    cases
}

fn content(storage: Arc<dyn Storage>) -> Vec<u8> {
    let disk = Image::from_storage(storage, &options(Access::ReadOnly)).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    disk.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// The content of an image that need not be openable before it is repaired.
fn sound_content(image: &Handmade) -> Vec<u8> {
    let mut image = image.clone();
    image.put32(field::REFCOUNT_TABLE_CLUSTERS, 1);
    content(Arc::new(MemoryStorage::from_bytes(&image.bytes)))
}

fn repair(storage: Arc<dyn Storage>, what: &str) {
    let options = options(Access::ReadWrite);
    let report = Image::check_storage(storage, &options, Repair::All).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{what}: {:?}", report.messages);
}

#[test]
fn a_repair_that_is_interrupted_anywhere_can_be_repeated() {
    let mut random = Random::new("interrupted repair");
    for (what, image) in damaged() {
        let expected = sound_content(&image);
        let recorder = Recorder::new();
        let storage = recorder.storage(&image.bytes);
        repair(Arc::clone(&storage) as _, what);
        assert!(content(Arc::clone(&storage) as _) == expected, "{what}");
        assert!(recorder.position() > 2, "{what}: nothing was repaired");
        for position in 0..=recorder.position() {
            for loss in Loss::ALL {
                let what = format!("{what}, {loss:?} after {position}");
                let bytes = storage.after_crash(position, loss, &mut |bound| random.below(bound));
                let crashed = Arc::new(MemoryStorage::from_bytes(&bytes));
                repair(Arc::clone(&crashed) as _, &what);
                assert!(content(crashed) == expected, "{what}: the disk is another");
            }
        }
    }
}

#[test]
fn a_repair_without_room_leaves_the_image_as_it_was() {
    for (what, image) in damaged() {
        let expected = sound_content(&image);
        for first in 0.. {
            let memory = Arc::new(MemoryStorage::from_bytes(&image.bytes));
            let failing = FailingStorage::new(Arc::clone(&memory) as _);
            failing.set_fault(Some(Fault { calls: first..u64::MAX, code: ENOSPC }));
            let options = options(Access::ReadWrite);
            let result = Image::check_storage(Arc::clone(&failing) as _, &options, Repair::All);
            if failing.failed() == 0 {
                break;
            }
            if let Err(error) = result {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
            }
            // Whatever it got to, the disk is there and the repair can be repeated.
            failing.set_fault(None);
            repair(Arc::clone(&memory) as _, what);
            assert!(content(memory) == expected, "{what}: no room from call {first} on");
        }
    }
}

#[test]
fn a_repair_of_an_image_that_cannot_grow_finds_room_within() {
    for (what, mut image) in damaged() {
        let expected = sound_content(&image);
        // As on a device: there is room within, and none behind.
        let length = image.bytes.len() + 8 * CLUSTER as usize;
        image.bytes.resize(length, 0);
        let fixed = Arc::new(Fixed(MemoryStorage::from_bytes(&image.bytes)));
        repair(Arc::clone(&fixed) as _, what);
        assert_eq!(fixed.len().unwrap(), length as u64, "{what}");
        assert!(content(fixed) == expected, "{what}");
    }
}

/// A storage that keeps its length.
#[derive(Debug)]
struct Fixed(MemoryStorage);

impl Storage for Fixed {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, offset: imgfmt::HostOffset, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read_at(offset, buffer)
    }

    fn write_at(
        &self,
        offset: imgfmt::HostOffset,
        data: &[u8],
        durability: imgfmt::Durability,
    ) -> std::io::Result<()> {
        if offset.bytes() + data.len() as u64 > self.0.len()? {
            return Err(std::io::Error::from_raw_os_error(ENOSPC));
        }
        self.0.write_at(offset, data, durability)
    }

    fn set_len(&self, _: u64) -> std::io::Result<()> {
        Err(std::io::Error::from_raw_os_error(22))
    }

    fn punch_hole(&self, offset: imgfmt::HostOffset, length: u64) -> std::io::Result<()> {
        self.0.punch_hole(offset, length)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.0.sync()
    }
}
