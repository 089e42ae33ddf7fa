//! Bitmaps of an image that was in use when the machine went down: recovered by whole extents, or
//! honestly said to be lost. That the sidecar is from another boot is all that is made up here.

use imgfmt::{BitmapChange, Durability, Image, RecoveryPrecision};

use crate::common::bitmaps::dirty;
use crate::common::{at, qemu};
use crate::survival::{
    SIZE, die_after, disk, flags, has_no_trace, make, open, read_only, reason, restart, sidecar,
};

/// An extent of the activity log.
const EXTENT: u64 = 4 << 20;

/// The disk works, and keeps what is written to it.
fn is_usable(image: &Image) {
    let mut sector = [0; 512];
    image.read_at(at(0), &mut sector).unwrap();
    assert_eq!(sector, [0x5a; 512]);
    image.write_at(at(4096), &[7; 512], Durability::Fua).unwrap();
}

#[test]
fn extents_that_were_being_written_are_marked_as_a_whole_and_nothing_else() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:1048576:4096,write:20971520:512");
    restart(&path);
    let expected = [(0, EXTENT), (5 * EXTENT, EXTENT)];
    for name in ["fine", "coarse"] {
        assert_eq!(dirty(&read_only(&path), name), expected, "{name}, who only reads");
    }
    assert_eq!(flags(&path).matches("in-use").count(), 2, "after reading");
    let image = open(&path);
    let status = image.bitmap_durability();
    assert_eq!(status.recovered, ["fine", "coarse"]);
    assert_eq!(status.precision, RecoveryPrecision::WholeExtents);
    assert_eq!(dirty(&image, "fine"), expected);
    assert_eq!(dirty(&image, "still"), []);
    image.close().unwrap();
    has_no_trace(&path);
    assert_eq!(qemu::dirty(&path, "fine"), expected);
}

#[test]
fn a_write_behind_a_clear_is_all_that_is_recovered() {
    let Some((_directory, path)) = disk() else { return };
    let script = format!("open:power,write:0:{SIZE},clear:fine,write:{}:512", SIZE - 512);
    die_after(&path, &script);
    restart(&path);
    let image = open(&path);
    assert_eq!(dirty(&image, "fine"), [(SIZE - EXTENT, EXTENT)]);
    assert_eq!(dirty(&image, "coarse"), [(0, SIZE)]);
}

#[test]
fn the_level_of_process_death_gives_nothing_back_and_the_disk_is_there() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:process,write:0:4096,flush");
    restart(&path);
    let said = reason(&read_only(&path), "fine").unwrap();
    assert!(said.contains("restarted"), "{said}");
    let image = open(&path);
    let said = reason(&image, "fine").unwrap();
    assert!(said.contains("restarted"), "{said}");
    assert_eq!(image.bitmap_durability().recovered, [""; 0]);
    is_usable(&image);
    let repair = BitmapChange::Repair { name: "fine".into() };
    image.bitmap_transaction(&[repair]).unwrap();
    assert_eq!(dirty(&image, "fine"), [(0, SIZE)]);
    image.close().unwrap();
    assert!(reason(&read_only(&path), "coarse").is_some(), "it was not repaired");
    qemu::check_but_for_leaks(&path, "closed");
}

#[test]
fn qemu_writing_before_the_recovery_is_noticed() {
    if !qemu::has_qemu() {
        return;
    }
    for level in ["process", "power"] {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        die_after(&path, &format!("open:{level},write:0:4096,flush"));
        restart(&path);
        qemu::io(&path, "qcow2", &["write 8M 4k".into()]);
        let image = open(&path);
        assert!(reason(&image, "fine").is_some(), "{level}");
        is_usable(&image);
        image.close().unwrap();
        assert!(reason(&read_only(&path), "fine").is_some(), "{level}, closed");
        qemu::check_but_for_leaks(&path, level);
    }
}

#[test]
fn a_writer_that_ignores_the_autoclear_bit_is_noticed_by_what_it_did_to_the_file() {
    if !qemu::has_qemu() {
        return;
    }
    for case in ["shorter", "another file"] {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        die_after(&path, "open:power,write:0:4096,flush");
        restart(&path);
        if case == "shorter" {
            // The length that the image had when the sidecar was made.
            let bytes = std::fs::read(sidecar(&path)).unwrap();
            let length = u64::from_le_bytes(bytes[112..120].try_into().unwrap());
            let longer = std::fs::metadata(&path).unwrap().len() + 65536;
            assert!(length < longer);
            let mut changed = bytes;
            changed[112..120].copy_from_slice(&longer.to_le_bytes());
            let crc = crc32fast::hash(&changed[..508]);
            changed[508..512].copy_from_slice(&crc.to_le_bytes());
            std::fs::write(sidecar(&path), changed).unwrap();
        } else {
            let copy = directory.path().join("copy");
            std::fs::copy(&path, &copy).unwrap();
            std::fs::rename(&copy, &path).unwrap();
        }
        let said = reason(&open(&path), "fine").unwrap();
        assert!(said.contains(case), "{said}");
    }
}

#[test]
fn a_restart_in_the_middle_of_the_recovery_costs_nothing() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:4096");
    let (image, found) = (std::fs::read(&path).unwrap(), std::fs::read(sidecar(&path)).unwrap());
    drop(open(&path));
    // Nothing of the recovery has reached the disk.
    std::fs::write(&path, image).unwrap();
    std::fs::write(sidecar(&path), found).unwrap();
    restart(&path);
    assert_eq!(dirty(&open(&path), "fine"), [(0, EXTENT)]);
    has_no_trace(&path);
}

#[test]
fn without_the_sidecar_the_bitmaps_stay_in_use() {
    let Some((_directory, path)) = disk() else { return };
    die_after(&path, "open:power,write:0:4096,flush");
    std::fs::remove_file(sidecar(&path)).unwrap();
    let image = open(&path);
    assert!(reason(&image, "fine").is_some());
    is_usable(&image);
    image.close().unwrap();
    assert!(flags(&path).contains("in-use"));
}
