//! What else is asked of a server while it streams into a disk: carried out, or refused with a
//! sentence. docs/control.md has the table.

use std::process::Command;

use rustix::process::Signal;

use super::control_stream::{connect, say, two_layers, wait_for};
use crate::support::image::{are_equal, is_clean};
use crate::support::{Disk, PROGRAM, Server, nbd_cli, says};
use crate::tools;

const MIB: u64 = 1 << 20;

/// An overlay that is served, and a stream that takes minutes.
struct Slow {
    disk: Disk,
    base: String,
    overlay: String,
    control: String,
}

impl Slow {
    fn new() -> Self {
        let disk = Disk::sparse();
        let (base, overlay) = two_layers(&disk);
        let control = disk.beside("control");
        Self { disk, base, overlay, control }
    }

    fn serve(&self) -> Server {
        Server::ours(&["--control", &self.control, "--allocation-depth", &self.overlay])
    }

    fn say(&self, arguments: &[&str]) -> crate::support::Outcome {
        say(&self.control, arguments)
    }

    fn begin(&self) {
        self.say(&["stream", "", "--rate", "128K"]).success();
        wait_for(&self.control, "under way", |state| state["done"].as_u64() >= Some(MIB));
    }

    /// Ends what is left of the stream without a limit.
    fn complete(&self) {
        self.say(&["stream", "", "--cancel"]).success();
        self.say(&["stream", ""]).success();
        wait_for(&self.control, "complete", |state| state["phase"] == "complete");
    }
}

#[test]
fn bitmaps_exports_and_checkpoints_come_and_go_beside_a_stream() {
    tools!(qemu_img = "qemu-img");
    let slow = Slow::new();
    let server = slow.serve();
    let client = connect(&server);
    slow.say(&["bitmap-add", "", "before"]).success();
    slow.begin();
    for request in ["bitmap-disable", "bitmap-enable", "bitmap-clear", "bitmap-remove"] {
        slow.say(&["bitmap-add", "", "daily"]).success();
        slow.say(&[request, "", "daily"]).success();
        if request != "bitmap-remove" {
            slow.say(&["bitmap-remove", "", "daily"]).success();
        }
    }
    slow.say(&["add-export", "second", slow.disk.path()]).success();
    nbd_cli(&["info", "--size", &server.uri_of("second")]).success();
    slow.say(&["remove-export", "second"]).success();
    // A layer that the stream still reads is not for writers.
    says(slow.say(&["add-export", "base", "-f", "raw", &slow.base]), &["base.img"]);
    // The view keeps its moment while the stream and clients change the image.
    let expected = std::fs::read(&slow.base).expect("the base");
    slow.say(&["checkpoint-start", "", "--bitmap", "before"]).success();
    client.write(22 * MIB, vec![9; 4096].into(), nbd_client::Durability::Cached).expect("room");
    let view = server.uri_of(".checkpoint");
    nbd_cli(&["image", "compare", &view, &slow.base]).success();
    let copied = slow.disk.beside("view.img");
    nbd_cli(&["copy", &view, &copied]).success();
    assert!(std::fs::read(copied).expect("the copy") == expected);
    slow.complete();
    nbd_cli(&["image", "compare", &view, &slow.base]).success();
    slow.say(&["checkpoint-end", "", "failure"]).success();
    let listing = slow.say(&["list"]).success();
    assert!(listing.contains("64.0 KiB dirty"), "{listing}");
    std::fs::remove_file(&slow.base).expect("it is not needed");
    let mut flat = expected;
    flat[22 << 20..(22 << 20) + 4096].fill(9);
    std::fs::write(&slow.base, flat).expect("room");
    client.disconnect().expect("an end");
    server.end();
    is_clean(&qemu_img, &slow.overlay);
    are_equal(&qemu_img, &slow.overlay, &slow.base);
}

#[test]
fn what_would_change_the_image_below_a_stream_is_refused() {
    let slow = Slow::new();
    let server = slow.serve();
    slow.begin();
    let refused = ["a stream into '' is running", "--cancel"];
    says(slow.say(&["stream", ""]), &refused);
    says(slow.say(&["remove-export", "", "--disconnect"]), &refused);
    says(nbd_cli(&["serve", "--takeover", &slow.control, &slow.overlay]), &refused[..1]);
    let overlay = &*slow.overlay;
    for command in [
        &["resize", overlay, "+1M"][..],
        &["snapshot", "create", overlay, "first"],
        &["stream", overlay],
        &["commit", overlay],
        &["rebase", "--no-backing", overlay],
        &["resize", "-f", "raw", &slow.base, "+1M"],
    ] {
        let command: Vec<_> = ["image"].iter().chain(command).copied().collect();
        says(nbd_cli(&command), &["another program"]);
    }
    nbd_cli(&["image", "compare", server.uri(), &slow.base]).success();
    slow.complete();
    server.end();
    // All of it is possible afterwards.
    nbd_cli(&["image", "snapshot", "create", overlay, "first"]).success();
    nbd_cli(&["image", "resize", "-f", "raw", &slow.base, "+1M"]).success();
}

#[test]
fn end_of_the_server_ends_a_stream_in_order_and_the_next_one_goes_on() {
    tools!(qemu_img = "qemu-img");
    let slow = Slow::new();
    for by_request in [false, true] {
        let mut server = slow.serve();
        slow.say(&["stream", "", "--rate", "2M"]).success();
        let state =
            |least: u64| move |state: &serde_json::Value| state["done"].as_u64() >= Some(least);
        let least = if by_request { 6 * MIB } else { 3 * MIB };
        wait_for(&slow.control, "under way", state(least));
        match by_request {
            true => drop(slow.say(&["shutdown"]).success()),
            false => server.signal(Signal::TERM),
        }
        assert_eq!(server.wait().code(), Some(0));
        // In order: not even a leak.
        is_clean(&qemu_img, &slow.overlay);
        are_equal(&qemu_img, &slow.overlay, &slow.base);
        let server = slow.serve();
        let client = connect(&server);
        let context = nbd_client::MetaContextName::qemu_allocation_depth();
        let extents = client.extents(&context, 0..24 * MIB).map(|extent| extent.expect("depth"));
        let kept: u64 =
            extents.filter(|extent| extent.flags == 1).map(|extent| extent.length).sum();
        assert!(kept >= least && kept < 24 * MIB, "{kept}");
        client.disconnect().expect("an end");
        server.end();
    }
    let server = slow.serve();
    slow.say(&["stream", ""]).success();
    wait_for(&slow.control, "complete", |state| state["phase"] == "complete");
    server.end();
    std::fs::rename(&slow.base, slow.disk.beside("kept.img")).expect("it is renamed");
    is_clean(&qemu_img, &slow.overlay);
    are_equal(&qemu_img, &slow.overlay, &slow.disk.beside("kept.img"));
}

#[test]
fn reload_leaves_an_export_into_which_a_stream_runs() {
    let slow = Slow::new();
    let (socket, file) = (slow.disk.beside("socket"), slow.disk.beside("config"));
    let write = |exports: &str| {
        let text = format!("socket = \"{socket}\"\ncontrol = \"{}\"\n{exports}", slow.control);
        std::fs::write(&file, text).expect("a file");
    };
    let export = |name: &str, source: &str| {
        format!("[[export]]\nname = \"{name}\"\nsource = \"{source}\"\n")
    };
    let streamed = export("vm", &slow.overlay);
    write(&streamed);
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--config", &file]);
    let server = Server::start(&mut command, socket.clone().into());
    slow.say(&["stream", "vm", "--rate", "128K"]).success();
    // Another one comes, and this one stays.
    write(&(streamed + &export("memory", "memory:1M")));
    let report = slow.say(&["reload", "--json"]).success();
    assert!(report.contains("\"memory\""), "{report}");
    write(&export("memory", "memory:1M"));
    let report = slow.say(&["reload", "--json"]).json();
    let left = report["left"].to_string();
    assert!(left.contains("a stream into 'vm' is running"), "{report}");
    let uri = server.uri_of("vm");
    nbd_cli(&["image", "compare", &uri, &slow.base]).success();
    slow.say(&["stream", "vm", "--cancel"]).success();
    let report = slow.say(&["reload", "--json"]).success();
    assert!(report.contains("\"vm\"") && !report.contains("running"), "{report}");
    nbd_cli(&["info", "--size", &uri]).failure();
    server.end();
}
