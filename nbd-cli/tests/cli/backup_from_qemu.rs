//! Backups of a disk that QEMU itself serves, with the commands of `docs/backup.md`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, nbd_cli, peer};
use crate::tools;

const DOCUMENT: &str = include_str!("../../../docs/backup.md");

/// QEMU with the disk `vm.qcow2` as the node `disk`, and its monitor.
struct Qemu {
    daemon: Child,
    monitor: BufReader<UnixStream>,
    events: Vec<Value>,
    directory: PathBuf,
}

impl Qemu {
    fn start(program: &Path, directory: &Path) -> Self {
        let beside = |name: &str| directory.join(name).display().to_string();
        let socket = beside("monitor");
        let daemon = Command::new(program)
            .args(["--blockdev", &format!("file,node-name=file,filename={}", beside("vm.qcow2"))])
            .args(["--blockdev", "qcow2,node-name=disk,file=file,discard=unmap"])
            .args(["--chardev", &format!("socket,id=c,path={socket},server=on,wait=off")])
            .args(["--monitor", "chardev=c"])
            .stdin(Stdio::null())
            .spawn()
            .expect("the daemon");
        let mut monitor = None;
        wait_until("the monitor answers", || {
            monitor = UnixStream::connect(&socket).ok();
            monitor.is_some()
        });
        let monitor = BufReader::new(monitor.expect("a monitor"));
        let mut qemu =
            Self { daemon, monitor, events: Vec::new(), directory: directory.to_owned() };
        assert!(qemu.line()["QMP"].is_object());
        qemu.run(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).expect("text");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Runs one command, in which `/tmp` is the directory.
    fn run(&mut self, command: &str) {
        let command = command.replace("/tmp/", &format!("{}/", self.directory.display()));
        writeln!(self.monitor.get_mut(), "{command}").expect("a monitor");
        loop {
            let reply = self.line();
            match reply["event"].is_string() {
                true => self.events.push(reply),
                false => {
                    assert!(reply["return"].is_object(), "{command}: {reply}");
                    return;
                }
            }
        }
    }

    /// Runs the commands of the document with this name.
    fn documented(&mut self, name: &str) {
        let start = format!(r#"{{"execute":"{name}","#);
        let command = DOCUMENT.lines().find(|line| line.starts_with(&start)).expect("the command");
        self.run(command);
    }

    fn wait(&mut self, event: &str) {
        while !self.events.iter().any(|it| it["event"] == event) {
            let line = self.line();
            self.events.push(line);
        }
        self.events.retain(|it| it["event"] != event);
    }

    /// Makes a view of the disk at this moment, with what is dirty in `daily`.
    fn begin(&mut self, qemu_img: &Path) {
        let scratch = self.directory.join("scratch.qcow2").display().to_string();
        peer(qemu_img, &["create", "-q", "-f", "qcow2", &scratch, "64M"]);
        self.documented("blockdev-add");
        self.documented("transaction");
        self.documented("block-export-add");
    }

    /// Ends it, after a backup that succeeded or failed.
    fn end(&mut self, succeeded: bool) {
        self.documented("block-export-del");
        self.wait("BLOCK_EXPORT_DELETED");
        self.documented("block-job-cancel");
        self.wait("BLOCK_JOB_CANCELLED");
        self.documented("blockdev-del");
        if !succeeded {
            self.documented("block-dirty-bitmap-merge");
        }
        self.documented("block-dirty-bitmap-remove");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn disk_of_a_running_qemu_is_backed_up_as_the_document_says() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", daemon = "qemu-storage-daemon");
    let disk = Disk::sparse();
    let image = disk.beside("vm.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "64M"]);
    let mut qemu = Qemu::start(&daemon, Path::new(&image).parent().expect("a directory"));
    qemu.documented("nbd-server-start");
    qemu.documented("block-dirty-bitmap-add");
    qemu.run(
        &json!({"execute": "block-export-add", "arguments":
            {"type": "nbd", "id": "live", "node-name": "disk", "name": "live", "writable": true}})
        .to_string(),
    );
    let socket = disk.beside("qemu.sock");
    let live = format!("nbd+unix:///live?socket={socket}");
    let write = |what: &str| {
        peer(&qemu_io, &["-f", "raw", "-c", &format!("write -q {what}"), &live]);
    };
    let (view, repository) = (format!("nbd+unix:///vm1?socket={socket}"), disk.beside("backups"));
    nbd_cli(&["repo", "init", &repository]).success();
    let into_repository = || -> Value {
        let backup = ["backup", "--json", "--verify=all", "--name", "vm1", "--bitmap", "pull"];
        let made = nbd_cli(&[&backup[..], &[&view, &repository]].concat()).success();
        serde_json::from_str(&made).expect("JSON")
    };
    let (full, next) = (disk.beside("full.qcow2"), disk.beside("next.qcow2"));

    write("-P 1 0 1M");
    qemu.begin(&qemu_img);
    write("-P 2 512k 64k");
    assert_eq!(into_repository()["read"], 1 << 20);
    nbd_cli(&["backup", "-q", &view, &full]).success();
    qemu.end(true);

    // What changed before a backup that failed is in the next one.
    write("-P 3 8M 64k");
    qemu.begin(&qemu_img);
    write("-P 4 16M 64k");
    qemu.end(false);

    write("-P 5 24M 64k");
    qemu.begin(&qemu_img);
    write("-P 6 8M 1M");
    let made = into_repository();
    assert_eq!((&made["incremental"], &made["read"]), (&json!(true), &json!(256 << 10)));
    let chain = ["backup", "-q", "--verify=all", "--bitmap", "pull", "--base", &full];
    nbd_cli(&[&chain[..], &[&view, &next]].concat()).success();
    let backup = format!("backup:{repository}/vm1");
    nbd_cli(&["image", "compare", "--second-format", "raw", &next, &backup]).success();
    qemu.end(true);
}
