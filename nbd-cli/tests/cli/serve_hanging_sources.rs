//! Sources whose server accepts connections and never answers, in a configuration and in requests
//! of the control socket.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::qemu_nbd::wait_until;
use crate::support::{Outcome, PROGRAM, Server, nbd_cli, run, says};

struct Place {
    directory: TempDir,
    hanging: UnixListener,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let hanging = UnixListener::bind(directory.path().join("hangs")).expect("a socket");
        Self { directory, hanging }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a plain name").to_owned()
    }

    /// A source that hangs.
    fn source(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path("hangs"))
    }

    /// Writes the configuration: the sockets, the time limit, a disk in memory, and `more`.
    fn write(&self, limit: &str, more: &str) {
        let (socket, control) = (self.path("socket"), self.path("control"));
        let text = format!(
            "socket = \"{socket}\"\ncontrol = \"{control}\"\nopen-timeout = \"{limit}\"\n\
             [[export]]\nname = \"vm\"\nsource = \"memory:1M\"\n{more}"
        );
        std::fs::write(self.path("config"), text).expect("a file");
    }

    /// Writes the configuration with an export that hangs.
    fn write_hanging(&self, limit: &str) {
        let more = format!("[[export]]\nname = \"far\"\nsource = \"{}\"\n", self.source());
        self.write(limit, &more);
    }

    fn serve(&self) -> Server {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--config", &self.path("config")]);
        command.stderr(std::fs::File::create(self.path("log")).expect("a file"));
        Server::start(&mut command, PathBuf::from(self.path("socket")))
    }

    fn control(&self, words: &[&str]) -> Outcome {
        nbd_cli(&[&["control", &self.path("control")], words].concat())
    }

    /// Starts a request of the control socket that waits for the source; returns the connection
    /// too.
    fn hang(&self, words: &[&str]) -> (Child, UnixStream) {
        let mut command = Command::new(PROGRAM);
        command.args(["control", &self.path("control")]).args(words);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a process");
        self.hanging.set_nonblocking(true).expect("a socket");
        let mut accepted = None;
        wait_until("the source is connected to", || {
            accepted = self.hanging.accept().ok();
            let ended = child.try_wait().expect("a process");
            let is_waiting = accepted.is_some() || ended.is_none();
            assert!(is_waiting, "{words:?} ended without a connection: {ended:?}");
            accepted.is_some()
        });
        let (connection, _) = accepted.expect("a connection");
        (child, connection)
    }

    /// That clients and the control socket are served, and that nothing has been added.
    fn is_served(&self, server: &Server) {
        nbd_cli(&["info", "--size", &server.uri_of("vm")]).success();
        let list = self.control(&["list"]).success();
        assert!(list.contains("vm") && !list.contains("far"), "{list}");
    }
}

#[test]
fn clients_and_requests_are_served_while_a_source_hangs_and_a_signal_ends_the_server() {
    let place = Place::new();
    place.write("0", "");
    let server = place.serve();
    place.write_hanging("0");
    let (reload, far) = place.hang(&["reload"]);
    place.is_served(&server);
    let source = place.source();
    let (add, added) = place.hang(&["add-export", "far", &source]);
    place.is_served(&server);
    place.control(&["add-export", "scratch", "memory:1M"]).success();
    // A server that leaves is no longer waited for.
    drop((far, added));
    let mut refused = [reload, add].map(|child| child.wait_with_output().expect("its end"));
    for output in &mut refused {
        assert!(!output.status.success(), "{output:?}");
    }
    place.is_served(&server);
    let (_reload, _far) = place.hang(&["reload"]);
    server.end();
}

#[test]
fn a_reload_and_a_request_end_in_time_and_name_the_source_that_hangs() {
    let place = Place::new();
    place.write("60s", "");
    let server = place.serve();
    // The limit is that of the new file.
    place.write_hanging("1s");
    let parts = ["source 'nbd+unix:///?socket=", "export 'far' was given up after 1 s", "hang"];
    says(place.control(&["reload"]), &parts);
    place.is_served(&server);
    server.signal(Signal::HUP);
    let log = || std::fs::read_to_string(place.path("log")).expect("text");
    wait_until("both reloads are given up", || log().matches("nothing was changed").count() >= 2);
    place.is_served(&server);
    place.write("1s", "");
    place.control(&["reload"]).success();
    server.end();

    let server = place.serve();
    says(place.control(&["add-export", "far", &place.source()]), &["was given up after 1 s"]);
    place.is_served(&server);
    server.end();
}

#[test]
fn a_check_ends_in_time_and_names_the_source_that_hangs() {
    let place = Place::new();
    place.write_hanging("500ms");
    let check = nbd_cli(&["serve", "--check", "--config", &place.path("config")]);
    says(check, &["export 'far' was given up after 0.5 s", "--open-timeout"]);
    place.write("500ms", "");
    nbd_cli(&["serve", "--check", "--config", &place.path("config")]).success();
}

#[test]
fn a_server_is_not_taken_over_while_a_source_that_was_given_up_is_still_being_opened() {
    let place = Place::new();
    let disk = place.path("disk");
    nbd_cli(&["image", "create", "-f", "raw", &disk, "1M"]).success();
    let (socket, control) = (place.path("socket"), place.path("control"));
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--control", &control, "--socket", &socket, "--format", "raw"]);
    command.args(["--open-timeout", "200ms", &disk]);
    let mut server = Server::start(&mut command, PathBuf::from(&socket));
    place.control(&["remove-export", ""]).success();
    let (add, far) = place.hang(&["add-export", "far", &place.source()]);
    assert!(!add.wait_with_output().expect("its end").status.success(), "it was given up");
    command.args(["--takeover", &control]);
    says(run(&mut command), &["still being opened", "given up"]);
    // As soon as the other server leaves, it is closed.
    drop(far);
    let next = Server::start(&mut command, PathBuf::from(&socket));
    assert_eq!(server.wait().code(), Some(0));
    next.end();
}
