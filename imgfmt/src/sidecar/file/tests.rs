//! The file: how it is made, replaced, locked and taken away.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;
use crate::access::BitmapDurability;
use crate::sidecar::tests::{BOOT, description, recovery};

fn image(directory: &tempfile::TempDir) -> PathBuf {
    let path = directory.path().join("disk.qcow2");
    std::fs::write(&path, b"image").unwrap();
    path
}

#[test]
fn the_file_is_private_has_its_length_and_starts_with_the_given_bits() {
    let directory = tempfile::tempdir().unwrap();
    let place = SidecarPlace::beside(&image(&directory)).unwrap();
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[9, 16]);
    let file =
        place.create_file(&description, &|bitmap, word| (bitmap as u64) << 32 | word).unwrap();
    let metadata = std::fs::metadata(directory.path().join("disk.qcow2.dirty")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    assert_eq!(metadata.len(), file.words().len() as u64 * 8);
    assert!(!directory.path().join("disk.qcow2.dirty.new").exists());
    assert!(place.open_file(Access::ReadOnly).is_err(), "it is locked while it is in use");
    drop(file);
    let found = place.open_file(Access::ReadWrite).unwrap().unwrap();
    let recovery = recovery(found, &description, BOOT).unwrap();
    let words = recovery.words(&description.bitmaps[0]).unwrap().unwrap();
    assert_eq!(words, (0..32).collect::<Vec<u64>>());
}

#[test]
fn links_are_not_followed_and_what_they_point_to_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory);
    let other = directory.path().join("other");
    std::fs::write(&other, b"precious").unwrap();
    for name in ["disk.qcow2.dirty", "disk.qcow2.dirty.new"] {
        std::os::unix::fs::symlink(&other, directory.path().join(name)).unwrap();
    }
    let place = SidecarPlace::beside(&path).unwrap();
    assert!(place.open_file(Access::ReadWrite).is_err());
    let description = description(BitmapDurability::ProcessDeath, 1 << 20, &[16]);
    let file = place.create_file(&description, &|_, _| 0).unwrap();
    let metadata = std::fs::symlink_metadata(directory.path().join("disk.qcow2.dirty")).unwrap();
    assert!(metadata.is_file());
    assert_eq!(std::fs::read(&other).unwrap(), b"precious");
    drop(file);
}

#[test]
fn an_image_has_the_same_sidecar_by_whatever_link_it_is_reached() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory);
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link.qcow2");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let description = description(BitmapDurability::ProcessDeath, 1 << 20, &[16]);
    let place = SidecarPlace::beside(&link).unwrap();
    let _file = place.create_file(&description, &|_, _| 0).unwrap();
    assert!(directory.path().join("disk.qcow2.dirty").exists());
}

#[test]
fn a_new_epoch_takes_the_place_of_the_old_file_which_then_removes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let place = SidecarPlace::beside(&image(&directory)).unwrap();
    let mut description = description(BitmapDurability::ProcessDeath, 1 << 20, &[16]);
    let old = place.create_file(&description, &|_, _| 0).unwrap();
    description.epoch += 1;
    let new = place.create_file(&description, &|_, _| 0).unwrap();
    old.remove().unwrap();
    assert!(directory.path().join("disk.qcow2.dirty").exists());
    new.remove().unwrap();
    assert!(!directory.path().join("disk.qcow2.dirty").exists());
    new.remove().unwrap();
}

/// As a process that another thread forks has a copy of every descriptor until it executes its
/// program.
#[test]
fn a_lock_ends_with_its_owner_even_if_others_have_a_copy_of_the_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let place = SidecarPlace::beside(&image(&directory)).unwrap();
    let description = description(BitmapDurability::ProcessDeath, 1 << 20, &[16]);
    let made = place.create_file(&description, &|_, _| 0).unwrap();
    let _copy = made.file.try_clone().unwrap();
    drop(made);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let found = place.open_file(access).unwrap().unwrap();
        let copy = found.0.try_clone().unwrap();
        drop(found);
        place.open_file(Access::ReadWrite).unwrap().unwrap();
        drop(copy);
    }
}
