//! `top`.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Disk, PROGRAM, Server, nbd_cli, says};
use crate::tools;

/// Ends a process that a failed test would leave.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_rates_of_all_intervals_are_the_load() {
    let disk = Disk::sparse();
    let [control, metrics] = ["control", "metrics"].map(|name| disk.beside(name));
    let metrics = format!("unix:{metrics}");
    let server = Server::ours(&["--control", &control, "--metrics", &metrics, "m=memory:1M"]);
    for source in [&control, &metrics] {
        let mut top = Command::new(PROGRAM);
        top.args(["top", "--json", "--interval", "200ms", source]).stdout(Stdio::piped());
        let mut top = Ended(top.spawn().expect("a program"));
        let mut lines = BufReader::new(top.0.stdout.take().expect("a pipe")).lines();
        let mut next = || -> Value {
            let line = lines.next().expect("a line").expect("text");
            serde_json::from_str(&line).expect("JSON")
        };
        assert_eq!(next()["exports"][0]["name"], "m");
        nbd_cli(&["bench", "--requests", "400", "-b", "4K", &server.uri_of("m")]).success();
        let (mut requests, mut bytes, mut latencies) = (0.0, 0.0, 0);
        while requests < 399.5 {
            let activity = next();
            let export = &activity["exports"][0];
            let number = |value: &Value| value.as_f64().expect("a number");
            let seconds = number(&activity["seconds"]);
            requests += number(&export["rates"]["requests"]) * seconds;
            bytes += number(&export["rates"]["bytes-read"]) * seconds;
            latencies +=
                usize::from(export["latency"]["p99"].as_f64().is_some_and(|p99| p99 > 0.0));
            assert_eq!(export["errors"], 0);
            assert_eq!(activity["total"]["rates"], export["rates"]);
        }
        assert!((requests - 400.0).abs() < 0.01, "{requests}");
        assert!((bytes - 400.0 * 4096.0).abs() < 1.0, "{bytes}");
        assert!(latencies > 0);
    }
    let once = ["top", "--once", "--interval", "50ms", "--sort", "name", &control];
    let text = nbd_cli(&once).success();
    assert!(text.lines().any(|line| line.ends_with("1.0M  m")), "{text}");
    server.end();
}

#[test]
fn what_cannot_be_watched_is_said() {
    let disk = Disk::sparse();
    let socket = disk.beside("metrics");
    let server = Server::ours(&["--metrics", &format!("unix:{socket}"), "memory:1M"]);
    for (source, words) in [
        (disk.beside("nothing"), "--control"),
        (format!("unix:{}", disk.beside("nothing")), "--metrics"),
        // The sockets of the other kind.
        (socket.clone(), "is not the control socket of a server"),
    ] {
        says(nbd_cli(&["top", "--once", &source]), &[&source, words]);
    }
    let source = format!("unix:{socket}");
    says(nbd_cli(&["top", &source]), &["not a terminal", "--once"]);
    let wrong = nbd_cli(&["top", "--sort", "x", &source]).stderr;
    assert!(wrong.contains("give one of throughput, requests, latency"), "{wrong}");
    server.end();
}

/// `top` on a terminal of its own, under a shell that looks at the modes of the terminal.
struct Terminal {
    script: Ended,
    keys: Option<ChildStdin>,
    seen: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    fn start(script: &Path, disk: &Disk, source: &str) -> Self {
        for file in ["before", "pid", "status", "after"] {
            // There is none before the first one.
            let _ = fs::remove_file(disk.beside(file));
        }
        let name = |name: &str| disk.beside(name);
        let shell = format!(
            "trap '' INT QUIT; stty -a > {}; sh -c 'echo $$ > {}; exec env --default-signal=INT,QUIT,HUP,USR1 \
             {PROGRAM} top --interval 50ms {source}'; echo $? > {}; stty -a > {}",
            name("before"),
            name("pid"),
            name("status"),
            name("after")
        );
        let mut command = Command::new(script);
        command
            .args(["-q", "-c", &shell, "/dev/null"])
            .env("TERM", "xterm")
            .env("SHELL", "/bin/sh");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut script = Ended(command.spawn().expect("a program"));
        let mut output = script.0.stdout.take().expect("a pipe");
        let (sender, seen) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut part) {
                if sender.send(part[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let keys = script.0.stdin.take();
        Self { script, keys, seen, text: String::new() }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.as_mut().expect("open").write_all(keys).expect("it reads");
    }

    /// Waits until the terminal has shown `what` since the last call.
    fn wait_for(&mut self, what: &str) {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.text.contains(what) {
            let rest = until.saturating_duration_since(Instant::now());
            let part = self.seen.recv_timeout(rest);
            let part = part.unwrap_or_else(|_| panic!("no {what:?} after {:?}", self.recent()));
            self.text.push_str(&String::from_utf8_lossy(&part));
        }
        let end = self.text.find(what).expect("found") + what.len();
        self.text.drain(..end);
    }

    /// The last characters, for messages.
    fn recent(&self) -> String {
        let skipped = self.text.chars().count().saturating_sub(2000);
        self.text.chars().skip(skipped).collect()
    }

    /// Waits for the end of all, and returns the status of `top`.
    fn end(mut self, disk: &Disk) -> String {
        self.wait_for("\u{1b}[?1049l");
        self.script.0.wait().expect("an end");
        let read = |name: &str| fs::read_to_string(disk.beside(name)).expect("a file");
        assert_eq!(read("before"), read("after"));
        read("status").trim().to_owned()
    }
}

#[test]
fn keys_sort_and_pause_and_the_terminal_is_as_before_after_every_end() {
    tools!(script = "script");
    let disk = Disk::sparse();
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, "m=memory:1M"]);
    let mut top = Terminal::start(&script, &disk, &control);
    top.wait_for("\u{1b}[?1049h");
    top.wait_for("1.0M  m");
    top.wait_for("s sort: throughput");
    top.press(b"s");
    top.wait_for("s sort: requests");
    // A key that sends several bytes is none of them.
    top.press(b"\x1b[p");
    top.press(b"s");
    top.wait_for("s sort: latency  p pause  ");
    top.press(b"p");
    top.wait_for("[paused]");
    top.press(b"q");
    assert_eq!(top.end(&disk), "0");
    for (signal, status) in [("TERM", "143"), ("HUP", "129"), ("USR1", "138")] {
        let mut top = Terminal::start(&script, &disk, &control);
        top.wait_for("q quit");
        let pid = fs::read_to_string(disk.beside("pid")).expect("a file");
        let kill = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).status();
        assert!(kill.expect("a shell").success());
        assert_eq!(top.end(&disk), status, "{signal}");
    }
    // Keys that the terminal turns into signals.
    for (key, status) in [(b"\x03", "130"), (b"\x1c", "131")] {
        let mut top = Terminal::start(&script, &disk, &control);
        top.wait_for("q quit");
        top.press(key);
        assert_eq!(top.end(&disk), status, "{key:?}");
    }
    // The server goes away.
    let mut top = Terminal::start(&script, &disk, &control);
    top.wait_for("q quit");
    server.end();
    top.wait_for("The numbers are ");
    top.wait_for(" s old: cannot reach the control socket");
    top.press(b"q");
    assert_eq!(top.end(&disk), "0");
}

#[test]
fn numbers_of_a_server_that_does_not_answer_are_called_old_and_have_an_age() {
    tools!(script = "script");
    let disk = Disk::sparse();
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, "m=memory:1M"]);
    let mut top = Terminal::start(&script, &disk, &control);
    top.wait_for("q quit");
    server.signal(Signal::STOP);
    top.wait_for("The numbers are ");
    top.wait_for(" s old: the server does not answer");
    server.signal(Signal::CONT);
    top.wait_for("q quit");
    top.press(b"q");
    assert_eq!(top.end(&disk), "0");
    server.end();
}

#[test]
fn a_second_signal_ends_a_display_whose_terminal_is_stopped() {
    tools!(script = "script");
    let disk = Disk::sparse();
    let control = disk.beside("control");
    let server = Server::ours(&["--control", &control, "m=memory:1M"]);
    let mut top = Terminal::start(&script, &disk, &control);
    top.wait_for("q quit");
    let read = |name: &str| fs::read_to_string(disk.beside(name)).unwrap_or_default();
    // Ctrl-S: whatever is written from now on waits.
    top.press(b"\x13");
    let until = Instant::now() + Duration::from_secs(60);
    while read("after").is_empty() {
        assert!(Instant::now() < until, "it does not end");
        // It may have ended.
        let kill = format!("kill -TERM {} 2> {}", read("pid").trim(), disk.beside("kill"));
        let _ = Command::new("sh").args(["-c", &kill]).status();
        std::thread::sleep(Duration::from_millis(100));
    }
    top.script.0.wait().expect("an end");
    assert_eq!((read("status").trim(), read("before")), ("143", read("after")));
    server.end();
}
