//! Images that are filled while calls of their storage fail.

use super::*;
use crate::foreign_options::ForeignOptions;
use crate::storage::MemoryStorage;
use crate::testing::{FailingStorage, Fault};

fn begin() -> (Arc<FailingStorage>, Box<dyn WritableLayer>) {
    let storage = FailingStorage::new(Arc::new(MemoryStorage::new(0)));
    let options = ForeignOptions::default();
    let new = NewForeign { size: 64 << 20, name: "a.vmdk".into(), options: &options, parent: None };
    let planned = plan(&new, 64 << 20).unwrap();
    let image = (planned.begin)(Arc::clone(&storage) as _, Vec::new(), || false).unwrap();
    (storage, image)
}

/// Fails one call, after some.
fn fail(storage: &FailingStorage, after: u64) {
    let call = storage.calls() + after;
    storage.set_fault(Some(Fault { calls: call..call + 1, code: 28 }));
}

fn value(grain: u64) -> u8 {
    (grain % 251) as u8 + 1
}

fn write(image: &dyn WritableLayer, grain: u64) -> Result<()> {
    let offset = GuestOffset::new(grain * GRAIN);
    image.write_at(offset, &[value(grain); GRAIN as usize], Durability::Cached)
}

/// The grains that a reader finds, if the image looks complete.
fn grains(storage: &Arc<FailingStorage>) -> Option<Vec<u64>> {
    let image = crate::Image::from_storage(Arc::clone(storage) as _, &crate::OpenOptions::new());
    let image = image.ok()?;
    let mut found = vec![0; GRAIN as usize];
    let mut is_there = |grain: &u64| {
        image.read_at(GuestOffset::new(grain * GRAIN), &mut found).unwrap();
        assert!(found.iter().all(|byte| *byte == found[0]));
        found[0] == value(*grain)
    };
    Some((0..1024).filter(|grain| is_there(grain)).collect())
}

#[test]
fn an_image_that_lacks_data_does_not_look_complete_when_it_is_dropped() {
    let (storage, image) = begin();
    write(&*image, 0).unwrap();
    fail(&storage, 0);
    // The table of the first grain is written before the grain of the second one.
    write(&*image, TABLE_GRAINS).unwrap_err();
    drop(image);
    assert_eq!(grains(&storage), None);
}

#[test]
fn what_failed_can_be_repeated_without_a_loss() {
    for after in 0..6 {
        let (storage, image) = begin();
        write(&*image, 0).unwrap();
        fail(&storage, after);
        if write(&*image, TABLE_GRAINS).is_err() {
            write(&*image, TABLE_GRAINS).unwrap();
        }
        if image.close().is_err() {
            image.close().unwrap();
        }
        assert_eq!(grains(&storage), Some(vec![0, TABLE_GRAINS]), "{after}");
    }
}
