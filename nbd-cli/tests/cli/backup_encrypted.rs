//! Backups of encrypted disks stay encrypted: each file has a passphrase, QEMU reads the chain, and
//! nothing is written in the clear.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::backup_chain::{change, disk_with_bitmap, serve};
use crate::support::image::write;
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Outcome, PROGRAM, nbd_cli, peer, says};
use crate::tools;

/// The options for a new passphrase, which takes no time to try.
fn new_key(key: &str) -> [&str; 5] {
    ["--encrypt", "--new-key-file", key, "--iter-time", "10ms"]
}

fn key(directory: &Disk, name: &str) -> String {
    let path = directory.beside(name);
    std::fs::write(&path, format!("never-in-any-log-{name}")).expect("room");
    path
}

/// Checks that QEMU reads the same in the chain, of which both files have a passphrase.
fn is_to_qemu(qemu_img: &Path, disk: &str, [monday, key]: [&str; 2], sunday_key: &str) {
    let secrets =
        [("s", key), ("t", sunday_key)].map(|(id, file)| format!("secret,id={id},file={file}"));
    let chain = format!(
        "driver=qcow2,encrypt.key-secret=s,file.filename={monday},backing.encrypt.key-secret=t"
    );
    let disk = format!("driver=qcow2,file.filename={disk}");
    let compare = ["compare", "--object", &secrets[0], "--object", &secrets[1], "--image-opts"];
    peer(qemu_img, &[&compare[..], &[&chain, &disk]].concat());
}

/// Checks that no 64 bytes that the disk has in a row are in a file.
fn has_no_plain_text(file: &str) {
    let bytes = std::fs::read(file).expect("the file");
    for byte in [1, 2, 3, 4] {
        assert!(
            !bytes.windows(64).any(|window| window.iter().all(|b| *b == byte)),
            "{file}: {byte}"
        );
    }
}

fn restored(outcome: Outcome) -> u64 {
    let report = outcome.json();
    report["checked"].as_u64().expect("a number")
}

#[test]
fn a_chain_of_encrypted_backups_is_read_by_its_passphrases_and_by_nothing_else() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let [sunday, monday] = ["sunday.qcow2", "monday.qcow2"].map(|name| directory.beside(name));
    let [key, other] = ["key", "other-key"].map(|name| key(&directory, name));
    let server = serve(&qemu_nbd, &disk);
    let start = ["-vv", "backup", "--verify=all", server.uri(), &sunday];
    let made = nbd_cli(&[&start[..], &new_key(&key)].concat());
    assert_eq!(made.code, Some(0), "{made:?}");
    assert!(!format!("{made:?}").contains("never-in-any-log"), "{made:?}");
    server.end();

    change(&qemu_io, &disk);
    let server = serve(&qemu_nbd, &disk);
    let base = ["--bitmap", "b0", "--base", &sunday, server.uri(), &monday];
    let backup = |more: &[&str]| nbd_cli(&[&["backup", "--verify=all"][..], &base, more].concat());
    says(backup(&[]), &["sunday.qcow2", "no passphrase", "--key-file"]);
    says(backup(&["--key-file", &key]), &["is encrypted", "would not be", "--encrypt"]);
    says(backup(&new_key(&other)), &["opens none of its key slots"]);
    says(backup(&["--key-file", &key, "--new-key-file", &other]), &["add --encrypt"]);
    assert!(!Path::new(&format!("{monday}.partial")).exists(), "it was begun");
    backup(&[&new_key(&other)[..], &["--key-file", &key]].concat()).success();
    server.end();
    for file in [&sunday, &monday] {
        has_no_plain_text(file);
        nbd_cli(&["image", "check", file]).success();
    }

    is_to_qemu(&qemu_img, &disk, [&monday, &other], &key);
    let keys = ["--key-file", &key, "--key-file", &other];
    nbd_cli(&[&["image", "compare"][..], &keys, &[&disk, &monday]].concat()).success();
    let restore = |to: &str, more: &[&str]| {
        nbd_cli(&[&["restore", "--json", &monday, to][..], more].concat())
    };
    let raw = directory.beside("restored.img");
    assert_eq!(restored(restore(&raw, &keys)), 2);
    crate::support::image::are_equal(&qemu_img, &disk, &raw);
    says(restore("null:", &["--key-file", &other]), &["sunday.qcow2"]);
    // With other passphrases the files are still what they were, and are built upon.
    let change = ["image", "key", "change", "--key-file", &key, "--iter-time", "10ms"];
    nbd_cli(&[&change[..], &["--new-key-file", &other, &sunday]].concat()).success();
    assert_eq!(restored(restore("null:", &["--key-file", &other])), 2);
    let server = serve(&qemu_nbd, &disk);
    let tuesday = directory.beside("tuesday.qcow2");
    let next = ["backup", "--bitmap", "b0", "--base", &monday, server.uri(), &tuesday];
    nbd_cli(&[&next[..], &new_key(&other)].concat()).success();
    server.end();
    // What is damaged is found, in copies as well.
    std::fs::create_dir(directory.beside("away")).expect("a directory");
    let [bad, above] = ["sunday", "monday"].map(|day| {
        let copy = directory.beside(&format!("away/{day}.qcow2"));
        std::fs::copy(directory.beside(&format!("{day}.qcow2")), &copy).expect("room");
        copy
    });
    let mut bytes = std::fs::read(&bad).expect("the file");
    let place = bytes.len() - 100_000;
    bytes[place] ^= 1;
    std::fs::write(&bad, bytes).expect("room");
    let outcome = nbd_cli(&["restore", "--key-file", &other, &above, "null:"]);
    says(outcome, &["away/sunday.qcow2", "does not hold"]);
}

#[test]
fn an_encrypted_backup_on_a_base_in_the_clear_says_so_and_keeps_its_own_part_secret() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let [sunday, monday] = ["sunday.qcow2", "monday.qcow2"].map(|name| directory.beside(name));
    let key = key(&directory, "key");
    let server = serve(&qemu_nbd, &disk);
    nbd_cli(&["backup", server.uri(), &sunday]).success();
    server.end();
    change(&qemu_io, &disk);
    let server = serve(&qemu_nbd, &disk);
    let base = ["backup", "--bitmap", "b0", "--base", &sunday, server.uri(), &monday];
    let made = nbd_cli(&[&base[..], &new_key(&key)].concat());
    assert_eq!(made.code, Some(0), "{made:?}");
    assert!(made.stderr.contains("is not encrypted, and remains so"), "{made:?}");
    server.end();
    has_no_plain_text(&monday);
    let restore = ["restore", "--json", "--key-file", &key, &monday, "null:"];
    assert_eq!(restored(nbd_cli(&restore)), 2);
    let compare = ["image", "compare", "--key-file", &key, &disk, &monday];
    nbd_cli(&compare).success();
}

#[test]
fn an_encrypted_backup_that_is_killed_is_resumed_with_its_passphrase_only() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    write(&qemu_io, &disk, "write -P 3 40M 8M");
    let target = directory.beside("full.qcow2");
    let [key, other] = ["key", "other-key"].map(|name| key(&directory, name));
    let server = serve(&qemu_nbd, &disk);
    let backup = ["backup", server.uri(), &target];
    let mut command = Command::new(PROGRAM);
    command.args(backup).args(new_key(&key)).args(["--rate", "1M"]).stderr(Stdio::null());
    let mut killed = command.spawn().expect("nbd-cli");
    let record = format!("{target}.partial.json");
    // It records its progress.
    wait_until("something was copied", || {
        std::fs::read_to_string(&record).is_ok_and(|text| !text.contains("\"done\":0"))
    });
    killed.kill().expect("it runs");
    killed.wait().expect("a child");
    assert!(!Path::new(&target).exists());
    let resume = |more: &[&str]| nbd_cli(&[&backup[..], &["--resume"], more].concat());
    says(resume(&[]), &["encryption was LUKS and is now none", "--restart"]);
    says(resume(&new_key(&other)), &["opens none of its key slots"]);
    let report = resume(&[&new_key(&key)[..], &["--json", "--verify=all"]].concat()).success();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert!(report["resumed-at"].as_u64() > Some(0), "{report}");
    server.end();
    has_no_plain_text(&target);
    let restore = ["restore", "--json", "--key-file", &key, &target, "null:"];
    assert_eq!(restored(nbd_cli(&restore)), 1);
    nbd_cli(&["image", "compare", "--key-file", &key, &disk, &target]).success();
}
