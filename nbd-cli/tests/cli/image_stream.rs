//! `image stream`, judged by qemu-img: overlays that stand alone afterwards, or on a lower layer.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::image::{are_equal, chain, info, is_clean};
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

#[test]
fn a_streamed_overlay_stands_alone() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &overlay, &flat]);
    peer(&qemu_img, &["bitmap", "--add", &overlay, "daily"]);
    let before = std::fs::read(&overlay).expect("the overlay");
    let said = nbd_cli(&["image", "stream", "--dry-run", &overlay]).success();
    assert!(said.contains("of data would be copied"), "{said}");
    assert!(std::fs::read(&overlay).expect("the overlay") == before, "a dry run changes nothing");
    nbd_cli(&["image", "stream", &overlay]).success();
    for below in ["middle.qcow2", "disk.img"] {
        std::fs::remove_file(disk.beside(below)).expect("a layer");
    }
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &flat);
    let found = info(&qemu_img, &overlay);
    assert!(found.get("backing-filename").is_none(), "{found}");
    assert!(found["format-specific"]["data"]["bitmaps"][0]["flags"][0] == "auto", "{found}");
    // Nothing is left to do.
    nbd_cli(&["image", "stream", &overlay]).success();
    are_equal(&qemu_img, &overlay, &flat);
}

#[test]
fn with_a_base_the_layers_above_it_are_not_needed_any_more() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &overlay, &flat]);
    let outcome = nbd_cli(&["image", "stream", "--base", "flat.img", &overlay]);
    says(outcome, &["flat.img", "is not a layer below it"]);
    nbd_cli(&["image", "stream", "--base", "disk.img", &overlay]).success();
    std::fs::remove_file(disk.beside("middle.qcow2")).expect("a layer");
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &flat);
    let found = info(&qemu_img, &overlay);
    assert_eq!(found["backing-filename"], "disk.img");
    assert_eq!(found["backing-filename-format"], "raw");
}

#[test]
fn a_killed_stream_leaves_the_disk_and_goes_on() {
    tools!(qemu_img = "qemu-img");
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (base, overlay) = (path("base.img"), path("overlay.qcow2"));
    let bytes: Vec<u8> = (0..24u32 << 20).map(|at| (at >> 12) as u8 | 1).collect();
    std::fs::write(&base, bytes).expect("the base");
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", &overlay]).success();
    for megabytes in [2, 5, 9] {
        // The rate leaves time for the kill.
        let mut child = Command::new(env!("CARGO_BIN_EXE_nbd-cli"))
            .args(["image", "stream", "--rate", "4M", &overlay])
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let end = Instant::now() + Duration::from_secs(60);
        let length = || std::fs::metadata(&overlay).expect("the overlay").len();
        while length() < megabytes << 20 && child.try_wait().expect("a child").is_none() {
            assert!(Instant::now() < end, "nothing is copied");
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        child.wait().expect("it ends");
        are_equal(&qemu_img, &overlay, &base);
    }
    nbd_cli(&["image", "stream", &overlay]).success();
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &base);
    std::fs::rename(&base, path("kept.img")).expect("it is not needed");
    are_equal(&qemu_img, &overlay, &path("kept.img"));
}
