//! An incremental backup is accepted only on the backup after which its bitmap started. A refused
//! backup changes nothing.

use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;

use crate::backup_chain::{change, disk_with_bitmap, serve};
use crate::support::image::{are_equal, is_clean, write as write_offline};
use crate::support::{Disk, Outcome, Server, nbd_cli, peer, says};
use crate::tools;

/// A disk that is served with a control socket, and its backups.
struct Lab<'a> {
    qemu_img: &'a Path,
    qemu_io: &'a Path,
    directory: Disk,
    disk: String,
    control: String,
}

impl<'a> Lab<'a> {
    fn new(qemu_img: &'a Path, qemu_io: &'a Path) -> Self {
        let directory = Disk::sparse();
        let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
        peer(qemu_img, &["create", "-q", "-f", "qcow2", &disk, "16M"]);
        Self { qemu_img, qemu_io, directory, disk, control }
    }

    fn serve(&self) -> Server {
        Server::ours(&["--control", &self.control, &format!("vm={}", self.disk)])
    }

    fn write(&self, server: &Server, command: &str) {
        let said = peer(self.qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
    }

    fn backup(&self, more: &[&str]) -> Outcome {
        let arguments =
            ["backup", "-q", "--control", &self.control, "--export", "vm", "-B", "daily"];
        nbd_cli(&[&arguments[..], more].concat())
    }

    fn beside(&self, name: &str) -> String {
        self.directory.beside(name)
    }

    /// The bitmap and the disk as the server describes them.
    fn bitmap(&self) -> Value {
        let listing = nbd_cli(&["control", &self.control, "--json", "list"]).success();
        let listing: Value = serde_json::from_str(&listing).expect("JSON");
        let exports = listing["exports"].as_array().expect("a list").clone();
        assert_eq!(exports.len(), 1, "no view is left: {listing}");
        exports[0]["bitmaps"][0].clone()
    }

    /// Sunday's full backup, a change, monday's upon it, and another change.
    fn sunday_and_monday(&self, server: &Server) -> (String, String) {
        let (sunday, monday) = (self.beside("sunday.qcow2"), self.beside("monday.qcow2"));
        self.write(server, "write -P 1 0 5M");
        self.backup(&[&sunday]).success();
        self.write(server, "write -P 2 1M 64k");
        self.backup(&["--base", &sunday, &monday]).success();
        self.write(server, "write -P 3 3M 64k");
        (sunday, monday)
    }

    /// Refused with these words, and everything is as before.
    #[track_caller]
    fn refuses(&self, base: &str, more: &[&str], words: &[&str]) {
        let before = self.bitmap();
        let target = self.beside("tuesday.qcow2");
        says(self.backup(&[&["--base", base], more, &[&target]].concat()), words);
        assert_eq!(self.bitmap(), before, "the bitmap is as it was");
        for left in [target.clone(), format!("{target}.partial"), format!("{target}.partial.json")]
        {
            assert!(!Path::new(&left).exists(), "{left}");
        }
    }

    /// Made, and the same as the disk.
    #[track_caller]
    fn accepts(&self, server: &Server, base: &str, more: &[&str]) {
        let (target, state) = (self.beside("tuesday.qcow2"), self.beside("state.img"));
        nbd_cli(&["copy", server.uri(), &state]).success();
        self.backup(&[&["--base", base], more, &[&target]].concat()).success();
        is_clean(self.qemu_img, &target);
        are_equal(self.qemu_img, &state, &target);
        let restored = self.beside("restored.img");
        nbd_cli(&["restore", "-q", "--trust-image", &target, &restored]).success();
        are_equal(self.qemu_img, &state, &restored);
        for file in [target, state, restored] {
            std::fs::remove_file(file).expect("it is there");
        }
    }
}

#[test]
fn a_backup_upon_sundays_when_mondays_exists_is_refused() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let lab = Lab::new(&qemu_img, &qemu_io);
    let server = lab.serve();
    let (sunday, monday) = lab.sunday_and_monday(&server);
    lab.refuses(&sunday, &[], &["sunday.qcow2", "'daily'", "monday.qcow2"]);
    // What is known to be wrong cannot be vouched for.
    lab.refuses(&sunday, &["--trust-base"], &["monday.qcow2"]);
    lab.refuses(&sunday, &["--restart"], &["monday.qcow2"]);
    // Other programs are refused as well.
    let id = nbd_cli(&[
        "control",
        &lab.control,
        "checkpoint-start",
        "vm",
        "-B",
        "daily",
        "--base",
        "00112233-4455-6677-8899-aabbccddeeff",
    ]);
    says(id, &["00112233-4455-6677-8899-aabbccddeeff", "full backup"]);
    lab.accepts(&server, &monday, &[]);
    server.end();
    is_clean(&qemu_img, &lab.disk);

    let about = |path: &str| -> Value {
        let said = nbd_cli(&["image", "info", "--json", path]).success();
        serde_json::from_str::<Value>(&said).expect("JSON")["backup"].clone()
    };
    assert_eq!(about(&monday)["base"], about(&sunday)["id"]);
    assert_eq!(about(&monday)["disk"], about(&sunday)["disk"]);
    assert_eq!(about(&monday)["unchanged"], true);
    write_offline(&qemu_io, &sunday, "write -P 9 1M 64k");
    let said = nbd_cli(&["image", "info", &sunday]).success();
    assert!(said.contains("of 'vm'") && said.contains("changed since"), "{said}");
}

#[test]
fn a_base_that_was_moved_or_copied_is_the_same_and_one_of_other_bytes_is_not() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let lab = Lab::new(&qemu_img, &qemu_io);
    let server = lab.serve();
    let (sunday, monday) = lab.sunday_and_monday(&server);

    let converted = lab.beside("converted.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", &monday, &converted]);
    lab.refuses(&converted, &[], &["converted.qcow2", "identity", "--trust-base"]);
    let made = lab.beside("made.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &made, "16M"]);
    lab.refuses(&made, &[], &["made.qcow2", "identity", "--trust-base"]);

    let copy = |from: &str, to: &str| {
        let to = lab.beside(to);
        std::fs::copy(from, &to).expect("room");
        to
    };
    let cut = copy(&monday, "cut.qcow2");
    let file = std::fs::File::options().write(true).open(&cut).expect("the copy");
    file.set_len(file.metadata().expect("it is open").len() - 512).expect("shorter");
    lab.refuses(&cut, &[], &["cut.qcow2", "cut off"]);
    let written = copy(&monday, "written.qcow2");
    write_offline(&qemu_io, &written, "write -P 9 1M 64k");
    lab.refuses(&written, &[], &["written.qcow2", "opened for writing"]);
    let ours = copy(&monday, "ours.qcow2");
    let writable = Server::ours(&[&ours]);
    lab.write(&writable, "write -P 9 1M 4k");
    writable.end();
    lab.refuses(&ours, &[], &["ours.qcow2", "opened for writing"]);
    // To serve a copy without changing it does no harm.
    let looked_at = copy(&monday, "looked-at.qcow2");
    Server::ours(&[&looked_at]).end();

    // The same bytes are the same backup, wherever they are and whatever they are called.
    lab.refuses(&sunday, &[], &["looked-at.qcow2"]);
    let renamed = lab.beside("renamed.qcow2");
    std::fs::rename(&monday, &renamed).expect("the same directory");
    lab.refuses(&sunday, &[], &["started after"]);
    let target = lab.beside("wednesday.qcow2");
    lab.backup(&["--base", &looked_at, &target]).success();
    lab.write(&server, "write -P 5 7M 64k");
    lab.accepts(&server, &target, &[]);

    // One below is not as it was.
    write_offline(&qemu_io, &sunday, "write -P 9 4M 64k");
    let tuesday = lab.beside("tuesday.qcow2");
    std::fs::rename(&target, &tuesday).expect("the same directory");
    let refused = lab.backup(&["--base", &tuesday, &target]);
    says(refused, &["sunday.qcow2' below it", "opened for writing"]);
    server.end();
}

#[test]
fn a_base_without_an_identity_is_taken_if_the_user_vouches_for_it() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let lab = Lab::new(&qemu_img, &qemu_io);
    let server = lab.serve();
    let (_, monday) = lab.sunday_and_monday(&server);
    let converted = lab.beside("converted.qcow2");
    peer(&qemu_img, &["convert", "-O", "qcow2", &monday, &converted]);
    let target = lab.beside("wednesday.qcow2");
    lab.backup(&["--trust-base", "--base", &converted, &target]).success();
    // It need not be vouched for again.
    lab.write(&server, "write -P 5 7M 64k");
    lab.accepts(&server, &target, &[]);
    server.end();
}

#[test]
fn a_base_of_another_disk_is_refused() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let (lab, other) = (Lab::new(&qemu_img, &qemu_io), Lab::new(&qemu_img, &qemu_io));
    let (server, other_server) = (lab.serve(), other.serve());
    lab.sunday_and_monday(&server);
    let (_, foreign) = other.sunday_and_monday(&other_server);
    lab.refuses(&foreign, &[], &["monday.qcow2", "another disk"]);
    lab.refuses(&foreign, &["--trust-base"], &["another disk"]);
    server.end();
    other_server.end();
}

#[test]
fn a_backup_that_fails_or_is_killed_leaves_the_base_what_it_was() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let lab = Lab::new(&qemu_img, &qemu_io);
    let server = lab.serve();
    let (sunday, monday) = lab.sunday_and_monday(&server);
    let began_after = lab.bitmap()["began-after"].clone();
    assert!(began_after.is_string(), "{}", lab.bitmap());
    // Something is in the way.
    let target = lab.beside("tuesday.qcow2");
    std::fs::write(format!("{target}.partial"), "").expect("room");
    says(lab.backup(&["--base", &monday, &target]), &["--restart"]);
    std::fs::remove_file(format!("{target}.partial")).expect("it is there");
    assert_eq!(lab.bitmap()["began-after"], began_after);
    let full = lab.beside("full.qcow2");
    std::fs::write(format!("{full}.partial"), "").expect("room");
    says(lab.backup(&[&full]), &["--restart"]);
    assert_eq!(lab.bitmap()["began-after"], began_after);

    // The server is killed in the middle of a checkpoint.
    let start = ["control", &lab.control, "checkpoint-start", "vm", "-B", "daily"];
    nbd_cli(&start).success();
    let mut server = server;
    lab.write(&server, "write -P 4 9M 64k");
    server.signal(Signal::KILL);
    server.wait();
    let server = lab.serve();
    assert_eq!(lab.bitmap()["began-after"], began_after);
    lab.refuses(&sunday, &[], &["monday.qcow2"]);
    lab.accepts(&server, &monday, &[]);
    server.end();
    is_clean(&qemu_img, &lab.disk);
}

#[test]
fn a_bitmap_that_was_cleared_or_may_have_been_needs_a_full_backup() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let lab = Lab::new(&qemu_img, &qemu_io);
    let server = lab.serve();
    let (_, monday) = lab.sunday_and_monday(&server);
    server.end();

    // QEMU knows nothing of backups: it may have cleared the bitmap, or only noted what it wrote.
    write_offline(&qemu_io, &lab.disk, "write -P 4 9M 64k");
    let server = lab.serve();
    lab.refuses(&monday, &[], &["another program", "--trust-base"]);
    lab.accepts(&server, &monday, &["--trust-base"]);
    server.end();

    let server = lab.serve();
    let full = lab.beside("full.qcow2");
    lab.backup(&[&full]).success();
    lab.write(&server, "write -P 5 11M 64k");
    nbd_cli(&["control", &lab.control, "bitmap-clear", "vm", "daily"]).success();
    lab.refuses(&full, &[], &["does not record after which backup", "'daily'"]);
    server.end();
    nbd_cli(&["bitmap", "remove", &lab.disk, "daily"]).success();
    nbd_cli(&["bitmap", "add", &lab.disk, "daily"]).success();
    let server = lab.serve();
    lab.refuses(&full, &[], &["does not record after which backup", "'daily'"]);
    server.end();
    is_clean(&qemu_img, &lab.disk);
}

#[test]
fn without_control_the_files_tell_what_can_be_known() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let name = |name: &str| directory.beside(name);
    let (full, second, third) = (name("full.qcow2"), name("second.qcow2"), name("third.qcow2"));
    let server = serve(&qemu_nbd, &disk);
    nbd_cli(&["backup", "-q", server.uri(), &full]).success();
    server.end();
    change(&qemu_io, &disk);
    let server = serve(&qemu_nbd, &disk);
    let upon = |base: &str, more: &[&str]| {
        let arguments = ["backup", "-q", "--bitmap", "b0", "--base", base, server.uri()];
        nbd_cli(&[&arguments[..], more].concat())
    };
    upon(&full, &[&second]).success();
    // There is a later one, and the bitmap may have begun after it.
    says(upon(&full, &[&third]), &["full.qcow2", "second.qcow2", "--trust-base"]);
    assert!(!Path::new(&third).exists());
    upon(&second, &[&third]).success();
    are_equal(&qemu_img, &disk, &third);
    std::fs::remove_file(&third).expect("it is there");
    upon(&full, &["--trust-base", &third]).success();
    are_equal(&qemu_img, &disk, &third);
    server.end();

    let other = Server::qemu_nbd(&qemu_nbd, "other", &["-r", "-B", "b0", "-f", "qcow2", &disk]);
    let fourth = name("fourth.qcow2");
    let arguments = ["backup", "-q", "--bitmap", "b0", "--base", &third, other.uri(), &fourth];
    says(nbd_cli(&arguments), &["third.qcow2", "'disk'", "'other'"]);
    other.end();
}

#[test]
fn a_backup_is_not_resumed_upon_another_base_of_the_same_name() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let (full, target) = (directory.beside("full.qcow2"), directory.beside("target.qcow2"));
    let server = serve(&qemu_nbd, &disk);
    nbd_cli(&["backup", "-q", server.uri(), &full]).success();
    server.end();
    change(&qemu_io, &disk);
    let server = serve(&qemu_nbd, &disk);
    let backup = |more: &[&str]| {
        let arguments = ["backup", "-q", "--bitmap", "b0", "--base", &full, server.uri(), &target];
        nbd_cli(&[&arguments[..], more].concat())
    };
    backup(&[]).success();
    // As if it had been interrupted at the end.
    let partial = format!("{target}.partial");
    std::fs::rename(&target, &partial).expect("the same directory");
    let state = serde_json::json!({
        "version": 1, "source": server.uri(), "size": 64 << 20, "bitmap": "b0", "base": full,
        "base-identity": "00112233-4455-6677-8899-aabbccddeeff", "done": 0,
    });
    std::fs::write(format!("{partial}.json"), state.to_string()).expect("room");
    says(backup(&["--resume"]), &["base's identity", "--restart"]);
    backup(&["--restart"]).success();
    are_equal(&qemu_img, &disk, &target);
    server.end();
}

#[test]
fn a_disk_of_odd_size_comes_back_as_it_was() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let size = 1_000_001;
    let odd = directory.beside("odd.img");
    std::fs::write(&odd, &directory.content()[..size]).expect("room");
    let server = Server::ours(&["--read-only", "--format", "raw", &odd]);
    let (full, restored) = (directory.beside("full.qcow2"), directory.beside("restored.img"));
    nbd_cli(&["backup", "--verify=all", server.uri(), &full]).success();
    is_clean(&qemu_img, &full);
    nbd_cli(&["restore", "--verify", &full, &restored]).success();
    assert!(std::fs::read(&odd).expect("it") == std::fs::read(&restored).expect("it"));
    // It fits where it came from.
    let blank = directory.blank("blank.img", size as u64);
    let back = Server::ours(&["--format", "raw", &blank]);
    nbd_cli(&["restore", "--verify", &full, back.uri()]).success();
    back.end();
    assert!(std::fs::read(&odd).expect("it") == std::fs::read(&blank).expect("it"));
    server.end();
}
