//! Jobs from image to image: what they tell while they run, how they are ended early, whose fault
//! an error is.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex};

use imgfmt::jobs::{
    Background, Cancellation, Clusters, CompareOptions, ConvertOptions, JobContext, JobErrorKind,
    MeasuredDisk, Observer, Progress, commit, compare, convert, copy_bitmaps, measure, rebase,
};
use imgfmt::storage::MemoryStorage;
use imgfmt::{
    Access, CreateOptions, Durability, ErrorKind, ExtentKind, Format, Image, L2Entries, Locking,
    OpenOptions, Qcow2Version, Recording, Repair, Storage,
};

use crate::common::{all_extents, at, range};

const MIB: u64 = 1 << 20;

/// Writes down what a job tells, and cancels it when it has come so far.
#[derive(Default)]
struct Notes {
    told: Mutex<Vec<Progress>>,
    cancel: Option<(u64, Cancellation)>,
}

impl Observer for Notes {
    fn progress(&self, progress: &Progress) {
        self.told.lock().unwrap().push(*progress);
        if let Some((at, cancellation)) = &self.cancel
            && progress.done >= *at
        {
            cancellation.cancel("interrupted by a test");
            cancellation.cancel("a later reason");
        }
    }
}

impl Notes {
    /// Takes notes only.
    fn taken() -> (Arc<Self>, JobContext) {
        let notes = Arc::new(Self::default());
        (notes.clone(), JobContext { observer: notes, ..JobContext::default() })
    }

    /// Cancels as soon as so many bytes are done.
    fn cancelling(at: u64) -> JobContext {
        let cancellation = Cancellation::new();
        let cancel = Some((at, cancellation.clone()));
        let notes = Arc::new(Self { cancel, ..Self::default() });
        JobContext { observer: notes, cancellation, ..JobContext::default() }
    }

    /// Checks that progress only grew, up to the end; returns the last one.
    fn last(&self, total: u64) -> Progress {
        let told = self.told.lock().unwrap();
        assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
        assert!(told.iter().all(|progress| progress.total == total), "{told:?}");
        assert_eq!(told.first().unwrap().done, 0);
        *told.last().unwrap()
    }
}

fn writable() -> OpenOptions {
    OpenOptions::new().access(Access::ReadWrite)
}

/// A raw disk in memory.
fn disk(bytes: &[u8]) -> Image {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
    Image::from_storage(storage, &writable().format(Format::Raw)).unwrap()
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![1; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// Eight MiB: data in the second and the last.
fn sparse_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 8 << 20];
    bytes[1 << 20..2 << 20].fill(7);
    bytes[7 << 20..].fill(9);
    bytes
}

/// A base of 4 MiB of sevens and an overlay of 6 MiB with data in its second MiB and zeroes in the
/// third.
fn overlay(directory: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let (base, top) = (directory.join("base.img"), directory.join("top.qcow2"));
    std::fs::write(&base, vec![7; 4 << 20]).unwrap();
    let mut create = CreateOptions::overlay("base.img", Format::Raw);
    create.size = Some(6 * MIB);
    let image = Image::create(&top, &create).unwrap();
    image.write_at(at(MIB), &vec![5; 1 << 20], Durability::Cached).unwrap();
    let (mode, speed) = (imgfmt::ZeroMode::MayUnmap, imgfmt::Speed::Any);
    image.write_zeroes(range(2 * MIB, MIB), mode, speed, Durability::Cached).unwrap();
    image.close().unwrap();
    (base, top)
}

#[test]
fn a_conversion_tells_its_progress_to_the_end() {
    let bytes = sparse_bytes();
    let source = disk(&bytes);
    for background in [Background::Zero, Background::Unknown, Background::Compared] {
        let destination = disk(&match background {
            Background::Zero => vec![0; 8 << 20],
            _ => vec![3; 8 << 20],
        });
        let mut options = ConvertOptions::default();
        options.background = background;
        options.threads = NonZeroUsize::new(4).unwrap();
        let (notes, context) = Notes::taken();
        let converted = convert(&source, &destination, &options, &context).unwrap();
        assert_eq!(converted.size, 8 * MIB);
        let last = notes.last(8 * MIB);
        assert_eq!((last.done, last.holes), (8 * MIB, converted.holes));
        assert!(content(&destination) == bytes, "{background:?}");
    }
}

#[test]
fn a_conversion_into_too_small_a_disk_writes_nothing() {
    let (source, destination) = (disk(&[1; 8192]), disk(&[2; 4096]));
    let error = convert(&source, &destination, &ConvertOptions::default(), &JobContext::default())
        .unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::DoesNotFit, "{error}");
    assert!(content(&destination) == [2; 4096]);
}

#[test]
fn whose_fault_an_error_is_can_be_told() {
    let (source, zero) = (disk(&sparse_bytes()), disk(&vec![0; 8 << 20]));
    let read_only: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&vec![0; 8 << 20]));
    let read_only =
        Image::from_storage(read_only, &OpenOptions::new().format(Format::Raw)).unwrap();
    let error = convert(&source, &read_only, &ConvertOptions::default(), &JobContext::default());
    let error = error.unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::Destination);
    assert_eq!(error.image_error().unwrap().kind(), ErrorKind::ReadOnly);
    assert_eq!(error.into_image_error().unwrap().kind(), ErrorKind::ReadOnly);
    let error = rebase(&zero, None, Clusters::Plain, &JobContext::default()).unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::InvalidArgument);
    assert!(error.to_string().contains("a raw image cannot have a backing file"), "{error}");
    let mut create = CreateOptions::new(Format::Qcow2, 0);
    for (cluster, bits) in [(0, 16), (100, 16), (65536, 0), (65536, 128), (4 << 20, 16)] {
        (create.cluster_size, create.refcount_bits) = (cluster, bits);
        let error = measure(MeasuredDisk::Empty(MIB), &create, &JobContext::default());
        assert_eq!(error.unwrap_err().kind(), JobErrorKind::InvalidArgument, "{cluster}, {bits}");
    }
    let create = CreateOptions::new(Format::Qcow2, 0);
    let error = measure(MeasuredDisk::Empty(u64::MAX), &create, &JobContext::default());
    assert_eq!(error.unwrap_err().kind(), JobErrorKind::InvalidArgument);
}

#[test]
fn a_cancelled_conversion_stops_between_two_steps() {
    let bytes = vec![5; 8 << 20];
    for threads in [1, 4] {
        let (source, destination) = (disk(&bytes), disk(&vec![0; 8 << 20]));
        let mut options = ConvertOptions::default();
        options.threads = NonZeroUsize::new(threads).unwrap();
        let error = convert(&source, &destination, &options, &Notes::cancelling(MIB)).unwrap_err();
        assert_eq!(error.kind(), JobErrorKind::Interrupted);
        assert_eq!(error.to_string(), "interrupted by a test");
        assert!(content(&destination) != bytes, "it went on to the end");
    }
}

#[test]
fn every_job_that_is_cancelled_before_it_begins_does_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = overlay(directory.path());
    let cancellation = Cancellation::new();
    cancellation.cancel("interrupted by a test");
    let context = JobContext { cancellation, ..JobContext::default() };
    let options = writable().locking(Locking::Off);
    let disk = Image::open(&top, &options).unwrap();
    let mut backing = Image::open(&base, &options.clone().format(Format::Raw)).unwrap();
    let before = content(&disk);
    let create = CreateOptions::new(Format::Qcow2, 0);
    let errors = [
        commit(&disk, &mut backing, 2, &context).unwrap_err(),
        rebase(&disk, None, Clusters::Plain, &context).unwrap_err(),
        convert(&backing, &disk, &ConvertOptions::default(), &context).unwrap_err(),
        compare(&disk, &backing, &CompareOptions::default(), &context).unwrap_err(),
        measure(MeasuredDisk::Image(&disk), &create, &context).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), JobErrorKind::Interrupted, "{error}");
    }
    assert!(content(&disk) == before);
}

#[test]
fn a_commit_fills_the_backing_file_and_says_how_much() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = overlay(directory.path());
    let expected = content(&Image::open(&top, &OpenOptions::new()).unwrap());
    let disk = Image::open(&top, &OpenOptions::new().locking(Locking::Off)).unwrap();
    let mut backing = Image::open(&base, &writable().format(Format::Raw)).unwrap();
    let (notes, context) = Notes::taken();
    let committed = commit(&disk, &mut backing, 2, &context).unwrap();
    assert_eq!((committed.data, committed.zeroes), (MIB, MIB));
    assert_eq!(notes.last(6 * MIB).done, 6 * MIB);
    backing.close().unwrap();
    assert!(std::fs::read(&base).unwrap() == expected);
}

#[test]
fn a_backing_file_that_cannot_grow_is_left_alone_by_a_commit() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = overlay(directory.path());
    let disk = Image::open(&top, &OpenOptions::new().locking(Locking::Off)).unwrap();
    let mut backing = Image::open(&base, &OpenOptions::new().format(Format::Raw)).unwrap();
    let error = commit(&disk, &mut backing, 2, &JobContext::default()).unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::DoesNotFit, "{error}");
    assert!(std::fs::read(&base).unwrap() == vec![7; 4 << 20]);
}

#[test]
fn a_rebase_keeps_the_disk_and_copies_what_differs_only() {
    let directory = tempfile::tempdir().unwrap();
    let (_, top) = overlay(directory.path());
    let mut other = vec![7; 4 << 20];
    other[0] = 1;
    let path = directory.path().join("other.img");
    std::fs::write(&path, other).unwrap();
    let expected = content(&Image::open(&top, &OpenOptions::new()).unwrap());
    let new = Image::open(&path, &OpenOptions::new().format(Format::Raw)).unwrap();
    let image = Image::open(&top, &writable()).unwrap();
    let (notes, context) = Notes::taken();
    let rebased = rebase(&image, Some(&new), Clusters::Plain, &context).unwrap();
    assert_eq!(rebased.copied, 65536);
    assert_eq!(notes.last(6 * MIB).done, 6 * MIB);
    image.close().unwrap();
    Image::change_backing_file(&top, &writable(), Some((path.as_os_str(), Format::Raw))).unwrap();
    let image = Image::open(&top, &OpenOptions::new()).unwrap();
    assert!(content(&image) == expected);
}

#[test]
fn bitmaps_are_copied_all_or_none() {
    let directory = tempfile::tempdir().unwrap();
    let image = |name: &str| {
        let path = directory.path().join(name);
        Image::create(&path, &CreateOptions::new(Format::Qcow2, MIB)).unwrap();
        Image::open(&path, &writable()).unwrap()
    };
    let (source, destination) = (image("a.qcow2"), image("b.qcow2"));
    source.add_bitmap("one", 65536, Recording::Enabled).unwrap();
    source.add_bitmap("two", 4096, Recording::Disabled).unwrap();
    source.write_at(at(65536), &[1; 512], Durability::Cached).unwrap();
    destination.add_bitmap("two", 4096, Recording::Enabled).unwrap();
    let error = copy_bitmaps(&source, &destination, &source.bitmaps()).unwrap_err();
    assert_eq!(error.image_error().unwrap().kind(), ErrorKind::AlreadyExists);
    assert_eq!(destination.bitmaps().len(), 1);
    destination.remove_bitmap("two").unwrap();
    copy_bitmaps(&source, &destination, &source.bitmaps()).unwrap();
    let dirty = destination.dirty_extents("one", range(0, MIB), 10).unwrap();
    assert_eq!(dirty.iter().filter(|extent| extent.is_dirty).count(), 1);
}

#[test]
fn compressed_clusters_take_less_and_read_the_same() {
    let directory = tempfile::tempdir().unwrap();
    // The last cluster is cut by the end of the disk.
    let source = disk(&vec![5; (3 << 20) + 512]);
    let path = directory.path().join("small.qcow2");
    let destination =
        Image::create(&path, &CreateOptions::new(Format::Qcow2, source.size())).unwrap();
    let mut options = ConvertOptions::default();
    (options.background, options.clusters) = (Background::Zero, Clusters::Compressed);
    convert(&source, &destination, &options, &JobContext::default()).unwrap();
    destination.close().unwrap();
    let copy = Image::open(&path, &OpenOptions::new()).unwrap();
    assert!(content(&copy) == content(&source));
    assert!(std::fs::metadata(&path).unwrap().len() < MIB);
    assert!(!all_extents(&copy, range(0, copy.size())).is_empty());
}

#[test]
fn a_commit_into_a_deeper_layer_writes_what_all_layers_above_it_show() {
    let directory = tempfile::tempdir().unwrap();
    let [base, middle, top] =
        ["base.img", "middle.qcow2", "top.qcow2"].map(|name| directory.path().join(name));
    std::fs::write(&base, vec![7; 4 << 20]).unwrap();
    // It ends before the others: there the disk is zero, and the base is not.
    let mut shorter = CreateOptions::overlay("base.img", Format::Raw);
    shorter.size = Some(2 << 20);
    let image = Image::create(&middle, &shorter).unwrap();
    image.write_at(at(0), &[1; 65536], Durability::Cached).unwrap();
    image.write_at(at(1 << 20), &[1; 65536], Durability::Cached).unwrap();
    image.close().unwrap();
    let mut above = CreateOptions::overlay("middle.qcow2", Format::Qcow2);
    above.size = Some(5 << 20);
    let image = Image::create(&top, &above).unwrap();
    image.write_at(at(1 << 20), &[2; 1000], Durability::Cached).unwrap();
    image.write_at(at(3 << 20), &[2; 65536], Durability::Cached).unwrap();
    image.close().unwrap();

    let disk = Image::open(&top, &OpenOptions::new().locking(Locking::Off)).unwrap();
    let (expected, between) = (content(&disk), std::fs::read(&middle).unwrap());
    let mut backing = Image::open(&base, &writable().format(Format::Raw)).unwrap();
    commit(&disk, &mut backing, 3, &JobContext::default()).unwrap();
    backing.close().unwrap();
    assert!(std::fs::read(&base).unwrap() == expected);
    assert!(content(&disk) == expected, "the overlay shows the same");
    assert!(std::fs::read(&middle).unwrap() == between);
}

#[test]
fn a_rebase_compresses_whole_clusters_and_keeps_parts_of_others() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
    std::fs::write(&base, vec![7; (1 << 20) + 512]).unwrap();
    for l2_entries in [L2Entries::Standard, L2Entries::Extended] {
        let mut create = CreateOptions::overlay("base.img", Format::Raw);
        create.l2_entries = l2_entries;
        let image = Image::create(&top, &create).unwrap();
        image.write_at(at(5000), &[1; 100], Durability::Cached).unwrap();
        let expected = content(&image);
        rebase(&image, None, Clusters::Compressed, &JobContext::default()).unwrap();
        image.close().unwrap();
        Image::change_backing_file(&top, &writable(), None).unwrap();
        let image = Image::open(&top, &OpenOptions::new()).unwrap();
        assert!(content(&image) == expected, "{l2_entries:?}");
        let report = Image::check_file(&top, &OpenOptions::new(), Repair::None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{l2_entries:?}");
        // All but the one of which a part was there.
        assert_eq!(report.compressed_clusters, 16, "{l2_entries:?}");
        drop(image);
        std::fs::remove_file(&top).unwrap();
    }
}

#[test]
fn a_rebase_notes_zeroes_without_space_where_the_version_can() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (old, new, top) = (path("old.img"), path("new.img"), path("top.qcow2"));
    // The old backing file ends before the new one and the overlay do.
    let mut bytes = vec![0; 3 << 16];
    bytes[..1 << 16].fill(5);
    std::fs::write(&old, bytes).unwrap();
    std::fs::write(&new, vec![7; 6 << 16]).unwrap();
    for (version, names_backing, clusters) in [
        (Qcow2Version::V2, true, Clusters::Plain),
        (Qcow2Version::V2, false, Clusters::Plain),
        (Qcow2Version::V3, true, Clusters::Plain),
        (Qcow2Version::V3, true, Clusters::Compressed),
        (Qcow2Version::V3, false, Clusters::Plain),
    ] {
        let case = format!("{version:?} {names_backing} {clusters:?}");
        let mut create = match names_backing {
            true => CreateOptions::overlay("old.img", Format::Raw),
            false => CreateOptions::new(Format::Qcow2, 0),
        };
        (create.size, create.version) = (Some(5 << 16 | 512), version);
        let image = Image::create(&top, &create).unwrap();
        image.write_at(at(4 << 16), &[1; 1 << 16], Durability::Cached).unwrap();
        let expected = content(&image);
        let backing = Image::open(&new, &OpenOptions::new().format(Format::Raw)).unwrap();
        rebase(&image, Some(&backing), clusters, &JobContext::default()).unwrap();
        image.close().unwrap();
        let name = Some((new.as_os_str(), Format::Raw));
        Image::change_backing_file(&top, &writable(), name).unwrap();
        assert!(content(&Image::open(&top, &OpenOptions::new()).unwrap()) == expected, "{case}");
        let report = Image::check_file(&top, &OpenOptions::new(), Repair::None).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{case}");
        let expected = match (version, names_backing) {
            // All of the disk: nothing says that a cluster reads as zero.
            (Qcow2Version::V2, _) => 5 << 16 | 512,
            (_, true) => 2 << 16,
            (_, false) => 1 << 16,
        };
        let image = Image::open(&top, &OpenOptions::new()).unwrap();
        let extents = all_extents(&image, range(0, image.size()));
        let data = extents.iter().filter(|it| it.depth == 1 && it.kind == ExtentKind::Data);
        assert_eq!(data.map(|it| it.range.length()).sum::<u64>(), expected, "{case}");
        std::fs::remove_file(&top).unwrap();
    }
}
