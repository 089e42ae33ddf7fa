//! The end of a server, and of an export, while the server of a source or of a layer below hangs.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::fs::FlockOperation;
use rustix::process::Signal;
use serde_json::Value;

use crate::support::image::{is_clean, json};
use crate::support::qemu_nbd::{Killed, wait_until};
use crate::support::{Disk, Outcome, PROGRAM, Server, nbd_cli, peer, says};
use crate::tools;

/// A server whose sources are on another one, which can be stopped.
struct Place {
    disk: Disk,
    upstream: Server,
}

impl Place {
    fn new() -> Self {
        let disk = Disk::sparse();
        let upstream = Server::ours(&["--format", "raw", disk.path()]);
        Self { disk, upstream }
    }

    /// Makes an image above the disk of the other server.
    fn overlay(&self, qemu_img: &std::path::Path) -> String {
        let upper = self.disk.beside("upper.qcow2");
        let below = ["-b", self.upstream.uri(), "-F", "raw", &upper];
        peer(qemu_img, &[&["create", "-q", "-f", "qcow2"][..], &below].concat());
        upper
    }

    fn serve(&self, more: &[&str]) -> Server {
        let socket = self.disk.beside("socket");
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--socket", &socket, "--control", &self.disk.beside("control")]);
        command.args(["--drain-timeout", "100ms"]).args(more);
        command.stderr(File::create(self.disk.beside("log")).expect("a file"));
        Server::start(&mut command, PathBuf::from(socket))
    }

    /// The signal takes effect some time after it was sent.
    fn stop_upstream(&self) {
        self.upstream.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.upstream.pid());
        wait_until("the upstream server is stopped", || {
            std::fs::read_dir(&tasks).expect("a process").flatten().all(|task| {
                let state = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                state.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
            })
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.disk.beside("log")).expect("text")
    }

    fn say(&self, words: &[&str]) -> Outcome {
        nbd_cli(&[&["control", &self.disk.beside("control")], words].concat())
    }

    /// Has a client make a request that hangs: its program, once the request is in flight.
    fn hang(&self, export: &str, command: &mut Command) -> Killed {
        let before = self.in_flight(export);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = Killed(child.spawn().expect("a program"));
        wait_until("the request is in flight", || self.in_flight(export) > before);
        child
    }

    fn in_flight(&self, export: &str) -> u64 {
        let list = self.say(&["list", "--json"]).json();
        let all = list["exports"].as_array().expect("a list").clone();
        let found = all.into_iter().find(|it| it["name"] == export).expect("the export");
        found["traffic"]["in-flight"].as_u64().expect("a number")
    }
}

/// A bitmap is not "in use" and has these bytes.
#[track_caller]
fn is_saved(qemu_img: &std::path::Path, image: &str) {
    is_clean(qemu_img, image);
    let info = json(qemu_img, &["info", "--output=json", image]);
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps[0]["flags"], serde_json::json!(["auto"]), "{info}");
    assert!(!std::path::Path::new(&format!("{image}.dirty")).exists());
}

/// Whether no process has a lock on a file.
fn is_unlocked(path: &str) -> bool {
    let file = File::options().write(true).open(path).expect("a file");
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

#[test]
fn a_layer_that_hangs_keeps_neither_its_image_nor_others_from_being_closed() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let place = Place::new();
    let (upper, other) = (place.overlay(&qemu_img), place.disk.beside("other.qcow2"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &other, "8M"]);
    let (a, b) = (format!("upper={upper}"), format!("other={other}"));
    for by_signal in [true, false] {
        let pid_file = place.disk.beside("pid");
        let mut server = place.serve(&["--trust-image", "--pid-file", &pid_file, &a, &b]);
        for name in ["upper", "other"] {
            if by_signal {
                place.say(&["bitmap-add", name, "daily"]).success();
            }
            let uri = server.uri_of(name);
            let said = peer(&qemu_io, &["-f", "raw", "-c", "write -P 7 1M 64k", &uri]);
            assert!(!said.contains("failed"), "{said}");
        }
        place.stop_upstream();
        let uri = server.uri_of("upper");
        let io = |command: &str| {
            place.hang("upper", Command::new(&qemu_io).args(["-f", "raw", "-c", command, &uri]))
        };
        let _reads = io("read 4M 4k");
        // The rest of the cluster is below.
        let _writes = io("write -P 8 5000k 512");
        // It waits for that write, and other requests for it.
        let mut waits = Command::new(PROGRAM);
        waits.args(["control", &place.disk.beside("control"), "checkpoint-start", "upper"]);
        waits.stdout(Stdio::null()).stderr(Stdio::null());
        let _waits = Killed(waits.spawn().expect("a program"));
        match by_signal {
            true => server.signal(Signal::TERM),
            false => drop(place.say(&["shutdown"]).success()),
        }
        // Clients are cut off soon, and the write goes on until then.
        wait_until("the request is given up, and the pid file is locked until then", || {
            let is_free = is_unlocked(&pid_file);
            let is_given_up = place.log().contains("a request was given up");
            assert!(is_given_up || !is_free, "the write is still in flight: {}", place.log());
            is_given_up
        });
        assert_eq!(server.wait().code(), Some(0), "{}", place.log());
        place.upstream.signal(Signal::CONT);
        for image in [&upper, &other] {
            is_saved(&qemu_img, image);
            let read = peer(&qemu_io, &["-f", "qcow2", "-c", "read -P 7 1M 64k", image]);
            assert!(!read.contains("failed"), "{read}");
        }
        place.disk.assert_equals(place.disk.path());
    }
}

#[test]
fn a_source_that_hangs_is_named_at_the_end_and_the_others_are_flushed() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let place = Place::new();
    let other = place.disk.beside("other.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &other, "8M"]);
    let far = format!("far={}", place.upstream.uri());
    // The one that hangs is flushed first.
    let mut server = place.serve(&["--format", "raw", &far]);
    place.say(&["add-export", "near", &other, "--format", "qcow2"]).success();
    place.say(&["bitmap-add", "near", "daily"]).success();
    for name in ["far", "near"] {
        let uri = server.uri_of(name);
        let said = peer(&qemu_io, &["-f", "raw", "-c", "write -P 7 1M 64k", &uri]);
        assert!(!said.contains("failed"), "{said}");
    }
    place.stop_upstream();
    server.signal(Signal::TERM);
    assert_eq!(server.wait().code(), Some(1), "{}", place.log());
    let log = place.log();
    for part in ["\"far\" could not be flushed", "does not answer", place.upstream.uri()] {
        assert!(log.contains(part), "{part}: {log}");
    }
    assert!(!log.contains("near"), "{log}");
    place.upstream.signal(Signal::CONT);
    is_saved(&qemu_img, &other);
}

#[test]
fn an_export_that_hangs_is_removed_and_requests_go_on() {
    let place = Place::new();
    let far = format!("far={}", place.upstream.uri());
    let server = place.serve(&["--format", "raw", "--open-timeout", "1s", &far, "near=memory:1M"]);
    place.stop_upstream();
    let mut copy = Command::new(PROGRAM);
    let _client = place.hang("far", copy.args(["checksum", &server.uri_of("far")]));
    says(place.say(&["remove-export", "far"]), &["add --disconnect"]);
    let removed = place.say(&["remove-export", "far", "--disconnect"]);
    says(removed, &["the export is removed", "neither flushed nor closed", "hangs"]);
    let list = place.say(&["list"]).success();
    assert!(list.contains("near") && !list.contains("far"), "{list}");
    place.upstream.signal(Signal::CONT);
    nbd_cli(&["info", "--size", &server.uri_of("near")]).success();
    server.end();
}

#[test]
fn requests_about_others_are_carried_out_while_one_about_a_disk_that_hangs_is_not() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let place = Place::new();
    let (upper, other) = (place.overlay(&qemu_img), place.disk.beside("other.qcow2"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &other, "8M"]);
    let (a, b) = (format!("upper={upper}"), format!("other={other}"));
    let server = place.serve(&["--trust-image", &a, &b]);
    for name in ["upper", "other"] {
        place.say(&["bitmap-add", name, "daily"]).success();
    }
    place.stop_upstream();
    let uri = server.uri_of("upper");
    let write = ["-f", "raw", "-c", "write -P 8 5000k 512", &uri];
    let _writes = place.hang("upper", Command::new(&qemu_io).args(write));
    let mut clear = Command::new(PROGRAM);
    clear.args(["control", &place.disk.beside("control"), "bitmap-clear", "upper", "daily"]);
    let mut clear = Killed(clear.stdout(Stdio::null()).spawn().expect("a program"));
    let exports = || -> Value {
        let list = place.say(&["list", "--json"]).success();
        serde_json::from_str::<Value>(&list).expect("JSON")["exports"].clone()
    };
    // It waits for that write, and so do the bitmaps.
    let is_upper = |export: &&Value| export["name"] == "upper";
    let mut listed = Value::Null;
    wait_until("the bitmaps of the disk that hangs are not listed", || {
        listed = exports();
        let all = listed.as_array().expect("a list");
        all.iter().find(is_upper).expect("the export")["problem"].is_string()
    });
    let all = listed.as_array().expect("a list");
    let near = all.iter().find(|export| export["name"] == "other").expect("the export");
    assert_eq!(near["bitmaps"][0]["name"], "daily", "{near}");
    assert!(place.say(&["list"]).success().contains("its bitmaps are not listed"));
    place.say(&["checkpoint-start", "other", "--bitmap", "daily"]).success();
    place.say(&["checkpoint-end", "other", "success"]).success();
    place.say(&["bitmap-add", "other", "weekly"]).success();
    place.say(&["add-export", "third", "memory:1M"]).success();
    place.say(&["remove-export", "other"]).success();
    place.upstream.signal(Signal::CONT);
    assert!(clear.0.wait().expect("a program").success());
    assert!(exports()[1]["problem"].is_null());
    server.end();
}

#[test]
fn a_stream_whose_layer_hangs_tells_since_when_it_has_copied_nothing() {
    tools!(qemu_img = "qemu-img");
    let place = Place::new();
    let upper = place.overlay(&qemu_img);
    let server = place.serve(&["--trust-image", &format!("upper={upper}")]);
    place.stop_upstream();
    place.say(&["stream", "upper"]).success();
    wait_until("the stream says so", || {
        let list = place.say(&["list", "--json"]).json();
        let stream = &list["exports"][0]["stream"];
        assert_eq!(stream["phase"], "running", "{stream}");
        stream["idle"].as_u64().expect("a number") >= 1
    });
    place.upstream.signal(Signal::CONT);
    server.end();
}
