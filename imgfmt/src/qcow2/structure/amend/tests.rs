//! Every state that a crash can leave, sector by sector, while the header is amended.

use std::ffi::OsString;
use std::process::Command;

use super::*;
use crate::create_options::CreateOptions;
use crate::format::Format;
use crate::image::Image;
use crate::qcow2::metadata::backing_change::{Use, change_backing};
use crate::qcow2::metadata::header_edit::put_extension;
use crate::storage::MemoryStorage;
use crate::testing::Recorder;
use crate::units::HostOffset;

const UNKNOWN_EXTENSION: u32 = 0x1234_5678;
const UNKNOWN_AUTOCLEAR: u64 = 1 << 40;

/// An image over a backing file with a name of this many bytes, or over none.
fn image(cluster_size: u64, version: Qcow2Version, name_length: usize) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut options = CreateOptions::new(Format::Qcow2, 1 << 20);
    (options.cluster_size, options.version) = (cluster_size, version);
    Image::create(&path, &options).unwrap();
    let storage = MemoryStorage::from_bytes(&std::fs::read(path).unwrap());
    put_extension(&storage, cluster_size, UNKNOWN_EXTENSION, &[7; 20]).unwrap();
    if name_length > 0 {
        let name = "n".repeat(name_length);
        change_backing(&storage, Some((name.as_ref(), Format::Raw)), Use::Closed).unwrap();
    }
    content(&storage)
}

fn content(storage: &MemoryStorage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_exact_at(HostOffset::new(0), &mut bytes).unwrap();
    bytes
}

/// What stays the same: name and format of the backing file, and the extension that is not known.
fn kept(bytes: &[u8]) -> (Option<OsString>, Option<String>, bool) {
    let storage = MemoryStorage::from_bytes(bytes);
    let header = Header::read(&storage, Purpose::Use).unwrap();
    let start = HeaderStart::read(&storage, &header).unwrap();
    let length = if header.version < 3 { 72 } else { u32_at(bytes, 100) as usize };
    let unknown = [&UNKNOWN_EXTENSION.to_be_bytes()[..], &[0, 0, 0, 20], &[7; 20]].concat();
    let area = extension::without(start.extensions(length), UNUSED_KIND).unwrap();
    let has_unknown = area.windows(unknown.len()).any(|part| part == unknown);
    (header.backing_name, header.extensions.backing_format, has_unknown)
}

/// Amends the image and looks at every state between.
fn amended(bytes: &[u8], amendment: &Amendment, what: &str) -> Vec<u8> {
    let recorder = Recorder::new();
    let storage = recorder.storage(bytes);
    amend(&*storage, amendment).unwrap();
    let after = storage.content();
    let (before, last) = (kept(bytes), u32_at(&after, 4));
    assert!(before.2, "{what}");
    let has_qemu = Command::new("qemu-img").arg("--version").output().is_ok();
    assert!(has_qemu || std::env::var_os("CI").is_none(), "qemu-img is needed");
    let mut states = std::collections::HashSet::new();
    for position in 0..=recorder.position() {
        states.extend(storage.all_after_crash(position));
    }
    assert!(states.contains(bytes) && states.contains(&after) && states.len() > 1, "{what}");
    for state in states {
        assert_eq!(kept(&state), before, "{what}");
        assert!([u32_at(bytes, 4), last].contains(&u32_at(&state, 4)), "{what}");
        if has_qemu {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk.qcow2");
            std::fs::write(&path, &state).unwrap();
            let looked = Command::new("qemu-img").args(["info", "-f", "qcow2"]).arg(&path).output();
            let looked = looked.unwrap();
            assert!(looked.status.success(), "{what}: {looked:?}");
        }
        // An interrupted amendment can be repeated.
        let again = MemoryStorage::from_bytes(&state);
        amend(&again, amendment).unwrap();
        assert_eq!(kept(&content(&again)), before, "{what}");
        assert_eq!(u32_at(&content(&again), 4), last, "{what}");
    }
    after
}

#[test]
fn a_crash_leaves_the_header_of_the_old_or_the_new_version() {
    for cluster_size in [4096, 65536] {
        for name_length in [0, 20, 300, 390, 430, 1000] {
            let what = format!("clusters of {cluster_size}, a name of {name_length}");
            let old = image(cluster_size, Qcow2Version::V2, name_length);
            let to = |version| Amendment { version: Some(version), ..Amendment::default() };
            let mut new = amended(&old, &to(Qcow2Version::V3), &what);
            // Not understood here: it means nothing after a change.
            let bits = UNKNOWN_AUTOCLEAR.to_be_bytes();
            new[field::AUTOCLEAR as usize..][..8].copy_from_slice(&bits);
            let lazy =
                Amendment { lazy_refcounts: Some(LazyRefcounts::On), ..Amendment::default() };
            let lazy = amended(&new, &lazy, &what);
            let header = Header::read(&MemoryStorage::from_bytes(&lazy), Purpose::Use).unwrap();
            assert_eq!((header.autoclear, header.compatible), (0, compatible::LAZY_REFCOUNTS));
            let back = amended(&lazy, &to(Qcow2Version::V2), &what);
            amended(&back, &to(Qcow2Version::V3), &what);
            let made = image(cluster_size, Qcow2Version::V3, name_length);
            amended(&made, &to(Qcow2Version::V2), &what);
        }
    }
}

#[test]
fn a_header_without_room_for_another_version_is_left_as_it_is() {
    // The name lies in the first sector and cannot move out of it.
    let old = image(1024, Qcow2Version::V2, 500);
    let storage = MemoryStorage::from_bytes(&old);
    let to = Amendment { version: Some(Qcow2Version::V3), ..Amendment::default() };
    assert_eq!(amend(&storage, &to).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(content(&storage) == old);
    // Extensions that fill the first sector.
    let storage = MemoryStorage::from_bytes(&image(4096, Qcow2Version::V2, 0));
    put_extension(&storage, 4096, UNKNOWN_EXTENSION, &[8; 370]).unwrap();
    let old = content(&storage);
    assert_eq!(amend(&storage, &to).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(content(&storage) == old);
}
