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
    assert!(said.contains("iB of data would be copied"), "{said}");
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

#[cfg(feature = "object-storage")]
#[test]
fn a_backup_is_used_at_once_and_streamed_until_its_repository_is_not_needed() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (repository, overlay) = (disk.beside("repository"), disk.beside("machine.qcow2"));
    nbd_cli(&["repo", "init", &repository]).success();
    nbd_cli(&["backup", "--name", "vm", disk.path(), &repository]).success();
    let latest = format!("backup:{repository}/vm@latest");
    let create = ["image", "create", "-f", "qcow2", "-b", &latest, "-F", "raw", &overlay];
    nbd_cli(&create).success();
    // The overlay stays on the backup that it was made on.
    let flat = disk.beside("flat.img");
    std::fs::copy(disk.path(), &flat).expect("a copy");
    peer(&qemu_io, &["-f", "raw", "-c", "write -P 99 0 1M", disk.path()]);
    nbd_cli(&["backup", "--name", "vm", disk.path(), &repository]).success();
    let name = info(&qemu_img, &overlay)["backing-filename"].as_str().expect("text").to_owned();
    assert!(name.starts_with(&format!("backup:{repository}/vm@")) && name.len() > 50, "{name}");

    // Served at once: a guest reads, writes, zeroes and discards before anything is copied.
    let commands = ["write -P 7 1M 100k", "write -z 3M 128k", "read 2M 1M"];
    let mut guest = format!("{} -f raw -d unmap -c 'discard 5M 64k'", qemu_io.display());
    let mut arguments = vec!["-f", "raw", "-c", "write -z 5M 64k"];
    for command in &commands {
        guest.push_str(&format!(" -c '{command}'"));
        arguments.extend(["-c", *command]);
    }
    guest.push_str(" \"$uri\"");
    nbd_cli(&["serve", "--trust-image", "--run", &guest, &overlay]).success();
    arguments.push(&flat);
    peer(&qemu_io, &arguments);
    let same = ["image", "compare", "--trust-image", &overlay, &flat];
    nbd_cli(&same).success();
    nbd_cli(&["image", "stream", "--trust-image", &overlay]).success();
    std::fs::remove_dir_all(&repository).expect("it is not needed any more");
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &flat);
}

#[cfg(feature = "object-storage")]
#[test]
fn an_image_that_names_a_backup_without_its_id_is_refused() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (repository, overlay) = (disk.beside("repository"), disk.beside("machine.qcow2"));
    nbd_cli(&["repo", "init", &repository]).success();
    nbd_cli(&["backup", "--name", "vm", disk.path(), &repository]).success();
    let latest = format!("backup:{repository}/vm@latest");
    peer(
        &qemu_img,
        &["create", "-q", "-f", "qcow2", "-u", "-b", &latest, "-F", "raw", &overlay, "8M"],
    );
    let outcome = nbd_cli(&["image", "map", "--trust-image", &overlay]);
    says(outcome, &["may be another disk later", "repo list"]);
}
