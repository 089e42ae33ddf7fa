//! Disks that clients use while they are backed up by their bitmaps.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout};
use std::time::{Duration, Instant};

use nbd_client::blocking::Client;
use nbd_client::{Connector, Durability};
use nbd_objects::testing::Contents;
use serde_json::Value;

use super::cases::Case;
use super::random::noise;
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

/// The exports, and the ends of the names of their backups.
type Exports = &'static [(&'static str, &'static str)];

const ONE: Exports = &[("vm", "")];
const SEVERAL: Exports = &[("vm", "#system"), ("vm-data", "#data")];

fn backup(exports: Exports) -> Vec<&'static str> {
    let what: &[&str] = match exports.len() {
        1 => &["--export", "vm"],
        _ => &["system=vm", "data=vm-data"],
    };
    let command = ["backup", "--name", "live", "--json", "--control", "{here}/control"];
    [&command[..], &["--bitmap", "daily"], what, &[REPOSITORY]].concat()
}

/// An incremental backup of a disk in use. Its bitmap must not restart unless there is a backup.
pub(crate) fn case() -> Case<'static> {
    of(ONE, "backup, by bitmap", |scene| Some(start(scene, ONE)))
}

/// One of several disks.
pub(crate) fn several() -> Case<'static> {
    of(SEVERAL, "backup, several by bitmaps", |scene| Some(start(scene, SEVERAL)))
}

fn of(exports: Exports, name: &'static str, prepare: fn(&Scene) -> Option<Live>) -> Case<'static> {
    Case {
        name,
        contents: Contents::default(),
        arguments: backup(exports).into_iter().map(str::to_owned).collect(),
        prepare,
        after: Box::new(move |scene, outcome, context| {
            wait_for_the_end_of_the_checkpoint(scene);
            let made = backups(scene) - 1;
            assert!(made == 1 || !outcome.is_success(), "{context}: {made} backups: {outcome:?}");
            if made > 0 {
                latest_is_the_disk(scene, exports, context);
            }
            // What the next one has to find, beside what this one had to.
            write(scene, exports, (2 << 20, 3));
        }),
        again: Box::new(move |scene, outcome, context| {
            is_incremental(outcome, context);
            latest_is_the_disk(scene, exports, context);
            // And the bitmap started with it.
            write(scene, exports, (3 << 20, 4));
            is_incremental(&scene.run(&backup(exports)), context);
            latest_is_the_disk(scene, exports, context);
            let checked = scene.run(&["repo", "check", "--read-data", REPOSITORY]);
            assert!(checked.is_success(), "{context}: {checked:?}");
        }),
    }
}

/// Serves disks, makes their first backup, and changes them.
fn start(scene: &Scene, exports: Exports) -> Live {
    let served = ["vm={here}/disk.qcow2", "vm-data={here}/data.qcow2"];
    for name in served {
        let (_, path) = name.split_once('=').expect("a name");
        scene.run(&["image", "create", "--format", "qcow2", path, "5M"]).success();
    }
    let serve = ["serve", "--control", "{here}/control", "--socket", "{here}/socket"];
    let mut command = scene.command(&[&serve[..], &served].concat());
    let mut server = command.spawn().expect("the program");
    let mut stdout = BufReader::new(server.stdout.take().expect("its output"));
    stdout.read_line(&mut String::new()).expect("its address");
    let live = Live { server, _stdout: stdout };
    write(scene, exports, (0, 1));
    scene.run(&["repo", "init", REPOSITORY]).success();
    let made = scene.run(&backup(exports)).success();
    assert!(made.contains("\"incremental\": false"), "{made}");
    write(scene, exports, (1 << 20, 2));
    live
}

fn uri(scene: &Scene, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", scene.beside("socket"))
}

/// Writes other noise to each disk.
fn write(scene: &Scene, exports: Exports, (offset, seed): (u64, u64)) {
    for (number, (export, _)) in (0..).zip(exports) {
        let uri = uri(scene, export).parse().expect("a URI");
        let client = Client::connect(&Connector::new(uri)).expect("the server");
        let noise = noise(100_000, seed + 10 * number).into();
        client.write(offset, noise, Durability::Cached).expect("it is written");
        client.disconnect().expect("the server is told");
    }
}

fn backups(scene: &Scene) -> usize {
    scene.json(&["repo", "list", "--json", REPOSITORY])["backups"].as_array().map_or(0, Vec::len)
}

#[track_caller]
fn latest_is_the_disk(scene: &Scene, exports: Exports, context: &str) {
    for (export, disk) in exports {
        let name = format!("backup:{REPOSITORY}/live@latest{disk}");
        let uri = uri(scene, export);
        let compared = scene.run(&["image", "compare", "-f", "raw", "-F", "raw", &uri, &name]);
        assert!(compared.is_success(), "{context}: {compared:?}");
    }
}

#[track_caller]
fn is_incremental(outcome: &Outcome, context: &str) {
    assert!(outcome.is_success(), "{context}: {outcome:?}");
    let made: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert_eq!(made["incremental"], true, "{context}: {made}");
    assert!(made["read"].as_u64() <= Some(2 << 20), "{context}: {made}");
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
