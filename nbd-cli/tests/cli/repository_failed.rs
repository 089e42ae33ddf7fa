//! Backups in a repository that fail or are interrupted: gc does not wait for them, and tells what
//! it waits for.

use std::path::Path;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Server, in_foreground, json, nbd_cli, says};
use crate::tools;

fn repository(directory: &Disk) -> String {
    let repository = directory.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    repository
}

/// A backup that takes hours.
fn slow_backup(disk: &str, repository: &str) -> Child {
    let mut command = in_foreground();
    command.args(["backup", "--name", "vm1", "--rate", "65536", disk, repository]);
    let child = command.stderr(Stdio::piped()).spawn().expect("nbd-cli");
    let sessions = Path::new(repository).join("sessions");
    let is_record = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().len() == 32)
    };
    let has_begun = || std::fs::read_dir(&sessions).is_ok_and(|mut found| found.any(is_record));
    wait_until("the backup has begun", has_begun);
    child
}

fn sessions(repository: &str) -> Vec<Value> {
    let list = json(&["repo", "list", "--json", repository]);
    list["sessions"].as_array().expect("a list").clone()
}

#[test]
fn backup_that_a_signal_ends_says_so_and_leaves_no_session() {
    let directory = Disk::sparse();
    let (repository, noise) = (repository(&directory), directory.beside("noise"));
    std::fs::write(&noise, directory.content().repeat(8)).expect("room");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let backup = slow_backup(&noise, &repository);
        kill_process(Pid::from_child(&backup), signal).expect("it runs");
        let output = backup.wait_with_output().expect("a child");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(128 + signal.as_raw()), "{said}");
        assert!(said.contains("interrupted by SIG"), "{said}");
        assert_eq!(sessions(&repository), [Value::Null; 0], "{said}");
        assert_eq!(json(&["repo", "list", "--json", &repository])["backups"], Value::Array(vec![]));
        nbd_cli(&["repo", "gc", "--wait", "1ms", &repository]).success();
    }
}

#[test]
fn backup_of_a_disk_that_cannot_be_read_is_not_waited_for() {
    tools!(nbdkit = "nbdkit", _dd = "dd");
    let directory = Disk::sparse();
    let repository = repository(&directory);
    let read = "pread=if [ $4 -ge $((32 << 20)) ]; then echo EIO bad >&2; exit 1; fi; \
                head -c $3 /dev/urandom";
    let server = Server::nbdkit(&nbdkit, &["eval", "get_size=echo $((64 << 20))", read]);
    let outcome = nbd_cli(&["backup", "--name", "vm1", server.uri(), &repository]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    // What was sent is used by the next one, if it comes before gc.
    let left = sessions(&repository);
    assert_eq!((left.len(), &left[0]["failed"]), (1, &Value::Bool(true)), "{left:?}");
    let listed = nbd_cli(&["repo", "list", &repository]).success();
    assert!(listed.contains("  failed: vm1 on "), "{listed}");
    let collected = nbd_cli(&["repo", "gc", "--wait", "1ms", "--json", &repository]);
    assert_eq!(collected.stderr, "");
    let collected = collected.json();
    assert_eq!(collected["ended-sessions"][0], left[0]["id"], "{collected}");
    assert!(collected["packs"].as_u64() >= Some(1), "{collected}");
    assert_eq!(json(&["repo", "stats", "--json", &repository])["packs"], 0);
    // At once: nothing was sent.
    let refuses = Server::nbdkit(&nbdkit, &["eval", "get_size=echo 65536", "pread=exit 1"]);
    nbd_cli(&["backup", "--name", "vm1", refuses.uri(), &repository]).failure();
    assert_eq!(sessions(&repository), [Value::Null; 0]);
}

#[test]
fn gc_says_at_once_and_once_which_backup_it_waits_for() {
    let directory = Disk::sparse();
    let repository = repository(&directory);
    let mut backup = slow_backup(directory.path(), &repository);
    let session = sessions(&repository)[0]["id"].as_str().expect("text").to_owned();
    let outcome = nbd_cli(&["repo", "gc", "--wait", "700ms", &repository]);
    let lines: Vec<_> = outcome.stderr.lines().collect();
    assert_eq!((outcome.code, lines.len()), (Some(1), 2), "{outcome:?}");
    let told =
        format!("nbd-cli: warning: waiting for {session}, being made or interrupted: vm1 on ");
    assert!(lines[0].starts_with(&told), "{outcome:?}");
    let limits = "at most 700ms if it was killed, and 700ms if it runs";
    let remedy = format!("'nbd-cli repo forget-session {repository} {session}'");
    assert!(lines[0].contains(limits) && lines[0].contains(&remedy), "{outcome:?}");
    kill_process(Pid::from_child(&backup), Signal::KILL).expect("it runs");
    backup.wait().expect("a child");
    let again = nbd_cli(&["repo", "gc", "--idle", "300ms", "--json", &repository]);
    assert!(again.stderr.contains("at most 300ms if it was killed, and 60 min"), "{again:?}");
    assert_eq!(again.json()["ended-sessions"][0], *session);
    let backup = slow_backup(directory.path(), &repository);
    let session = sessions(&repository)[0]["id"].as_str().expect("text").to_owned();
    nbd_cli(&["repo", "forget-session", &repository, &session]).success();
    let done = nbd_cli(&["repo", "gc", "--wait", "1ms", &repository]);
    assert_eq!((done.code, &*done.stderr), (Some(0), ""), "{done:?}");
    kill_process(Pid::from_child(&backup), Signal::KILL).expect("it runs");
    backup.wait_with_output().expect("a child");
}

/// Bytes of all files below.
fn bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let size = |path: &Path| match path.is_dir() {
        true => bytes(path),
        false => path.metadata().expect("a file").len(),
    };
    entries.map(|entry| size(&entry.expect("an entry").path())).sum()
}

#[test]
fn sizes_that_commands_tell_are_those_of_the_files() {
    let directory = Disk::sparse();
    let repository = repository(&directory);
    let folder = Path::new(&repository);
    let held = || bytes(&folder.join("packs")) + bytes(&folder.join("backups"));
    let mut added = 0;
    let empty = directory.blank("empty", 1 << 20);
    for (name, disk) in [("empty", &*empty), ("vm1", directory.path()), ("vm1", directory.path())] {
        let before = held();
        let made = json(&["backup", "--name", name, "--json", disk, &repository]);
        assert_eq!(made["added"], held() - before, "{made}");
        added += held() - before;
        let list = json(&["repo", "list", "--json", &repository]);
        let mut listed = list["backups"].as_array().expect("a list").iter();
        let own = listed.find(|backup| backup["id"] == made["id"]).expect("the backup");
        assert_eq!(own["added"], made["added"], "{list}");
    }
    let stats = json(&["repo", "stats", "--json", &repository]);
    assert_eq!(stats["bytes"], held(), "{stats}");
    let disks = stats["disks"].as_array().expect("a list").iter();
    assert_eq!(disks.filter_map(|disk| disk["added"].as_u64()).sum::<u64>(), added, "{stats}");
    nbd_cli(&["repo", "prune", "--name", "vm1", "--keep-last", "1", &repository]).success();
    says(nbd_cli(&["repo", "forget", &repository, "vm1"]), &["is not one backup"]);
    nbd_cli(&["repo", "forget", &repository, "vm1@latest"]).success();
    let packs = bytes(&folder.join("packs"));
    for dry_run in [&["--dry-run"][..], &[]] {
        let gc = [&["repo", "gc", "--json", "--wait", "1ms", &repository], dry_run].concat();
        assert_eq!(json(&gc)["bytes"], packs);
    }
    assert_eq!(bytes(&folder.join("packs")), 0);
    assert_eq!(json(&["repo", "stats", "--json", &repository])["bytes"], held());
}
