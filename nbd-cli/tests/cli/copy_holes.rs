//! The bytes on the wire for a sparse disk, counted by a relay between client and server.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use crate::support::{Disk, Server, is_sparse_here, nbd_cli, peer};
use crate::tools;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 10 << 30;
/// Where the disk has a MiB of data, in MiB.
const DATA: [u64; 4] = [0, 1000, 5003, 10_239];

/// Passes bytes on and counts those that come from the server.
struct Relay {
    _directory: TempDir,
    socket: PathBuf,
    received: Arc<AtomicU64>,
}

impl Relay {
    fn before(server: &Path) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("relay");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let received = Arc::new(AtomicU64::new(0));
        let (server, count) = (server.to_owned(), Arc::clone(&received));
        // It goes with the process.
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let upstream = UnixStream::connect(&server).expect("the server listens");
                let clone = |stream: &UnixStream| stream.try_clone().expect("a descriptor");
                let (from, to) = (clone(&client), clone(&upstream));
                std::thread::spawn(move || pass(from, to, &AtomicU64::new(0)));
                let count = Arc::clone(&count);
                std::thread::spawn(move || pass(upstream, client, &count));
            }
        });
        Self { _directory: directory, socket, received }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Bytes from the server since this was asked last.
    fn take(&self) -> u64 {
        self.received.swap(0, Ordering::SeqCst)
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, count: &AtomicU64) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        // Before they are passed on: who has them all finds them counted.
        count.fetch_add(length as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn make_raw(path: &str) {
    let file = File::create(path).expect("a file");
    file.set_len(SIZE).expect("a size");
    for place in DATA {
        file.write_all_at(&[place as u8 | 1; 1 << 20], place * MIB).expect("room");
    }
}

#[track_caller]
fn assert_is_copy(path: &str) {
    let copy = File::open(path).expect("the copy");
    assert_eq!(copy.metadata().expect("a file").len(), SIZE);
    let mut content = vec![0; 3 << 20];
    for place in DATA {
        let start = place.saturating_sub(1) * MIB;
        let read = copy.read_at(&mut content, start).expect("it can be read");
        for (at, byte) in (start..).zip(&content[..read]) {
            let expected = if at / MIB == place { place as u8 | 1 } else { 0 };
            assert_eq!(*byte, expected, "at {at}");
        }
    }
}

#[test]
fn ten_gib_with_four_mib_of_data_cost_four_mib_and_some_headers() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let raw = disk.beside("large.raw");
    make_raw(&raw);
    let mut images = vec![raw.clone()];
    if let Some(qemu_img) = crate::support::tool("qemu-img") {
        let qcow2 = disk.beside("large.qcow2");
        peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]);
        images.push(qcow2);
    }
    for image in images {
        let server = Server::ours(&[&image]);
        let relay = Relay::before(server.socket());
        for options in [&["--no-extents", "--request-size=1M"][..], &[]] {
            let copied = disk.beside("copy.img");
            nbd_cli(&[&["copy"], options, &[&relay.uri(), &copied]].concat()).success();
            let received = relay.take();
            let data = DATA.len() as u64 * MIB;
            // A hole is 32 bytes in place of a MiB.
            let most = data + (SIZE / MIB) * 100 + (64 << 10);
            assert!((data..most).contains(&received), "{image} {options:?}: {received} bytes");
            assert!(allocated(&copied) < 2 * data, "{image} {options:?}");
            assert_is_copy(&copied);
            std::fs::remove_file(&copied).expect("it is there");
        }
    }
}

#[test]
fn backups_and_conversions_of_a_sparse_disk_cost_what_its_data_does() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let raw = disk.beside("large.raw");
    make_raw(&raw);
    let server = Server::ours(&["--read-only", "--format", "raw", &raw]);
    let relay = Relay::before(server.socket());
    let (copied, restored) = (disk.beside("copied"), disk.beside("restored.raw"));
    let data = DATA.len() as u64 * MIB;
    for command in [
        &["backup", "--quiet"][..],
        &["backup", "--quiet", "--verify=all"],
        &["image", "convert", "-O", "qcow2"],
        &["image", "convert", "-O", "raw"],
    ] {
        nbd_cli(&[command, &[&relay.uri(), &copied]].concat()).success();
        let received = relay.take();
        // Verification reads the data once more.
        let times = if command.contains(&"--verify=all") { 2 } else { 1 };
        let most = times * data + (256 << 10);
        assert!((times * data..most).contains(&received), "{command:?}: {received} bytes");
        assert!(allocated(&copied) < 2 * data, "{command:?}");
        if command[0] == "backup" {
            nbd_cli(&["restore", "--quiet", &copied, &restored]).success();
            assert_is_copy(&restored);
            std::fs::remove_file(&restored).expect("it is there");
        }
        std::fs::remove_file(&copied).expect("it is there");
    }
}

#[test]
fn an_export_that_is_served_again_hands_its_holes_on() {
    tools!(qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    if is_sparse_here(&disk).is_none() {
        return;
    }
    let raw = disk.beside("large.raw");
    make_raw(&raw);
    let program = disk.beside("qemu-nbd");
    std::os::unix::fs::symlink(crate::support::PROGRAM, &program).expect("a link");
    let data = DATA.len() as u64 * MIB;
    for theirs in [true, false] {
        let upstream = match theirs {
            true => Server::qemu_nbd(&qemu_nbd, "", &["-r", "-f", "raw", &raw]),
            false => Server::ours(&["--read-only", "--format", "raw", &raw]),
        };
        let below = Relay::before(upstream.socket());
        let ours = Server::ours(&["--read-only", "--format", "raw", &below.uri()]);
        let as_qemu_nbd =
            Server::qemu_nbd(Path::new(&program), "", &["-r", "-f", "raw", &below.uri()]);
        for server in [ours, as_qemu_nbd] {
            let above = Relay::before(server.socket());
            let copied = disk.beside("copy.img");
            // Holes that are told in answers to reads only.
            let copy = ["copy", "--no-extents", "--request-size=1M", &above.uri(), &copied];
            below.take();
            nbd_cli(&copy).success();
            let most = data + (SIZE / MIB) * 100 + (64 << 10);
            for received in [above.take(), below.take()] {
                assert!((data..most).contains(&received), "{theirs}: {received} bytes");
            }
            assert_is_copy(&copied);
            std::fs::remove_file(&copied).expect("it is there");
        }
    }
}

#[test]
fn what_others_write_to_an_export_that_is_served_again_is_seen() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    if is_sparse_here(&disk).is_none() {
        return;
    }
    let file = disk.blank("disk.img", 8 << 20);
    let upstream = Server::ours(&["--format", "raw", &file]);
    let server = Server::ours(&["--read-only", "--format", "raw", upstream.uri()]);
    let map = |uri: &str| nbd_cli(&["map", "--json", uri]).success();
    for command in ["write -P 1 1M 1M", "write -P 2 4M 64k", "write -z -u 1M 512k"] {
        assert_eq!(map(server.uri()), map(upstream.uri()), "before {command}");
        peer(&qemu_io, &["-f", "raw", "-c", command, upstream.uri()]);
        assert_eq!(map(server.uri()), map(upstream.uri()), "after {command}");
        nbd_cli(&["image", "compare", server.uri(), upstream.uri()]).success();
    }
}

#[test]
fn holes_that_are_told_only_in_answers_to_reads_stay_holes() {
    tools!(qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let server = Server::qemu_nbd(&qemu_nbd, "disk", &["-r", "-f", "raw", disk.path()]);
    let copied = disk.beside("copy.img");
    // Neither asked for nor looked for.
    let quiet = ["copy", "--no-extents", "--sparse=0"];
    nbd_cli(&[&quiet[..], &[server.uri(), &copied]].concat()).success();
    disk.assert_equals(&copied);
    assert!(allocated(&copied) < 2 << 20, "{} bytes", allocated(&copied));
    let whole = nbd_cli(&[&quiet[..], &["--allocated", server.uri(), &copied]].concat());
    whole.success();
    disk.assert_equals(&copied);
    assert!(allocated(&copied) >= 8 << 20, "{} bytes", allocated(&copied));
}
