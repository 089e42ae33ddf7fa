//! A disk that is overwritten shows the old content, nothing, or all of the new content.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{FailingStorage, Fault, Loss, Recorder};
use imgfmt::{
    Access, CreateOptions, Durability, Format, Image, OpenOptions, Storage, Unfinished, ZeroMode,
};

use crate::common::Random;

const DISK: u64 = 512 << 10;
const DEVICE: usize = 2 << 20;

fn empty_image() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("empty.qcow2");
    let mut options = CreateOptions::new(Format::Qcow2, DISK);
    options.cluster_size = 4096;
    Image::create(&path, &options).unwrap();
    std::fs::read(path).unwrap()
}

fn open(
    storage: Arc<dyn Storage>,
    format: Option<Format>,
    access: Access,
) -> imgfmt::Result<Image> {
    let options = OpenOptions::new().access(access);
    Image::from_storage(storage, &format.map_or(options.clone(), |format| options.format(format)))
}

/// Writes pieces of a disk and zeroes to the rest.
fn fill(image: &Image, content: &[u8]) {
    for (index, piece) in content.chunks(20000).enumerate() {
        let offset = (index * 20000) as u64;
        image.write_at(offset.into(), piece, Durability::Cached).unwrap();
    }
    let rest = imgfmt::GuestRange::new((content.len() as u64).into(), 1000).unwrap();
    image.write_zeroes(rest, ZeroMode::MayUnmap, imgfmt::Speed::Any, Durability::Cached).unwrap();
}

fn content(image: &Image, length: usize) -> Vec<u8> {
    let mut content = vec![0; length];
    image.read_at(0.into(), &mut content).unwrap();
    content
}

fn random_content(random: &mut Random, length: usize) -> Vec<u8> {
    (0..length).map(|_| random.below(255) as u8 + 1).collect()
}

/// A device with an image on it, and the content of its disk.
fn old_device(random: &mut Random) -> (Vec<u8>, Vec<u8>) {
    let mut bytes = empty_image();
    bytes.resize(DEVICE, 0xaa);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    let image = open(storage.clone(), Some(Format::Qcow2), Access::ReadWrite).unwrap();
    let old = random_content(random, 200_000);
    fill(&image, &old);
    image.close().unwrap();
    storage.read_at(imgfmt::HostOffset::new(0), &mut bytes).unwrap();
    (bytes, old)
}

#[test]
fn a_crash_while_a_device_is_overwritten_never_shows_a_part_of_the_new_disk() {
    let mut random = Random::new("unfinished");
    for format in [Format::Qcow2, Format::Raw] {
        let (device, old) = old_device(&mut random);
        let new = random_content(&mut random, 180_000);
        let recorder = Recorder::new();
        let medium = recorder.storage(&device);
        let unfinished = Arc::new(Unfinished::new(medium.clone()).unwrap());
        if format == Format::Qcow2 {
            let start = imgfmt::HostOffset::new(0);
            unfinished.write_at(start, &empty_image(), Durability::Cached).unwrap();
        }
        let image = open(unfinished.clone(), Some(format), Access::ReadWrite).unwrap();
        fill(&image, &new);
        image.close().unwrap();
        unfinished.complete().unwrap();
        let mut seen = [0; 3];
        for position in 0..=recorder.position() {
            for loss in Loss::ALL {
                let left = medium.after_crash(position, loss, &mut |bound| random.below(bound));
                // As a stranger would open it.
                let seen_as =
                    open(Arc::new(MemoryStorage::from_bytes(&left)), None, Access::ReadOnly);
                match seen_as {
                    Err(error) => {
                        assert!(error.to_string().contains("incomplete"), "{error}");
                        seen[1] += 1;
                    }
                    Ok(image) if content(&image, old.len()) == old => seen[0] += 1,
                    Ok(image) => {
                        assert_eq!(image.format(), format);
                        assert!(
                            content(&image, new.len()) == new,
                            "{format:?}, {position}, {loss:?}"
                        );
                        seen[2] += 1;
                    }
                }
            }
        }
        assert!(seen.iter().all(|count| *count > 0), "{format:?}: {seen:?}");
    }
}

#[test]
fn a_device_that_cannot_be_marked_as_incomplete_durably_stays_as_it_was() {
    const EIO: i32 = 5;
    let before = random_content(&mut Random::new("unfinished, not marked"), 64 << 10);
    let start = imgfmt::HostOffset::new(0);
    let mut failures = 0;
    loop {
        let medium = Arc::new(MemoryStorage::from_bytes(&before));
        let failing = FailingStorage::new(Arc::clone(&medium) as _);
        let unfinished = Unfinished::new(failing.clone()).unwrap();
        let call = failing.calls() + failures;
        failing.set_fault(Some(Fault { calls: call..call + 1, code: EIO }));
        let written = unfinished.write_at(start, &[7; 4096], Durability::Cached);
        let is_marked = unfinished.is_incomplete();
        if written.is_ok() || is_marked {
            break;
        }
        failures += 1;
        let mut found = vec![0; before.len()];
        medium.read_at(start, &mut found).unwrap();
        assert!(found == before, "after failure {failures}");
    }
    assert_eq!(failures, 2, "the mark, and its sync");
}
