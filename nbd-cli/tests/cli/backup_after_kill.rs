//! A killed server loses no dirty bit that the next incremental backup needs.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::image::{are_equal, info, is_clean};
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Server, nbd_cli, peer, run};
use crate::tools;

const MIB: u64 = 1 << 20;

#[test]
fn the_backup_after_a_kill_is_small_and_complete() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    for durability in ["process", "power"] {
        Scenario::new(&qemu_img, &qemu_io, durability).play();
    }
}

/// A disk, its server's command line, and the judges.
struct Scenario<'a> {
    qemu_img: &'a Path,
    qemu_io: &'a Path,
    durability: &'a str,
    directory: Disk,
    disk: String,
    control: String,
}

impl<'a> Scenario<'a> {
    fn new(qemu_img: &'a Path, qemu_io: &'a Path, durability: &'a str) -> Self {
        let directory = Disk::sparse();
        let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
        peer(qemu_img, &["create", "-q", "-f", "qcow2", &disk, "64M"]);
        Self { qemu_img, qemu_io, durability, directory, disk, control }
    }

    fn play(&self) {
        let full = self.directory.beside("full.qcow2");
        let server = self.serve();
        self.write(&server, "write -P 1 0 48M");
        self.backup(&[&full]);
        self.write(&server, "write -P 2 1M 64k");
        self.kill(server);
        self.is_accepted_in_use();

        // Also in the middle of a checkpoint, whose bits are in two places then.
        let server = self.serve();
        self.write(&server, "write -P 3 20M 64k");
        nbd_cli(&["control", &self.control, "checkpoint-start", "vm", "--bitmap", "daily"])
            .success();
        self.write(&server, "write -P 4 40M 64k");
        self.kill(server);
        self.is_accepted_in_use();

        // And in the middle of writes that nobody waits for.
        self.kill_under_load(self.serve());
        self.is_accepted_in_use();

        let server = self.serve();
        let state = self.directory.beside("state.img");
        nbd_cli(&["copy", server.uri(), &state]).success();
        let second = self.directory.beside("second.qcow2");
        let report = self.backup(&["--base", &full, &second]);
        server.end();
        let copied = report["copied"].as_u64().expect("a number");
        assert!((192 << 10..=12 * MIB).contains(&copied), "changes, and little more: {report}");
        self.is_accepted("the closed image");
        is_clean(self.qemu_img, &second);
        are_equal(self.qemu_img, &state, &self.disk);
        are_equal(self.qemu_img, &state, &second);
        let restored = self.directory.beside("restored.img");
        nbd_cli(&["restore", "--verify", &second, &restored]).success();
        are_equal(self.qemu_img, &state, &restored);
    }

    fn serve(&self) -> Server {
        let source = format!("vm={}", self.disk);
        let durability = ["--bitmap-durability", self.durability];
        Server::ours(&[&durability[..], &["--control", &self.control, &source]].concat())
    }

    fn write(&self, server: &Server, command: &str) {
        let said = peer(self.qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
    }

    fn backup(&self, more: &[&str]) -> Value {
        let arguments = ["backup", "--control", &self.control, "--export", "vm", "-B", "daily"];
        let said = nbd_cli(&[&arguments[..], &["--verify=all", "--json"], more].concat());
        said.json()
    }

    fn kill(&self, mut server: Server) {
        server.signal(Signal::KILL);
        assert!(!server.wait().success());
    }

    /// Kills the server while a client writes to a part of the disk.
    fn kill_under_load(&self, server: Server) {
        let mut load = Command::new(self.qemu_io);
        load.args(["-f", "raw"]);
        for index in 0..4000 {
            // Every place of 8 MiB in steps that come back to none of them soon.
            let offset = 24 * MIB + index * 1_048_583 % (8 * MIB / 4096) * 4096;
            load.args(["-c", &format!("write -q -P {} {offset} 4k", 1 + index % 255)]);
        }
        let load = load.arg(server.uri()).stdin(Stdio::null());
        // The header changes before the bitmap is marked, and syncs lie between: on a busy disk the
        // kill could come first. An acknowledged write has waited for the mark.
        self.write(&server, "write -P 5 44M 64k");
        let before = self.changed();
        let mut load = load.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("qemu-io");
        wait_until("a write has changed the image", || self.changed() != before);
        std::thread::sleep(Duration::from_millis(150));
        self.kill(server);
        // Its writes fail from now on.
        load.wait().expect("qemu-io ends");
    }

    /// Returns the time of the last change of the image file.
    fn changed(&self) -> SystemTime {
        let metadata = std::fs::metadata(&self.disk).expect("the image");
        metadata.modified().expect("a time")
    }

    /// QEMU opens what a killed server leaves, and knows that the bitmap is not complete for it.
    fn is_accepted_in_use(&self) {
        let about = self.is_accepted("what the killed server left");
        let bitmaps = about["format-specific"]["data"]["bitmaps"].as_array().expect("a list");
        let daily = bitmaps.iter().find(|bitmap| bitmap["name"] == "daily").expect("the bitmap");
        assert!(daily["flags"].to_string().contains("in-use"), "{about}");
    }

    /// Clusters that nothing refers to do no harm (3), anything else does.
    fn is_accepted(&self, what: &str) -> Value {
        let check = run(Command::new(self.qemu_img).args(["check", "-q", &self.disk]));
        assert!(matches!(check.code, Some(0 | 3)), "{what}, {}: {check:?}", self.durability);
        info(self.qemu_img, &self.disk)
    }
}
