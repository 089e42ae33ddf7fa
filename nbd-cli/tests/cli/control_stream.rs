//! `control stream`: layers are taken away below disks that are served, judged by qemu-img.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nbd_client::blocking::Client;
use nbd_client::{Connector, MetaContextName};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::image::{are_equal, chain, info, is_clean};
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Outcome, Server, nbd_cli, peer, says};
use crate::tools;

/// Asks the server at a control socket.
pub(crate) fn say(control: &str, arguments: &[&str]) -> Outcome {
    nbd_cli(&[&["control", control][..], arguments].concat())
}

/// The stream of the first export.
pub(crate) fn state(control: &str) -> Value {
    let listing = say(control, &["list", "--json"]).success();
    let listing: Value = serde_json::from_str(&listing).expect("JSON");
    listing["exports"][0]["stream"].clone()
}

pub(crate) fn wait_for(control: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        let state = state(control);
        if holds(&state) {
            return state;
        }
        assert!(Instant::now() < end, "it is not {what}: {state}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client that can ask for the depth.
pub(crate) fn connect(server: &Server) -> Client {
    let connector: Connector = server.uri().parse().expect("a URI");
    let depth = MetaContextName::qemu_allocation_depth();
    Client::connect(&connector.meta_contexts([depth])).expect("a client")
}

/// A raw file of 24 MiB, and an empty overlay over it.
pub(crate) fn two_layers(disk: &Disk) -> (String, String) {
    let (base, overlay) = (disk.beside("base.img"), disk.beside("top.qcow2"));
    let bytes: Vec<u8> = (0..24u32 << 20).map(|at| (at >> 12) as u8 | 1).collect();
    std::fs::write(&base, bytes).expect("the base");
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", &overlay]).success();
    (base, overlay)
}

#[test]
fn a_disk_is_streamed_while_clients_use_it_and_stands_alone() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (base, overlay) = two_layers(&disk);
    let flat = disk.beside("flat.img");
    std::fs::copy(&base, &flat).expect("a copy");
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, "--allocation-depth", &overlay]);
    says(say(&control, &["stream", "", "--cancel"]), &["nothing is streamed into"]);
    says(say(&control, &["stream", "", "--base", "flat.img"]), &["flat.img", "not a layer below"]);
    says(say(&control, &["stream", "absent"]), &["no disk exported as 'absent'"]);
    let said = say(&control, &["stream", "", "--rate", "256K"]).success();
    assert!(said.contains("running"), "{said}");
    // Meanwhile it is not removed, and no second stream starts.
    let refused = ["a stream into '' is running", "--cancel"];
    says(say(&control, &["stream", ""]), &refused);
    says(say(&control, &["remove-export", "", "--disconnect"]), &refused);
    says(nbd_cli(&["serve", "--takeover", &control, &overlay]), &refused[..1]);
    let writes = ["-f", "raw", "-c", "write -P 7 1M 100k", "-c", "write -z 20M 128k"];
    for target in [server.uri(), &flat] {
        peer(&qemu_io, &[&writes[..], &[target]].concat());
    }
    nbd_cli(&["image", "compare", server.uri(), &flat]).success();
    let before = wait_for(&control, "under way", |state| state["done"].as_u64() >= Some(1 << 20));
    assert_eq!((&before["phase"], &before["total"]), (&"running".into(), &(24 << 20).into()));
    let said = say(&control, &["stream", "", "--cancel"]).success();
    assert!(said.contains("cancelled"), "{said}");
    nbd_cli(&["image", "compare", server.uri(), &flat]).success();
    // The next one goes on.
    say(&control, &["stream", ""]).success();
    let done = wait_for(&control, "complete", |state| state["phase"] == "complete");
    assert_eq!((&done["done"], &done["problem"]), (&done["total"], &Value::Null));
    // The layer is closed and unlocked: qemu-io writes to it.
    peer(&qemu_io, &["-f", "raw", "-c", "write -P 66 0 24M", &base]);
    std::fs::remove_file(&base).expect("it is not needed any more");
    nbd_cli(&["image", "compare", server.uri(), &flat]).success();
    assert!(info(&qemu_img, &flat).is_object());
    say(&control, &["stream", ""]).success();
    server.end();
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &flat);
    assert!(info(&qemu_img, &overlay).get("backing-filename").is_none());
}

#[test]
fn what_clients_read_is_streamed_first_and_then_what_follows_it() {
    let disk = Disk::sparse();
    let (base, overlay) = two_layers(&disk);
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, "--allocation-depth", &overlay]);
    let client = connect(&server);
    let depth = |megabyte: u64| {
        let start = megabyte << 20;
        let mut extents =
            client.extents(&MetaContextName::qemu_allocation_depth(), start..24 << 20);
        extents.next().expect("an extent").expect("the depth").flags
    };
    // It takes a minute and a half.
    say(&control, &["stream", "", "--rate", "256K"]).success();
    wait_until("it has begun", || depth(0) == 1);
    assert_eq!((depth(14), depth(15)), (2, 2));
    client.read(14 << 20..(14 << 20) + 4096).expect("the disk");
    wait_until("it was asked for", || depth(14) == 1);
    assert_eq!(depth(8), 2);
    wait_until("it is near", || depth(15) == 1);
    assert_eq!(depth(8), 2);
    say(&control, &["stream", "", "--cancel"]).success();
    say(&control, &["stream", ""]).success();
    wait_for(&control, "complete", |state| state["phase"] == "complete");
    client.disconnect().expect("an end");
    nbd_cli(&["image", "compare", server.uri(), &base]).success();
    server.end();
}

#[test]
fn a_base_stays_below_and_bitmaps_stay_empty() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let overlay = chain(&disk, &qemu_img, &qemu_io);
    let flat = disk.beside("flat.img");
    peer(&qemu_img, &["convert", &overlay, &flat]);
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, &overlay]);
    say(&control, &["bitmap-add", "", "daily"]).success();
    say(&control, &["stream", "", "--base", "disk.img"]).success();
    wait_for(&control, "complete", |state| state["phase"] == "complete");
    std::fs::remove_file(disk.beside("middle.qcow2")).expect("a layer");
    let listing = say(&control, &["list"]).success();
    assert!(listing.contains("stream complete") && listing.contains("0 bytes dirty"), "{listing}");
    nbd_cli(&["image", "compare", server.uri(), &flat]).success();
    server.end();
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &flat);
    assert_eq!(info(&qemu_img, &overlay)["backing-filename"], "disk.img");
}

#[test]
fn disks_that_cannot_take_what_is_below_are_refused_with_a_sentence() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (base, overlay) = two_layers(&disk);
    peer(&qemu_img, &["snapshot", "-c", "first", &overlay]);
    for (arguments, why) in [
        (&["--read-only", &overlay][..], "it is served read-only"),
        (&["--temporary", &overlay], "in memory or temporary"),
        (&["memory:1M"], "is not an image"),
        (&["--format", "raw", &base], "only a qcow2 image"),
    ] {
        let control = disk.beside("control");
        let server = Server::ours(&[&["--control", &control][..], arguments].concat());
        says(say(&control, &["stream", ""]), &[why]);
        server.end();
    }
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, &overlay]);
    say(&control, &["stream", ""]).success();
    let failed = wait_for(&control, "failed", |state| state["phase"] == "failed");
    assert!(failed["problem"].as_str().is_some_and(|why| why.contains("internal snapshots")));
    server.end();
}

#[test]
fn a_killed_server_leaves_the_disk_and_the_next_stream_goes_on() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (base, overlay) = two_layers(&disk);
    let control = disk.beside("control");
    for megabytes in [2, 5, 9, 25] {
        let mut server = Server::ours(&["--control", &control, &overlay]);
        let rate = if megabytes > 24 { "1G" } else { "6M" };
        say(&control, &["stream", "", "--rate", rate]).success();
        // The last one is killed somewhere at its end.
        let is_there = |state: &Value| {
            state["done"].as_u64() >= Some(megabytes << 20) || state["phase"] == "complete"
        };
        wait_for(&control, "far enough", is_there);
        server.signal(Signal::KILL);
        server.wait();
        let _ = std::fs::remove_file(&control);
        are_equal(&qemu_img, &overlay, &base);
    }
    std::fs::rename(&base, disk.beside("kept.img")).expect("it is not needed");
    are_equal(&qemu_img, &overlay, &disk.beside("kept.img"));
}

fn serve(base: &str, socket: &Path) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-cli"));
    command.arg("serve").arg("--socket").arg(socket).args(["-r", "--format", "raw", base]);
    Server::start(&mut command, socket.to_owned())
}

#[test]
fn a_layer_that_is_away_pauses_the_stream_until_it_is_back() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (base, overlay) = two_layers(&disk);
    let socket = PathBuf::from(disk.beside("base.sock"));
    let mut below = serve(&base, &socket);
    let name = format!("nbd+unix:///?socket={}", socket.display());
    let create = ["create", "-q", "-f", "qcow2", "-u", "-b", &name, "-F", "raw", &overlay, "24M"];
    peer(&qemu_img, &create);
    let control = disk.beside("control");
    let options = ["--control", &control, "--trust-image", "--source-reconnect", "300ms"];
    let server = Server::ours(&[&options[..], &[&overlay]].concat());
    say(&control, &["stream", "", "--rate", "1M"]).success();
    let mut done = 0;
    for _ in 0..2 {
        let running = wait_for(&control, "under way", |state| state["done"].as_u64() > Some(done));
        assert_eq!((&running["phase"], &running["problem"]), (&"running".into(), &Value::Null));
        below.signal(Signal::KILL);
        below.wait();
        let _ = std::fs::remove_file(&socket);
        let paused = wait_for(&control, "paused", |state| state["phase"] == "paused");
        let why = paused["problem"].as_str();
        assert!(why.is_some_and(|why| why.contains("base.sock")), "{paused}");
        done = paused["done"].as_u64().expect("a number");
        let said = say(&control, &["list"]).success();
        assert!(said.contains("stream paused, and tried again"), "{said}");
        // Clients get errors, and no zeroes.
        let compared = nbd_cli(&["image", "compare", server.uri(), &base]);
        assert!(compared.code > Some(1), "{compared:?}");
        below = serve(&base, &socket);
    }
    wait_for(&control, "under way", |state| state["done"].as_u64() > Some(done));
    nbd_cli(&["image", "compare", server.uri(), &base]).success();
    say(&control, &["stream", "", "--cancel"]).success();
    say(&control, &["stream", ""]).success();
    wait_for(&control, "complete", |state| state["phase"] == "complete");
    below.end();
    nbd_cli(&["image", "compare", server.uri(), &base]).success();
    server.end();
    is_clean(&qemu_img, &overlay);
    are_equal(&qemu_img, &overlay, &base);
}
