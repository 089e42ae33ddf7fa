//! Disks of Ceph, which qemu-nbd serves, below overlays and behind this server.
//!
//! `NBD_TEST_RBD` is the name of a pool in which `rbd` and qemu-nbd may make disks, beside the
//! store of `NBD_TEST_STORE`. `cargo xtask soak --only ceph` makes both; without them nothing is
//! judged.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use serde_json::Value;

use crate::readme::paste;
use crate::real_store::Place;
use crate::support::random::{Random, noise};
use crate::support::{Server, nbd_cli, peer};

const MIB: usize = 1 << 20;
const SIZE: usize = 48 * MIB;

/// A pool, and a place beside it for backups.
struct Pool {
    rbd: PathBuf,
    qemu_nbd: PathBuf,
    qemu_io: PathBuf,
    name: String,
    place: Place,
}

impl Pool {
    fn new(prefix: &str) -> Option<Self> {
        let Ok(name) = std::env::var("NBD_TEST_RBD") else {
            eprintln!(
                "skipped: there is no pool of Ceph; `cargo xtask soak --only ceph` makes one"
            );
            return None;
        };
        let tool = crate::support::tool;
        let (rbd, qemu_nbd, qemu_io) = (tool("rbd")?, tool("qemu-nbd")?, tool("qemu-io")?);
        Some(Self { rbd, qemu_nbd, qemu_io, name, place: Place::new(prefix)? })
    }

    /// The name of a disk in the pool, which no other run of the tests has.
    fn disk(&self, name: &str) -> String {
        format!("{}/{name}-{}", self.name, std::process::id())
    }

    fn rbd(&self, arguments: &[&str]) {
        peer(&self.rbd, &[&["--no-progress"], arguments].concat());
    }

    /// QEMU's server of a disk, or of a snapshot.
    fn serve(&self, disk: &str, options: &[&str]) -> Server {
        let disk = format!("rbd:{disk}");
        let arguments = [&["-f", "raw", "--discard=unmap"], options, &[&disk]].concat();
        Server::qemu_nbd(&self.qemu_nbd, "disk", &arguments)
    }

    /// Writes at places that a seed determines, to an export and to the file that it must equal.
    fn write(&self, uri: &str, model: &str, random: &mut Random) {
        let file = std::fs::File::options().write(true).open(model).expect("the model");
        let mut commands = Vec::new();
        for _ in 0..12 {
            let (pattern, length) = (random.below(4) as u8, random.below(300_000) + 1);
            let offset = random.below(SIZE - length);
            commands.extend(["-c".to_owned(), format!("write -P {pattern} {offset} {length}")]);
            file.write_all_at(&vec![pattern; length], offset as u64).expect("room");
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let said = peer(&self.qemu_io, &[&["-f", "raw"], &*commands, &[uri]].concat());
        assert!(!said.contains("failed"), "{said}");
    }
}

/// Makes a file with data, zeroes and holes.
fn content(pool: &Pool, random: &mut Random) -> String {
    let path = pool.place.disk.blank("content.img", SIZE as u64);
    let file = std::fs::File::options().write(true).open(&path).expect("it is there");
    for _ in 0..5 {
        let data = noise(random.below(6 * MIB) / 8 * 8 + 8, random.next());
        let offset = random.below(SIZE - data.len());
        file.write_all_at(&data, offset as u64).expect("room");
    }
    path
}

#[track_caller]
fn is_equal(model: &str, uri: &str) {
    nbd_cli(&["image", "compare", "-f", "raw", "-F", "raw", model, uri]).success();
}

#[test]
fn overlays_of_a_disk_of_ceph_are_written_backed_up_and_freed_of_it() {
    let Some(pool) = Pool::new("overlays") else { return };
    let mut random = Random::of_this_run(1);
    let (golden, content) = (pool.disk("golden"), content(&pool, &mut random));
    let snapshot = format!("{golden}@base");
    pool.rbd(&["import", &content, &golden]);
    pool.rbd(&["snap", "create", &snapshot]);
    let base = pool.serve(&snapshot, &["-r"]);
    is_equal(&content, base.uri());
    let place = &pool.place;
    let overlays = ["a", "b"].map(|name| {
        let beside = |end: &str| place.disk.beside(&format!("{name}.{end}"));
        let (overlay, model, control) = (beside("qcow2"), beside("img"), beside("control"));
        let create = ["image", "create", "-f", "qcow2", "-b", base.uri(), "-F", "raw", &overlay];
        nbd_cli(&create).success();
        std::fs::copy(&content, &model).expect("room");
        (overlay, model, control)
    });
    place.run(&["repo", "init", &place.url]).success();
    let servers = overlays.each_ref().map(|(overlay, _, control)| {
        Server::ours(&["--trust-image", "--control", control, &format!("vm={overlay}")])
    });
    // The disk itself changes, and its snapshot does not.
    let writable = pool.serve(&golden, &[]);
    pool.write(writable.uri(), &content, &mut random);
    is_equal(&content, writable.uri());
    writable.end();
    for round in 0..3 {
        for ((server, name), (_, model, control)) in servers.iter().zip(["a", "b"]).zip(&overlays) {
            pool.write(server.uri(), model, &mut random);
            is_equal(model, server.uri());
            let (to, export) = (&*place.url, ["--export", "vm", "-B", "daily"]);
            let what = ["backup", "--json", "--name", name, "--control", control];
            let made = place.json(&[&what[..], &export, &["--verify=all", to]].concat());
            assert_eq!(made["incremental"], round > 0, "{made}");
            let from = format!("backup:{to}/{name}@latest");
            place.run(&["image", "compare", "-f", "raw", "-F", "raw", model, &from]).success();
        }
    }
    servers.into_iter().for_each(Server::end);
    let ((alone, model, _), (overlay, other, _)) = (&overlays[0], &overlays[1]);
    nbd_cli(&["image", "stream", "-q", "--trust-image", alone]).success();
    let compare = ["image", "compare", "--trust-image", "-f", "raw", "-F", "qcow2", other, overlay];
    nbd_cli(&compare).success();
    base.end();
    // Ceph is needed by one of them, and not by the other.
    nbd_cli(&["image", "compare", "-f", "raw", "-F", "qcow2", model, alone]).success();
    assert_ne!(nbd_cli(&compare).code, Some(0));
}

#[test]
fn a_disk_of_ceph_is_served_backed_up_and_restored_to_another_one() {
    let Some(pool) = Pool::new("disks") else { return };
    let mut random = Random::of_this_run(1);
    let (shared, new) = (pool.disk("shared"), pool.disk("new"));
    let (model, place) = (content(&pool, &mut random), &pool.place);
    pool.rbd(&["create", "--size", "48M", &shared]);
    let theirs = pool.serve(&shared, &[]);
    let ours = Server::ours(&["--format", "raw", theirs.uri()]);
    nbd_cli(&["copy", "-q", &model, ours.uri()]).success();
    is_equal(&model, ours.uri());
    // Holes of the file are holes of the disk.
    let map: Value = serde_json::from_str(
        &nbd_cli(&["map", "--json", "--context", "base:allocation", ours.uri()]).success(),
    )
    .expect("JSON");
    assert!(map.to_string().contains("hole"), "{map}");
    place.run(&["repo", "init", &place.url]).success();
    let backup = || {
        let made = place.json(&["backup", "--json", "--name", "vm", ours.uri(), &place.url]);
        let from = format!("backup:{}/vm", place.url);
        place.run(&["image", "compare", "-f", "raw", "-F", "raw", &model, &from]).success();
        (made, from)
    };
    let (first, _) = backup();
    pool.write(ours.uri(), &model, &mut random);
    let (second, from) = backup();
    assert!(second["added"].as_u64() < first["added"].as_u64(), "{second} {first}");
    pool.rbd(&["create", "--size", "48M", &new]);
    let target = pool.serve(&new, &[]);
    place.run(&["restore", "-q", &from, target.uri()]).success();
    is_equal(&model, target.uri());
    for server in [target, ours, theirs] {
        server.end();
    }
    let exported = place.disk.beside("exported.img");
    pool.rbd(&["export", &new, &exported]);
    is_equal(&model, &exported);
}

#[test]
fn readme_commands_of_ceph_run() {
    if Pool::new("guide").is_some() {
        paste("docs/ceph.md");
    }
}
