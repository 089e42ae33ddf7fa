//! Streaming copies into an overlay what the layers below it provide: the disk stays the same
//! through crashes, errors and writes by others, judged by qemu-img.

use imgfmt::jobs::{JobContext, JobErrorKind, measure_stream, stream};
use imgfmt::testing::{Fault, Loss};
use imgfmt::{Durability, ExtentKind, Format, Image};

use crate::common::bitmaps::dirty;
use crate::common::{Random, all_extents, at, qemu, range, run, text};
use crate::judge::streams::{SIZE, SUBJECTS, read, remove_base, three_layers};
use crate::judge::subjects::{Made, OnTrial, Tolerance, options, qemu_check, rounds};

const ENOSPC: i32 = 28;

/// All that comes from layers below.
fn from_below(image: &Image) -> u64 {
    let extents = all_extents(image, range(0, image.size()));
    extents.iter().filter(|it| it.depth >= 2).map(|it| it.range.length()).sum()
}

/// Removes the name of the backing file, and the file.
fn stand_alone(made: &Made) {
    Image::change_backing_file(&made.path, &options(), None).unwrap();
    remove_base(made);
}

#[test]
fn a_streamed_disk_is_the_same_without_its_backing_file() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("stream");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let image = Image::open(&made.path, &options()).unwrap();
        let measured = measure_stream(&image, None, &JobContext::default()).unwrap();
        let streamed = stream(&image, None, &JobContext::default()).unwrap();
        // Zeroes need no entry in an image of version 2 that stands alone, even if they are data
        // below.
        if !subject.options.contains("0.10") {
            // Clusters are copied whole.
            assert!(streamed.data + streamed.zeroes >= measured.data, "{subject:?}");
            assert_eq!(from_below(&image), 0, "{subject:?}");
        }
        assert!(read(&image) == made.content, "{subject:?}");
        let again = stream(&image, None, &JobContext::default()).unwrap();
        assert_eq!(again.data, 0, "{subject:?}: nothing is copied twice");
        image.close().unwrap();
        qemu_check(&made.path, Tolerance::Nothing, subject.options);
        stand_alone(&made);
        qemu_check(&made.path, Tolerance::Nothing, subject.options);
        assert!(qemu::content(&made.path, "qcow2") == made.content, "{subject:?}");
    }
}

#[test]
fn with_a_base_only_the_layers_above_it_are_copied() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("stream to a base");
    for kind in ["", "compat=0.10", "extended_l2=on,cluster_size=16k", "cluster_size=2M"] {
        let directory = tempfile::tempdir().unwrap();
        let [top, middle, base] = three_layers(directory.path(), kind, "qcow2", &mut random);
        let content = qemu::content(&top, "qcow2");
        let image = Image::open(&top, &options()).unwrap();
        assert_eq!(image.layer_in(&base), Some((3, Format::Qcow2)));
        assert_eq!(image.layer_in(&top), None, "the image is not below itself");
        stream(&image, Some(3), &JobContext::default()).unwrap();
        let extents = all_extents(&image, range(0, SIZE));
        assert!(extents.iter().all(|extent| extent.depth != 2), "{kind}");
        let error = stream(&image, Some(4), &JobContext::default()).unwrap_err();
        assert_eq!(error.kind(), JobErrorKind::InvalidArgument);
        image.close().unwrap();
        let new = Some((std::ffi::OsStr::new("base.qcow2"), Format::Qcow2));
        Image::change_backing_file(&top, &options(), new).unwrap();
        std::fs::remove_file(&middle).unwrap();
        qemu_check(&top, Tolerance::Nothing, kind);
        assert!(qemu::content(&top, "qcow2") == content, "{kind}");
    }
}

#[test]
fn a_crash_while_streaming_leaves_the_same_disk_and_the_next_call_goes_on() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash while streaming");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let trial = OnTrial::new(&made);
        let image = trial.open().unwrap();
        let begin = trial.recorder.position();
        stream(&image, None, &JobContext::default()).unwrap();
        image.close().unwrap();
        let length = (trial.recorder.position() - begin + 1) as u64;
        for _ in 0..rounds("IMGFMT_STREAM_ROUNDS", 4) {
            let position = begin + random.below(length) as usize;
            let loss = Loss::ALL[random.below(4) as usize];
            trial.crash(&made, position, loss, &mut random);
            let what = format!("{subject:?}, {loss:?} at {position}");
            qemu_check(&made.path, Tolerance::Leaks, &what);
            let image = Image::open(&made.path, &options()).unwrap();
            assert!(read(&image) == made.content, "{what}");
            stream(&image, None, &JobContext::default()).unwrap();
            assert!(read(&image) == made.content, "{what}");
            image.close().unwrap();
        }
        stand_alone(&made);
        assert!(qemu::content(&made.path, "qcow2") == made.content, "{subject:?}");
    }
}

#[test]
fn a_full_disk_ends_streaming_with_an_error_and_the_same_disk() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("stream to a full disk");
    for subject in SUBJECTS {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        for first in [0, 2, 11] {
            let trial = OnTrial::new(&made);
            let image = trial.open().unwrap();
            let calls = trial.file.calls() + first..u64::MAX;
            trial.file.set_fault(Some(Fault { calls, code: ENOSPC }));
            // Enough calls may be left for all of it, and the data file has space.
            let _ = stream(&image, None, &JobContext::default());
            trial.file.set_fault(None);
            assert!(read(&image) == made.content, "{subject:?} from {first}");
            stream(&image, None, &JobContext::default()).unwrap();
            assert!(read(&image) == made.content, "{subject:?} from {first}");
            image.close().unwrap();
            trial.put_down(&made);
            qemu_check(&made.path, Tolerance::Leaks, subject.options);
        }
    }
}

#[test]
fn what_others_write_meanwhile_stays() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("write while streaming");
    for subject in SUBJECTS {
        for _ in 0..rounds("IMGFMT_STREAM_ROUNDS", 1) {
            let directory = tempfile::tempdir().unwrap();
            let made = subject.make(directory.path(), SIZE, &mut random);
            let image = Image::open(&made.path, &options()).unwrap();
            let seed = random.next();
            let mut expected = made.content.clone();
            std::thread::scope(|scope| {
                let streams = scope.spawn(|| stream(&image, None, &JobContext::default()));
                let mut random = Random::seeded(seed);
                for _ in 0..200 {
                    let length = random.below(5000) + 1;
                    let offset = random.below(SIZE - length);
                    let bytes = random.bytes(length as usize);
                    image.write_at(at(offset), &bytes, Durability::Cached).unwrap();
                    expected[offset as usize..][..length as usize].copy_from_slice(&bytes);
                }
                streams.join().unwrap().unwrap();
            });
            assert!(read(&image) == expected, "{subject:?}, seed {seed}");
            image.close().unwrap();
            stand_alone(&made);
            qemu_check(&made.path, Tolerance::Nothing, subject.options);
            assert!(qemu::content(&made.path, "qcow2") == expected, "{subject:?}, seed {seed}");
        }
    }
}

#[test]
fn no_bit_is_set_zeroes_stay_zeroes_and_discarded_clusters_stay() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [base, top] = ["base.qcow2", "top.qcow2"].map(|name| directory.path().join(name));
    qemu::create(&base, "", "1M");
    qemu::io(&base, "qcow2", &["write -P 7 0 256k".into(), "write -z 256k 128k".into()]);
    qemu::create_overlay(&top, "", &base, "qcow2", "1M");
    qemu::io(&top, "qcow2", &["discard 64k 64k".into()]);
    run("qemu-img", &["bitmap", "--add", text(&top), "daily"]);
    let image = Image::open(&top, &options()).unwrap();
    let streamed = stream(&image, None, &JobContext::default()).unwrap();
    assert_eq!((streamed.data, streamed.zeroes), (192 << 10, 128 << 10));
    assert_eq!(dirty(&image, "daily"), []);
    let kinds: Vec<_> = all_extents(&image, range(0, 1 << 20))
        .iter()
        .map(|it| (it.range.length() >> 10, it.kind == ExtentKind::Data, it.depth))
        .collect();
    let expected =
        [(64, true, 1), (64, false, 1), (128, true, 1), (128, false, 1), (640, false, 0)];
    assert_eq!(kinds, expected);
    image.write_at(at(512 << 10), &[1; 512], Durability::Cached).unwrap();
    image.close().unwrap();
    Image::change_backing_file(&top, &options(), None).unwrap();
    assert_eq!(qemu::dirty(&top, "daily"), [(512 << 10, 64 << 10)]);
    qemu_check(&top, Tolerance::Nothing, "streamed");
}

#[test]
fn an_image_with_internal_snapshots_is_refused() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("stream with snapshots");
    let made = SUBJECTS[0].make(directory.path(), SIZE, &mut random);
    run("qemu-img", &["snapshot", "-c", "first", text(&made.path)]);
    let image = Image::open(&made.path, &options()).unwrap();
    let error = stream(&image, None, &JobContext::default()).unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::InvalidArgument);
    assert!(error.to_string().contains("internal snapshots"), "{error}");
}
