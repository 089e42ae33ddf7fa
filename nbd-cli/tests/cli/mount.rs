//! `nbd-cli mount`: disks and partitions as files, judged by qemu-img and sfdisk.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::process::Signal;

use crate::support::mount::{Mount, can_mount, is_mounted, unmount};
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Server, image, nbd_cli, peer, says};
use crate::tools;

/// Makes partitions by a script of sfdisk, and returns what sfdisk says of them: number, first byte
/// and length.
fn partition(sfdisk: &Path, disk: &str, script: &str) -> Vec<(u64, u64, u64)> {
    let mut child =
        Command::new(sfdisk).args(["--quiet", disk]).stdin(Stdio::piped()).spawn().expect("sfdisk");
    child.stdin.take().expect("piped").write_all(script.as_bytes()).expect("it reads");
    assert!(child.wait().expect("its end").success(), "{script}");
    let table = image::json(sfdisk, &["--json", disk]);
    let table = &table["partitiontable"];
    let sector = table["sectorsize"].as_u64().unwrap_or(512);
    let partitions = table["partitions"].as_array().expect("partitions");
    let number = |node: &str| node.strip_prefix(disk).expect("its name").parse().expect("a number");
    let partitions = partitions.iter().filter(|partition| partition["type"] != "5");
    partitions
        .map(|partition| {
            let at = |name: &str| partition[name].as_u64().expect("a number");
            (
                number(partition["node"].as_str().expect("a name")),
                at("start") * sector,
                at("size") * sector,
            )
        })
        .collect()
}

/// A raw disk whose sectors all differ, with room for a table.
fn numbered(directory: &Disk, name: &str, size: u64) -> String {
    let path = directory.blank(name, size);
    let mut bytes = vec![0; size as usize];
    for (index, sector) in bytes.chunks_mut(512).enumerate() {
        sector[..8].copy_from_slice(&(index as u64 + 1).to_be_bytes());
    }
    std::fs::write(&path, bytes).expect("room");
    path
}

/// Checks the files of a mounted disk against the raw disk and its partitions.
#[track_caller]
fn assert_shows(mount: &Mount, below: &str, raw: &str, partitions: &[(u64, u64, u64)]) {
    let expected = std::fs::read(raw).expect("the raw disk");
    let file = |name: &str| std::fs::read(mount.path(below).join(name)).expect(name);
    assert!(file("disk") == expected, "{below}/disk");
    for (number, start, length) in partitions {
        let part = &expected[*start as usize..][..*length as usize];
        assert!(file(&format!("p{number}")) == part, "{below}/p{number}");
    }
    let names = mount.path(below).read_dir().expect("a directory").count();
    assert_eq!(names, 1 + partitions.len(), "{below}");
}

#[test]
fn mount_shows_the_disk_of_a_chain_and_the_partitions_of_a_gpt() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", sfdisk = "sfdisk");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let raw = numbered(&directory, "raw.img", 8 << 20);
    let partitions =
        partition(&sfdisk, &raw, "label: gpt\nstart=2048, size=2048\nstart=6144, size=4096\n");
    assert_eq!(partitions.len(), 2);
    let [base, overlay] = ["base.qcow2", "top.qcow2"].map(|name| directory.beside(name));
    peer(&qemu_img, &["convert", "-O", "qcow2", &raw, &base]);
    peer(&qemu_img, &["snapshot", "-c", "before", &base]);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay]);
    image::write(&qemu_io, &overlay, "write -P 7 2M 100k");
    let judged = directory.beside("judged.img");
    peer(&qemu_img, &["convert", "-O", "raw", &overlay, &judged]);

    let mount = Mount::new(&[&overlay]);
    assert_shows(&mount, "", &judged, &partitions);
    let refused = OpenOptions::new().write(true).open(mount.path("disk")).expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
    mount.unmount();
    // A snapshot, a server's disk, and several disks at once.
    let mount = Mount::new(&["--snapshot", "before", &base]);
    assert_shows(&mount, "", &raw, &partitions);
    mount.unmount();
    let server = Server::ours(&["--read-only", &base]);
    let mount = Mount::new(&[server.uri(), &overlay, &overlay]);
    assert_shows(&mount, "top.qcow2", &judged, &partitions);
    assert_shows(&mount, "top.qcow2-2", &judged, &partitions);
    assert_eq!(mount.path("").read_dir().expect("it is mounted").count(), 3);
    mount.unmount();
}

#[cfg(feature = "object-storage")]
#[test]
fn mount_shows_a_backup_in_a_repository_and_writes_to_an_overlay_on_it() {
    tools!(qemu_img = "qemu-img", sfdisk = "sfdisk");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let raw = numbered(&directory, "raw.img", 8 << 20);
    let partitions = partition(&sfdisk, &raw, "label: gpt\nstart=2048, size=2048\nstart=6144\n");
    let repository = directory.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    nbd_cli(&["backup", "-q", "--name", "vm", &raw, &repository]).success();
    let readers = || {
        let stats = nbd_cli(&["repo", "stats", "--json", &repository]).success();
        let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
        stats["readers"].as_array().map(Vec::len)
    };
    let backup = format!("backup:{repository}/vm@latest");
    let mount = Mount::new(&[&backup]);
    assert_shows(&mount, "", &raw, &partitions);
    assert_eq!(readers(), Some(1), "it is pinned");
    let refused = OpenOptions::new().write(true).open(mount.path("disk")).expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
    mount.unmount();
    assert_eq!(readers(), Some(0));
    let nowhere = directory.beside("empty");
    std::fs::create_dir(&nowhere).expect("a directory");
    says(nbd_cli(&["mount", "--writable", &backup, &nowhere]), &["read-only", "overlay"]);
    let overlay = directory.beside("overlay.qcow2");
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", &backup, "-F", "raw", &overlay]).success();
    let mount = Mount::new(&["--writable", "--trust-image", &overlay]);
    assert_shows(&mount, "", &raw, &partitions);
    let part = OpenOptions::new().write(true).open(mount.path("p1")).expect("a partition");
    part.write_all_at(&[9; 70_000], 4000).expect("room");
    part.sync_all().expect("durable");
    drop(part);
    mount.unmount();
    nbd_cli(&["image", "stream", "--trust-image", &overlay]).success();
    std::fs::remove_dir_all(&repository).expect("it is not needed");
    let mut expected = std::fs::read(&raw).expect("the raw disk");
    expected[(1 << 20) + 4000..][..70_000].fill(9);
    std::fs::write(&raw, &expected).expect("room");
    image::is_clean(&qemu_img, &overlay);
    image::are_equal(&qemu_img, &raw, &overlay);
}

#[test]
fn mount_shows_the_logical_partitions_of_an_mbr() {
    tools!(sfdisk = "sfdisk");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let raw = numbered(&directory, "raw.img", 8 << 20);
    let script = "label: dos\nstart=64, size=1000, type=83\nstart=2048, size=8192, type=5\n\
                  start=12288, size=2048, type=c\nnode=5, start=2112, size=100\n\
                  start=4096, size=2000\nstart=8000, size=64\n";
    let script = script.replace("node=5, ", "");
    let partitions = partition(&sfdisk, &raw, &script);
    assert_eq!(partitions.len(), 5, "{partitions:?}");
    let mount = Mount::new(&["--format", "raw", &raw]);
    assert_shows(&mount, "", &raw, &partitions);
    mount.unmount();
}

#[test]
fn mount_keeps_holes_and_names_where_data_is() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let path = directory.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &path, "1T"]);
    image::write(&qemu_io, &path, "write -P 7 512G 64k");
    let mount = Mount::new(&[&path]);
    let disk = File::open(mount.path("disk")).expect("the disk");
    let seek = |to| rustix::fs::seek(&disk, to);
    use rustix::fs::SeekFrom::{Data, Hole};
    assert_eq!(seek(Data(0)), Ok(512 << 30));
    assert_eq!(seek(Hole(512 << 30)), Ok((512 << 30) + (64 << 10)));
    assert_eq!(seek(Data((512 << 30) + (64 << 10))), Err(Errno::NXIO));
    assert_eq!(seek(Hole(1 << 30)), Ok(1 << 30));
    drop(disk);
    mount.unmount();
}

#[test]
fn mount_writes_into_the_image_when_told_so() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", sfdisk = "sfdisk");
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let raw = numbered(&directory, "raw.img", 8 << 20);
    let partitions = partition(&sfdisk, &raw, "label: gpt\nstart=2048, size=2048\n");
    let path = directory.beside("disk.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", &raw, &path]);
    let mount = Mount::new(&["--writable", &path]);
    // Nobody else writes meanwhile.
    let other = directory.beside("other");
    std::fs::create_dir(&other).expect("a directory");
    says(nbd_cli(&["mount", "--writable", &path, &other]), &[&path, "another program"]);
    let part = OpenOptions::new().read(true).write(true).open(mount.path("p1")).expect("p1");
    part.write_all_at(&[9; 100_000], 4096).expect("room");
    let end = partitions[0].2;
    assert_eq!(part.write_at(&[9; 512], end - 100).expect("some of it"), 100);
    let beyond = part.write_at(&[9], end).expect_err("the end");
    assert_eq!(beyond.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
    assert!(part.set_len(0).is_err(), "a disk keeps its size");
    use rustix::fs::FallocateFlags as Flags;
    let punch = Flags::PUNCH_HOLE | Flags::KEEP_SIZE;
    rustix::fs::fallocate(&part, punch, 512 << 10, 256 << 10).expect("a hole");
    part.sync_all().expect("durable");
    // The disk shows the same as its partition, at once.
    let disk = File::open(mount.path("disk")).expect("the disk");
    let mut bytes = [0; 200];
    disk.read_exact_at(&mut bytes, (1 << 20) + 4096 - 100).expect("the disk");
    assert_eq!((bytes[99], bytes[100], bytes[199]), (0, 9, 9));
    drop((part, disk));
    mount.unmount();
    image::is_clean(&qemu_img, &path);
    image::write(&qemu_io, &path, "read -P 9 1052672 100000");
    image::write(&qemu_io, &path, "read -P 0 1536k 256k");
    let mut expected = std::fs::read(&raw).expect("the raw disk");
    expected[(1 << 20) + 4096..][..100_000].fill(9);
    expected[(1 << 20) + end as usize - 100..][..100].fill(9);
    expected[(1 << 20) + (512 << 10)..][..256 << 10].fill(0);
    std::fs::write(&raw, &expected).expect("room");
    image::are_equal(&qemu_img, &raw, &path);
}

#[test]
fn mount_that_is_ended_while_a_program_writes_keeps_all_that_was_written() {
    tools!(qemu_img = "qemu-img");
    if !can_mount() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT] {
        let directory = Disk::sparse();
        let path = directory.beside("disk.qcow2");
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &path, "1G"]);
        let mut mount = Mount::new(&["--writable", &path]);
        let disk = OpenOptions::new().write(true).open(mount.path("disk")).expect("the disk");
        let written = std::sync::atomic::AtomicU64::new(0);
        let failure = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for block in 0..(1 << 30) / 65_536_u64 {
                    let bytes = (block + 1).to_le_bytes().repeat(8192);
                    disk.write_all_at(&bytes, block * 65_536)?;
                    written.store(block + 1, std::sync::atomic::Ordering::SeqCst);
                }
                Ok::<(), std::io::Error>(())
            });
            let count = || written.load(std::sync::atomic::Ordering::SeqCst);
            wait_until("it writes", || count() > 50);
            mount.signal(signal);
            let (status, said) = mount.wait();
            assert!(status.success(), "{signal:?}: {status} {said}");
            writer.join().expect("no panic")
        });
        assert!(failure.is_err(), "it was cut off");
        assert!(!mount.is_mounted());
        image::is_clean(&qemu_img, &path);
        let raw = directory.beside("raw.img");
        peer(&qemu_img, &["convert", "-O", "raw", &path, &raw]);
        let raw = File::open(&raw).expect("the raw disk");
        for block in 0..written.into_inner() {
            let mut bytes = vec![0; 65_536];
            raw.read_exact_at(&mut bytes, block * 65_536).expect("the raw disk");
            assert!(bytes == (block + 1).to_le_bytes().repeat(8192), "block {block}");
        }
    }
}

#[test]
fn mount_with_fork_returns_when_the_disk_is_there_and_ends_when_it_is_unmounted() {
    if !can_mount() {
        return;
    }
    let directory = Disk::sparse();
    let mounted = directory.beside("mounted");
    std::fs::create_dir(&mounted).expect("a directory");
    let arguments =
        ["mount", "--fork", "--writable", "--format", "raw", directory.path(), &mounted];
    let said = nbd_cli(&arguments).success();
    assert_eq!(said, format!("{mounted}/disk\n"));
    directory.assert_equals(format!("{mounted}/disk"));
    unmount(Path::new(&mounted));
    assert!(!is_mounted(Path::new(&mounted)));
    // The lock on the image goes with the program.
    let size = ["image", "resize", "--format", "raw", directory.path(), "+1M"];
    wait_until("the image is free", || nbd_cli(&size).code == Some(0));
}

#[test]
fn mount_says_what_is_missing() {
    let directory = Disk::sparse();
    let disk = directory.path();
    let nowhere = directory.beside("nowhere");
    says(nbd_cli(&["mount", disk, disk]), &[disk, "not a directory"]);
    says(nbd_cli(&["mount", disk, &nowhere]), &[&nowhere, "create it"]);
    says(nbd_cli(&["mount", &nowhere, "/"]), &[&nowhere]);
    let both = nbd_cli(&["mount", "--writable", "--files", disk, &nowhere]);
    assert!(both.stderr.contains("cannot be used with"), "{both:?}");
}
