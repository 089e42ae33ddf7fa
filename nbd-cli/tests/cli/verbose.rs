//! The log of `-v` and `-vv`.

use std::process::{Command, Stdio};

use crate::support::{Disk, PROGRAM, Server, nbd_cli};

#[test]
fn twice_verbose_logs_more_than_once() {
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let log = |option: &str| {
        let (path, mut command) = (disk.beside("log"), Command::new(PROGRAM));
        command.args([
            option,
            "serve",
            "--read-only",
            "-f",
            "raw",
            "--socket",
            &socket,
            disk.path(),
        ]);
        command.stderr(Stdio::from(std::fs::File::create(&path).expect("a file")));
        let server = Server::start(&mut command, socket.clone().into());
        nbd_cli(&["map", server.uri()]).success();
        server.end();
        std::fs::read_to_string(path).expect("text")
    };
    let (once, twice) = (log("-v"), log("-vv"));
    for part in ["client connected", "client disconnected"] {
        assert!(once.contains(part) && twice.contains(part), "{part}: {once} {twice}");
    }
    for part in ["negotiated", "base:allocation", "BlockStatus"] {
        assert!(!once.contains(part), "{part}: {once}");
        assert!(twice.contains(part), "{part}: {twice}");
    }
    let server = Server::ours(&["memory:1M"]);
    let client = |option: &str| nbd_cli(&[option, "map", server.uri()]);
    assert_eq!(client("-v").stderr, "");
    assert!(client("-vv").stderr.contains("negotiated"));
}
