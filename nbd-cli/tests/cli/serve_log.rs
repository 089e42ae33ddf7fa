//! The log of a server: its forms, its file, and the clients it is about.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{PROGRAM, Server, nbd_cli, run, says};

const PATIENCE: Duration = Duration::from_secs(30);

struct Logged {
    directory: TempDir,
    server: Server,
}

impl Logged {
    /// A server that logs to a file.
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name| directory.path().join(name);
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--socket").arg(path("socket"));
        command.arg("--log-file").arg(path("log")).args(arguments).arg("vm=memory:1M");
        let server = Server::start(&mut command, path("socket"));
        Self { directory, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits for a line with all of these.
    fn line(&self, file: &str, parts: &[&str]) -> String {
        let start = Instant::now();
        loop {
            let log = std::fs::read_to_string(self.path(file)).unwrap_or_default();
            let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
            if let Some(line) = log.lines().find(has_all) {
                return line.to_owned();
            }
            assert!(start.elapsed() < PATIENCE, "no line with {parts:?} in:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn lines_name_the_client_its_process_and_the_export() {
    let logged = Logged::start(&["-v"]);
    nbd_cli(&["map", logged.server.uri()]).success();
    let line = logged.line("log", &["client connected"]);
    let user = rustix::process::geteuid().as_raw();
    for part in [&format!("uid={user}"), "pid=", "program=nbd-cli", "export=\"vm\"", "socket"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    logged.server.end();
}

#[test]
fn warnings_name_the_client_too() {
    let logged = Logged::start(&["--stall-timeout", "100ms"]);
    let mut client = std::os::unix::net::UnixStream::connect(logged.server.socket()).expect("one");
    // EXPORT_NAME, and half a request.
    let bytes = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x02vm\x25\x60\x95\x13";
    std::io::Write::write_all(&mut client, bytes).expect("the handshake");
    let line = logged.line("log", &["WARN", "connection failed"]);
    assert!(line.contains("pid=") && line.contains("export=\"vm\""), "{line}");
}

#[test]
fn json_has_an_object_per_line() {
    let logged = Logged::start(&["-v", "--log-format", "json"]);
    nbd_cli(&["map", logged.server.uri()]).success();
    let line = logged.line("log", &["client connected"]);
    let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!((&line["level"], &line["message"]), (&"INFO".into(), &"client connected".into()));
    assert!(line["span"]["pid"].is_number() && line["span"]["uid"].is_number(), "{line}");
    assert_eq!(line["span"]["program"], "nbd-cli");
    assert_eq!(line["span"]["export"], "\"vm\"");
    logged.server.end();
}

#[test]
fn a_log_file_that_was_renamed_is_opened_again() {
    let logged = Logged::start(&["-v"]);
    nbd_cli(&["map", logged.server.uri()]).success();
    logged.line("log", &["client connected"]);
    std::fs::rename(logged.path("log"), logged.path("log.1")).expect("a file");
    logged.server.signal(Signal::HUP);
    let start = Instant::now();
    while !logged.path("log").exists() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    nbd_cli(&["map", logged.server.uri()]).success();
    logged.line("log", &["client connected"]);
    logged.server.end();
}

#[test]
fn a_warning_of_a_running_server_is_a_line_of_its_log_file() {
    let logged = Logged::start(&["--log-format", "json"]);
    // A directory in place of the file cannot be opened.
    let moved = logged.path("moved");
    let directory = logged.directory.path();
    std::fs::create_dir(&moved).unwrap();
    std::fs::rename(logged.path("log"), moved.join("log")).unwrap();
    std::fs::create_dir(logged.path("log")).unwrap();
    logged.server.signal(Signal::HUP);
    let line = logged.line("moved/log", &["cannot open the log file"]);
    let object: serde_json::Value = serde_json::from_str(&line).expect("a JSON object");
    assert_eq!(object["level"], "WARN", "{line}");
    assert!(line.contains(&*directory.to_string_lossy()), "{line}");
    logged.server.end();
}

#[test]
fn the_environment_has_the_level_unless_there_is_an_option() {
    let server = Server::ours(&["memory:1M"]);
    let log_of = |level: &str, option: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.env("NBD_LOG", level).args(["map", server.uri()]).args(option);
        run(&mut command)
    };
    assert_eq!(log_of("", &[]).stderr, "");
    assert!(log_of("nbd_client=debug", &[]).stderr.contains("DEBUG"));
    assert_eq!(log_of("error", &[]).stderr, "");
    assert!(log_of("error", &["-vv"]).stderr.contains("DEBUG"));
    says(log_of("info,nbd_server=loud", &[]), &["NBD_LOG", "loud", "debug"]);
}

#[test]
fn a_log_file_that_cannot_be_opened_is_an_error() {
    let arguments = ["--log-file", "/nonexistent/log", "serve", "memory:1M"];
    says(nbd_cli(&arguments), &["/nonexistent/log", "No such file"]);
}

#[test]
fn a_client_cannot_write_lines_of_its_own() {
    let logged = Logged::start(&["-v"]);
    assert_eq!(nbd_cli(&["map", &logged.server.uri_of("x%0AFORGED")]).code, Some(1));
    nbd_cli(&["map", logged.server.uri()]).success();
    logged.line("log", &["client connected"]);
    let log = std::fs::read_to_string(logged.path("log")).expect("text");
    assert!(!log.lines().any(|line| line.starts_with("FORGED")), "{log}");
}
