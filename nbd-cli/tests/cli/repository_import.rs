//! Images and chains of backups that are imported into a repository.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::support::image::{are_equal, chain, write};
use crate::support::{Disk, Server, json, nbd_cli, peer, says};
use crate::tools;

fn repository(disk: &Disk, name: &str) -> String {
    let repository = disk.beside(name);
    nbd_cli(&["repo", "init", &repository]).success();
    repository
}

fn import(repository: &str, more: &[&str]) -> Vec<Value> {
    let arguments = ["repo", "import", "--json", "--name", "vm", repository];
    json(&[&arguments[..], more].concat()).as_array().expect("a list").clone()
}

fn backups(repository: &str) -> Vec<Value> {
    let list = json(&["repo", "list", "--json", repository]);
    list["backups"].as_array().expect("a list").clone()
}

/// Checks that QEMU sees the disk of a file in its backup.
#[track_caller]
fn judge(qemu_img: &Path, disk: &Disk, repository: &str, files: &[Value]) {
    for (number, file) in files.iter().enumerate() {
        let restored = disk.beside(&format!("restored.{number}"));
        let id = file["id"].as_str().expect("text");
        nbd_cli(&["restore", "-q", &format!("backup:{repository}/vm@{id}"), &restored]).success();
        are_equal(qemu_img, file["file"].as_str().expect("a path"), &restored);
        std::fs::remove_file(restored).expect("it is there");
    }
    let checked = nbd_cli(&["repo", "check", "--read-data", repository]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
}

#[test]
fn layers_of_a_chain_become_backups_once() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let repository = repository(&disk, "repository");
    let newest = chain(&disk, &qemu_img, &qemu_io);
    // Parts of blocks, and a larger disk.
    let small = disk.beside("small.qcow2");
    let over = ["-b", &*newest, "-F", "qcow2", &small, "70M"];
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    peer(&qemu_img, &[&create[..], &over].concat());
    write(&qemu_io, &small, "write -P 77 100k 4k");
    write(&qemu_io, &small, "write -z 260k 8k");
    write(&qemu_io, &small, "write -P 78 69M 4k");
    // A copy has given the oldest file the newest time.
    let hour = Duration::from_secs(3600);
    let touch = |path: &str, time: SystemTime| {
        let file = File::options().write(true).open(path).expect("a file");
        file.set_modified(time).expect("its owner may");
    };
    let then = UNIX_EPOCH + 480_000 * hour;
    touch(disk.path(), SystemTime::now() + 9 * hour);
    touch(&disk.beside("middle.qcow2"), then - hour);
    touch(&newest, then);
    touch(&small, then + hour);
    let first = import(&repository, &["--verify", &newest]);
    assert_eq!(first.len(), 3, "{first:?}");
    // What the layers have themselves is read, in whole blocks.
    assert!(first[2]["read"].as_u64() <= Some(192 << 10), "{first:?}");
    let second = import(&repository, &["--verify", &small]);
    let new: Vec<_> = second.iter().map(|file| file["new"] == true).collect();
    assert_eq!(new, [false, false, false, true], "{second:?}");
    assert!(second[3]["read"].as_u64() < Some(2 << 20), "{second:?}");
    judge(&qemu_img, &disk, &repository, &second);
    let listed = backups(&repository);
    let in_order = listed.iter().zip(&second).all(|(one, other)| one["id"] == other["id"]);
    assert!(in_order && listed.len() == 4, "{listed:?} {second:?}");
    assert_eq!(listed[2]["time"], "2024-10-04 00:00:00 UTC");
    // A file that was written to since is another one, and so are those upon it.
    assert!(import(&repository, &[&small]).iter().all(|file| file["new"] == false));
    write(&qemu_io, &small, "write -P 79 5M 64k");
    let third = import(&repository, &[disk.path(), &small]);
    let new: Vec<_> = third.iter().map(|file| file["new"] == true).collect();
    assert_eq!(new, [false, false, false, false, true], "{third:?}");
    judge(&qemu_img, &disk, &repository, &third[4..]);
}

#[test]
fn internal_snapshots_are_named_because_they_are_not_imported() {
    let disk = Disk::sparse();
    let (repository, image) = (repository(&disk, "repository"), disk.beside("disk.qcow2"));
    nbd_cli(&["image", "convert", "-O", "qcow2", disk.path(), &image]).success();
    for number in 1..=10 {
        let name = format!("s{number}");
        nbd_cli(&["image", "snapshot", "create", &image, &name]).success();
    }
    let arguments = ["repo", "import", "--name", "vm", &repository, &image];
    let imported = nbd_cli(&arguments);
    for part in ["disk.qcow2' are not imported ('s1', 's2'", "'s8', 2 more)", "--snapshot NAME"] {
        assert!(imported.stderr.contains(part), "{part}: {imported:?}");
    }
    imported.success();
    let monday = disk.beside("monday.qcow2");
    nbd_cli(&["image", "convert", "--snapshot", "s1", "-O", "qcow2", &image, &monday]).success();
    let imported = nbd_cli(&["repo", "import", "--name", "s1", &repository, &monday]);
    assert_eq!(imported.stderr, "");
    imported.success();
}

#[test]
fn chain_of_backups_is_continued_in_the_repository() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let repository = repository(&directory, "repository");
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let write_to = |command: &str| {
        let said = peer(&qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
    };
    let of_server = ["backup", "--json", "--control", &control, "--export", "vm", "-B", "daily"];
    let backup = |more: &[&str]| json(&[&of_server[..], more].concat());
    let (sunday, monday) = (directory.beside("sunday.qcow2"), directory.beside("monday.qcow2"));
    write_to("write -P 1 0 5M");
    backup(&[&sunday]);
    write_to("write -P 2 1M 64k");
    backup(&["--base", &sunday, &monday]);
    write_to("write -P 3 3M 64k");
    let files = import(&repository, &[&sunday, &monday]);
    assert_eq!(files.len(), 3, "{files:?}");
    judge(&qemu_img, &directory, &repository, &files[1..]);
    // The server knows the backup of monday.
    let made = backup(&["--verify=all", "--name", "vm", &repository]);
    assert_eq!(made["incremental"], true, "{made}");
    assert!(made["read"].as_u64() <= Some(64 << 10), "{made}");
    // And without the server nothing is known of the bitmap.
    let list = backups(&repository);
    assert_eq!((&list[0]["bitmap"], &list[0]["export"]), (&Value::Null, &"vm".into()), "{list:?}");
    // A file that does not hold what it should is not a backup, and neither is what is upon it.
    let damaged = directory.beside("damaged");
    std::fs::create_dir(&damaged).expect("a folder");
    let copy = |name: &str| format!("{damaged}/{name}.qcow2");
    std::fs::copy(&monday, copy("monday")).expect("room");
    let mut content = std::fs::read(&sunday).expect("a file");
    let at = content.windows(4096).position(|part| part == [1; 4096]).expect("data");
    content[at + 5] ^= 1;
    std::fs::write(copy("sunday"), content).expect("room");
    let arguments = ["repo", "import", "--name", "other", &repository, &copy("monday")];
    says(nbd_cli(&arguments), &["sunday.qcow2", "does not hold what the backup wrote"]);
    assert_eq!(backups(&repository).len(), 3);
    server.end();
}

#[test]
fn what_was_exported_is_imported_with_its_times() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (one, other) = (repository(&disk, "one"), repository(&disk, "other"));
    nbd_cli(&["backup", "-q", "--name", "vm", disk.path(), &one]).success();
    let file = File::options().write(true).open(disk.path()).expect("the disk");
    std::os::unix::fs::FileExt::write_all_at(&file, &[3; 1000], 2 << 20).expect("room");
    file.set_len((8 << 20) + 100).expect("room");
    nbd_cli(&["backup", "-q", "--name", "vm", disk.path(), &one]).success();
    let folder = disk.beside("chain");
    let exported = json(&["repo", "export", "--json", &one, "vm", &folder]);
    let newest = exported[1]["file"].as_str().expect("a path");
    let back = import(&one, &[newest]);
    assert!(back.iter().all(|file| file["new"] == false), "{back:?}");
    let moved = import(&other, &[newest]);
    judge(&qemu_img, &disk, &other, &moved);
    let (was, is) = (backups(&one), backups(&other));
    // A file has its time in steps of two seconds.
    let ten_seconds = |it: &Value| it["time"].as_str().map(|it| it[..18].to_owned());
    assert_eq!(ten_seconds(&was[1]), ten_seconds(&is[1]), "{was:?} {is:?}");
    let sizes = |list: &[Value]| list.iter().map(|it| it["size"].clone()).collect::<Vec<_>>();
    assert_eq!(sizes(&was), sizes(&is));
}
