//! A crash at any instant leaves an image that QEMU finds sound but for leaks, and that holds what
//! was flushed.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A test may fail, and says what it skips.

mod common;

use std::sync::Arc;

use common::fault::{FaultStorage, SectorModel};
use common::{Random, qemu};
use imgfmt::{Access, Durability, Format, Image, OpenOptions, Storage};

const SIZE: u64 = 3 << 20;

const KINDS: [&str; 6] = [
    "cluster_size=65536",
    "cluster_size=4096",
    "cluster_size=512,refcount_bits=64",
    "extended_l2=on,cluster_size=16384",
    "compat=0.10,cluster_size=4096",
    "cluster_size=4096,refcount_bits=1",
];

fn options() -> OpenOptions {
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    options.metadata_cache_bytes(0)
}

fn empty(options: &str, folder: &std::path::Path) -> Vec<u8> {
    let path = folder.join("empty.qcow2");
    let _ = std::fs::remove_file(&path);
    qemu::create(&path, options, &SIZE.to_string());
    std::fs::read(&path).unwrap()
}

#[test]
fn a_loss_of_power_leaves_at_worst_leaked_clusters() {
    if !qemu::has_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("crashed.qcow2");
    let mut random = Random::new("qcow2 crash");
    for kind in KINDS {
        let storage = Arc::new(FaultStorage::new(&empty(kind, folder.path())));
        let image = Image::from_storage(Arc::clone(&storage) as _, &options()).unwrap();
        let mut model = SectorModel::new(SIZE);
        let mut history = vec![(storage.position(), model.clone())];
        for _ in 0..150 {
            model.step(&image, &mut random).unwrap();
            history.push((storage.position(), model.clone()));
        }
        for _ in 0..12 {
            // What was flushed when an operation had ended holds until the next has ended.
            let index = random.below(history.len() as u64 - 1) as usize;
            let (from, to) = (history[index].0, history[index + 1].0);
            let position = from + random.below((to - from) as u64 + 1) as usize;
            let bytes = storage.crash(position, &mut random);
            std::fs::write(&path, &bytes).unwrap();
            let what = format!("{kind}: crash after {position} of {} changes", storage.position());
            qemu::check_but_for_leaks(&path, &what);
            // The next operation may have begun, and its flush may not have counted yet.
            let mut allowed = history[index].1.clone();
            for (allowed, next) in allowed.allowed.iter_mut().zip(&history[index + 1].1.allowed) {
                allowed.extend(next);
            }
            let reopened = Image::open(&path, &options()).unwrap();
            allowed.check(&reopened, &what);
            let mut model = allowed;
            model.pin(&reopened);
            for _ in 0..10 {
                model.step(&reopened, &mut random).unwrap();
            }
            reopened.close().unwrap();
            qemu::check_but_for_leaks(&path, &format!("{what}, then written again"));
        }
    }
}

#[test]
fn an_error_anywhere_leaves_the_image_sound_and_in_use() {
    if !qemu::has_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("failed.qcow2");
    let mut random = Random::new("qcow2 errors");
    for kind in KINDS {
        let empty = empty(kind, folder.path());
        for _ in 0..8 {
            let storage = Arc::new(FaultStorage::new(&empty));
            let image = Image::from_storage(Arc::clone(&storage) as _, &options()).unwrap();
            let mut model = SectorModel::new(SIZE);
            let first = storage.calls() + random.below(300);
            let end = first + [1, 2, 30][random.below(3) as usize];
            let code = [5, 28][random.below(2) as usize]; // EIO, ENOSPC
            storage.fail(first, end, code);
            let what = format!("{kind}: error {code} in calls {first} to {end}");
            for _ in 0..60 {
                if let Err(error) = model.step(&image, &mut random) {
                    assert_eq!(error.raw_os_error(), Some(code), "{what}: {error}");
                }
            }
            storage.fail(0, 0, 0);
            for _ in 0..20 {
                model.step(&image, &mut random).unwrap();
            }
            model.check(&image, &what);
            image.close().unwrap();
            std::fs::write(&path, storage.content()).unwrap();
            qemu::check_but_for_leaks(&path, &what);
            model.check(&Image::open(&path, &OpenOptions::new()).unwrap(), &what);
        }
    }
}

#[test]
fn a_flush_makes_a_write_durable_and_the_storage_shows_it() {
    // The crash test above would pass if nothing were ever lost: make sure that something is.
    let storage = FaultStorage::new(&[0; 4096]);
    let offset = imgfmt::HostOffset::new(512);
    storage.write_at(offset, &[1; 512], Durability::Cached).unwrap();
    storage.sync().unwrap();
    storage.write_at(offset, &[2; 512], Durability::Cached).unwrap();
    let mut random = Random::new("storage");
    let found: Vec<u8> = (0..50).map(|_| storage.crash(3, &mut random)[512]).collect();
    assert!(found.contains(&1) && found.contains(&2) && !found.contains(&0), "{found:?}");
}
