//! `serve --takeover`: another process goes on with a server's clients and images.

use std::io::Write as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::qemu_nbd::wait_until;
use crate::support::service_manager::started_by_service_manager;
use crate::support::{PROGRAM, Server, nbd_cli, run};
use crate::tools;

pub(crate) const SIZE: &str = "16M";

/// Servers of one disk, one after the other.
pub(crate) struct Place {
    directory: TempDir,
    pub(crate) disk: String,
    pub(crate) more: Vec<String>,
}

impl Place {
    /// With a qcow2 image whose bitmap `b` records.
    fn qcow2() -> Self {
        let place = Self::new("disk.qcow2", &["--bitmap", "b"]);
        nbd_cli(&["image", "create", "-f", "qcow2", &place.disk, SIZE]).success();
        nbd_cli(&["bitmap", "add", &place.disk, "b"]).success();
        place
    }

    pub(crate) fn raw() -> Self {
        let place = Self::new("disk.raw", &["--format", "raw"]);
        nbd_cli(&["image", "create", "-f", "raw", &place.disk, SIZE]).success();
        place
    }

    pub(crate) fn new(disk: &str, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = directory.path().join(disk).to_str().expect("a plain name").to_owned();
        Self { directory, disk, more: more.iter().map(|&option| option.to_owned()).collect() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain name").to_owned()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--control").arg(self.path("control"));
        command.arg("--socket").arg(self.path("socket")).args(["--listen", "127.0.0.1:0"]);
        command.arg("--pid-file").arg(self.path("server.pid")).args(&self.more).arg(&self.disk);
        command
    }

    pub(crate) fn serve(&self) -> Server {
        Server::start(&mut self.command(), self.path("socket"))
    }

    pub(crate) fn taking_over(&self) -> Command {
        let mut command = self.command();
        command.arg("--takeover").arg(self.path("control"));
        command
    }

    /// Another server takes over, and the first one ends.
    #[track_caller]
    pub(crate) fn take_over(&self, mut server: Server) -> Server {
        let next = Server::start(&mut self.taking_over(), self.path("socket"));
        assert_eq!(server.wait().code(), Some(0));
        next
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.text("socket"))
    }

    /// A client that writes, and verifies what it reads.
    pub(crate) fn load(&self, more: &[&str]) -> Load {
        let mut command = Command::new(PROGRAM);
        command.args(["bench", "--verify", "--destroy-data", "-w", "mixed", "-q"]);
        command.args(["--depth", "8", "--flush-every", "50", "--range", "0+8M"]).args(more);
        command.arg(self.uri()).stdout(Stdio::null());
        Load(command.spawn().expect("a load"))
    }

    /// Bytes that clients have written to the export of this server.
    fn written(&self) -> u64 {
        let list = nbd_cli(&["control", &self.text("control"), "list", "--json"]).success();
        let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
        list["exports"][0]["traffic"]["bytes-written"].as_u64().expect("a number")
    }

    /// After a kill clusters may be leaked, and no more.
    #[track_caller]
    fn assert_sound(&self) {
        let outcome = nbd_cli(&["image", "check", &self.disk]);
        assert!(outcome.stdout.contains("0 corruptions") || outcome.code == Some(0), "{outcome:?}");
    }

    /// Every block that is not zero is dirty.
    fn assert_no_bit_is_missing(&self) {
        let raw = self.text("content");
        nbd_cli(&["image", "convert", "-O", "raw", &self.disk, &raw]).success();
        let content = std::fs::read(&raw).expect("the content");
        let server = Server::ours(&["--read-only", "--bitmap", "b", &self.disk]);
        let outcome = nbd_cli(&["map", "--context", "qemu:dirty-bitmap:b", "--json", server.uri()]);
        let map = outcome.json();
        let mut is_dirty = vec![false; content.len()];
        for extent in map.as_array().expect("extents") {
            let number = |key: &str| extent[key].as_u64().expect("a number") as usize;
            is_dirty[number("offset")..][..number("length")].fill(number("type") & 1 == 1);
        }
        let missing = content.iter().zip(&is_dirty).position(|(byte, dirty)| *byte != 0 && !dirty);
        assert_eq!(missing, None, "a changed byte that is not dirty");
        assert!(content.iter().any(|byte| *byte != 0), "nothing was written");
    }
}

/// A running `bench`; killed when dropped.
pub(crate) struct Load(Child);

impl Load {
    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("a child").is_some()
    }

    /// Ends it as a user does: what it has written is recorded then.
    #[track_caller]
    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, Signal::TERM).expect("a running load");
        assert_eq!(self.0.wait().expect("a child").code(), Some(128 + 15));
    }

    #[track_caller]
    pub(crate) fn assert_verified(mut self) {
        assert_eq!(self.0.wait().expect("a child").code(), Some(0), "the data is not as written");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ten takeovers beside a client that never reconnects.
fn ten_takeovers(place: &Place) -> Server {
    let mut server = place.serve();
    let state = place.text("state");
    let mut load = place.load(&["--duration", "60m", "--verify-state", &state]);
    wait_until("the load writes", || place.written() > 0);
    for _ in 0..10 {
        server = place.take_over(server);
    }
    assert!(!load.has_ended(), "the load has ended before the takeovers");
    load.stop();
    let all = ["bench", "--verify-only", "--verify-state", &state, "-q", server.uri()];
    nbd_cli(&all).success();
    server
}

#[test]
fn a_client_of_a_raw_disk_notices_ten_takeovers_as_pauses() {
    ten_takeovers(&Place::raw()).end();
}

#[test]
fn a_client_of_a_qcow2_disk_notices_ten_takeovers_as_pauses_and_no_bit_is_lost() {
    let place = Place::qcow2();
    ten_takeovers(&place).end();
    nbd_cli(&["image", "check", &place.disk]).success();
    place.assert_no_bit_is_missing();
}

#[test]
fn a_foreign_client_goes_on_with_extended_headers_and_its_contexts() {
    tools!(nbdsh = "nbdsh");
    let place = Place::qcow2();
    let server = place.serve();
    let takes_over = format!("{:?}", place.taking_over()).replace('"', "");
    let script = format!(
        r"
import subprocess
contexts = ['base:allocation', 'qemu:dirty-bitmap:b']
h = nbd.NBD()
for context in contexts:
    h.add_meta_context(context)
h.connect_uri('{uri}')
h.pwrite(b'x' * 65536, 0)
successor = subprocess.Popen('{takes_over}'.split(), stdout=subprocess.PIPE)
assert successor.stdout.readline().startswith(b'nbd')
assert h.pread(65536, 0) == b'x' * 65536
h.pwrite(b'y' * 100, 1000000)
h.flush()
found = {{}}
h.block_status(1 << 20, 0, lambda context, offset, entries, error: found.update({{context: entries}}))
assert sorted(found) == sorted(contexts), found
assert found['qemu:dirty-bitmap:b'][:2] == [65536, 1], found
successor.terminate()
assert successor.wait() == 0
",
        uri = place.uri()
    );
    // Its module belongs to the system's Python, which need not be the first one.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let outcome = run(Command::new(nbdsh).env("PATH", path).args(["-c", &script]));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    drop(server);
    place.assert_no_bit_is_missing();
}

#[test]
fn a_successor_that_cannot_serve_leaves_the_server_as_it_was() {
    let place = Place::qcow2();
    let server = place.serve();
    let load = place.load(&["--duration", "2s"]);
    let control = place.text("control");
    for (arguments, words) in [
        (&["/nonexistent/disk.qcow2"][..], "/nonexistent/disk.qcow2"),
        (&["--bitmap", "no-such-bitmap", &place.disk], "no-such-bitmap"),
        (&["--pid-file", "/nonexistent/pid", &place.disk], "/nonexistent/pid"),
    ] {
        let all = ["serve", "--takeover", &control, "--socket", &place.text("socket")];
        let outcome = nbd_cli(&[&all[..], arguments].concat());
        assert!(outcome.code == Some(1) && outcome.stderr.contains(words), "{outcome:?}");
    }
    load.assert_verified();
    nbd_cli(&["info", server.uri()]).success();
    place.take_over(server).end();
    place.assert_no_bit_is_missing();
}

#[test]
fn what_would_be_lost_is_not_taken_over() {
    for arguments in [&["memory:1M"][..], &["--temporary", "DISK"]] {
        let mut place = Place::raw();
        let disk = std::mem::take(&mut place.disk);
        place.more.clear();
        place.more.extend(arguments.iter().map(|text| text.replace("DISK", &disk)));
        place.disk = place.more.pop().expect("a source");
        let server = place.serve();
        let outcome = run(&mut place.taking_over());
        assert!(outcome.code == Some(1) && outcome.stderr.contains("lost"), "{outcome:?}");
        nbd_cli(&["info", server.uri()]).success();
        server.end();
    }
    let outcome = nbd_cli(&["serve", "--takeover", "/nonexistent/control", "memory:1M"]);
    assert!(outcome.code == Some(1) && outcome.stderr.contains("control socket"), "{outcome:?}");
}

#[test]
fn a_file_that_its_name_does_not_lead_to_any_more_is_not_taken_over() {
    let place = Place::new("disk.qcow2", &[]);
    let base = place.text("base.raw");
    nbd_cli(&["image", "create", "-f", "raw", &base, SIZE]).success();
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", &base, "-F", "raw", &place.disk]).success();
    let server = place.serve();
    for file in [place.disk.clone(), base] {
        let elsewhere = place.text("elsewhere");
        std::fs::rename(&file, &elsewhere).expect("another name");
        let refused = |place: &Place| {
            let outcome = run(&mut place.taking_over());
            let words = "renamed, removed or replaced";
            assert!(outcome.code == Some(1) && outcome.stderr.contains(words), "{outcome:?}");
            assert!(outcome.stderr.contains(&file), "{outcome:?}");
            nbd_cli(&["info", server.uri()]).success();
        };
        refused(&place);
        std::fs::copy(&elsewhere, &file).expect("another file");
        refused(&place);
        std::fs::rename(&elsewhere, &file).expect("the old name");
    }
    place.take_over(server).end();
}

#[test]
fn a_program_that_asks_to_take_over_and_leaves_does_not_lock_the_control_socket() {
    let place = Place::raw();
    let server = place.serve();
    let control = place.text("control");
    for _ in 0..10 {
        let mut asking = UnixStream::connect(&control).expect("a connection at every moment");
        let _ = asking.write_all(b"{\"command\":\"takeover\"}\n");
        drop(asking);
        wait_until("the control socket answers", || {
            nbd_cli(&["control", &control, "list"]).code == Some(0)
        });
    }
    nbd_cli(&["info", server.uri()]).success();
    place.take_over(server).end();
}

#[test]
fn the_control_socket_moves_with_the_server_to_another_path_and_back() {
    let place = Place::raw();
    let mut server = place.serve();
    let paths = [place.text("control"), place.text("moved")];
    std::os::unix::fs::symlink(".", place.path("link")).unwrap();
    let others = [place.text("link/control"), place.text("link/./link/control")];
    for (from, to) in [
        (&paths[0], &paths[1]),
        (&paths[1], &paths[0]),
        (&paths[0], &paths[0]),
        (&paths[0], &others[0]),
        (&others[0], &others[1]),
        (&others[1], &paths[0]),
    ] {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--takeover", from, "--control", to, "--format", "raw"]);
        command.arg("--socket").arg(place.path("socket")).arg(&place.disk);
        let next = Server::start(&mut command, place.path("socket"));
        assert_eq!(server.wait().code(), Some(0));
        nbd_cli(&["control", to, "list"]).success();
        let is_left = PathBuf::from(from).exists();
        assert_eq!(is_left, from.ends_with("control") && to.ends_with("control"), "{from} is left");
        server = next;
    }
    server.end();
    assert!(paths.iter().all(|path| !PathBuf::from(path).exists()), "a socket is left");
}

#[test]
fn a_successor_killed_at_any_moment_ends_nothing() {
    let place = Place::qcow2();
    let server = place.serve();
    let empty = length(&place);
    let load = place.load(&["--duration", "60m"]);
    wait_until("the image grows", || length(&place) > empty);
    for round in 0..12_u64 {
        let mut command = place.taking_over();
        let mut successor = command.stdout(Stdio::null()).spawn().expect("a successor");
        std::thread::sleep(Duration::from_millis(5 + round * 9));
        successor.kill().expect("a child");
        let _ = successor.wait();
        // Either of both serves, unless the successor was killed when it did.
        if !is_locked(&place) {
            break;
        }
    }
    drop(load);
    drop(server);
    place.serve().end();
    place.assert_sound();
    place.assert_no_bit_is_missing();
}

#[test]
fn a_server_killed_at_any_moment_of_its_takeover_loses_nothing_that_was_answered() {
    for round in 0..4_u64 {
        let place = Place::qcow2();
        let server = place.serve();
        let state = place.text("state");
        // It ends with a flush: something is there whatever happens.
        place.load(&["--requests", "200", "--verify-state", &state]).assert_verified();
        let mut load =
            place.load(&["--duration", "30s", "--reconnect", "1s", "--verify-state", &state]);
        let mut command = place.taking_over();
        let mut successor = command.stdout(Stdio::null()).spawn().expect("a successor");
        std::thread::sleep(Duration::from_millis(20 + round * 25));
        drop(server);
        std::thread::sleep(Duration::from_millis(200));
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&successor),
            Signal::TERM,
        );
        let _ = successor.wait();
        let _ = load.0.wait();
        let server = place.serve();
        let all = ["bench", "--verify-only", "--verify-state", &state, "-q", server.uri()];
        nbd_cli(&all).success();
        server.end();
        place.assert_sound();
        place.assert_no_bit_is_missing();
    }
}

fn length(place: &Place) -> u64 {
    std::fs::metadata(&place.disk).expect("the image").len()
}

/// Whether a server runs: it holds the lock on the file of its process id.
fn is_locked(place: &Place) -> bool {
    let file = std::fs::File::open(place.path("server.pid")).expect("the process id file");
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
}

#[test]
fn a_service_manager_learns_of_the_successor_and_its_socket_is_used_on() {
    tools!(python3 = "python3");
    let place = Place::raw();
    let manager = UnixDatagram::bind(place.path("notify")).expect("a socket");
    manager.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
    let activated = place.text("activated");
    let mut command = started_by_service_manager(&python3, &activated, "serve");
    command.env("NOTIFY_SOCKET", place.path("notify")).env("WATCHDOG_USEC", "300000");
    command.arg("--control").arg(place.path("control")).args(["--format", "raw", &place.disk]);
    let mut server = Server::start(&mut command, place.path("activated"));
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--control").arg(place.path("control"));
    command.arg("--takeover").arg(place.path("control")).args(["--format", "raw", &place.disk]);
    let next = Server::start(&mut command, place.path("activated"));
    assert_eq!(server.wait().code(), Some(0));
    assert!(next.uri().contains(&activated), "{}", next.uri());
    nbd_cli(&["info", next.uri()]).success();
    let expected = format!("MAINPID={}", next.pid());
    let mut buffer = [0; 4096];
    loop {
        let length = manager.recv(&mut buffer).expect("a message about the successor");
        if String::from_utf8_lossy(&buffer[..length]).contains(&expected) {
            break;
        }
    }
    // The watchdog would kill it otherwise: it does not have the environment of the first one.
    let mut signs = 0;
    while signs < 3 {
        let length = manager.recv(&mut buffer).expect("a sign of life");
        let is_sign = String::from_utf8_lossy(&buffer[..length]).contains("WATCHDOG=1");
        signs += usize::from(is_sign);
    }
    next.end();
    assert!(place.path("activated").exists(), "the service manager owns it");
}
