//! Backups of a disk in use, through the control socket of its server.

use std::path::Path;

use serde_json::Value;

use crate::support::image::{are_equal, info, is_clean};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

fn write(qemu_io: &Path, uri: &str, command: &str) {
    let said = peer(qemu_io, &["-f", "raw", "-c", command, uri]);
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn incremental_backups_of_a_disk_in_use_restore_to_each_of_their_moments() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "64M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let backup = |more: &[&str]| -> Value {
        let arguments = ["backup", "--control", &control, "--export", "vm", "-B", "daily"];
        let said = nbd_cli(&[&arguments[..], &["--verify=all", "--json"], more].concat());
        said.json()
    };
    let copy = |name: &str| {
        let copied = directory.beside(name);
        nbd_cli(&["copy", server.uri(), &copied]).success();
        copied
    };
    let (full, second, third) = (
        directory.beside("full.qcow2"),
        directory.beside("second.qcow2"),
        directory.beside("third.qcow2"),
    );

    write(&qemu_io, server.uri(), "write -P 1 0 5M");
    let first_state = copy("1.img");
    backup(&[&full]);

    write(&qemu_io, server.uri(), "write -P 2 1M 100k");
    write(&qemu_io, server.uri(), "write -z 3M 128k");
    // A backup that fails forgets nothing.
    let wrong = directory.beside("wrong.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &wrong, "32M"]);
    let arguments = ["backup", "--control", &control, "--export", "vm", "-B", "daily", "-b"];
    let failed = nbd_cli(&[&arguments[..], &[&wrong, &second]].concat());
    says(failed, &["33554432", "full backup"]);
    let second_state = copy("2.img");
    let report = backup(&["--base", &full, &second]);
    assert_eq!(report["copied"].as_u64(), Some(128 << 10), "{report}");
    assert_eq!(report["zero"].as_u64(), Some(128 << 10), "{report}");

    write(&qemu_io, server.uri(), "write -P 3 40M 64k");
    let third_state = copy("3.img");
    let report = backup(&["--base", &second, &third]);
    assert_eq!(report["copied"].as_u64(), Some(64 << 10), "{report}");
    server.end();

    for (state, taken) in [(first_state, full), (second_state, second), (third_state, third)] {
        is_clean(&qemu_img, &taken);
        are_equal(&qemu_img, &state, &taken);
        let restored = directory.beside("restored.img");
        nbd_cli(&["restore", &taken, &restored]).success();
        are_equal(&qemu_img, &state, &restored);
        std::fs::remove_file(restored).expect("it is there");
    }
    is_clean(&qemu_img, &disk);
    let bitmaps = info(&qemu_img, &disk)["format-specific"]["data"]["bitmaps"].clone();
    assert_eq!(bitmaps.as_array().map(Vec::len), Some(1), "only 'daily' is left: {bitmaps}");
}

#[test]
fn the_view_stays_while_clients_write_and_the_bitmap_notes_what_they_do() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let say = |arguments: &[&str]| nbd_cli(&[&["control", &control][..], arguments].concat());
    say(&["bitmap-add", "vm", "b"]).success();
    write(&qemu_io, server.uri(), "write -P 1 1M 1M");
    let before = directory.beside("before.img");
    nbd_cli(&["copy", server.uri(), &before]).success();

    let view = say(&["checkpoint-start", "vm", "--bitmap", "b"]).success();
    let view = view.lines().next().expect("a URI");
    write(&qemu_io, server.uri(), "write -P 2 0 8M");
    write(&qemu_io, server.uri(), "discard 12M 1M");
    are_equal(&qemu_img, &before, view);
    let map = nbd_cli(&["map", "--context", "qemu:dirty-bitmap:b", "--json", view]).success();
    let map: Value = serde_json::from_str(&map).expect("JSON");
    assert_eq!(map.to_string().matches("dirty\"").count(), 1, "only what was dirty then: {map}");
    says(say(&["checkpoint-start", "vm"]), &["already"]);
    says(say(&["bitmap-clear", "vm", "b"]), &["belongs to a checkpoint"]);
    says(say(&["remove-export", "vm"]), &["checkpoint", "in progress"]);

    say(&["checkpoint-end", "vm", "failure"]).success();
    says(say(&["checkpoint-end", "vm", "success"]), &["no checkpoint"]);
    let listing = say(&["--json", "list"]).json();
    let bitmap = &listing["exports"][0]["bitmaps"][0];
    assert_eq!(bitmap["dirty-bytes"], 9 << 20, "both times together: {listing}");
    server.end();
    is_clean(&qemu_img, &disk);
}

/// Marks the only bitmap of an image as in use, as a killed QEMU leaves it.
fn leave_in_use(image: &str, name: &str) {
    let mut bytes = std::fs::read(image).expect("the image");
    let found = bytes.windows(name.len()).rposition(|window| window == name.as_bytes());
    bytes[found.expect("its entry") - 9] |= 1;
    std::fs::write(image, bytes).expect("the image");
}

#[test]
fn a_full_backup_restarts_an_unreliable_bitmap_with_a_warning() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
    peer(&qemu_img, &["bitmap", "--add", &disk, "daily"]);
    leave_in_use(&disk, "daily");
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let backup = |more: &[&str]| {
        let arguments =
            ["backup", "--control", &control, "--export", "vm", "-B", "daily", "--json"];
        nbd_cli(&[&arguments[..], more].concat())
    };
    let (full, second) = (directory.beside("full.qcow2"), directory.beside("second.qcow2"));
    // An attempt that fails leaves nothing that looks as if little had changed.
    std::fs::write(directory.beside("taken.qcow2"), "").expect("room");
    assert_eq!(backup(&[&directory.beside("taken.qcow2")]).code, Some(1));
    let listing = nbd_cli(&["control", &control, "--json", "list"]).success();
    let listing: Value = serde_json::from_str(&listing).expect("JSON");
    let bitmap = &listing["exports"][0]["bitmaps"][0];
    assert!(bitmap["dirty-bytes"] == 16 << 20 || bitmap["problem"].is_string(), "{listing}");
    server.end();
    leave_in_use(&disk, "daily");

    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    // An incremental one needs the bits.
    let refused = backup(&["--base", &disk, &second]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let said = backup(&[&full]);
    assert!(said.stderr.contains("'daily' was unreliable"), "{said:?}");
    assert!(said.stderr.contains("it restarts with this backup"), "{said:?}");
    said.success();
    write(&qemu_io, server.uri(), "write -P 3 1M 64k");
    let report = backup(&["--base", &full, &second]).success();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["copied"].as_u64(), Some(64 << 10), "{report}");
    let state = directory.beside("state.img");
    nbd_cli(&["copy", server.uri(), &state]).success();
    server.end();
    are_equal(&qemu_img, &state, &second);
    is_clean(&qemu_img, &disk);
}

#[test]
fn a_bitmap_that_a_checkpoint_made_is_offered_when_it_has_ended() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let contexts = || nbd_cli(&["list-meta", server.uri()]).success();
    let arguments = ["backup", "-q", "--control", &control, "--export", "vm", "-B", "daily"];
    assert!(!contexts().contains("daily"));
    nbd_cli(&[&arguments[..], &[&directory.beside("full.qcow2")]].concat()).success();
    assert!(contexts().contains("qemu:dirty-bitmap:daily"), "{}", contexts());
    write(&qemu_io, server.uri(), "write -P 3 1M 64k");
    let context = ["map", "--context", "qemu:dirty-bitmap:daily", "--json", server.uri()];
    let map = nbd_cli(&context).json();
    assert_eq!(map.to_string().matches("dirty\"").count(), 1, "{map}");

    // What a failed one made is gone.
    let start = ["control", &control, "checkpoint-start", "vm", "-B", "weekly", "--add-bitmap"];
    nbd_cli(&start).success();
    assert!(!contexts().contains("weekly"));
    nbd_cli(&["control", &control, "checkpoint-end", "vm", "failure"]).success();
    assert!(!contexts().contains("weekly"));
    server.end();
    is_clean(&qemu_img, &disk);
}

#[test]
fn a_checkpoint_restarts_an_unreliable_bitmap_on_request_under_both_names_of_the_option() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    for option in ["--restart-bitmap", "--begin-anew"] {
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
        peer(&qemu_img, &["bitmap", "--add", &disk, "daily"]);
        leave_in_use(&disk, "daily");
        let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
        let start = |more: &[&str]| {
            let request = ["control", "--json", &control, "checkpoint-start", "vm", "-B", "daily"];
            nbd_cli(&[&request[..], more].concat())
        };
        assert_eq!(start(&[]).code, Some(1));
        let reply = start(&[option]).json();
        let reason = reply["restart-reason"].as_str();
        assert!(reason.is_some_and(|reason| reason.contains("in use")), "{reply}");
        server.end();
    }
}
