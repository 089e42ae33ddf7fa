//! `bench --verify`: servers that tell the truth, and servers that do not.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use nbd_server::export::{
    Durability, Export, ExportEntry, ExportError, Filter, MemoryExport, TryWrite,
};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};

use crate::support::{Disk, Outcome, PROGRAM, Server as Process, nbd_cli, says};

const SIZE: u64 = 1 << 20;

/// What a disk does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// Nothing.
    None,
    /// Some writes are acknowledged and not made.
    Dropped,
    /// A write is made when the next one of its block comes.
    Late,
    /// Some writes go to the block behind.
    Misplaced,
    /// Of some writes only the first half is made.
    Torn,
    /// A flush does nothing: what was written since the start can be lost.
    NotFlushed,
    /// Some writes are not answered for a long time.
    Silent,
}

/// A disk of [`SIZE`] bytes that lies, and can crash.
struct Disc {
    inner: MemoryExport,
    lie: Lie,
    writes: AtomicU64,
    /// The write of each offset that was not made yet.
    held: Mutex<HashMap<u64, Vec<u8>>>,
    /// What was where before the writes that are not flushed, oldest first.
    undo: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Disc {
    fn new(lie: Lie) -> Arc<Self> {
        let inner = MemoryExport::new(SIZE);
        let (held, undo) = (Mutex::default(), Mutex::default());
        Arc::new(Self { inner, lie, writes: AtomicU64::new(0), held, undo })
    }

    /// Loses what is not flushed.
    fn crash(&self) {
        for (offset, old) in self.undo.lock().expect("no panic").drain(..).rev() {
            self.inner.write_at(offset, &old, Durability::Cached).expect("memory");
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        let mut old = vec![0; data.len()];
        let mut undo = self.undo.lock().expect("no panic");
        self.inner.read_at(offset, &mut old)?;
        undo.push((offset, old));
        self.inner.write_at(offset, data, Durability::Cached)
    }
}

impl Filter for Disc {
    fn inner(&self) -> &dyn Export {
        &self.inner
    }

    fn try_write_at(&self, _: u64, _: &[u8]) -> Result<TryWrite, ExportError> {
        Ok(TryWrite::WouldBlock)
    }

    fn write_at(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), ExportError> {
        let length = data.len() as u64;
        let is_chosen = self.writes.fetch_add(1, Ordering::Relaxed) % 50 == 49;
        match self.lie {
            Lie::Late => {
                let mut held = self.held.lock().expect("no panic");
                match held.insert(offset, data.to_vec()) {
                    Some(earlier) => self.write(offset, &earlier),
                    None => Ok(()),
                }
            }
            Lie::Dropped if is_chosen => Ok(()),
            Lie::Silent if is_chosen => {
                std::thread::sleep(std::time::Duration::from_secs(6));
                Ok(())
            }
            Lie::Misplaced if is_chosen => self.write((offset + length) % (SIZE - length), data),
            Lie::Torn if is_chosen => self.write(offset, &data[..data.len() / 2]),
            _ => self.write(offset, data),
        }
    }

    fn flush(&self) -> Result<(), ExportError> {
        if self.lie != Lie::NotFlushed {
            self.undo.lock().expect("no panic").clear();
        }
        Ok(())
    }
}

/// The disk as one server has it. It is gone when no thread of the server uses the disk any more.
struct Attached(Arc<Disc>);

impl Filter for Attached {
    fn inner(&self) -> &dyn Export {
        &*self.0
    }
}

/// A server in this process; ends with this value, and forgets its clients.
struct Serving {
    runtime: tokio::runtime::Runtime,
    attached: Weak<Attached>,
    uri: String,
}

impl Serving {
    /// Ends the server. Its threads go on for a moment with what they have in hand; they have ended
    /// when this returns.
    fn end(self) {
        drop(self.runtime);
        while self.attached.strong_count() > 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

fn serve(disk: &Arc<Disc>, socket: &Path) -> Serving {
    let _ = std::fs::remove_file(socket);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let exports = ExportRegistry::new();
    let export = Arc::new(Attached(Arc::clone(disk)));
    let attached = Arc::downgrade(&export);
    exports.add("", ExportEntry::new(export)).expect("one export");
    let mut server = Server::new(ServerConfig::default(), exports);
    let address = ListenAddress::Unix(socket.to_owned());
    let bound = runtime.block_on(server.listen(&address)).expect("a socket").remove(0);
    runtime.spawn(server.serve(std::future::pending()));
    Serving { runtime, attached, uri: bound.uri("").to_string() }
}

const VERIFY: [&str; 7] = ["bench", "-w", "mixed", "--verify", "--destroy-data", "-d", "8"];

/// A verified run over a disk with this lie.
fn verified(lie: Lie, arguments: &[&str]) -> Outcome {
    let directory = tempfile::tempdir().expect("a directory");
    let serving = serve(&Disc::new(lie), &directory.path().join("s"));
    nbd_cli(&[&VERIFY[..], &["--requests", "2000", &serving.uri], arguments].concat())
}

#[test]
fn honest_server_passes_with_any_load() {
    for arguments in [
        &[][..],
        &["-b", "512:3,4K:1", "--zipf", "1.2"],
        &["--pattern", "sequential", "--flush-every", "20", "-C", "3"],
        &["--fua", "--read-percent", "0"],
        &["-C", "40", "--flush-every", "20"],
        &["--replies", "simple", "-b", "64K"],
    ] {
        let text = verified(Lie::None, arguments).success();
        assert!(text.contains("are as they were written") && !text.contains("ARE NOT"), "{text}");
    }
}

#[test]
fn server_that_drops_delays_or_misplaces_writes_is_found_out() {
    for (lie, part) in [
        (Lie::Dropped, "generation"),
        (Lie::Late, "generation"),
        (Lie::Misplaced, "offset"),
        (Lie::Torn, "wrong checksum"),
    ] {
        // Every block is written several times.
        let outcome = verified(lie, &["--range", "0+256K"]);
        let text = outcome.stdout.clone();
        assert!(text.contains("ARE NOT") && text.contains(part), "{lie:?}: {text}");
        says(outcome, &["does not contain the written data", "at offset"]);
    }
}

#[test]
fn lost_writes_are_an_error_where_the_report_cannot_be_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let serving = serve(&Disc::new(Lie::Dropped), &directory.path().join("s"));
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = Command::new(PROGRAM);
    command.args(VERIFY).args(["--range", "0+256K", "--requests", "2000", &serving.uri]);
    let outcome = command.stdout(writer).output().expect("nbd-cli");
    assert_eq!(outcome.status.code(), Some(1), "{outcome:?}");
}

/// A verified load in another process.
fn start(uri: &str, arguments: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(VERIFY).args(["--duration", "3s", "--range", "0+256K", uri]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("nbd-cli")
}

/// Runs a load, crashes the disk in the middle of it and serves what is left; gives what was said.
fn across_a_crash(lie: Lie) -> (Option<i32>, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let (disk, socket) = (Disc::new(lie), directory.path().join("s"));
    let serving = serve(&disk, &socket);
    let uri = serving.uri.clone();
    // The report of an interval of zero length says nothing; requests are what counts.
    let before = disk.writes.load(Ordering::Relaxed);
    let child = start(&uri, &["--flush-every", "20"]);
    while disk.writes.load(Ordering::Relaxed) < before + 500 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    serving.end();
    disk.crash();
    let _serving = serve(&disk, &socket);
    let output = child.wait_with_output().expect("its end");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("lost and made again"), "{text} {output:?}");
    (output.status.code(), text)
}

#[test]
fn crash_may_lose_what_was_not_flushed() {
    let (code, text) = across_a_crash(Lie::None);
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn crash_that_loses_what_was_flushed_is_found_out() {
    let (code, text) = across_a_crash(Lie::NotFlushed);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("ARE NOT"), "{text}");
}

#[test]
fn server_killed_in_the_middle_keeps_everything_that_a_file_keeps() {
    keeps_everything_when_killed("2");
}

#[test]
fn connections_that_share_threads_are_made_again() {
    keeps_everything_when_killed("40");
}

#[test]
fn request_that_is_not_answered_ends_the_load_although_others_are() {
    let directory = tempfile::tempdir().expect("a directory");
    let serving = serve(&Disc::new(Lie::Silent), &directory.path().join("s"));
    for connections in ["1", "40"] {
        let arguments = ["--timeout", "3s", "--reconnect", "0", "-C", connections];
        let arguments = [&VERIFY[..], &arguments, &["--duration", "1m", &serving.uri]].concat();
        says(nbd_cli(&arguments), &["a request was not answered within 3s"]);
    }
}

fn keeps_everything_when_killed(connections: &str) {
    let disk = Disk::sparse();
    let socket = disk.beside("socket");
    let serve = || {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--socket", &socket, disk.path()]);
        Process::start(&mut command, socket.clone().into())
    };
    let server = serve();
    let child = start(server.uri(), &["--flush-every", "50", "-C", connections]);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    // With SIGKILL.
    drop(server);
    let _server = serve();
    let output = child.wait_with_output().expect("its end");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text} {output:?}");
}

#[test]
fn later_run_verifies_and_continues_what_an_earlier_one_wrote() {
    let disk = Disk::sparse();
    let state = disk.beside("state");
    let first = Process::ours(&[disk.path()]);
    let keep = ["--verify-state", &state];
    let write = ["bench", "-w", "write", "--verify", "--destroy-data", "--requests", "400"];
    let range = ["--range", "1M+512K"];
    nbd_cli(&[&write[..], &keep, &range, &[first.uri()]].concat()).success();
    first.end();
    let old = std::fs::read(disk.path()).expect("the disk");
    let server = Process::ours(&[disk.path()]);
    let only = ["bench", "--verify-only"];
    let look = |arguments: &[&str]| nbd_cli(&[&only[..], arguments, &[server.uri()]].concat());
    let text = look(&keep).success();
    assert!(text.contains("are as they were written"), "{text}");
    nbd_cli(&[&write[..], &keep, &["-C", "2", server.uri()]].concat()).success();
    look(&keep).success();
    // The disk as it was before the second run: whole, and too old.
    let file = std::fs::File::options().write(true).open(disk.path()).expect("the disk");
    std::os::unix::fs::FileExt::write_all_at(&file, &old, 0).expect("room");
    says(look(&keep), &["does not contain the written data", "the old generation"]);
    // A state that is not there proves nothing.
    says(look(&["--verify-state", &disk.beside("none")]), &["no state of a former run"]);
}

#[test]
fn later_run_writes_whole_blocks_of_the_earlier_one_only() {
    let disk = Disk::sparse();
    let state = disk.beside("state");
    let server = Process::ours(&[disk.path()]);
    let write = ["bench", "-w", "write", "--verify", "--destroy-data", "--requests", "300"];
    let keep = ["--verify-state", &state, server.uri()];
    nbd_cli(&[&write[..], &["-b", "8K"], &keep].concat()).success();
    says(nbd_cli(&[&write[..], &keep].concat()), &["blocks of 8K", "the same --block-size"]);
    nbd_cli(&[&["bench", "--verify-only"], &keep[..]].concat()).success();
    nbd_cli(&[&write[..], &["-b", "8K,16K"], &keep].concat()).success();
}

#[test]
fn run_that_was_killed_does_not_make_a_later_one_accuse_the_server() {
    let disk = Disk::sparse();
    let state = disk.beside("state");
    let server = Process::ours(&[disk.path()]);
    let write = ["bench", "-w", "write", "--verify", "--destroy-data", "--verify-state", &state];
    nbd_cli(&[&write[..], &["--requests", "400", server.uri()]].concat()).success();
    let old = std::fs::read(&state).expect("the state");
    let mut command = Command::new(PROGRAM);
    command.args(write).args(["--duration", "60s", server.uri()]).stdout(Stdio::null());
    let mut killed = command.spawn().expect("nbd-cli");
    let began = std::time::Instant::now();
    while std::fs::read(&state).expect("the state") == old && began.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    killed.kill().expect("SIGKILL");
    killed.wait().expect("its end");
    let keep = ["--verify-state", &state, server.uri()];
    says(nbd_cli(&[&["bench", "--verify-only"], &keep[..]].concat()), &["was killed", "remove it"]);
    says(nbd_cli(&[&write[..], &["--requests", "1", server.uri()]].concat()), &["was killed"]);
}

#[test]
fn seed_alone_finds_damaged_and_misplaced_blocks() {
    let disk = Disk::sparse();
    let server = Process::ours(&[disk.path()]);
    let write = ["bench", "-w", "write", "--verify", "--destroy-data", "--requests", "400"];
    nbd_cli(&[&write[..], &["--seed", "77", server.uri()]].concat()).success();
    let look = |seed: &str| nbd_cli(&["bench", "--verify-only", "--seed", seed, server.uri()]);
    look("77").success();
    let text = look("78").success();
    assert!(text.contains(" 0 blocks") && text.contains("hold other data"), "{text}");
    let bytes = std::fs::read(disk.path()).expect("the disk");
    let mut starts =
        (0..bytes.len()).step_by(4096).filter(|at| bytes[*at..].starts_with(b"NBDbench"));
    let offset = starts.next_back().expect("a block");
    let file = std::fs::File::options().write(true).open(disk.path()).expect("the disk");
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", offset as u64 + 4000).expect("room");
    says(look("77"), &["wrong checksum", &format!("offset {offset}")]);
}
