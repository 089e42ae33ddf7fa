//! Bitmaps of an image whose process died: recovered, or honestly said to be lost.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use imgfmt::{BitmapDurability, Image, RecoveryPrecision, Repair};

use crate::common::bitmaps::dirty;
use crate::common::{self, qemu, run, text};
use crate::survival::{
    SIZE, die_after, disk, flags, has_no_trace, make, open, options, read_only, reason, sidecar,
};

#[test]
fn bits_are_recovered_exactly_and_qemu_sees_a_clean_image_then() {
    if !qemu::has_qemu() {
        return;
    }
    for level in ["process", "power"] {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        die_after(&path, &format!("open:{level},write:1048576:4096,flush,write:2097152:512"));
        assert_eq!(flags(&path).matches("in-use").count(), 2, "before the recovery");
        let mode = std::fs::metadata(sidecar(&path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let expected = vec![(1048576, 4096), (2097152, 512)];
        // A reader sees the bits and changes nothing.
        assert_eq!(dirty(&read_only(&path), "fine"), expected);
        assert_eq!(flags(&path).matches("in-use").count(), 2, "after reading");
        let image = open(&path);
        let status = image.bitmap_durability();
        assert_eq!(status.recovered, ["fine", "coarse"]);
        assert_eq!(status.precision, RecoveryPrecision::Exact);
        assert_eq!(dirty(&image, "fine"), expected);
        drop(image);
        has_no_trace(&path);
        assert_eq!(qemu::dirty(&path, "fine"), expected);
    }
}

#[test]
fn a_recovery_that_is_interrupted_by_death_is_repeated() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:4096");
    die_after(&path, "open:power");
    die_after(&path, "open:power,write:65536:4096");
    die_after(&path, "open:process,write:131072:4096");
    let image = open(&path);
    assert_eq!(dirty(&image, "fine"), [(0, 4096), (65536, 4096), (131072, 4096)]);
    image.close().unwrap();
    has_no_trace(&path);
}

#[test]
fn a_repair_before_the_recovery_does_no_harm() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:4096,write:1048576:4096");
    // As if the process had died some time ago.
    let bytes = std::fs::read(sidecar(&path)).unwrap();
    let mut old = bytes.clone();
    let alive = u64::from_le_bytes(old[512..520].try_into().unwrap()) - 10_000_000_000;
    old[512..520].copy_from_slice(&alive.to_le_bytes());
    std::fs::write(sidecar(&path), old).unwrap();
    // A leak: the refcount of a cluster behind the end becomes 1.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let cluster = file.metadata().unwrap().len().div_ceil(65536);
    file.write_all_at(&[0, 1], 2 * 65536 + 2 * cluster).unwrap();
    file.set_len((cluster + 1) * 65536).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(10)).unwrap();
    drop(file);
    let report = Image::check_file(&path, &options(), Repair::All).unwrap();
    assert!(report.leaks_repaired > 0, "there was something to repair: {report:?}");
    assert_eq!(dirty(&open(&path), "fine"), [(0, 4096), (1048576, 4096)]);
}

#[test]
fn without_a_sidecar_the_bitmaps_stay_in_use_as_qemu_has_it() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:none,write:0:4096");
    assert!(!sidecar(&path).exists());
    assert!(reason(&open(&path), "fine").is_some());
    assert!(flags(&path).contains("in-use"));
}

#[test]
fn qemu_writing_before_the_recovery_is_noticed() {
    if !qemu::has_qemu() {
        return;
    }
    for level in ["process", "power"] {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        die_after(&path, &format!("open:{level},write:0:4096"));
        qemu::io(&path, "qcow2", &["write 1M 4k".into()]);
        let image = open(&path);
        let found = reason(&image, "fine");
        assert!(found.is_some(), "{level}: a bitmap without QEMU's write must not be shown");
        image.close().unwrap();
        assert!(reason(&read_only(&path), "fine").is_some(), "{level}");
        qemu::check_but_for_leaks(&path, "after QEMU wrote");
    }
}

#[test]
fn qemu_reading_before_the_recovery_does_no_harm() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:4096,flush");
    run("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 0x5a 0 4k", text(&path)]);
    run("qemu-img", &["info", text(&path)]);
    assert_eq!(dirty(&open(&path), "fine"), [(0, 4096)]);
}

#[test]
fn a_writer_that_ignores_the_autoclear_bit_is_noticed_by_the_time() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:4096,flush");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
    drop(file);
    let reason = reason(&open(&path), "fine").unwrap();
    assert!(reason.contains("another program has changed the image"), "{reason}");
}

#[test]
fn a_copy_of_the_image_does_not_believe_a_copy_of_the_sidecar() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = make(directory.path());
    die_after(&path, "open:power,write:0:4096,flush");
    let copy = directory.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    std::fs::copy(sidecar(&path), sidecar(&copy)).unwrap();
    let reason = reason(&open(&copy), "fine").unwrap();
    assert!(reason.contains("another file"), "{reason}");
    assert_eq!(dirty(&open(&path), "fine"), [(0, 4096)], "the original is as it was");
}

#[test]
fn a_sidecar_that_is_gone_damaged_or_of_another_session_is_not_believed() {
    if !qemu::has_qemu() {
        return;
    }
    for case in ["gone", "damaged", "cut", "other"] {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        die_after(&path, "open:power,write:0:4096,flush");
        let bytes = std::fs::read(sidecar(&path)).unwrap();
        match case {
            "gone" => std::fs::remove_file(sidecar(&path)).unwrap(),
            "damaged" => {
                let mut bytes = bytes;
                bytes[50] ^= 1;
                std::fs::write(sidecar(&path), bytes).unwrap();
            }
            "cut" => std::fs::write(sidecar(&path), &bytes[..bytes.len() / 2]).unwrap(),
            _ => {
                drop(open(&path));
                die_after(&path, "open:power,write:65536:4096,flush");
                std::fs::write(sidecar(&path), bytes).unwrap();
            }
        }
        let image = open(&path);
        let reason = reason(&image, "fine");
        assert!(reason.is_some(), "{case}");
        // The disk is there, and can be written on.
        let mut sector = [0; 512];
        image.read_at(common::at(0), &mut sector).unwrap();
        assert_eq!(sector, [0x5a; 512], "{case}");
        image.write_at(common::at(0), &sector, imgfmt::Durability::Fua).unwrap();
        image.close().unwrap();
        qemu::check_but_for_leaks(&path, case);
    }
}

#[test]
fn changes_of_the_list_of_bitmaps_survive_with_their_bits() {
    if !qemu::has_qemu() {
        return;
    }
    let whole = format!("0:{SIZE}");
    for (script, fine, coarse, still) in [
        ("write:0:512,clear:fine", vec![], vec![(0, 65536)], vec![]),
        ("write:0:512,clear:fine,write:65536:512", vec![(65536, 512)], vec![(0, 131072)], vec![]),
        (
            "write:0:512,merge:still:fine,write:512:512",
            vec![(0, 1024)],
            vec![(0, 65536)],
            vec![(0, 65536)],
        ),
        (
            "write:0:512,enable:still,write:131072:512",
            vec![(0, 512), (131072, 512)],
            vec![(0, 65536), (131072, 65536)],
            vec![(131072, 65536)],
        ),
        (
            &format!("write:{whole},clear:fine,clear:coarse,write:0:1"),
            vec![(0, 512)],
            vec![(0, 65536)],
            vec![],
        ),
    ] {
        for level in ["process", "power"] {
            let directory = tempfile::tempdir().unwrap();
            let path = make(directory.path());
            die_after(&path, &format!("open:{level},{script}"));
            let image = open(&path);
            assert_eq!(dirty(&image, "fine"), fine, "{script}");
            assert_eq!(dirty(&image, "coarse"), coarse, "{script}");
            assert_eq!(dirty(&image, "still"), still, "{script}");
            image.close().unwrap();
            has_no_trace(&path);
        }
    }
}

#[test]
fn removing_one_bitmap_keeps_the_bits_of_the_others() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:512,remove:coarse,write:512:512");
    let image = open(&path);
    assert_eq!(image.bitmap_durability().recovered, ["fine"]);
    assert_eq!(dirty(&image, "fine"), [(0, 1024)]);
}

/// The first of two changes makes the sidecar out of date, the second leaves no bitmap that would
/// have to be marked as in use.
#[test]
fn what_is_written_behind_two_changes_of_the_list_is_recovered() {
    if !qemu::has_qemu() {
        return;
    }
    for (level, second) in [("process", "remove"), ("power", "remove"), ("process", "disable")] {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        let script = format!("write:0:512,clear:coarse,{second}:coarse,write:65536:512");
        die_after(&path, &format!("open:{level},{script}"));
        assert_eq!(dirty(&open(&path), "fine"), [(0, 512), (65536, 512)], "{level}, {second}");
        has_no_trace(&path);
    }
}

#[test]
fn a_clean_close_leaves_no_trace() {
    let Some((_directory, path)) = disk() else { return };
    let image = open(&path);
    assert!(!sidecar(&path).exists(), "nothing has changed yet");
    image.write_at(common::at(0), &[1; 512], imgfmt::Durability::Cached).unwrap();
    assert!(sidecar(&path).exists());
    image.close().unwrap();
    has_no_trace(&path);
    qemu::check(&path);
}

#[test]
fn it_can_be_told_before_the_first_write_whether_a_sidecar_can_be_made() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = make(directory.path());
    let names = || std::fs::read_dir(directory.path()).unwrap().count();
    let image = open(&path);
    assert_eq!(image.probe_bitmap_durability().degraded, None);
    assert_eq!(names(), 1, "something stayed behind");
    // What has the name of a file that is not finished is in nobody's way.
    let new = path.with_extension("qcow2.dirty.new");
    std::fs::create_dir(&new).unwrap();
    assert_eq!(image.probe_bitmap_durability().degraded, None);
    assert_eq!(names(), 2, "something stayed behind");
    // A directory in the sidecar's own place is.
    std::fs::create_dir(sidecar(&path)).unwrap();
    let status = image.probe_bitmap_durability();
    assert_eq!(status.durability, BitmapDurability::CleanClose);
    assert!(status.degraded.unwrap().contains("is a directory"));
    std::fs::remove_dir(sidecar(&path)).unwrap();
    assert_eq!(image.probe_bitmap_durability().durability, BitmapDurability::PowerLoss);
    image.write_at(common::at(0), &[1; 512], imgfmt::Durability::Cached).unwrap();
    assert_eq!(image.probe_bitmap_durability(), image.bitmap_durability());
    assert!(sidecar(&path).exists());
    image.close().unwrap();
    std::fs::remove_dir(&new).unwrap();
    has_no_trace(&path);
}

#[test]
fn without_a_sidecar_writes_succeed_and_the_lower_durability_is_reported() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = make(directory.path());
    // A directory of that name cannot be replaced by a file.
    std::fs::create_dir(sidecar(&path)).unwrap();
    let image =
        Image::open(&path, &options().bitmap_durability(BitmapDurability::ProcessDeath)).unwrap();
    assert_eq!(image.bitmap_durability().durability, BitmapDurability::ProcessDeath);
    assert_eq!(image.probe_bitmap_durability().durability, BitmapDurability::CleanClose);
    image.write_at(common::at(0), &[1; 512], imgfmt::Durability::Cached).unwrap();
    let status = image.bitmap_durability();
    assert_eq!(status.durability, BitmapDurability::CleanClose);
    assert!(status.degraded.is_some());
    image.close().unwrap();
    std::fs::remove_dir(sidecar(&path)).unwrap();
    has_no_trace(&path);
    assert_eq!(dirty(&read_only(&path), "fine"), [(0, 512)]);
}
