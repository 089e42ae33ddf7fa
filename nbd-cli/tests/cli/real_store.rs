//! Images and backups on a real store.

use std::process::Command;

use serde_json::Value;

use crate::support::image::are_equal;
use crate::support::random::noise;
use crate::support::real_store::RealStore;
use crate::support::{Disk, Outcome, Server, nbd_cli, peer, run, says};
use crate::tools;

/// A place in the store of its own, and a directory beside it.
pub(crate) struct Place {
    store: &'static RealStore,
    pub(crate) disk: Disk,
    pub(crate) url: String,
}

impl Place {
    pub(crate) fn new(prefix: &str) -> Option<Self> {
        let (store, disk) = (RealStore::of_all_tests()?, Disk::sparse());
        // A store that outlives the tests may have what others left.
        let prefix = format!("{prefix}-{}", std::process::id());
        Some(Self { store, disk, url: format!("s3://bucket/{prefix}") })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.store.command(&self.disk.beside("home"));
        command.args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.command(arguments))
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.run(arguments).success();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    fn serve(&self, arguments: &[&str]) -> Server {
        let socket = self.disk.beside("socket");
        let mut command = self.command(&["serve", "--socket", &socket]);
        Server::start(command.args(arguments), socket.into())
    }
}

#[test]
fn real_store_takes_an_image_and_serves_it() {
    let Some(place) = Place::new("images") else { return };
    let (image, url) = (place.disk.beside("image"), &*format!("{}/disk.img", place.url));
    // Three parts.
    std::fs::write(&image, noise(36 << 20, 5)).expect("room");
    says(place.run(&["image", "info", url]), &[url, "does not exist"]);
    place.run(&["image", "push", "-q", "--verify", &image, url]).success();
    says(place.run(&["image", "push", "-q", &image, url]), &[url, "exists already", "--replace"]);
    place.run(&["image", "push", "-q", "--replace", &image, url]).success();
    assert_eq!(place.json(&["image", "info", "--json", url])["virtual-size"], 36 << 20);
    place.run(&["image", "compare", "-f", "raw", &image, url]).success();
    let server = place.serve(&["--read-only", "--format", "raw", url]);
    nbd_cli(&["image", "compare", "-f", "raw", &image, server.uri()]).success();
    // Blocks that nobody has read are of the object that was opened, or none.
    std::fs::write(&image, noise(35 << 20, 6)).expect("room");
    server.end();
    let server = place.serve(&[
        "--read-only",
        "--format",
        "raw",
        "--cache-dir",
        &place.disk.beside("other"),
        url,
    ]);
    place.run(&["image", "push", "-q", "--replace", &image, url]).success();
    says(nbd_cli(&["copy", "-q", server.uri(), "null:"]), &["EIO"]);
}

#[test]
fn real_store_refuses_wrong_keys() {
    let Some(place) = Place::new("keys") else { return };
    let url = &*place.url;
    place.run(&["repo", "init", url]).success();
    for (name, value) in [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "AKIANOBODY")] {
        for arguments in [
            &["repo", "list", url][..],
            &["repo", "init", "s3://bucket/other"],
            &["backup", "-q", "--name", "vm", place.disk.path(), url],
            &["image", "info", url],
            &["image", "push", "-q", place.disk.path(), "s3://bucket/pushed"],
        ] {
            let outcome = run(place.command(arguments).env(name, value));
            says(outcome, &["s3://bucket/", "403", "check the credentials"]);
        }
    }
}

#[test]
fn real_store_keeps_backups_of_a_disk_in_use() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let Some(place) = Place::new("backups") else { return };
    let (repository, disk) = (&*place.url, place.disk.beside("disk.qcow2"));
    place.run(&["repo", "init", repository]).success();
    says(place.run(&["repo", "init", repository]), &["is a repository already"]);
    let noise_file = place.disk.beside("noise");
    std::fs::write(&noise_file, noise(30 << 20, 7)).expect("room");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "100M"]);
    peer(&qemu_io, &["-c", &format!("write -s {noise_file} 0 30M"), &disk]);
    let control = place.disk.beside("control");
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let backup = || {
        let what =
            ["backup", "--name", "vm", "--control", &control, "--export", "vm", "-B", "daily"];
        place.json(&[&what[..], &["--verify=all", "--json", repository]].concat())
    };
    let mut made: Vec<(Value, String)> = Vec::new();
    for change in ["write -P 1 40M 1M", "write -P 2 5M 100k", "write -z 10M 1M"] {
        let said = peer(&qemu_io, &["-f", "raw", "-c", change, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
        let backup = backup();
        assert_eq!(backup["incremental"], !made.is_empty(), "{backup}");
        let copied = place.disk.beside(&format!("{}.img", made.len()));
        nbd_cli(&["copy", "-q", server.uri(), &copied]).success();
        made.push((backup, copied));
    }
    server.end();
    let checked = place.json(&["repo", "check", "--read-data=100%", "--json", repository]);
    assert_eq!(checked["problems"], Value::from(Vec::<i32>::new()));
    assert_eq!(
        place.json(&["repo", "list", "--json", repository])["backups"].as_array().map(Vec::len),
        Some(3)
    );
    let name = |backup: &Value| format!("vm@{}", backup["id"].as_str().expect("text"));
    let restored = |backup: &Value, copied: &str| {
        let file = place.disk.beside("restored.img");
        let from = format!("backup:{repository}/{}", name(backup));
        place.run(&["restore", "-q", &from, &file]).success();
        are_equal(&qemu_img, copied, &file);
        std::fs::remove_file(file).expect("it is there");
    };
    made.iter().for_each(|(backup, copied)| restored(backup, copied));
    // The others stay whole.
    place.run(&["repo", "forget", repository, &name(&made[0].0)]).success();
    place.run(&["repo", "gc", "--idle", "1ms", repository]).success();
    made[1..].iter().for_each(|(backup, copied)| restored(backup, copied));
    place.run(&["repo", "prune", "--keep-last", "1", repository]).success();
    place.run(&["repo", "gc", "--idle", "1ms", repository]).success();
    let before = place.json(&["repo", "stats", "--json", repository]);
    assert_eq!(before["disks"][0]["backups"], 1, "{before}");
    streamed(&place, &made[2].1);
    place.run(&["repo", "forget", repository, "vm@latest"]).success();
    place.run(&["repo", "gc", "--idle", "1ms", repository]).success();
    let checked = place.json(&["repo", "check", "--json", repository]);
    assert_eq!(checked["problems"], Value::from(Vec::<i32>::new()));
}

/// The last backup is used at once, written to, and streamed until the store is not needed.
fn streamed(place: &Place, expected: &str) {
    let overlay = place.disk.beside("overlay.qcow2");
    let backing = format!("backup:{}/vm", place.url);
    place.run(&["image", "create", "-f", "qcow2", "-b", &backing, "-F", "raw", &overlay]).success();
    let server = place.serve(&["--trust-image", &overlay]);
    nbd_cli(&["image", "compare", "-f", "raw", expected, server.uri()]).success();
    server.end();
    place.run(&["image", "stream", "-q", "--trust-image", &overlay]).success();
    // Nothing of the store is needed any more, nor its address known.
    nbd_cli(&["image", "compare", "-F", "qcow2", "-f", "raw", expected, &overlay]).success();
    let info = nbd_cli(&["image", "info", &overlay]).success();
    assert!(!info.contains("backing"), "{info}");
}

#[test]
fn real_store_takes_backups_of_two_writers_beside_a_collector() {
    let Some(place) = Place::new("writers") else { return };
    let passphrase = place.disk.beside("passphrase");
    std::fs::write(&passphrase, "correct horse").expect("room");
    let (repository, key) = (&*place.url, ["--passphrase-file", &*passphrase]);
    place.run(&[&["repo", "init", "--encrypt", repository], &key[..]].concat()).success();
    let disks = ["a", "b"].map(|name| {
        let path = place.disk.beside(name);
        std::fs::write(&path, noise(20 << 20, u64::from(name.as_bytes()[0]))).expect("room");
        (name, path)
    });
    std::thread::scope(|scope| {
        for (name, path) in &disks {
            let place = &place;
            scope.spawn(move || {
                for _ in 0..3 {
                    let what = ["backup", "-q", "--name", name, path, &place.url];
                    place.run(&[&what[..], &key].concat()).success();
                }
            });
        }
        // It looks at sessions that run again and again, after a tenth of this time.
        let collect = ["repo", "gc", "--idle", "70s", repository];
        for _ in 0..2 {
            place.run(&[&collect[..], &key].concat()).success();
        }
    });
    for (name, path) in &disks {
        let restored = place.disk.beside(&format!("{name}.restored"));
        let from = format!("backup:{repository}/{name}");
        place.run(&[&["restore", "-q", &from, &restored], &key[..]].concat()).success();
        assert!(std::fs::read(&restored).expect("a disk") == std::fs::read(path).expect("a disk"));
    }
    says(place.run(&["repo", "list", repository]), &["--passphrase-file"]);
    let list = place.json(&[&["repo", "list", "--json", repository], &key[..]].concat());
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(6), "{list}");
    place.run(&[&["repo", "check", "--read-data=100%", repository], &key[..]].concat()).success();
}
