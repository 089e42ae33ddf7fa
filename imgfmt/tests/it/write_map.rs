//! Writes that the caller carries out: where they may go, and what waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::FailingStorage;
use imgfmt::{
    Access, BitmapChange, CreateOptions, Durability, ErrorKind, Format, Image, OpenOptions,
    Recording, WriteMap,
};

use crate::common::bitmaps::dirty;
use crate::common::{at, range};

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 64 << 10;

/// A new image, opened again on a storage that lets others write.
fn image(options: &CreateOptions) -> Image {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    Image::create(&path, options).unwrap();
    on_storage(&std::fs::read(&path).unwrap(), &OpenOptions::new().access(Access::ReadWrite))
}

fn on_storage(bytes: &[u8], options: &OpenOptions) -> Image {
    let storage = FailingStorage::new(Arc::new(MemoryStorage::from_bytes(bytes)));
    Image::from_storage(storage, options).unwrap()
}

fn new_qcow2() -> Image {
    image(&CreateOptions::new(Format::Qcow2, SIZE))
}

fn write(image: &Image, offset: u64, length: usize) {
    image.write_at(at(offset), &vec![7; length], Durability::Cached).unwrap();
}

fn map(image: &Image, offset: u64, length: u64) -> Option<WriteMap> {
    image.map_write(at(offset), length).unwrap()
}

#[test]
fn only_a_place_that_is_the_disks_alone_is_mapped() {
    let mut image = new_qcow2();
    assert!(map(&image, 0, 512).is_none(), "not allocated");
    write(&image, 0, 2 * CLUSTER as usize);
    write(&image, 5 * CLUSTER, 512);
    write(&image, 2 * CLUSTER, 512);
    assert!(map(&image, 512, 2 * CLUSTER - 512).is_some(), "next to each other");
    assert!(map(&image, 2 * CLUSTER - 512, 1024).is_none(), "in two places");
    assert!(map(&image, 3 * CLUSTER - 512, 1024).is_none(), "the second is not allocated");
    image
        .write_zeroes(
            range(0, CLUSTER),
            imgfmt::ZeroMode::MayUnmap,
            imgfmt::Speed::Any,
            Durability::Cached,
        )
        .unwrap();
    assert!(map(&image, 0, 512).is_none(), "zeroes");
    image.create_snapshot("one").unwrap();
    assert!(map(&image, CLUSTER, 512).is_none(), "a snapshot has it too");
    write(&image, CLUSTER, 512);
    assert!(map(&image, CLUSTER, 512).is_some(), "copied");
    assert!(map(&image, SIZE, 0).is_none(), "nothing to write");
    let beyond = image.map_write(at(SIZE - 512), 1024).unwrap_err();
    assert_eq!(beyond.kind(), ErrorKind::OutOfBounds);
}

#[test]
fn the_guarded_sector_of_a_raw_image_is_written_by_the_image_itself() {
    let options = OpenOptions::new().access(Access::ReadWrite);
    let probed = on_storage(&[0; 8192], &options);
    assert!(map(&probed, 0, 512).is_none() && map(&probed, 511, 512).is_none());
    assert!(map(&probed, 512, 512).is_some());
    let named = on_storage(&[0; 8192], &options.format(Format::Raw));
    assert!(map(&named, 0, 512).is_some());
    let read_only = on_storage(&[0; 8192], &OpenOptions::new());
    assert_eq!(read_only.map_write(at(0), 512).unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_mapped_place_is_not_given_away_before_the_write_is_over() {
    let image = new_qcow2();
    write(&image, 0, CLUSTER as usize);
    let held = map(&image, 0, 4096).unwrap();
    image.discard(range(0, CLUSTER), Durability::Fua).unwrap();
    for cluster in 1..20 {
        write(&image, cluster * CLUSTER, CLUSTER as usize);
        image.flush().unwrap();
        let other = map(&image, cluster * CLUSTER, 4096).unwrap();
        assert!(other.offset() != held.offset());
    }
    // It reaches a place that nobody has.
    held.storage().write_at(held.offset(), &[9; 4096], Durability::Cached).unwrap();
    let place = held.offset();
    held.written();
    let mut content = vec![9; SIZE as usize];
    image.read_at(at(0), &mut content).unwrap();
    assert!(!content.contains(&9));
    image.flush().unwrap();
    write(&image, 30 * CLUSTER, CLUSTER as usize);
    assert_eq!(map(&image, 30 * CLUSTER, 4096).unwrap().offset(), place, "now it is given away");
}

#[test]
fn a_change_of_bitmaps_waits_for_a_write_that_is_under_way() {
    let image = new_qcow2();
    image.add_bitmap("old", CLUSTER, Recording::Enabled).unwrap();
    write(&image, 0, CLUSTER as usize);
    let clear = [BitmapChange::Clear { name: "old".into() }];
    image.bitmap_transaction(&clear).unwrap();
    assert!(map(&image, 0, 4096).is_none(), "the image does not say yet that the bitmap is in use");
    write(&image, CLUSTER, 512);
    let under_way = map(&image, 0, 4096).unwrap();
    assert_eq!(dirty(&image, "old"), [(0, 2 * CLUSTER)], "noted before the first byte");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            image.bitmap_transaction(&clear).unwrap();
            assert!(is_over.load(SeqCst), "it did not wait");
        });
        // From now on writes are the image's own, and are not noted between the two.
        while map(&image, 0, 4096).is_some() {
            std::thread::yield_now();
        }
        is_over.store(true, SeqCst);
        drop(under_way);
    });
    assert_eq!(dirty(&image, "old"), []);
}

#[test]
fn a_write_is_durable_alone_where_all_that_leads_to_it_is_on_disk() {
    let image = new_qcow2();
    let is_alone = |offset| map(&image, offset, 512).unwrap().is_durable_alone();
    write(&image, 0, CLUSTER as usize);
    assert!(!is_alone(0), "its mapping is in memory");
    image.flush().unwrap();
    assert!(is_alone(0));
    write(&image, 0, 512);
    assert!(is_alone(0), "nothing was allocated");
    write(&image, CLUSTER, 512);
    assert!(!is_alone(CLUSTER) && !is_alone(0));
    image.write_at(at(CLUSTER), &[8; 512], Durability::Fua).unwrap();
    assert!(is_alone(CLUSTER));
    let options = OpenOptions::new().access(Access::ReadWrite).format(Format::Raw);
    assert!(map(&on_storage(&[0; 8192], &options), 0, 512).unwrap().is_durable_alone());
}

#[test]
fn what_others_wrote_before_an_image_was_opened_counts_as_not_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let image = Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    write(&image, 0, 512);
    drop(image);
    let options = OpenOptions::new().access(Access::ReadWrite);
    let image = on_storage(&std::fs::read(&path).unwrap(), &options);
    write(&image, 0, 512);
    assert!(!map(&image, 0, 512).unwrap().is_durable_alone());
    image.flush().unwrap();
    assert!(map(&image, 0, 512).unwrap().is_durable_alone());
}

#[test]
fn the_next_flush_tells_of_a_durable_write_that_failed() {
    let image = new_qcow2();
    write(&image, 0, 512);
    image.flush().unwrap();
    let error = std::io::Error::from_raw_os_error(libc::EIO);
    map(&image, 0, 512).unwrap().failed(&error);
    assert!(!map(&image, 0, 512).unwrap().is_durable_alone(), "a flush has to tell first");
    image.flush().unwrap_err();
    image.flush().unwrap();
    assert!(map(&image, 0, 512).unwrap().is_durable_alone());
}
