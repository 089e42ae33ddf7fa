//! Servers described in a file.

use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::qemu_nbd::wait_until;
use crate::support::{PROGRAM, Server, nbd_cli, says};

/// A directory with a configuration, a socket and a control socket.
struct Configured {
    directory: TempDir,
}

impl Configured {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a plain name").to_owned()
    }

    /// Writes the file: what every server here has, and `text`.
    fn write(&self, text: &str) {
        let (socket, control) = (self.path("socket"), self.path("control"));
        let text = format!("socket = \"{socket}\"\ncontrol = \"{control}\"\n{text}");
        std::fs::write(self.path("config"), text).expect("a file");
    }

    fn serve(&self) -> Server {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--config", &self.path("config")]);
        command.stderr(std::fs::File::create(self.path("log")).expect("a file"));
        Server::start(&mut command, PathBuf::from(self.path("socket")))
    }

    fn reload(&self) -> crate::support::Outcome {
        nbd_cli(&["control", &self.path("control"), "reload", "--json"])
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).expect("text")
    }
}

fn export(name: &str, more: &str) -> String {
    format!("[[export]]\nname = \"{name}\"\nsource = \"memory:1M\"\n{more}\n")
}

fn is_there(server: &Server, name: &str) -> bool {
    nbd_cli(&["info", "--size", &server.uri_of(name)]).code == Some(0)
}

#[test]
fn a_file_says_what_the_command_line_can_say() {
    let place = Configured::new();
    let image = place.path("disk.img");
    std::fs::write(&image, vec![7; 1 << 20]).expect("a file");
    let of_image =
        format!("[[export]]\nsource = \"{image}\"\nformat = \"raw\"\nread-only = true\n");
    place.write(&format!(
        "max-connections = 7\n{of_image}description = \"x y\"\n{}",
        export("vm", "")
    ));
    assert!(
        nbd_cli(&["serve", "--check", "--config", &place.path("config")])
            .success()
            .contains("exports: 2")
    );
    let server = place.serve();
    nbd_cli(&["info", "--is", "read-only", &server.uri_of("")]).success();
    assert!(is_there(&server, "vm"));
    // Also while it is served.
    nbd_cli(&["serve", "--check", "--config", &place.path("config")]).success();
    server.end();
}

#[test]
fn exports_come_go_and_change_without_dropping_clients() {
    let place = Configured::new();
    place.write(&(export("stays", "") + &export("goes", "")));
    let server = place.serve();
    let copy = |name: &str| {
        let uri = server.uri_of(name);
        nbd_cli(&["copy", &uri, "null:"]).code
    };
    // A client that is there all the time.
    let held = nbd_client_holds(&server, "goes");
    place.write(
        &(export("stays", "readonly-for = \"0.0.0.0/0\"\nhidden = true") + &export("comes", "")),
    );
    let report = place.reload().success();
    for part in ["\"comes\"", "\"goes\""] {
        assert!(report.contains(part), "{report}");
    }
    assert!(is_there(&server, "comes") && !is_there(&server, "goes"));
    assert_eq!((copy("stays"), copy("comes")), (Some(0), Some(0)));
    let listed = nbd_cli(&["info", "--list", "--json", &server.uri_of("")]).success();
    assert!(listed.contains("\"comes\"") && !listed.contains("\"stays\""), "{listed}");
    held.still_works();
    server.end();
}

/// A client in the middle of its work.
struct Holder(std::os::unix::net::UnixStream);

fn nbd_client_holds(server: &Server, name: &str) -> Holder {
    use std::io::{Read as _, Write as _};
    let mut stream =
        std::os::unix::net::UnixStream::connect(server.socket()).expect("a connection");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("a greeting");
    let length = u32::try_from(name.len()).expect("short").to_be_bytes();
    let option = [b"\0\0\0\x03IHAVEOPT\0\0\0\x01", &length[..], name.as_bytes()].concat();
    stream.write_all(&option).expect("the handshake");
    stream.read_exact(&mut [0; 10]).expect("a description");
    Holder(stream)
}

impl Holder {
    fn still_works(mut self) {
        use std::io::{Read as _, Write as _};
        let request = b"\x25\x60\x95\x13\0\0\0\0cookies!\0\0\0\0\0\0\0\0\0\0\x02\0";
        self.0.write_all(request).expect("a request");
        let mut reply = [1; 16 + 512];
        self.0.read_exact(&mut reply).expect("a reply");
        assert_eq!(&reply[..8], b"\x67\x44\x66\x98\0\0\0\0");
    }
}

#[test]
fn a_reload_that_fails_changes_nothing() {
    let place = Configured::new();
    place.write(&export("vm", ""));
    let server = place.serve();
    for (bad, parts) in [
        (export("new", "reed-only = true"), &["line 6", "'reed-only'"][..]),
        (
            export("new", "") + "[[export]]\nname = \"x\"\nsource = \"/nonexistent/x\"\n",
            &["/nonexistent/x"],
        ),
        ("[[export".to_owned(), &["line 3"]),
    ] {
        place.write(&bad);
        says(place.reload(), parts);
        assert!(is_there(&server, "vm") && !is_there(&server, "new"), "{bad}");
        says(nbd_cli(&["serve", "--check", "--config", &place.path("config")]), parts);
    }
    server.signal(Signal::HUP);
    while !place.log().contains("nothing was changed") {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(is_there(&server, "vm"));
    place.write(&export("after", ""));
    place.reload().success();
    assert!(is_there(&server, "after") && !is_there(&server, "vm"));
    server.end();
}

#[test]
fn what_cannot_change_is_named_and_stays() {
    let place = Configured::new();
    place.write(&export("vm", ""));
    let server = place.serve();
    place.write(&format!(
        "max-connections = 1\n{}",
        export("vm", "read-only = true\nhidden = true")
    ));
    for _ in 0..2 {
        let report = place.reload().success();
        for part in ["max-connections", "read-only of the export 'vm'"] {
            assert!(report.contains(part), "{report}");
        }
        assert!(!report.contains("hidden"), "{report}");
    }
    assert_eq!(nbd_cli(&["info", "--is", "read-only", &server.uri_of("vm")]).code, Some(2));
    assert!(place.log().contains("max-connections"), "{}", place.log());
    server.end();
}

#[test]
fn options_of_the_file_are_refused_on_the_command_line() {
    let place = Configured::new();
    place.write(&export("vm", ""));
    let config = place.path("config");
    for (option, parts) in [
        (&["--max-connections", "7"][..], &["--max-connections", "write it into the file"][..]),
        (&["--read-only"], &["--read-only", "write it into the file"]),
        (&["--run", "true"], &["--run", "'control'"]),
    ] {
        says(nbd_cli(&[&["serve", "--config", &config], option].concat()), parts);
    }
    says(nbd_cli(&["serve", "--config", "/nonexistent"]), &["cannot read", "/nonexistent"]);
    let server = Server::ours(&["--control", &place.path("control"), "memory:1M"]);
    says(place.reload(), &["no configuration file", "--config"]);
    server.end();
}

#[test]
fn a_check_writes_nothing() {
    let place = Configured::new();
    let image = place.path("disk.qcow2");
    nbd_cli(&["image", "create", "--format", "qcow2", &image, "1M"]).success();
    let before = std::fs::read(&image).expect("an image");
    let modified = std::fs::metadata(&image).expect("an image").modified().expect("a time");
    place.write(&format!("[[export]]\nsource = \"{image}\"\n"));
    nbd_cli(&["serve", "--check", "--config", &place.path("config")]).success();
    assert_eq!(std::fs::read(&image).expect("an image"), before);
    assert_eq!(std::fs::metadata(&image).expect("an image").modified().expect("a time"), modified);
    let names = place.directory.path().read_dir().expect("a directory").count();
    assert_eq!(names, 2, "nothing else was made");
}

#[test]
fn an_image_is_not_renamed_in_one_reload() {
    let place = Configured::new();
    let image = place.path("disk.img");
    std::fs::write(&image, vec![7; 1 << 20]).expect("a file");
    let named = |name: &str, source: &str, more: &str| {
        format!(
            "[[export]]\nname = \"{name}\"\nsource = \"{source}\"\nformat = \"raw\"\nlocking = \
             \"off\"\n{more}"
        )
    };
    place.write(&named("a", &image, ""));
    let server = place.serve();
    let other_name = place.path("./disk.img");
    for (source, more) in [(&image, ""), (&image, "read-only = true\n"), (&other_name, "")] {
        place.write(&named("b", source, more));
        says(place.reload(), &["'b'", "'a'", "in one reload"]);
        assert!(is_there(&server, "a") && !is_there(&server, "b"));
    }
    place.write(&export("scratch", ""));
    place.reload().success();
    place.write(&named("b", &image, "read-only = true\n"));
    place.reload().success();
    // Two that only read may share the image.
    place.write(&named("c", &image, "read-only = true\n"));
    place.reload().success();
    assert!(is_there(&server, "c") && !is_there(&server, "a") && !is_there(&server, "b"));
    server.end();
}

#[test]
fn an_image_is_not_opened_again_while_clients_of_its_removed_export_have_it_open() {
    let place = Configured::new();
    let image = place.path("disk.img");
    std::fs::write(&image, vec![7; 1 << 20]).expect("a file");
    let named = |name: &str, more: &str| {
        let source = format!("source = \"{image}\"\nformat = \"raw\"\nlocking = \"off\"");
        format!("[[export]]\nname = \"{name}\"\n{source}\n{more}") + &export("scratch", "")
    };
    place.write(&named("a", ""));
    let server = place.serve();
    let held = nbd_client_holds(&server, "a");
    place.write(&export("scratch", ""));
    place.reload().success();
    for (name, more) in [("b", ""), ("b", "read-only = true\n"), ("a", "")] {
        place.write(&named(name, more));
        let parts = [format!("'{name}' is still open for clients of 'a'"), "disconnected".into()];
        says(place.reload(), &parts.each_ref().map(String::as_str));
        assert!(!is_there(&server, name));
    }
    held.still_works();
    wait_until("the last client has left", || place.reload().code == Some(0));
    assert!(is_there(&server, "a"));
    server.end();
}

#[test]
fn an_export_that_cannot_go_yet_goes_with_a_later_reload() {
    let place = Configured::new();
    place.write(&(export("vm", "") + &export("stays", "")));
    let server = place.serve();
    let control = place.path("control");
    nbd_cli(&["control", &control, "checkpoint-start", "vm"]).success();
    place.write(&export("stays", ""));
    for _ in 0..2 {
        let report = place.reload().json();
        assert_eq!(report["removed"], serde_json::json!([]), "{report}");
        assert!(report["left"].to_string().contains("checkpoint"), "{report}");
        assert!(is_there(&server, "vm"));
    }
    nbd_cli(&["control", &control, "checkpoint-end", "vm", "failure"]).success();
    let report = place.reload().success();
    assert!(report.contains("\"vm\"") && !is_there(&server, "vm"), "{report}");
    server.end();
}

#[test]
fn an_export_that_was_removed_meanwhile_is_added_again() {
    let place = Configured::new();
    place.write(&(export("vm", "") + &export("stays", "")));
    let server = place.serve();
    nbd_cli(&["control", &place.path("control"), "remove-export", "vm"]).success();
    assert!(!is_there(&server, "vm"));
    assert!(place.reload().success().contains("\"vm\""));
    assert!(is_there(&server, "vm"));
    server.end();
}

#[test]
fn a_reload_refuses_exports_for_tls_only_without_tls() {
    let place = Configured::new();
    place.write(&export("vm", ""));
    let server = place.serve();
    place.write(&format!("tls-only = \"vm\"\n{}", export("vm", "")));
    says(place.reload(), &["'tls-only'", "tls = \"allow\""]);
    assert!(is_there(&server, "vm"));
    server.end();
}

#[test]
fn warnings_of_a_reload_are_lines_of_the_log() {
    let place = Configured::new();
    place.write(&export("vm", ""));
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--config", &place.path("config"), "--log-format", "json"]);
    command.args(["--log-file", &place.path("log")]);
    let server = Server::start(&mut command, PathBuf::from(place.path("socket")));
    place.write(&format!("max-connections = 1\n{}", export("vm", "")));
    place.reload().success();
    let log = place.log();
    let line: serde_json::Value = serde_json::from_str(log.trim()).expect("one object");
    assert!(line["message"].to_string().contains("max-connections"), "{line}");
    server.end();
}

#[test]
fn an_image_is_closed_before_the_lock_of_the_process_id_goes() {
    let place = Configured::new();
    let image = place.path("disk.qcow2");
    nbd_cli(&["image", "create", "--format", "qcow2", &image, "1M"]).success();
    let pid_file = place.path("pid");
    let of_image = format!("[[export]]\nsource = \"{image}\"\n");
    place.write(&format!("pid-file = \"{pid_file}\"\n{of_image}"));
    let server = place.serve();
    // A client of the control socket that stays.
    let idle = std::os::unix::net::UnixStream::connect(place.path("control")).expect("a client");
    nbd_cli(&["control", &place.path("control"), "list"]).success();
    let lock = std::fs::File::options().write(true).open(&pid_file).expect("a file");
    server.signal(Signal::TERM);
    let is_taken = || {
        rustix::fs::fcntl_lock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err()
    };
    while is_taken() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    nbd_cli(&["image", "resize", &image, "2M"]).success();
    drop(idle);
    server.end();
}

#[test]
fn a_check_is_not_done_in_the_background() {
    let place = Configured::new();
    place.write(&export("vm", ""));
    let config = place.path("config");
    let refused = nbd_cli(&["serve", "--check", "--fork", "--config", &config]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(refused.stderr.contains("'--check' cannot be used with '--fork'"), "{refused:?}");
}
