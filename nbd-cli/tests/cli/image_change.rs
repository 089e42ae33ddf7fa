//! `image resize`, `amend`, `rebase`, `commit` and `snapshot`, judged by qemu-img.

use crate::support::image::{are_equal, chain, info, is_clean, json, ours, write};
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

#[test]
fn an_old_image_is_amended_in_place() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("old.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", &image, "1M"]);
    nbd_cli(&["image", "amend", "--compat", "1.1", "--lazy-refcounts", "on", &image]).success();
    is_clean(&qemu_img, &image);
    let data = &info(&qemu_img, &image)["format-specific"]["data"];
    assert_eq!(
        (data["compat"].as_str(), data["lazy-refcounts"].as_bool()),
        (Some("1.1"), Some(true))
    );
    nbd_cli(&["image", "amend", "--compat", "0.10", &image]).success();
    is_clean(&qemu_img, &image);
    assert_eq!(info(&qemu_img, &image)["format-specific"]["data"]["compat"], "0.10");
}

#[test]
fn a_disk_grows_and_shrinks() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    for path in [image.as_str(), disk.path()] {
        let size = |change: &[&str]| {
            let all: Vec<_> = ["image", "resize", path].iter().chain(change).copied().collect();
            assert_eq!(nbd_cli(&all).success(), "");
            info(&qemu_img, path)["virtual-size"].as_u64().expect("a size")
        };
        assert_eq!(size(&["12M"]), 12 << 20);
        assert_eq!(size(&["+1G"]), (1 << 30) + (12 << 20));
        assert_eq!(size(&["--shrink", "-1G"]), 12 << 20);
        let outcome = nbd_cli(&["image", "resize", path, "1M"]);
        says(outcome, &[path, "12582912 bytes", "add --shrink"]);
        assert_eq!(size(&["--shrink", "8M"]), 8 << 20);
        says(
            nbd_cli(&["image", "resize", path, "-9M"]),
            &[path, "the resulting size would be invalid"],
        );
        disk.assert_equals(disk.path());
    }
    is_clean(&qemu_img, &image);
    are_equal(&qemu_img, &image, disk.path());
}

#[test]
fn a_rebased_disk_stays_the_same() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    for new in [Some(("disk.img", "raw")), Some(("other.qcow2", "qcow2")), None] {
        let disk = Disk::sparse();
        let overlay = chain(&disk, &qemu_img, &qemu_io);
        let flat = disk.beside("flat.img");
        peer(&qemu_img, &["convert", &overlay, &flat]);
        // Smaller than the overlay, and different from everything below it.
        let other = disk.beside("other.qcow2");
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &other, "5M"]);
        write(&qemu_io, &other, "write -P 85 0 5M");
        let mut arguments = vec!["image", "rebase"];
        match new {
            Some((name, format)) => arguments.extend(["-b", name, "-F", format]),
            None => arguments.push("--no-backing"),
        }
        arguments.push(&overlay);
        assert_eq!(nbd_cli(&arguments).success(), "");
        let found = info(&qemu_img, &overlay);
        assert_eq!(found.get("backing-filename").and_then(|name| name.as_str()), new.map(|n| n.0));
        let format = found.get("backing-filename-format").and_then(|format| format.as_str());
        assert_eq!(format, new.map(|new| new.1));
        is_clean(&qemu_img, &overlay);
        are_equal(&qemu_img, &overlay, &flat);
    }
}

#[test]
fn zeroes_are_kept_when_an_image_gets_its_first_backing_file() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
    write(&qemu_io, &image, "write -P 1 2M 64k");
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &image, &flat]);
    nbd_cli(&["image", "rebase", "-b", "disk.img", "-F", "raw", &image]).success();
    is_clean(&qemu_img, &image);
    are_equal(&qemu_img, &image, &flat);
}

#[test]
fn an_unsafe_rebase_changes_the_name_only() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let bytes = || std::fs::read(&overlay).expect("the overlay");
    let by_qemu = bytes();
    nbd_cli(&["image", "rebase", "-u", "-b", "middle.qcow2", "-F", "qcow2", &overlay]).success();
    let before = bytes();
    assert!(by_qemu[65536..] == before[65536..], "only the header changes");
    let name = format!("{}moved.qcow2", "far/".repeat(200));
    nbd_cli(&["image", "rebase", "--unsafe", "-b", &name, "-F", "qcow2", &overlay]).success();
    assert!(bytes()[65536..] == before[65536..], "only the header changes");
    let found = ours(&["info", "--json", &overlay]);
    assert_eq!(found["backing-filename"], name.as_str());
    nbd_cli(&["image", "rebase", "-u", "-b", "middle.qcow2", "-F", "qcow2", &overlay]).success();
    let back = bytes();
    assert!(back[65536..] == before[65536..], "only the header changes");
    let found = ours(&["info", "--json", &overlay]);
    assert_eq!(found["backing-filename"], "middle.qcow2");
    is_clean(&qemu_img, &overlay);
    let long = "x".repeat(1024);
    let outcome = nbd_cli(&["image", "rebase", "-u", "-b", &long, "-F", "raw", &overlay]);
    says(outcome, &[&overlay, "1 to 1023 bytes"]);
    assert!(bytes() == back, "nothing changes");
}

#[test]
fn an_interrupted_change_of_the_backing_file_is_completed_by_repeating_it() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &overlay, &flat]);
    // As a crash leaves it where the header has no room for two names at once: incompatible bit 62,
    // and no name.
    let mut bytes = std::fs::read(&overlay).expect("the overlay");
    bytes[72] |= 0x40;
    bytes[8..20].fill(0);
    std::fs::write(&overlay, &bytes).expect("the overlay");
    let rebase = ["image", "rebase", "-b", "middle.qcow2", "-F", "qcow2", &overlay];
    let unusable: [&[&str]; 4] = [
        &["image", "info", &overlay],
        &["image", "check", "--repair", "all", &overlay],
        &["image", "amend", "--lazy-refcounts", "on", &overlay],
        &rebase,
    ];
    for command in unusable {
        let advice = "run 'nbd-cli image rebase --unsafe' with the new backing file";
        says(nbd_cli(command), &[&overlay, "interrupted", advice]);
    }
    assert!(std::fs::read(&overlay).expect("the overlay") == bytes, "nothing changes");
    nbd_cli(&[&rebase[..], &["--unsafe"]].concat()).success();
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &flat);
}

#[test]
fn a_rebase_onto_what_cannot_be_changes_nothing() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let before = std::fs::read(&overlay).expect("the overlay");
    for (name, format, reason) in [
        ("missing.img", "raw", "no such file"),
        ("disk.img", "qcow2", "qcow2"),
        ("overlay.qcow2", "qcow2", "overlay.qcow2"),
    ] {
        says(nbd_cli(&["image", "rebase", "-b", name, "-F", format, &overlay]), &[reason]);
        assert!(std::fs::read(&overlay).expect("the overlay") == before, "{name}");
    }
    says(nbd_cli(&["image", "rebase", "--no-backing", disk.path()]), &["raw image cannot"]);
    says(nbd_cli(&["image", "rebase", "-u", "--no-backing", disk.path()]), &["raw image cannot"]);
    disk.assert_equals(disk.path());
}

#[test]
fn an_internal_snapshot_keeps_what_it_shows_of_the_layers_below() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (image, flat) = (disk.beside("image.qcow2"), disk.beside("flat.img"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", disk.path(), "-F", "raw", &image]);
    peer(&qemu_img, &["snapshot", "-c", "before", &image]);
    write(&qemu_io, &image, "write -P 1 0 2M");
    let changes: [&[&str]; 5] = [
        &["image", "rebase", "--no-backing", &image],
        &["image", "commit", &image],
        &["image", "stream", &image],
        &["qemu-img", "rebase", "-b", "", &image],
        &["qemu-img", "commit", &image],
    ];
    for change in changes {
        let outcome = nbd_cli(change);
        assert_eq!(outcome.code, Some(1), "{change:?}");
        assert!(outcome.stderr.contains("internal snapshots"), "{change:?}: {}", outcome.stderr);
    }
    peer(&qemu_img, &["convert", "-l", "before", "-O", "raw", &image, &flat]);
    are_equal(&qemu_img, &flat, disk.path());
}

#[test]
fn after_a_commit_the_backing_file_holds_the_same_disk() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &overlay, &flat]);
    let middle = disk.beside("middle.qcow2");
    assert_eq!(nbd_cli(&["image", "commit", &overlay]).success(), "");
    is_clean(&qemu_img, &middle);
    are_equal(&qemu_img, &middle, &flat);
    are_equal(&qemu_img, &overlay, &flat);
    is_clean(&qemu_img, &overlay);
    let check = json(&qemu_img, &["check", "--output=json", &overlay]);
    assert_eq!(check.get("allocated-clusters"), None, "the overlay is emptied: {check}");
    disk.assert_equals(disk.path());
    // And once more, into a raw image.
    let before = std::fs::read(&middle).expect("the overlay");
    nbd_cli(&["image", "commit", "--keep", &middle]).success();
    assert!(std::fs::read(&middle).expect("the overlay") == before, "it is kept");
    are_equal(&qemu_img, disk.path(), &flat);
    says(nbd_cli(&["image", "commit", disk.path()]), &["no backing file"]);
}

#[test]
fn a_commit_makes_a_backing_file_that_is_too_small_larger() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = disk.beside("large.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-b", "disk.img", "-F", "raw"];
    peer(&qemu_img, &[&create[..], &[&overlay, "20M"]].concat());
    write(&qemu_io, &overlay, "write -P 3 19M 64k");
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &overlay, &flat]);
    nbd_cli(&["image", "commit", &overlay]).success();
    are_equal(&qemu_img, disk.path(), &flat);
    assert_eq!(std::fs::metadata(disk.path()).expect("the disk").len(), 20 << 20);
}

#[test]
fn snapshots_come_and_go() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", disk.path(), &image]);
    let snapshot = |action: &str| nbd_cli(&["image", "snapshot", action, &image, "before"]);
    assert_eq!(snapshot("create").success(), "");
    says(snapshot("create"), &["there is a snapshot 'before' already"]);
    let list = ours(&["snapshot", "list", "--json", &image]);
    let theirs = &info(&qemu_img, &image)["snapshots"];
    for key in ["id", "name", "date-sec", "date-nsec", "vm-state-size", "vm-clock-sec"] {
        assert_eq!(list[0][key], theirs[0][key], "{key}");
    }
    let text = nbd_cli(&["image", "snapshot", "list", &image]).success();
    assert!(text.contains("8.0 MiB") && text.contains("UTC  before"), "{text}");
    write(&qemu_io, &image, "write -P 1 0 2M");
    snapshot("apply").success();
    are_equal(&qemu_img, &image, disk.path());
    snapshot("delete").success();
    assert_eq!(nbd_cli(&["image", "snapshot", "list", &image]).success(), "");
    says(snapshot("delete"), &["no snapshot 'before'"]);
    is_clean(&qemu_img, &image);
    are_equal(&qemu_img, &image, disk.path());
    says(nbd_cli(&["image", "snapshot", "create", disk.path(), "x"]), &["to qcow2"]);
}
