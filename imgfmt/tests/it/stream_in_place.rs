//! Layers are taken away below a disk that is open and in use: readers, writers and crashes find
//! the same disk, and the files of the layers are free. Judged by qemu-img.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use imgfmt::jobs::{JobContext, JobErrorKind, stream_in_place};
use imgfmt::storage::FileStorage;
use imgfmt::testing::{Fault, Loss};
use imgfmt::{
    Access, BackingFile, CreateOptions, Durability, Extent, Format, Image, Locking, NewBase,
    OpenOptions, Speed, ZeroMode,
};

use crate::common::bitmaps::dirty;
use crate::common::{Random, all_extents, at, qemu, range, run, text};
use crate::judge::streams::{SIZE, SUBJECTS, read, remove_base, three_layers};
use crate::judge::subjects::{OnTrial, Tolerance, options, qemu_check, rounds};

const EIO: i32 = 5;

fn deepest(image: &Image) -> u32 {
    let extents = all_extents(image, range(0, image.size()));
    extents.iter().map(|extent: &Extent| extent.depth).max().unwrap_or(0)
}

/// Whether no one has the file open with a lock.
fn is_free(path: &Path) -> bool {
    FileStorage::open(path, Access::ReadWrite, Locking::On).is_ok()
}

#[test]
fn an_open_disk_loses_its_backing_file_and_is_the_same() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("stream in place");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let image = Image::open(&made.path, &options()).unwrap();
        let base = image.files().last().unwrap().0.clone();
        assert!(!is_free(&base), "{subject:?}");
        stream_in_place(&image, None, &JobContext::default()).unwrap();
        assert!(is_free(&base), "{subject:?}");
        remove_base(&made);
        assert!(image.info().unwrap().backing_name.is_none(), "{subject:?}");
        assert_eq!((image.layer_sizes(), image.layer_in(&base)), (vec![SIZE], None));
        assert!(image.files().iter().all(|(path, _)| *path != base), "{subject:?}");
        assert!(read(&image) == made.content && deepest(&image) <= 1, "{subject:?}");
        let again = stream_in_place(&image, None, &JobContext::default()).unwrap();
        assert_eq!(again.data + again.zeroes, 0, "{subject:?}");
        // It is used as any disk: also what is discarded now reads as zero.
        let mut expected = made.content.clone();
        image.write_at(at(5000), &[9; 70_000], Durability::Cached).unwrap();
        expected[5000..75_000].fill(9);
        image
            .write_zeroes(
                range(131_072, 300_000),
                ZeroMode::MayUnmap,
                Speed::Any,
                Durability::Cached,
            )
            .unwrap_or_else(|error| panic!("{subject:?}: {error}"));
        expected[131_072..431_072].fill(0);
        assert!(read(&image) == expected, "{subject:?}");
        image.close().unwrap();
        qemu_check(&made.path, Tolerance::Nothing, subject.options);
        assert!(qemu::content(&made.path, "qcow2") == expected, "{subject:?}");
    }
}

#[test]
fn the_base_that_is_left_becomes_the_backing_file() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("stream in place to a base");
    for kind in ["", "compat=0.10", "extended_l2=on,cluster_size=16k", "cluster_size=512"] {
        let directory = tempfile::tempdir().unwrap();
        let paths = three_layers(directory.path(), kind, "raw", &mut random);
        let [top, middle, base] = &paths;
        let content = qemu::content(top, "qcow2");
        let image = Image::open(top, &options()).unwrap();
        for depth in [0, 1, 4] {
            let wrong = Some(NewBase { depth, name: OsStr::new("base.raw") });
            let error = stream_in_place(&image, wrong, &JobContext::default()).unwrap_err();
            assert_eq!(error.kind(), JobErrorKind::InvalidArgument, "{depth}");
        }
        let new = Some(NewBase { depth: 3, name: OsStr::new("base.raw") });
        stream_in_place(&image, new, &JobContext::default()).unwrap();
        assert!(is_free(middle) && !is_free(base), "{kind}");
        std::fs::remove_file(middle).unwrap();
        assert_eq!(image.layer_in(base), Some((2, Format::Raw)));
        assert_eq!(image.layer_sizes(), [SIZE, SIZE]);
        let info = image.info().unwrap();
        assert_eq!(info.backing_name.unwrap(), "base.raw");
        assert_eq!(info.backing_format.unwrap(), "raw");
        assert!(read(&image) == content && deepest(&image) <= 2, "{kind}");
        image.close().unwrap();
        qemu_check(top, Tolerance::Nothing, kind);
        assert!(qemu::content(top, "qcow2") == content, "{kind}");
        // The rest goes in another run.
        let image = Image::open(top, &options()).unwrap();
        stream_in_place(&image, None, &JobContext::default()).unwrap();
        std::fs::remove_file(base).unwrap();
        assert!(read(&image) == content, "{kind}");
        image.close().unwrap();
        assert!(qemu::content(top, "qcow2") == content, "{kind}");
    }
}

#[test]
fn a_crash_at_the_change_leaves_the_same_disk() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash at the change of the backing file");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        let begin = trial.recorder.position();
        stream_in_place(&image, None, &JobContext::default()).unwrap();
        let end = trial.recorder.position();
        image
            .write_zeroes(range(0, SIZE / 2), ZeroMode::MayUnmap, Speed::Any, Durability::Cached)
            .unwrap();
        image.flush().unwrap();
        let zeroed_at = trial.recorder.position();
        drop(image);
        let mut zeroed = made.content.clone();
        zeroed[..SIZE as usize / 2].fill(0);
        let base = made.path.with_extension("base.kept");
        let name = ["raw", "qcow2"].map(|it| made.path.with_extension(format!("base.{it}")));
        let name = name.iter().find(|path| path.exists()).unwrap();
        let mut positions: Vec<usize> = (end.saturating_sub(6).max(begin)..=end).collect();
        for _ in 0..rounds("IMGFMT_STREAM_ROUNDS", 1) {
            positions.push(begin + random.below((end - begin) as u64) as usize);
        }
        for position in positions {
            let loss = Loss::ALL[random.below(4) as usize];
            trial.crash(&made, position, loss, &mut random);
            let what = format!("{subject:?}, {loss:?} at {position} of {begin} to {end}");
            qemu_check(&made.path, Tolerance::Leaks, &what);
            let image = Image::open(&made.path, &options()).unwrap();
            let names_base = image.info().unwrap().backing_name.is_some();
            assert!(position < end || !names_base, "{what}");
            // Without the name, the layer below is not needed.
            if !names_base {
                std::fs::rename(name, &base).unwrap();
            }
            assert!(read(&image) == made.content, "{what}");
            stream_in_place(&image, None, &JobContext::default()).unwrap();
            assert!(read(&image) == made.content, "{what}");
            image.close().unwrap();
            assert!(qemu::content(&made.path, "qcow2") == made.content, "{what}");
            if !names_base {
                std::fs::rename(&base, name).unwrap();
            }
        }
        // Zeroes after the change need no entry, and nothing below shows through.
        trial.crash(&made, zeroed_at, Loss::ALL[random.below(4) as usize], &mut random);
        remove_base(&made);
        assert!(qemu::content(&made.path, "qcow2") == zeroed, "{subject:?}");
    }
}

#[test]
fn two_hundred_writers_and_readers_find_their_data() {
    if !qemu::has_qemu() {
        return;
    }
    const WRITERS: u64 = 200;
    const PART: u64 = SIZE / WRITERS;
    let mut random = Random::new("write while streaming in place");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let image = Image::open(&made.path, &options()).unwrap();
        let seed = random.next();
        let mut expected = made.content.clone();
        std::thread::scope(|scope| {
            let streams = scope.spawn(|| stream_in_place(&image, None, &JobContext::default()));
            let parts = expected.chunks_mut(PART as usize).enumerate();
            let writers: Vec<_> = parts
                .map(|(number, part)| {
                    let (image, start) = (&image, number as u64 * PART);
                    scope.spawn(move || {
                        let mut random = Random::seeded(seed.wrapping_add(number as u64) | 1);
                        for _ in 0..3 {
                            change(image, start, part, &mut random);
                        }
                    })
                })
                .collect();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            streams.join().unwrap().unwrap();
        });
        remove_base(&made);
        assert!(read(&image) == expected, "{subject:?}, seed {seed}");
        image.close().unwrap();
        qemu_check(&made.path, Tolerance::Nothing, subject.options);
        assert!(qemu::content(&made.path, "qcow2") == expected, "{subject:?}, seed {seed}");
    }
}

/// Writes, zeroes or discards something within a part of the disk, and reads all of the part.
fn change(image: &Image, start: u64, part: &mut [u8], random: &mut Random) {
    let length = random.below(part.len() as u64) + 1;
    let offset = random.below(part.len() as u64 - length + 1);
    let place = range(start + offset, length);
    let expected = &mut part[offset as usize..][..length as usize];
    match random.below(4) {
        0 => {
            image.write_zeroes(place, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap();
            expected.fill(0);
        }
        1 => {
            image.discard(place, Durability::Cached).unwrap();
            // It reads as before or as zero, and stays so.
            let old = expected.to_vec();
            image.read_at(at(start + offset), expected).unwrap();
            let is_kept = |(new, old): (&u8, &u8)| *new == 0 || new == old;
            assert!(expected.iter().zip(&old).all(is_kept), "a discard shows something else");
        }
        _ => {
            expected.copy_from_slice(&random.bytes(length as usize));
            image.write_at(at(start + offset), expected, Durability::Cached).unwrap();
        }
    }
    let mut found = vec![0xee; part.len()];
    image.read_at(at(start), &mut found).unwrap();
    assert!(found == part, "at {start}");
}

#[test]
fn a_reader_never_sees_a_layer_again_that_was_taken_away() {
    const CLUSTERS: usize = 16;
    for _ in 0..rounds("IMGFMT_STREAM_ROUNDS", 20) {
        let directory = tempfile::tempdir().unwrap();
        let [base, top] = ["base.raw", "top.qcow2"].map(|name| directory.path().join(name));
        std::fs::write(&base, vec![1; CLUSTERS << 16]).unwrap();
        let image = Image::create(&top, &CreateOptions::overlay("base.raw", Format::Raw)).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        // 1 of the layer below, 2 that is written, and then 0.
                        let mut seen = [1; CLUSTERS];
                        let mut bytes = vec![0; CLUSTERS << 16];
                        while !is_over.load(Ordering::Acquire) {
                            image.read_at(at(0), &mut bytes).unwrap();
                            for (seen, cluster) in seen.iter_mut().zip(bytes.chunks(1 << 16)) {
                                let is_next =
                                    matches!((*seen, cluster[0]), (1, _) | (2, 2 | 0) | (0, 0));
                                assert!(is_next, "{} after {seen}", cluster[0]);
                                *seen = cluster[0];
                            }
                        }
                    })
                })
                .collect();
            stream_in_place(&image, None, &JobContext::default()).unwrap();
            for cluster in 0..CLUSTERS as u64 {
                let place = range(cluster << 16, 1 << 16);
                image.write_at(place.offset(), &[2; 1 << 16], Durability::Cached).unwrap();
                image.discard(place, Durability::Cached).unwrap();
            }
            is_over.store(true, Ordering::Release);
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
    }
}

#[test]
fn bitmaps_record_nothing_and_stay_valid_through_the_change() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [base, top] = ["base.qcow2", "top.qcow2"].map(|name| directory.path().join(name));
    qemu::create(&base, "", "1M");
    qemu::io(&base, "qcow2", &["write -P 7 0 256k".into()]);
    qemu::create_overlay(&top, "", &base, "qcow2", "1M");
    run("qemu-img", &["bitmap", "--add", text(&top), "daily"]);
    let image = Image::open(&top, &options()).unwrap();
    image.write_at(at(0), &[1; 512], Durability::Cached).unwrap();
    stream_in_place(&image, None, &JobContext::default()).unwrap();
    assert_eq!(dirty(&image, "daily"), [(0, 64 << 10)]);
    image.write_at(at(512 << 10), &[1; 512], Durability::Cached).unwrap();
    image.close().unwrap();
    assert_eq!(qemu::dirty(&top, "daily"), [(0, 64 << 10), (512 << 10, 64 << 10)]);
    qemu_check(&top, Tolerance::Nothing, "streamed in place");
}

#[test]
fn a_failed_flush_or_an_ignored_backing_file_keeps_the_layers() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("a flush that fails before the change");
    let subject = SUBJECTS[0];
    let directory = tempfile::tempdir().unwrap();
    let made = subject.make(directory.path(), SIZE, &mut random);
    let trial = OnTrial::new(&made);
    let image = trial.open().unwrap();
    trial.file.lose_at_sync(0).unwrap();
    image.write_at(at(0), &made.content[..512], Durability::Cached).unwrap();
    image.flush().unwrap_err();
    for _ in 0..2 {
        let error = stream_in_place(&image, None, &JobContext::default()).unwrap_err();
        assert!(error.to_string().contains("keep the layers below"), "{error}");
        assert!(image.info().unwrap().backing_name.is_some());
    }
    drop(image);
    let trial = OnTrial::new(&made);
    let image = trial.open().unwrap();
    trial.file.set_fault(Some(Fault { calls: trial.file.calls() + 1..u64::MAX, code: EIO }));
    stream_in_place(&image, None, &JobContext::default()).unwrap_err();
    assert_eq!(image.layer_sizes().len(), 2);
    drop(image);
    let image = Image::open(&made.path, &options().backing(BackingFile::Ignored)).unwrap();
    let error = stream_in_place(&image, None, &JobContext::default()).unwrap_err();
    assert!(error.to_string().contains("is not open"), "{error}");
    image.close().unwrap();
    let image = Image::open(&made.path, &OpenOptions::new().access(Access::ReadOnly)).unwrap();
    assert!(stream_in_place(&image, None, &JobContext::default()).is_err());
    assert!(qemu::content(&made.path, "qcow2") == made.content);
}

#[test]
fn the_name_changes_before_the_file_of_a_closed_image_is_unlocked() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("close with another backing file");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let image = Image::open(&made.path, &options()).unwrap();
        imgfmt::jobs::stream(&image, None, &JobContext::default()).unwrap();
        image.close_with_backing(None).unwrap();
        remove_base(&made);
        qemu_check(&made.path, Tolerance::Nothing, subject.options);
        assert!(qemu::content(&made.path, "qcow2") == made.content, "{subject:?}");
        let image = Image::open(&made.path, &OpenOptions::new()).unwrap();
        image.close_with_backing(None).unwrap_err();
    }
}
