//! Commands that find no space: the disk and its bitmaps are as before, and the same command
//! succeeds when there is space.

use std::path::Path;

use crate::support::image::{are_equal, info, is_clean};
use crate::support::{Disk, PROGRAM, nbd_cli, peer};
use crate::tools;

const CLUSTER: u64 = 4096;

/// An overlay with a snapshot and a bitmap, of which `copy` has the content.
struct Image<'a> {
    disk: Disk,
    path: String,
    copy: String,
    qemu_img: &'a Path,
}

impl<'a> Image<'a> {
    fn new(qemu_img: &'a Path, qemu_io: &Path, has_backing: bool) -> Self {
        let disk = Disk::sparse();
        let (path, copy) = (disk.beside("disk.qcow2"), disk.beside("copy"));
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"];
        let backing: &[&str] =
            if has_backing { &["-b", disk.path(), "-F", "raw", &path] } else { &[&path, "8M"] };
        peer(qemu_img, &[&create[..], backing].concat());
        let write = |command: &str| peer(qemu_io, &["-f", "qcow2", "-c", command, &path]);
        write("write -P 5 1M 100k");
        if !has_backing {
            peer(qemu_img, &["snapshot", "-c", "before", &path]);
        }
        peer(qemu_img, &["bitmap", "--add", "-g", "4096", &path, "backup"]);
        write("write -P 7 1M 100k");
        peer(qemu_img, &["convert", "-O", "raw", &path, &copy]);
        std::fs::copy(&path, disk.beside("start")).expect("room");
        Self { disk, path, copy, qemu_img }
    }

    fn bitmaps(&self) -> String {
        nbd_cli(&["bitmap", "list", &self.path]).success()
    }

    /// Runs a command while the file can grow by `room` bytes. It may fail.
    fn run_with_room(&self, prlimit: &Path, room: u64, command: &[&str]) -> bool {
        let length = std::fs::metadata(&self.path).expect("an image").len();
        let mut limited = std::process::Command::new(prlimit);
        limited.arg(format!("--fsize={}:", length + room)).arg(PROGRAM).args(command);
        let output = limited.output().expect("prlimit");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{command:?}: {said}");
        assert!(output.status.success() || said.lines().count() == 1, "{command:?}: {said}");
        output.status.success()
    }

    /// What a command that failed has left. Bits may have been set if it `writes`.
    fn is_as_before(&self, bitmaps: &str, writes: bool, what: &str) {
        is_clean(self.qemu_img, &self.path);
        let found = info(self.qemu_img, &self.path);
        assert_eq!(found["virtual-size"], 8 << 20, "{what}");
        assert!(!found.to_string().contains("in-use"), "{what}: {found}");
        are_equal(self.qemu_img, &self.path, &self.copy);
        assert!(writes || self.bitmaps() == bitmaps, "{what}: {}", self.bitmaps());
        assert!(!self.bitmaps().contains("inconsistent"), "{what}: {}", self.bitmaps());
    }
}

#[test]
fn a_command_that_fails_on_a_full_disk_keeps_disk_and_bitmaps_and_can_be_repeated() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", prlimit = "prlimit");
    let commands: [&[&str]; 4] = [
        &["image", "resize", "IMAGE", "60M"],
        &["qemu-img", "resize", "-q", "--preallocation=falloc", "IMAGE", "9M"],
        &["image", "snapshot", "apply", "IMAGE", "before"],
        &["image", "rebase", "--no-backing", "IMAGE"],
    ];
    let images = [false, true].map(|has_backing| Image::new(&qemu_img, &qemu_io, has_backing));
    for command in commands {
        let writes = command.contains(&"rebase");
        for room in [0, 5 * CLUSTER] {
            let image = &images[usize::from(writes)];
            let start = image.disk.beside("start");
            std::fs::copy(start, &image.path).expect("room");
            let what = format!("{command:?}, room for {room} bytes");
            let command =
                command.iter().map(|word| if *word == "IMAGE" { &image.path } else { *word });
            let command: Vec<&str> = command.collect();
            let bitmaps = image.bitmaps();
            if image.run_with_room(&prlimit, room, &command) {
                is_clean(&qemu_img, &image.path);
                continue;
            }
            image.is_as_before(&bitmaps, writes, &what);
            nbd_cli(&command).success();
            is_clean(&qemu_img, &image.path);
            assert!(!image.bitmaps().contains("inconsistent"), "{what}: {}", image.bitmaps());
        }
    }
}
