//! The effect of the options of the qemu-nbd form on the disk.

use std::path::Path;

use rustix::process::Signal;

use crate::support::qemu_nbd::{Foreground, ours};
use crate::support::{Disk, Server, image, is_sparse_here, peer};
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

/// As QEMU has it, in this form only: `serve` shows the exact size.
#[test]
fn a_raw_disk_that_ends_within_a_sector_is_exported_in_whole_sectors() {
    tools!(tool = "qemu-io");
    let disk = Disk::sparse();
    let odd = disk.beside("odd.img");
    for (arguments, command, length) in [
        (&["-t"][..], "read -P 0 1000 24", 1000),
        (&["-t"], "write -z 990 34", 1000),
        (&["-t"], "discard 512 512", 1000),
        (&["-t"], "write -P 5 512 512", 1024),
        (&["-t", "-o", "999"], "write -P 5 0 512", 1511),
        (&["-t", "-s"], "write -P 5 512 512", 1000),
    ] {
        std::fs::write(&odd, [7; 1000]).expect("the disk");
        let server = Foreground::start(ours(), &[arguments, &["-f", "raw", &odd]].concat());
        let said = qemu_io(&tool, &server, command);
        assert!(!said.contains("failed"), "{command}: {said}");
        drop(server);
        assert_eq!(std::fs::metadata(&odd).expect("the disk").len(), length, "{command}");
    }
    let server = Server::ours(&["--format", "raw", &odd]);
    let size = crate::support::nbd_cli(&["info", "--size", server.uri()]).success();
    assert_eq!(size, "1000\n");
}

/// As a known backup tool passes them.
#[test]
fn numbers_are_read_as_the_c_library_reads_them() {
    let disk = Disk::sparse();
    for argument in ["-e 2", "-o 512", "--handshake-limit= 5", "-o01000", "-o0x200", "-e+2"] {
        let arguments = ["-t", "-r", "-f", "raw", argument, disk.path()];
        let server = Foreground::start(ours(), &arguments);
        let size = crate::support::nbd_cli(&["info", "--size", &server.uri("")]).success();
        let rest = if argument.starts_with("-o") { 512 } else { 0 };
        assert_eq!(size, format!("{}\n", disk.content().len() - rest), "{argument}");
    }
}

#[test]
fn nothing_is_printed_with_verbose_and_a_log_with_trace() {
    let disk = Disk::sparse();
    for (option, prints) in [("-v", false), ("-vvv", false), ("-Tnbd_*", true)] {
        let mut server = Foreground::start(ours(), &["-t", option, "-f", "raw", disk.path()]);
        crate::support::nbd_cli(&["info", "--size", &server.uri("")]).success();
        server.signal(Signal::TERM);
        assert_eq!(server.exit_code(), Some(0));
        assert_eq!(!server.complaints().is_empty(), prints, "{option}: {}", server.complaints());
    }
}

/// A new server for a disk is started as soon as the old one was told to end.
#[test]
fn a_writable_server_starts_although_a_reading_one_is_still_ending() {
    let disk = Disk::sparse();
    for _ in 0..5 {
        let mut first = Foreground::start(ours(), &["-t", "-r", "-f", "raw", disk.path()]);
        first.signal(Signal::TERM);
        let second = Foreground::start(ours(), &["-t", "-f", "raw", disk.path()]);
        assert_eq!(first.exit_code(), Some(0));
        crate::support::nbd_cli(&["info", "--size", &second.uri("")]).success();
        assert_eq!(second.complaints(), "");
    }
}

/// With the page cache bypassed QEMU finds zeroes only where whole blocks are written.
#[test]
fn few_zeroes_are_data_where_the_page_cache_is_bypassed() {
    tools!(tool = "qemu-io");
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    for (cache, switch, is_data) in [
        ("none", "", true),
        ("writeback", "", false),
        ("writeback", "cache.direct=on,", true),
        ("none", "cache.direct=off,", false),
    ] {
        let blank = disk.blank(&format!("{cache}{switch}.img").replace(',', ""), 1 << 20);
        let cache = format!("--cache={cache}");
        let zeroes = ["--discard=unmap", "--detect-zeroes=unmap", "-t", "--image-opts"];
        let options = format!("driver=raw,{switch}file.filename={blank}");
        let server =
            Foreground::start(ours(), &[&[cache.as_str()], &zeroes[..], &[&options]].concat());
        qemu_io(&tool, &server, "write -P 0 512k 1");
        qemu_io(&tool, &server, "write -P 0 0 64k");
        drop(server);
        let found = allocated(&blank);
        assert_eq!(found > 0, is_data, "{cache} {switch} {found}");
        assert!(found < 64 << 10, "{cache} {switch} {found}");
    }
}
