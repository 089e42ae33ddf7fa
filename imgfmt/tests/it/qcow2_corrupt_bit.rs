//! An image in which damage is found is marked, so that nobody writes on.

use std::process::Command;

use imgfmt::{Access, Durability, ErrorKind, Format, Image, OpenOptions, Speed, ZeroMode};

use crate::common::{at, qemu, range, run, text};

const CLUSTER: u64 = 65536;

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(access)
}

/// Changes the L2 entry of guest cluster 1 of an image of 64 KiB clusters.
fn set_entry(path: &std::path::Path, entry: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = number(40) as usize;
    let l2 = (number(l1) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2 + 8..l2 + 16].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(path, bytes).unwrap();
}

fn is_marked(path: &std::path::Path) -> bool {
    std::fs::read(path).unwrap()[79] & 2 != 0
}

#[test]
fn damage_that_a_write_meets_is_marked_and_ends_all_writing_until_it_is_repaired() {
    if !qemu::has_qemu() {
        return;
    }
    let copied = 1 << 63;
    // Into the refcount table, into the middle of a cluster, into nothing.
    for entry in [copied | CLUSTER, copied | (6 * CLUSTER + 512), copied | (900 * CLUSTER)] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        qemu::create(&path, "", "1M");
        qemu::io(&path, "qcow2", &["write -P 7 0 128k".to_owned()]);
        set_entry(&path, entry);
        let image = Image::open(&path, &options(Access::ReadWrite)).unwrap();
        image.write_at(at(0), &[8; 512], Durability::Cached).unwrap();
        assert!(!is_marked(&path), "nothing was found yet");
        let error = image.write_at(at(CLUSTER), &[1; 512], Durability::Cached).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(is_marked(&path), "{entry:#x}");
        let cached = Durability::Cached;
        let zeroes = ZeroMode::MayUnmap;
        for result in [
            image.write_at(at(0), &[9; 512], cached),
            image.try_write_at(at(0), &[9; 512]).map(|_| ()),
            image.write_zeroes(range(0, CLUSTER), zeroes, Speed::Any, cached),
            image.discard(range(0, CLUSTER), cached),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains("nbd-cli image check --repair all"), "{error}");
        }
        // What was written before is still there, and is kept.
        let mut found = [0; 1024];
        image.read_at(at(0), &mut found).unwrap();
        assert!(found[..512] == [8; 512] && found[512..] == [7; 512]);
        image.close().unwrap();
        let error = Image::open(&path, &options(Access::ReadWrite)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        let image = Image::open(&path, &options(Access::ReadOnly)).unwrap();
        image.read_at(at(0), &mut found).unwrap();
        assert!(found[..512] == [8; 512]);
        drop(image);

        let refused = Command::new("qemu-io").args(["-c", "write 0 512", text(&path)]).output();
        let refused = refused.unwrap();
        assert!(!refused.status.success(), "QEMU does not see the mark");
        let output = Command::new("qemu-img").args(["check", "-r", "all", text(&path)]).output();
        if output.unwrap().status.success() {
            assert!(!is_marked(&path), "{entry:#x}: repaired");
            Image::open(&path, &options(Access::ReadWrite)).unwrap();
            run("qemu-img", &["check", "-q", text(&path)]);
        }
    }
}

#[test]
fn a_cluster_that_is_freed_twice_marks_the_image() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "", "1M");
    qemu::io(&path, "qcow2", &["write -P 7 0 192k".to_owned()]);
    // The entry of guest cluster 0: both name the same cluster now.
    let bytes = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (number(number(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    set_entry(&path, number(l2));
    let image = Image::open(&path, &options(Access::ReadWrite)).unwrap();
    image.discard(range(0, CLUSTER), Durability::Cached).unwrap();
    image.flush().unwrap();
    assert!(!is_marked(&path), "so far nothing is known");
    image.discard(range(CLUSTER, CLUSTER), Durability::Cached).unwrap();
    // What it gave up is let go of later; the mark comes no later than with the end.
    drop(image.flush());
    drop(image.close());
    assert!(is_marked(&path));
    let error = Image::open(&path, &options(Access::ReadWrite)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}
