//! Walks along a disk: neighbours are joined, every step is bounded, and an error is the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use imgfmt::storage::StorageExtent;
use imgfmt::{
    CreateOptions, Durability, ErrorKind, Extent, ExtentKind, Format, HostOffset, Image,
    OpenOptions, Storage,
};

use crate::common::{all_extents, at, range};

const KIB: u64 = 1024;

/// A disk that tells of one KiB at a time: data, or a hole for each KiB from `holes` on. What is
/// from `bad` on cannot be told.
#[derive(Debug)]
struct Teller {
    size: u64,
    holes: u64,
    bad: u64,
    asked: AtomicUsize,
}

impl Teller {
    fn image(size: u64, holes: u64, bad: u64) -> (Arc<Self>, Image) {
        let teller = Arc::new(Self { size, holes, bad, asked: AtomicUsize::new(0) });
        let options = OpenOptions::new().format(Format::Raw);
        let image = Image::from_storage(teller.clone(), &options).unwrap();
        (teller, image)
    }
}

impl Storage for Teller {
    fn len(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, _: HostOffset, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let offset = offset.bytes();
        self.asked.fetch_add(1, Ordering::Relaxed);
        if offset >= self.bad {
            return Err(io::Error::other("a bad sector"));
        }
        let kind = if offset < self.holes { ExtentKind::Data } else { ExtentKind::Hole };
        Ok(StorageExtent { length: length.min(KIB - offset % KIB), kind })
    }
}

fn parts(extents: &[Extent]) -> Vec<(u64, u64, ExtentKind)> {
    let part = |it: &Extent| (it.range.offset().bytes(), it.range.length(), it.kind);
    extents.iter().map(part).collect()
}

#[test]
fn neighbours_are_joined_across_steps() {
    let (_, image) = Teller::image(40 * KIB, 10 * KIB, u64::MAX);
    let expected = [(0, 10 * KIB, ExtentKind::Data), (10 * KIB, 30 * KIB, ExtentKind::Hole)];
    assert_eq!(parts(&all_extents(&image, range(0, 40 * KIB))), expected);
    let narrow: Result<Vec<_>, _> =
        image.extents(range(0, 40 * KIB)).bounded(usize::MAX, 1).collect();
    assert_eq!(parts(&narrow.unwrap()), expected, "one extent a step");
    let inside = all_extents(&image, range(KIB / 2, 20 * KIB));
    let expected = [
        (KIB / 2, 10 * KIB - KIB / 2, ExtentKind::Data),
        (10 * KIB, 10 * KIB + KIB / 2, ExtentKind::Hole),
    ];
    assert_eq!(parts(&inside), expected);
}

#[test]
fn an_error_comes_after_what_was_found_and_ends_the_walk() {
    let (teller, image) = Teller::image(40 * KIB, 10 * KIB, 20 * KIB);
    for per_step in [1, 1000] {
        let mut extents = image.extents(range(0, 40 * KIB)).bounded(usize::MAX, per_step);
        let mut known = 0;
        let error = loop {
            match extents.next().unwrap() {
                Ok(extent) => known = extent.range.end().bytes(),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        // A step that fails tells nothing, those before it do.
        assert_eq!(known, if per_step == 1 { 10 * KIB } else { 0 });
        let asked = teller.asked.load(Ordering::Relaxed);
        assert!(extents.next().is_none() && extents.next().is_none());
        assert_eq!(teller.asked.load(Ordering::Relaxed), asked, "it is not asked again");
    }
    let mut beyond = image.extents(range(39 * KIB, 2 * KIB));
    assert_eq!(beyond.next().unwrap().unwrap_err().kind(), ErrorKind::OutOfBounds);
    assert!(beyond.next().is_none());
}

#[test]
fn an_iterator_that_is_not_asked_looks_at_nothing() {
    let (teller, image) = Teller::image(1 << 40, 1 << 40, u64::MAX);
    let mut extents = image.extents(range(0, 1 << 40));
    assert_eq!(teller.asked.load(Ordering::Relaxed), 0);
    // A billion extents that are alike: one item follows some of them only.
    let first = extents.next().unwrap().unwrap();
    assert!(first.range.length() >= KIB && first.range.length() < 1 << 40);
    assert!(teller.asked.load(Ordering::Relaxed) < 1 << 17);
    let second = extents.next().unwrap().unwrap();
    assert_eq!(second.range.offset(), first.range.end());
}

#[test]
fn a_bounded_walk_ends_early_and_finds_something_all_the_same() {
    let (teller, image) = Teller::image(40 * KIB, 10 * KIB, u64::MAX);
    let found: Vec<_> =
        image.extents(range(0, 40 * KIB)).bounded(1, 1).map(Result::unwrap).collect();
    assert_eq!(found.len(), 1);
    assert!(found[0].range.length() >= KIB);
    assert!(teller.asked.load(Ordering::Relaxed) >= 1);
    assert!(image.extents(range(0, 0)).next().is_none());
}

#[test]
fn a_fragmented_qcow2_image_is_walked_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut options = CreateOptions::new(Format::Qcow2, 8 << 20);
    options.cluster_size = 512;
    Image::create(&path, &options).unwrap();
    let open = OpenOptions::new().access(imgfmt::Access::ReadWrite);
    let image = Image::open(&path, &open).unwrap();
    // More extents than one step finds.
    for index in 0..4000 {
        image.write_at(at(index * 1024), &[7; 512], Durability::Cached).unwrap();
    }
    let extents = all_extents(&image, range(0, 8 << 20));
    assert_eq!(extents.len(), 8000);
    let shared = Arc::new(image);
    let walk = shared.shared_extents(range(0, 8 << 20));
    drop(shared);
    assert_eq!(walk.map(Result::unwrap).collect::<Vec<_>>(), extents);
}
