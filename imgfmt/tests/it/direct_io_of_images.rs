//! Images whose data passes the page cache by, or whose every change is durable: they are what QEMU
//! finds, too.

use std::sync::Arc;

use imgfmt::testing::Recorder;
use imgfmt::{
    Access, CacheMode, Durability, Format, Image, OpenOptions, OpenPolicy, Speed, TryRead,
    TryWrite, ZeroMode,
};

use crate::common::{Random, at, qemu, range};
use crate::direct_io::open_direct;
use crate::judge::Model;
use crate::judge::subjects::{Start, Subject, Tolerance, check_snapshots, options, qemu_check};

const SIZE: u64 = (2 << 20) + 512;

#[test]
fn qcow2_images_of_every_kind_are_what_their_model_is() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new("direct images");
    for (subject, cache) in [
        (Subject::new("", Start::Empty), CacheMode::None),
        (Subject::new("cluster_size=512,refcount_bits=64", Start::Used), CacheMode::None),
        (Subject::new("extended_l2=on,cluster_size=16384", Start::Snapshots), CacheMode::None),
        (Subject::new("cluster_size=4096", Start::Overlay), CacheMode::DirectSync),
        (Subject::new("cluster_size=8192", Start::RawOverlay), CacheMode::None),
        (Subject::new("", Start::Compressed), CacheMode::None),
        (Subject::new("data_file=DIR/data.raw,cluster_size=4096", Start::Used), CacheMode::None),
        (Subject::new("cluster_size=1024,compat=0.10", Start::Used), CacheMode::Writethrough),
    ] {
        let made = subject.make(directory.path(), SIZE, &mut random);
        if open_direct(&made.path).is_none() {
            return;
        }
        let what = format!("{subject:?}, {cache}");
        let image = Image::open(&made.path, &options().cache(cache)).unwrap();
        assert_eq!(image.direct_alignment().is_some(), cache.is_direct());
        let mut model = Model::new(made.content.clone());
        for _ in 0..60 {
            model.step(&image, &mut random, &what).unwrap();
        }
        model.check(&image, &what);
        image.close().unwrap();
        qemu_check(&made.path, Tolerance::Nothing, &what);
        check_snapshots(&made, &what);
        assert!(qemu::content(&made.path, "qcow2") == model.current, "{what}: read by QEMU");
    }
}

#[test]
fn files_of_a_chain_are_all_read_past_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw");
    std::fs::write(&base, vec![5; 100_001]).unwrap();
    if open_direct(&base).is_none() {
        return;
    }
    let overlay = directory.path().join("overlay.qcow2");
    let new = imgfmt::CreateOptions::new(Format::Qcow2, 1 << 20);
    Image::create(&overlay, &new).unwrap();
    let plain = OpenOptions::new();
    Image::change_backing_file(&overlay, &plain, Some((base.as_os_str(), Format::Raw))).unwrap();
    let options = options().policy(OpenPolicy::any_file());
    for (cache, may_wait) in [(CacheMode::Writeback, false), (CacheMode::None, true)] {
        let image = Image::open(&overlay, &options.clone().cache(cache)).unwrap();
        let mut found = vec![0; 100];
        image.read_at(at(99_950), &mut found).unwrap();
        assert_eq!((found[50], found[51]), (5, 0));
        let tried = image.try_read_at(at(0), &mut found).unwrap();
        assert_eq!(tried == TryRead::WouldBlock, may_wait, "{cache}");
    }
}

#[test]
fn a_raw_image_past_the_page_cache_offers_no_file_to_send_from_and_no_write_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, vec![5; 100_001]).unwrap();
    if open_direct(&path).is_none() {
        return;
    }
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    for cache in CacheMode::ALL {
        let image = Image::open(&path, &options.clone().cache(cache)).unwrap();
        assert_eq!(image.raw_fd().is_none(), cache.is_direct(), "{cache}");
        let must_wait = cache.is_direct() || cache.is_writethrough();
        let tried = image.try_write_at(at(1), &[1; 10]).unwrap();
        assert_eq!(tried == TryWrite::WouldBlock, must_wait, "{cache}");
    }
}

/// Each change asks for durability once it is made, whatever the caller asks for.
#[test]
fn every_change_is_durable_when_it_returns() {
    for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::DirectSync] {
        let recorder = Recorder::new();
        let storage = recorder.storage(&[1; 300_000]);
        let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
        let image = Image::from_storage(Arc::clone(&storage) as _, &options.cache(cache)).unwrap();
        image.write_at(at(0), &[2; 5000], Durability::Cached).unwrap();
        let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
        image.write_zeroes(range(100_000, 5000), mode, speed, Durability::Cached).unwrap();
        image.discard(range(200_000, 5000), Durability::Cached).unwrap();
        let end = recorder.position();
        let lost = imgfmt::testing::Loss::ALL.into_iter().any(|loss| {
            let mut below = |bound: u64| bound / 2;
            storage.after_crash(end, loss, &mut below) != storage.content()
        });
        assert_eq!(lost, !cache.is_writethrough(), "{cache}");
    }
}
