//! Every backup records a checksum of the data in its file, and `restore` checks all files of the
//! chain before it says success.

use std::path::Path;

use crate::support::image::{are_equal, is_clean};
use crate::support::{Disk, Outcome, Server, nbd_cli, peer, says};
use crate::tools;

const CLUSTER: usize = 64 << 10;

/// A disk with two backups: monday's file hides a part of sunday's.
fn sunday_and_monday(directory: &Disk, qemu_io: &Path) -> (String, String) {
    let name = |what: &str| directory.beside(what);
    let (disk, control) = (name("disk.qcow2"), name("control"));
    let (sunday, monday) = (name("sunday.qcow2"), name("monday.qcow2"));
    // The last cluster is incomplete.
    nbd_cli(&["image", "create", "-f", "qcow2", &disk, "16778240"]).success();
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let write = |command: &str| {
        let said = peer(qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
    };
    let backup = |more: &[&str]| {
        let arguments = ["backup", "-q", "--control", &control, "--export", "vm", "-B", "daily"];
        nbd_cli(&[&arguments[..], more].concat()).success();
    };
    write("write -P 1 0 5M");
    write("write -P 4 16777216 1024");
    backup(&[&sunday]);
    write("write -P 2 1M 64k");
    write("write -z 2M 128k");
    write("write -P 3 10M 4k");
    backup(&["--base", &sunday, &monday]);
    (sunday, monday)
}

fn restore(image: &str, to: &str, more: &[&str]) -> Outcome {
    nbd_cli(&[&["restore", "--json", "--trust-image", image, to][..], more].concat())
}

fn checked(outcome: Outcome) -> u64 {
    let report = outcome.json();
    report["checked"].as_u64().expect("a number")
}

/// Copies of both files in a directory of its own.
fn copies(directory: &Disk, name: &str, files: [&String; 2]) -> [String; 2] {
    std::fs::create_dir(directory.beside(name)).expect("a directory");
    files.map(|file| {
        let base = Path::new(file).file_name().expect("a name").to_str().expect("plain");
        let copy = directory.beside(&format!("{name}/{base}"));
        std::fs::copy(file, &copy).expect("room");
        copy
    })
}

/// Changes one byte of a cluster in which every byte is `byte`, and nothing else.
fn damage(file: &str, byte: u8, which: usize) {
    let mut content = std::fs::read(file).expect("the file");
    let mut found =
        content.chunks_mut(CLUSTER).filter(|cluster| cluster.iter().all(|b| *b == byte));
    found.nth(which).expect("a cluster")[4711] ^= 0x10;
    std::fs::write(file, content).expect("room");
}

#[test]
fn restores_check_what_backups_recorded_and_other_programs_read_them() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (sunday, monday) = sunday_and_monday(&directory, &qemu_io);
    let disk = directory.beside("disk.qcow2");
    for (backup, files) in [(&sunday, 1), (&monday, 2)] {
        is_clean(&qemu_img, backup);
        let restored = directory.beside(&format!("restored-{files}.img"));
        assert_eq!(checked(restore(backup, &restored, &[])), files);
        are_equal(&qemu_img, backup, &restored);
        assert_eq!(checked(restore(backup, "null:", &[])), files);
    }
    are_equal(&qemu_img, &disk, &monday);
    let server = Server::ours(&[&directory.blank("blank.img", 16_778_240)]);
    assert_eq!(checked(restore(&monday, server.uri(), &[])), 2);
    // Copies are as good, and copies of copies.
    let [_, monday] = copies(&directory, "away", [&sunday, &monday]);
    assert_eq!(checked(restore(&monday, "null:", &[])), 2);
}

#[test]
fn damage_anywhere_in_a_chain_is_found_and_named() {
    tools!(_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (sunday, monday) = sunday_and_monday(&directory, &qemu_io);
    // Visible data of sunday, data that monday hides, and data of monday.
    for (case, file, byte, which) in
        [("visible", 0, 1, 3), ("hidden", 0, 1, 16), ("zeroed", 0, 1, 32), ("monday", 1, 2, 0)]
    {
        let files = copies(&directory, case, [&sunday, &monday]);
        damage(&files[file], byte, which);
        let restored = directory.beside(&format!("{case}/restored.img"));
        let outcome = restore(&files[1], &restored, &[]);
        let name = if file == 0 { "sunday.qcow2" } else { "monday.qcow2" };
        let words = [&format!("{case}/{name}"), "is damaged", "--no-check", "restored.img"];
        says(outcome, &words.map(|word| word as &str));
        says(restore(&files[1], "null:", &[]), &[name, "is damaged"]);
        for left in [restored.clone(), format!("{restored}.partial")] {
            assert!(!Path::new(&left).exists(), "{case}: {left}");
        }
        assert_eq!(checked(restore(&files[1], &restored, &["--no-check"])), 0, "{case}");
        // The file below is right if only the other one is damaged.
        let below = restore(&files[0], "null:", &[]);
        if file == 1 {
            assert_eq!(checked(below), 1, "{case}");
        } else {
            says(below, &["sunday.qcow2", "is damaged"]);
        }
    }
}

#[test]
fn a_backup_that_was_opened_for_writing_is_restored_unchecked() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (_, monday) = sunday_and_monday(&directory, &qemu_io);
    peer(&qemu_io, &["-f", "qcow2", "-c", "write -P 9 4M 64k", &monday]);
    let restored = directory.beside("restored.img");
    let outcome = restore(&monday, &restored, &[]);
    assert!(outcome.stderr.contains("monday.qcow2' was opened for writing"), "{outcome:?}");
    assert_eq!(checked(outcome), 1, "sunday's file");
    are_equal(&qemu_img, &monday, &restored);
}

#[test]
fn a_disk_with_smaller_clusters_upon_a_backup_does_not_make_that_look_damaged() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (_, monday) = sunday_and_monday(&directory, &qemu_io);
    // Within clusters of monday's that hide sunday's, of sunday's, and of both.
    for (case, writes) in [&[1060][..], &[4], &[1060, 4]].into_iter().enumerate() {
        let top = directory.beside(&format!("top-{case}.qcow2"));
        let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-F", "qcow2"];
        peer(&qemu_img, &[&options[..], &["-b", &monday, &top]].concat());
        for at in writes {
            let command = format!("write -P 7 {at}k 4k");
            peer(&qemu_io, &["-f", "qcow2", "-c", &command, &top]);
        }
        for format in ["raw", "qcow2"] {
            let restored = directory.beside(&format!("restored-{case}.{format}"));
            assert_eq!(checked(restore(&top, &restored, &["-O", format])), 2, "{writes:?}");
            are_equal(&qemu_img, &top, &restored);
        }
    }
}

#[test]
fn copies_with_holes_and_disks_of_another_size_are_as_good() {
    tools!(qemu_img = "qemu-img", cp = "cp");
    let directory = Disk::sparse();
    let disk = directory.beside("disk.img");
    let mut content = vec![0; 40 * CLUSTER + 777];
    for page in content.chunks_mut(4096).skip(1).step_by(2) {
        page.fill(5);
    }
    content[40 * CLUSTER..].fill(6);
    std::fs::write(&disk, content).expect("room");
    let server = Server::ours(&["--read-only", &disk]);
    let backup = directory.beside("backup.qcow2");
    nbd_cli(&["backup", "-q", server.uri(), &backup]).success();
    let copy = directory.beside("copy.qcow2");
    peer(&cp, &["--sparse=always", &backup, &copy]);
    let top = directory.beside("top.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &copy, &top]);
    for image in [&backup, &copy, &top] {
        assert_eq!(checked(restore(image, "null:", &[])), 1, "{image}");
    }
    let restored = directory.beside("restored.qcow2");
    assert_eq!(checked(restore(&copy, &restored, &["-O", "qcow2"])), 1);
}

#[test]
fn a_backup_upon_another_base_than_its_own_is_not_restored() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (sunday, monday) = sunday_and_monday(&directory, &qemu_io);
    let blank = Server::ours(&["--read-only", &directory.blank("blank.img", 16_778_240)]);
    let [other, upon_other] = copies(&directory, "other", [&sunday, &monday]);
    std::fs::remove_file(&other).expect("the copy");
    nbd_cli(&["backup", "-q", blank.uri(), &other]).success();
    let words = ["monday.qcow2' was made upon another backup", "other/sunday.qcow2", "--no-check"];
    says(restore(&upon_other, "null:", &[]), &words);
    restore(&upon_other, "null:", &["--no-check"]).success();
    // It has the right content, but no identity.
    let [converted, upon_it] = copies(&directory, "converted", [&sunday, &monday]);
    peer(&qemu_img, &["convert", "-O", "qcow2", &sunday, &converted]);
    let outcome = restore(&upon_it, "null:", &[]);
    assert!(outcome.stderr.contains("sunday.qcow2' does not say that it is"), "{outcome:?}");
    assert_eq!(checked(outcome), 1, "monday's file");
}

#[test]
fn what_other_programs_have_changed_in_place_is_restored_with_a_warning() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (sunday, monday) = sunday_and_monday(&directory, &qemu_io);
    peer(&qemu_img, &["commit", "-q", "-d", &monday]);
    let outcome = restore(&sunday, "null:", &[]);
    let text = outcome.stderr.clone();
    assert!(text.contains("sunday.qcow2' was") && text.contains("after the backup was"), "{text}");
    assert_eq!(checked(outcome), 0);
}

#[test]
fn an_identity_that_cannot_be_read_is_a_warning_and_files_without_are_counted() {
    tools!(_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (sunday, monday) = sunday_and_monday(&directory, &qemu_io);
    let mut content = std::fs::read(&sunday).expect("the file");
    let at = content.windows(4).position(|word| word == b"bckp").expect("an extension");
    // Of the checksum.
    content[at + 12] ^= 1;
    std::fs::write(&sunday, content).expect("room");
    let outcome = nbd_cli(&["restore", "--trust-image", &monday, "null:"]);
    assert!(outcome.stderr.contains("sunday.qcow2' says about the backup"), "{outcome:?}");
    let said = outcome.success();
    assert!(said.contains("1 of 2 files as recorded"), "{said}");
    says(restore(&monday, "null:", &["--verify"]), &["nothing that could be verified"]);
}
