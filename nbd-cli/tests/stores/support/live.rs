//! A disk that clients use while it is backed up by its bitmap.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout};
use std::time::{Duration, Instant};

use nbd_client::blocking::Client;
use nbd_client::{Connector, Durability};
use nbd_objects::testing::Contents;
use serde_json::Value;

use super::cases::Case;
use super::disks::noise;
use super::{Outcome, REPOSITORY, Scene};

/// How long anything may take. Only a hang takes that long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Its server. It ends when it is dropped.
pub(crate) struct Live {
    server: Child,
    _stdout: BufReader<ChildStdout>,
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

const BACKUP: [&str; 11] = [
    "backup",
    "--name",
    "live",
    "--json",
    "--control",
    "{here}/control",
    "--export",
    "vm",
    "--bitmap",
    "daily",
    REPOSITORY,
];

/// An incremental backup of a disk in use. Its bitmap must not restart unless there is a backup.
pub(crate) fn case() -> Case<'static> {
    Case {
        name: "backup, by bitmap",
        contents: Contents::default(),
        arguments: BACKUP.map(str::to_owned).into(),
        prepare: |scene| Some(start(scene)),
        after: Box::new(|scene, outcome, context| {
            wait_for_the_end_of_the_checkpoint(scene);
            let made = backups(scene) - 1;
            assert!(made == 1 || !outcome.is_success(), "{context}: {made} backups: {outcome:?}");
            if made > 0 {
                latest_is_the_disk(scene, context);
            }
            // What the next one has to find, beside what this one had to.
            write(scene, 2 << 20, 3);
        }),
        again: Box::new(|scene, outcome, context| {
            is_incremental(outcome, context);
            latest_is_the_disk(scene, context);
            // And the bitmap started with it.
            write(scene, 3 << 20, 4);
            is_incremental(&scene.run(&BACKUP), context);
            latest_is_the_disk(scene, context);
            let checked = scene.run(&["repo", "check", "--read-data", REPOSITORY]);
            assert!(checked.is_success(), "{context}: {checked:?}");
        }),
    }
}

/// Serves a disk, makes its first backup, and changes it.
fn start(scene: &Scene) -> Live {
    scene.run(&["image", "create", "--format", "qcow2", "{here}/disk.qcow2", "5M"]).success();
    let serve = ["serve", "--control", "{here}/control", "--socket", "{here}/socket"];
    let mut command = scene.command(&[&serve[..], &["vm={here}/disk.qcow2"]].concat());
    let mut server = command.spawn().expect("the program");
    let mut stdout = BufReader::new(server.stdout.take().expect("its output"));
    stdout.read_line(&mut String::new()).expect("its address");
    let live = Live { server, _stdout: stdout };
    write(scene, 0, 1);
    scene.run(&["repo", "init", REPOSITORY]).success();
    let made = scene.run(&BACKUP).success();
    assert!(made.contains("\"incremental\": false"), "{made}");
    write(scene, 1 << 20, 2);
    live
}

fn write(scene: &Scene, offset: u64, seed: u64) {
    let uri = format!("nbd+unix:///vm?socket={}", scene.beside("socket"));
    let client = Client::connect(&Connector::new(uri.parse().expect("a URI"))).expect("the server");
    client.write(offset, noise(100_000, seed).into(), Durability::Cached).expect("it is written");
    client.disconnect().expect("the server is told");
}

fn backups(scene: &Scene) -> usize {
    scene.json(&["repo", "list", "--json", REPOSITORY])["backups"].as_array().map_or(0, Vec::len)
}

#[track_caller]
fn latest_is_the_disk(scene: &Scene, context: &str) {
    let uri = format!("nbd+unix:///vm?socket={}", scene.beside("socket"));
    let name = format!("backup:{REPOSITORY}/live@latest");
    let compared = scene.run(&["image", "compare", "-f", "raw", "-F", "raw", &uri, &name]);
    assert!(compared.is_success(), "{context}: {compared:?}");
}

#[track_caller]
fn is_incremental(outcome: &Outcome, context: &str) {
    assert!(outcome.is_success(), "{context}: {outcome:?}");
    let made: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert_eq!(made["incremental"], true, "{context}: {made}");
    assert!(made["read"].as_u64() <= Some(1 << 20), "{context}: {made}");
}

/// A server that notices that its client was killed ends the checkpoint, in its own time.
fn wait_for_the_end_of_the_checkpoint(scene: &Scene) {
    let until = Instant::now() + PATIENCE;
    loop {
        let list = scene.run(&["control", "--json", "{here}/control", "list"]).success();
        let list: Value = serde_json::from_str(&list).expect("JSON");
        let exports = list["exports"].as_array().expect("a list");
        if !exports.is_empty() && exports.iter().all(|it| it["checkpoint"].is_null()) {
            return;
        }
        assert!(Instant::now() < until, "{list}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
