//! What the options of the qemu-nbd form do to the disk.

use std::path::Path;

use crate::support::qemu_nbd::{Foreground, ours};
use crate::support::{Disk, image, is_sparse_here, peer};
use crate::tools;

/// Runs a command of qemu-io on a server's only export; returns what it says.
#[track_caller]
fn qemu_io(tool: &Path, server: &Foreground, command: &str) -> String {
    let uri = server.uri("");
    peer(tool, &["-f", "raw", "-c", command, &uri])
}

#[test]
fn writes_of_snapshot_mode_are_gone_at_the_end() {
    tools!(tool = "qemu-io");
    let disk = Disk::sparse();
    for arguments in [&["-s", "-f", "raw"][..], &["--snapshot", "-f", "raw", "-e", "2"]] {
        let server = Foreground::start(ours(), &[arguments, &["-t", disk.path()]].concat());
        qemu_io(&tool, &server, "write -P 7 0 64k");
        let said = qemu_io(&tool, &server, "read -P 7 0 64k");
        assert!(!said.contains("failed"), "{said}");
        drop(server);
        disk.assert_equals(disk.path());
    }
}

#[test]
fn an_offset_moves_every_request() {
    tools!(tool = "qemu-io");
    let disk = Disk::sparse();
    let node =
        format!("driver=raw,offset=4M,size=1M,file.driver=file,file.filename={}", disk.path());
    for (arguments, size) in [
        (&["-f", "raw", "-o", "4194304", disk.path()][..], 4 << 20),
        (&["--image-opts", &node], 1 << 20),
    ] {
        let server = Foreground::start(ours(), &[&["-t"], arguments].concat());
        let uri = server.uri("");
        let described = crate::support::nbd_cli(&["info", "--size", &uri]).success();
        assert_eq!(described, format!("{size}\n"));
        let said = qemu_io(&tool, &server, "write -P 7 64k 4k");
        assert!(!said.contains("failed"), "{said}");
        drop(server);
        let mut expected = disk.content().to_vec();
        expected[(4 << 20) + (64 << 10)..][..4096].fill(7);
        assert!(std::fs::read(disk.path()).expect("the disk") == expected, "{arguments:?}");
    }
}

#[test]
fn discards_are_ignored_unless_unmap_is_chosen() {
    tools!(tool = "qemu-io");
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let before = allocated(disk.path());
    for (arguments, command, is_freed) in [
        (&["-t"][..], "discard 0 512k", false),
        (&["-t", "--discard=ignore"], "write -z -u 0 64k", false),
        (&["-t", "--discard=unmap"], "discard 0 512k", true),
        (&["-t", "--discard", "on", "--detect-zeroes=unmap"], "write -P 0 512k 512k", true),
    ] {
        let server = Foreground::start(ours(), &[arguments, &["-f", "raw", disk.path()]].concat());
        let held = allocated(disk.path());
        let said = peer(&tool, &["-d", "unmap", "-f", "raw", "-c", command, &server.uri("")]);
        assert!(!said.contains("failed"), "{said}");
        assert_eq!(allocated(disk.path()) < held, is_freed, "{arguments:?}, {command}");
    }
    assert!(allocated(disk.path()) < before);
}

#[test]
fn a_guess_of_the_format_is_told_when_it_matters() {
    tools!(tool = "qemu-io");
    let disk = Disk::sparse();
    let guessed = Foreground::start(ours(), &["-t", disk.path()]);
    // A client that was served: the server has said everything.
    assert!(!qemu_io(&tool, &guessed, "write -P 0 0 512").contains("failed"));
    assert!(guessed.complaints().contains("WARNING: Image format was not specified"));
    drop(guessed);
    for arguments in [&["-t", "-r"][..], &["-t", "-f", "raw"], &["-t", "-s"]] {
        let server = Foreground::start(ours(), &[arguments, &[disk.path()]].concat());
        crate::support::nbd_cli(&["info", "--size", &server.uri("")]).success();
        assert_eq!(server.complaints(), "", "{arguments:?}");
    }
}

#[test]
fn every_cache_mode_keeps_what_is_written_after_a_kill() {
    tools!(tool = "qemu-io", qemu_img = "qemu-img");
    let disk = Disk::sparse();
    for (byte, mode) in (1_u8..).zip(["writeback", "writethrough", "none", "directsync", "unsafe"])
    {
        let qcow2 = disk.beside("cached.qcow2");
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", &qcow2, "8M"]);
        let server = Foreground::start(ours(), &["-t", "--cache", mode, "-f", "qcow2", &qcow2]);
        // No flush: qemu-io must not send one of its own accord before the process is killed.
        let write = format!("write -P {byte} 1M 64k");
        let uri = server.uri("");
        let flushed = mode != "writethrough" && mode != "directsync";
        let mut arguments = vec!["-t", "unsafe", "-f", "raw", "-c", &write];
        if flushed {
            arguments = vec!["-f", "raw", "-c", &write, "-c", "flush"];
        }
        arguments.push(&uri);
        peer(&tool, &arguments);
        // Dropping it is SIGKILL.
        drop(server);
        image::is_clean(&qemu_img, &qcow2);
        let said =
            peer(&tool, &["-r", "-f", "qcow2", "-c", &format!("read -P {byte} 1M 64k"), &qcow2]);
        assert!(!said.contains("failed"), "{mode}: {said}");
    }
}

#[test]
fn backing_files_anywhere_are_followed_as_qemu_nbd_does() {
    tools!(qemu_img = "qemu-img", qemu_io_tool = "qemu-io");
    let disk = Disk::sparse();
    let elsewhere = Disk::sparse();
    let overlay = elsewhere.beside("overlay.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", disk.path(), "-F", "raw", &overlay]);
    let server = Foreground::start(ours(), &["-t", "-f", "qcow2", &overlay]);
    qemu_io(&qemu_io_tool, &server, "write -P 9 2M 4k");
    let copy = elsewhere.beside("copy.img");
    peer(&qemu_img, &["convert", "-O", "raw", &server.uri(""), &copy]);
    let mut expected = disk.content().to_vec();
    expected[2 << 20..][..4096].fill(9);
    assert!(std::fs::read(&copy).expect("the copy") == expected);
    drop(server);
    disk.assert_equals(disk.path());
}

#[test]
fn a_raw_image_keeps_its_exact_size() {
    let disk = Disk::sparse();
    let odd = disk.blank("odd.img", 1000);
    let server = Foreground::start(ours(), &["-t", "-f", "raw", &odd]);
    let size = crate::support::nbd_cli(&["info", "--size", &server.uri("")]).success();
    assert_eq!(size, "1000\n");
}
