//! `serve --cache` and `qemu-nbd --cache`: qemu-io finds every mode right, and the system shows
//! which one is used.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::OFlags;

use crate::support::qemu_nbd::{Foreground, ours};
use crate::support::{Disk, PROGRAM, Server, image, peer};
use crate::tools;

const MODES: [&str; 5] = ["writeback", "none", "writethrough", "directsync", "unsafe"];

/// Whether the system opens a file for direct I/O.
pub(crate) fn has_direct_io(path: &str) -> bool {
    let flags = OFlags::DIRECT.bits() as i32;
    std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).is_ok()
}

fn is_direct(mode: &str) -> bool {
    mode == "none" || mode == "directsync"
}

/// The modes that can be tried here.
fn modes(disk: &Disk) -> impl Iterator<Item = &'static str> {
    let has_direct_io = has_direct_io(disk.path());
    if !has_direct_io {
        eprintln!("skipped: no direct I/O in the directory for temporary files");
    }
    MODES.into_iter().filter(move |mode| has_direct_io || !is_direct(mode))
}

#[test]
fn qemu_io_finds_what_it_wrote_in_every_mode() {
    tools!(qemu_io = "qemu-io", qemu_img = "qemu-img");
    let disk = Disk::sparse();
    for mode in modes(&disk) {
        for format in ["raw", "qcow2"] {
            let path = disk.beside(&format!("{mode}.{format}"));
            if format == "raw" {
                // qemu-img would round the size up.
                disk.blank(&format!("{mode}.raw"), 8_388_700);
            } else {
                peer(&qemu_img, &["create", "-q", "-f", format, &path, "8389120"]);
            }
            let server = Server::ours(&["--cache", mode, "-f", format, &path]);
            let commands = [
                "write -P 1 0 1M",
                "write -P 2 4097 513",
                "aio_write -P 3 1M 512",
                "aio_write -P 4 1049088 512",
                "aio_write -P 5 1049600 3M",
                "aio_flush",
                "write -P 6 8388608 92",
                "write -z -u 300001 70001",
                "discard 5M 100001",
                "flush",
            ];
            let reads = [
                "read -P 1 0 4097",
                "read -P 2 4097 513",
                "read -P 1 4610 295391",
                "read -P 0 300001 70001",
                "read -P 1 370002 678574",
                "read -P 3 1M 512",
                "read -P 4 1049088 512",
                "read -P 5 1049600 3M",
                "read -P 0 5M 100001",
                "read -P 6 8388608 92",
            ];
            let ask = |commands: &[&str], place: &[&str]| {
                let mut arguments: Vec<&str> = commands.iter().flat_map(|c| ["-c", *c]).collect();
                arguments.extend(place);
                let said = peer(&qemu_io, &arguments);
                assert!(!said.contains("failed"), "{mode}, {format}: {said}");
            };
            let both: Vec<&str> = commands.into_iter().chain(reads).collect();
            ask(&both, &["-f", "raw", server.uri()]);
            server.end();
            // The file itself, read through the page cache.
            ask(&reads[..9], &["-r", "-f", format, &path]);
            if format == "qcow2" {
                image::is_clean(&qemu_img, &path);
            } else {
                assert_eq!(std::fs::metadata(&path).expect("the file").len(), 8_388_700);
            }
        }
    }
}

/// Runs a server that writes what it asks the kernel for into a file, and one request of qemu-io.
fn calls_of(
    strace: &Path,
    qemu_io: &Path,
    disk: &Disk,
    arguments: &[&str],
    request: &str,
) -> String {
    let (log, socket) = (disk.beside("calls"), disk.beside("socket"));
    let mut command = Command::new(strace);
    // With -D the child is the server, not strace.
    command.args([
        "-D",
        "-f",
        "-y",
        "-e",
        "trace=openat,pwritev2,fdatasync,fsync,pwrite64",
        "-o",
        &log,
    ]);
    command.args([PROGRAM, "serve", "--socket", &socket, "-f", "raw"]).args(arguments);
    command.arg(disk.path()).stderr(Stdio::null());
    let server = Server::start(&mut command, socket.clone().into());
    peer(qemu_io, &["-t", "unsafe", "-f", "raw", "-c", request, server.uri()]);
    let calls = std::fs::read_to_string(&log).expect("the calls");
    drop(server);
    calls
}

#[test]
fn the_kernel_is_asked_for_what_the_mode_says() {
    tools!(strace = "strace", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    for mode in modes(&disk) {
        // The writes of a ring are not system calls.
        let arguments = ["--cache", mode, "--aio", "threads"];
        let calls = calls_of(&strace, &qemu_io, &disk, &arguments, "write -P 9 4k 4k");
        let is_of_disk = |line: &&str| line.contains("disk.img");
        let opened = calls.lines().filter(is_of_disk).any(|line| line.contains("O_DIRECT"));
        assert_eq!(opened, is_direct(mode), "{mode}: {calls}");
        let count = |part: &str| {
            calls.lines().filter(is_of_disk).filter(|line| line.contains(part)).count()
        };
        let is_writethrough = mode == "writethrough" || mode == "directsync";
        assert_eq!(count("RWF_DSYNC"), usize::from(is_writethrough), "{mode}: {calls}");
        // The client flushes when it ends.
        let syncs = count("fdatasync(");
        assert!(if mode == "unsafe" { syncs == 0 } else { syncs <= 1 }, "{mode}: {calls}");
    }
}

/// Nothing in it outlives the server, whatever the mode of the image below it.
#[test]
fn a_temporary_overlay_is_never_synced() {
    tools!(strace = "strace", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let arguments = ["--temporary", "--cache", "writethrough"];
    let calls = calls_of(&strace, &qemu_io, &disk, &arguments, "write -P 9 4k 4k");
    let of_overlay = || calls.lines().filter(|line| line.contains("(deleted)"));
    assert!(of_overlay().any(|line| line.contains("pwrite")), "{calls}");
    let is_sync = |line: &str| line.contains("sync(") || line.contains("RWF_DSYNC");
    assert!(!of_overlay().any(is_sync), "{calls}");
}

#[test]
fn a_log_says_which_mode_and_alignment_are_used() {
    let disk = Disk::sparse();
    for mode in modes(&disk) {
        let (log, socket) = (disk.beside("log"), disk.beside("log-socket"));
        let mut command = Command::new(PROGRAM);
        command.args(["-v", "serve", "--cache", mode, "--socket", &socket, disk.path()]);
        command.stderr(Stdio::from(std::fs::File::create(&log).expect("a file")));
        Server::start(&mut command, socket.into()).end();
        let said = std::fs::read_to_string(log).expect("text");
        assert!(said.contains(&format!("cache={mode}")), "{said}");
        assert_eq!(said.contains("offset_alignment="), is_direct(mode), "{said}");
    }
}

#[test]
fn a_log_says_whether_io_uring_is_used() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    for (arguments, environment, may_be_used) in
        [(&[][..], "auto", true), (&[], "threads", false), (&["--aio", "threads"], "auto", false)]
    {
        let (log, socket) = (disk.beside("aio-log"), disk.beside("aio-socket"));
        let mut command = Command::new(PROGRAM);
        command.args(["-v", "serve", "-f", "raw", "--socket", &socket]).args(arguments);
        command.arg(disk.path()).env("NBD_AIO", environment);
        command.stderr(Stdio::from(std::fs::File::create(&log).expect("a file")));
        let server = Server::start(&mut command, socket.into());
        peer(&qemu_io, &["-f", "raw", "-c", "read -P 0 2M 4k", server.uri()]);
        server.end();
        let said = std::fs::read_to_string(log).expect("text");
        // Why it is not there the system says, where it may be used.
        assert_eq!(said.contains("it was forbidden"), !may_be_used, "{said}");
        assert!(said.contains("io_uring"), "{said}");
    }
}

/// As the files of /proc.
#[test]
fn a_file_system_without_direct_io_is_refused_with_the_modes_that_work() {
    for mode in ["none", "directsync"] {
        let arguments = ["serve", "--locking", "off", "-f", "raw", "--read-only"];
        let mut command = Command::new(PROGRAM);
        command.args(arguments).args(["--cache", mode, "/proc/self/oom_score_adj"]);
        let output = command.stdin(Stdio::null()).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(said.contains("no direct I/O") && said.contains("writeback"), "{said}");
    }
}

#[test]
fn switches_of_image_options_choose_direct_io() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    if !has_direct_io(disk.path()) {
        eprintln!("skipped: no direct I/O in the directory for temporary files");
        return;
    }
    let options =
        format!("driver=raw,cache.direct=on,file.driver=file,file.filename={}", disk.path());
    let server = Foreground::start(
        ours(),
        &["-t", "--image-opts", "--aio=native", "--cache=none", &options],
    );
    peer(&qemu_io, &["-f", "raw", "-c", "write -P 9 4097 513", &server.uri("")]);
    assert_eq!(server.complaints(), "");
    drop(server);
    assert_eq!(std::fs::read(disk.path()).expect("the disk")[4097..4610], [9; 513]);
}
