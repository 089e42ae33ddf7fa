//! `nbd-cli mount --files`: files out of the file systems of a disk.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::support::mount::{Mount, can_mount};
use crate::support::{Disk, Server, nbd_cli, peer, run};
use crate::tools;

/// Bytes that differ from place to place.
fn content(length: u64) -> Vec<u8> {
    (0..length).map(|at| (at / 251 + at % 253) as u8).collect()
}

/// A directory with files of several kinds.
fn tree(directory: &Disk) -> PathBuf {
    let root = PathBuf::from(directory.beside("tree"));
    std::fs::create_dir_all(root.join("etc/deep/deeper")).expect("directories");
    std::fs::write(root.join("etc/fstab"), "none /proc proc\n").expect("room");
    std::fs::write(root.join("etc/deep/deeper/empty"), "").expect("room");
    std::fs::write(root.join("a name with spaces and ü"), content(5_000)).expect("room");
    std::fs::write(root.join("large"), content(5 << 20)).expect("room");
    let file = std::fs::File::options().write(true).open(root.join("etc/fstab")).expect("it");
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_580_608_922);
    file.set_modified(time).expect("a time");
    let secret = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(root.join("etc/fstab"), secret).expect("a mode");
    root
}

/// Adds what FAT does not have.
fn links(root: &Path) {
    std::os::unix::fs::symlink("etc/fstab", root.join("link")).expect("a link");
    std::os::unix::fs::symlink("x".repeat(200), root.join("long link")).expect("a link");
    let sparse = std::fs::File::create(root.join("sparse")).expect("room");
    sparse.set_len(6 << 30).expect("a hole");
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (6 << 30) - 3).expect("room");
}

/// Checks that two trees are the same, by diff.
#[track_caller]
fn assert_same(first: &Path, second: &Path, except: &str) {
    let mut diff = Command::new("diff");
    diff.args(["--recursive", "--no-dereference", "--exclude=lost+found", "--exclude=sparse"]);
    let outcome = run(diff.args(["--exclude", except]).args([first, second]));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

#[test]
fn mount_takes_files_out_of_ext4_in_a_backup() {
    tools!(mke2fs = "mke2fs", qemu_img = "qemu-img");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let root = tree(&directory);
    links(&root);
    for (kind, block) in [("ext2", "1024"), ("ext3", "4096"), ("ext4", "4096")] {
        let disk = directory.beside("disk.img");
        let _ = std::fs::remove_file(&disk);
        let source = root.to_str().expect("a plain name");
        peer(&mke2fs, &["-q", "-t", kind, "-b", block, "-d", source, &disk, "64M"]);
        let backup = directory.beside(&format!("{kind}.qcow2"));
        let image = directory.beside(&format!("{kind}-disk.qcow2"));
        peer(&qemu_img, &["convert", "-O", "qcow2", &disk, &image]);
        let server = Server::ours(&["--read-only", &image]);
        nbd_cli(&["backup", server.uri(), &backup]).success();
        server.end();

        let mount = Mount::new(&["--files", &backup]);
        let files = mount.path("files/disk");
        assert_same(&root, &files, "");
        let fstab = files.join("etc/fstab").metadata().expect("fstab");
        assert_eq!(
            (fstab.mode() & 0o7777, fstab.mtime(), fstab.size()),
            (0o600, 1_580_608_922, 16)
        );
        let sparse = std::fs::File::open(files.join("sparse")).expect("sparse");
        assert_eq!(sparse.metadata().expect("its size").len(), 6 << 30);
        let mut end = [0; 4];
        let at = (6 << 30) - 4;
        let read = std::os::unix::fs::FileExt::read_exact_at(&sparse, &mut end, at);
        match kind {
            "ext4" => assert_eq!((read.is_ok(), &end), (true, b"\0end")),
            // Holes as large as whole blocks of the map are an error, never other data.
            _ => assert_eq!(read.map_err(|error| error.raw_os_error()), Err(Some(5))),
        }
        drop(sparse);
        assert_same(&root, &files, "");
        assert!(std::fs::write(files.join("etc/fstab"), "x").is_err());
        assert!(files.join("etc/missing").metadata().is_err());
        mount.unmount();
    }
}

#[test]
fn mount_takes_files_out_of_fat() {
    tools!(mkfs = "mkfs.vfat", mcopy = "mcopy");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let root = tree(&directory);
    for (bits, size) in [("12", 8 << 20), ("16", 64 << 20), ("32", 300 << 20)] {
        let disk = directory.blank(&format!("fat{bits}.img"), size);
        peer(&mkfs, &["-F", bits, &disk]);
        let mut copy = Command::new(&mcopy);
        copy.args(["-i", &disk, "-s", "-m", "-Q"]).env("TZ", "UTC").env("LC_ALL", "C.UTF-8");
        for entry in root.read_dir().expect("the tree") {
            copy.arg(entry.expect("an entry").path());
        }
        run(copy.arg("::/")).success();
        let mount = Mount::new(&["--files", "--format", "raw", &disk]);
        let files = mount.path("files/disk");
        assert_same(&root, &files, "");
        let fstab = files.join("etc/fstab").metadata().expect("fstab");
        assert_eq!((fstab.mtime(), fstab.size()), (1_580_608_922, 16));
        assert_eq!(std::fs::read(files.join("ETC/FSTAB")).expect("no case").len(), 16);
        mount.unmount();
    }
}

#[test]
fn mount_says_that_there_is_no_known_file_system() {
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let mut mount = Mount::new(&["--files", "--format", "raw", directory.path()]);
    assert_eq!(mount.path("files").read_dir().expect("it is empty").count(), 0);
    mount.signal(rustix::process::Signal::TERM);
    let (status, said) = mount.wait();
    assert!(status.success() && said.contains("no ext2, ext3, ext4 or FAT"), "{said}");
}
