//! Backups of several disks as one.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_client::blocking::Client;
use nbd_client::{Connector, Durability};
use serde_json::Value;

use crate::support::image::is_clean;
use crate::support::random::noise;
use crate::support::{Disk, Outcome, Server, json, nbd_cli, peer, says};
use crate::tools;

#[test]
fn disks_of_one_backup_are_listed_read_and_forgotten_as_one() {
    let disk = Disk::sparse();
    let repository = disk.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    // Sizes that end no block, nothing at all, and a block that both have.
    let (odd, empty) = (disk.beside("odd"), disk.blank("empty", 0));
    std::fs::write(&odd, &disk.content()[..200_777]).expect("room");
    let named = [
        format!("system={}", disk.path()),
        format!("odd={odd}"),
        format!("empty={empty}"),
        format!("again={odd}"),
    ];
    let backup = |named: &[&str], more: &[&str]| {
        nbd_cli(&[&["backup", "--json", "--name", "vm"], more, named, &[&repository]].concat())
    };
    let all: Vec<_> = named.iter().map(String::as_str).collect();
    backup(&all, &["--verify=all"]).success();
    File::options()
        .write(true)
        .open(&odd)
        .and_then(|file| file.write_all_at(&[9; 100], 150_000))
        .expect("room");
    let made = backup(&all, &["--verify"]).json();
    assert!(made["added"].as_u64() < Some(200_000), "{made}");
    let list = json(&["repo", "list", "--json", &repository]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(2), "{list}");
    let disks = list["backups"][1]["disks"].as_array().expect("a list");
    let found: Vec<_> =
        disks.iter().map(|disk| (disk["name"].clone(), disk["size"].clone())).collect();
    let expected = [("system", 8 << 20), ("odd", 200_777), ("empty", 0), ("again", 200_777)];
    assert_eq!(found, expected.map(|(name, size)| (Value::from(name), Value::from(size))));
    let said = nbd_cli(&["repo", "list", &repository]).success();
    assert!(said.contains("vm (system, odd, empty, again)"), "{said}");
    // One by one, and together.
    let name = format!("backup:{repository}/vm@latest");
    says(nbd_cli(&["restore", &name, "null:"]), &["named disks (system, odd", "vm@latest#system"]);
    says(nbd_cli(&["restore", &format!("{name}#other"), "null:"]), &["no disk 'other'", "odd"]);
    let restored = disk.beside("restored");
    nbd_cli(&["restore", "--verify", &format!("{name}#system"), &restored]).success();
    disk.assert_equals(&restored);
    let compare = ["image", "compare", "-f", "raw", "-F", "raw", &odd, &format!("{name}#again")];
    nbd_cli(&compare).success();
    let folder = disk.beside("folder");
    std::fs::create_dir(&folder).expect("a folder");
    nbd_cli(&["restore", "--verify", &name, &folder]).success();
    for (name, path) in [("system", disk.path()), ("odd", &odd), ("empty", &empty), ("again", &odd)]
    {
        let restored = std::fs::read(format!("{folder}/{name}.img")).expect("a disk");
        assert!(restored == std::fs::read(path).expect("a disk"), "{name}");
    }
    // As the backing file of an overlay, it is this disk of this backup.
    let overlay = disk.beside("overlay.qcow2");
    let create = ["image", "create", "-f", "qcow2", "-b", &format!("{name}#odd"), "-F", "raw"];
    nbd_cli(&[&create[..], &[&overlay]].concat()).success();
    let id = list["backups"][1]["id"].as_str().expect("text");
    let info = json(&["image", "info", "--json", &overlay]);
    assert!(info.to_string().contains(&format!("vm@{id}#odd")), "{info}");
    let checked = nbd_cli(&["repo", "check", "--read-data", &repository]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    // They go as one.
    says(nbd_cli(&["repo", "forget", &repository, "vm@latest#odd"]), &["one disk of a backup"]);
    nbd_cli(&["repo", "prune", "--keep-last", "1", &repository]).success();
    nbd_cli(&["restore", &format!("{name}#again"), "null:"]).success();
    nbd_cli(&["repo", "forget", &repository, "vm@latest"]).success();
    nbd_cli(&["repo", "gc", "--idle", "1ms", &repository]).success();
    assert_eq!(json(&["repo", "stats", "--json", &repository])["packs"], 0);
}

#[test]
fn disks_of_a_server_are_backed_up_at_one_moment_by_their_bitmaps() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let repository = directory.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    let control = directory.beside("control");
    let (one, two) = (directory.beside("one.qcow2"), directory.beside("two.qcow2"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &one, "40M"]);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &two, "16M"]);
    let server =
        Server::ours(&["--control", &control, &format!("one={one}"), &format!("two={two}")]);
    let uri = |export: &str| server.uri().replace("/one?", &format!("/{export}?"));
    let write = |export: &str, command: &str| {
        let said = peer(&qemu_io, &["-f", "raw", "-c", command, &uri(export)]);
        assert!(!said.contains("failed"), "{said}");
    };
    let backup = || {
        let arguments = ["backup", "--json", "--name", "vm", "--control", &control, "-B", "daily"];
        let disks = ["--verify=all", "system=one", "data=two", &repository];
        nbd_cli(&[&arguments[..], &disks].concat())
    };
    let judge = |is_incremental: bool| {
        let made = backup().success();
        let made: Value = serde_json::from_str(&made).expect("JSON");
        assert_eq!(made["incremental"], is_incremental, "{made}");
        for (name, export) in [("system", "one"), ("data", "two")] {
            let backup = format!("backup:{repository}/vm@latest#{name}");
            let compare = ["image", "compare", "-f", "raw", "-F", "raw", &uri(export), &backup];
            nbd_cli(&compare).success();
        }
        made["read"].as_u64().expect("a number")
    };
    write("one", "write -P 1 0 5M");
    write("two", "write -P 2 1M 5M");
    judge(false);
    write("one", "write -P 3 39M 64k");
    write("two", "write -P 4 0 64k");
    assert!(judge(true) <= 128 << 10);
    // One that cannot be started leaves the other as it was.
    let arguments = ["backup", "--name", "vm", "--control", &control, "-B", "daily", "system=one"];
    for (export, why) in [("nowhere", "'nowhere'"), ("one", "two checkpoints of 'one'")] {
        let failed = nbd_cli(&[&arguments[..], &[&format!("data={export}"), &repository]].concat());
        assert!(failed.code == Some(1) && failed.stderr.contains(why), "{failed:?}");
    }
    write("two", "write -P 5 2M 64k");
    assert!(judge(true) <= 64 << 10);
    server.end();
}

/// A client writes a number to the first disk, and when that was answered to the second one: at no
/// moment has the second one a higher number.
#[test]
fn disks_of_a_server_are_never_of_two_moments() {
    let directory = Disk::sparse();
    let repository = directory.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    let control = directory.beside("control");
    let (one, two) = (directory.blank("one", 1 << 20), directory.blank("two", 1 << 20));
    let server =
        Server::ours(&["--control", &control, &format!("one={one}"), &format!("two={two}")]);
    let client = |name: &str| {
        let uri = server.uri_of(name).parse().expect("a URI");
        Client::connect(&Connector::new(uri)).expect("the server")
    };
    let (first, second) = (client("one"), client("two"));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1u64.. {
                for disk in [&first, &second] {
                    let bytes = number.to_le_bytes().repeat(64);
                    disk.write(0, bytes.into(), Durability::Cached).expect("it is written");
                }
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let mut seen = Vec::new();
        for round in 0..8 {
            let arguments = ["backup", "--name", "vm", "--control", &control, "a=one", "b=two"];
            nbd_cli(&[&arguments[..], &[&repository]].concat()).success();
            let numbers = ["a", "b"].map(|disk| {
                let path = directory.beside(&format!("{disk}{round}"));
                let backup = format!("backup:{repository}/vm@latest#{disk}");
                nbd_cli(&["restore", &backup, &path]).success();
                let bytes = std::fs::read(&path).expect("a disk");
                u64::from_le_bytes(*bytes.first_chunk().expect("eight bytes"))
            });
            seen.push(numbers);
        }
        is_over.store(true, Ordering::Relaxed);
        for [a, b] in &seen {
            assert!(b <= a && *a <= b + 1, "{seen:?}");
        }
        assert!(seen[0][0] < seen[7][0], "nothing was written meanwhile: {seen:?}");
    });
    server.end();
}

/// A backup of one name, of disks in files.
struct Lab {
    disk: Disk,
    repository: String,
}

impl Lab {
    fn new() -> Self {
        let disk = Disk::sparse();
        let repository = disk.beside("repository");
        nbd_cli(&["repo", "init", &repository]).success();
        Self { disk, repository }
    }

    /// Makes a file of noise, which does not compress.
    fn noise(&self, name: &str, length: usize) -> String {
        let path = self.disk.beside(name);
        let seed = name.bytes().fold(0, |seed: u64, byte| (seed << 8) ^ u64::from(byte));
        std::fs::write(&path, noise(length, seed)).expect("room");
        path
    }

    fn backup<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        let command = ["backup", "--json", "--name", "vm"].map(OsStr::new);
        let arguments = arguments.iter().map(AsRef::as_ref);
        let arguments = command.into_iter().chain(arguments).chain([self.repository.as_ref()]);
        nbd_cli(&arguments.collect::<Vec<&OsStr>>())
    }

    /// Makes a backup of files by their names; returns the bytes that it added.
    #[track_caller]
    fn added(&self, disks: &[(&str, &str)]) -> u64 {
        let named: Vec<_> = disks.iter().map(|(name, path)| format!("{name}={path}")).collect();
        let made = self.backup(&[&named[..], &["--verify=all".to_owned()]].concat()).success();
        let made: Value = serde_json::from_str(&made).expect("JSON");
        for (name, path) in disks {
            let backup = format!("backup:{}/vm#{name}", self.repository);
            nbd_cli(&["image", "compare", "-f", "raw", "-F", "raw", path, &backup]).success();
        }
        made["added"].as_u64().expect("a number")
    }
}

#[test]
fn disks_come_go_and_grow_and_nothing_is_sent_again() {
    let lab = Lab::new();
    let [one, two, three] = ["one", "two", "three"].map(|name| lab.noise(name, 1_000_001));
    assert!(lab.added(&[("one", &one), ("two", &two), ("three", &three)]) > 3_000_000);
    // In any order, without the first or the last, and all again.
    assert!(lab.added(&[("three", &three), ("one", &one), ("two", &two)]) < 100_000);
    assert!(lab.added(&[("two", &two), ("three", &three)]) < 200_000);
    let said = lab.backup(&[format!("two={two}")]).stderr;
    assert!(said.contains("has disks that this one has not: three"), "{said}");
    assert!(lab.added(&[("two", &two)]) < 50_000);
    let grown = lab.noise("two", 1_500_000);
    assert!(lab.added(&[("two", &grown), ("new", &one)]) > 500_000);
    let added = lab.added(&[("two", &grown), ("new", &one), ("three", &three)]);
    assert!((1_000_000..1_300_000).contains(&added), "{added}: only the third one");
    let cut = lab.noise("two", 700_000);
    assert!(lab.added(&[("two", &cut), ("three", &three), ("new", &one)]) < 300_000);
    // One disk without a name, and with it again.
    lab.backup(&[&*cut, "--verify"]).success();
    nbd_cli(&["restore", &format!("backup:{}/vm@latest", lab.repository), "null:"]).success();
    lab.added(&[("two", &cut)]);
    let checked = nbd_cli(&["repo", "check", "--read-data", &lab.repository]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
}

#[test]
fn names_of_disks_lead_nowhere_else() {
    let lab = Lab::new();
    let path = lab.noise("disk", 1000);
    let (long, named) = ("n".repeat(300), |name: &str| format!("{name}={path}"));
    for wrong in ["..", ".", "a#b", "a@b", "a:b", "a\nb", &long] {
        says(lab.backup(&[named(wrong)]), &["a name of its own"]);
    }
    says(lab.backup(&[named("a"), named("a")]), &["a name of its own"]);
    // Neither a path nor bytes that are not UTF-8 can be a name.
    says(lab.backup(&[named("a"), path.clone()]), &["has no name"]);
    says(lab.backup(&[named("a"), named("../x")]), &["has no name"]);
    let mut bytes = b"\xff=".to_vec();
    bytes.extend_from_slice(path.as_bytes());
    let bytes = OsStr::from_bytes(&bytes);
    says(lab.backup(&[OsStr::new(&named("a")), bytes]), &["has no name"]);
    says(lab.backup(&[&*path, &path]), &["DISK=SOURCE"]);
    let export = ["--export", "vm", "--control", &path];
    says(lab.backup(&[&export[..], &[&named("a")]].concat()), &["not both"]);
    says(nbd_cli(&["backup", "nbd://localhost/a", "b.qcow2", "c"]), &["one argument too many"]);
    says(nbd_cli(&["backup", "--control", &path, "b.qcow2"]), &["--export NAME"]);
    assert_eq!(json(&["repo", "list", "--json", &lab.repository])["sessions"][0], Value::Null);
    // What looks odd and leads nowhere is a name like any other.
    let odd = ["-rf", "...", " a b ", "\u{fc}", "$(id)", "*"];
    let named: Vec<_> = odd.iter().map(|name| named(name)).collect();
    let named = [&["--".to_owned()], &named[..]].concat();
    lab.backup(&named).success();
    let said = nbd_cli(&["repo", "list", &lab.repository]).success();
    assert!(said.contains("(-rf, ...,  a b , \u{fc}, $(id), *)"), "{said}");
    let folder = lab.disk.beside("folder");
    std::fs::create_dir(&folder).expect("a folder");
    nbd_cli(&["restore", &format!("backup:{}/vm", lab.repository), &folder]).success();
    let mut restored: Vec<_> = std::fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    restored.sort_unstable();
    let mut expected = odd.map(|name| format!("{name}.img"));
    expected.sort_unstable();
    assert_eq!(restored, expected);
    // Nothing is overwritten.
    let again = nbd_cli(&["restore", &format!("backup:{}/vm", lab.repository), &folder]);
    says(again, &["exists already"]);
}

#[test]
fn a_disk_that_fails_leaves_no_backup() {
    tools!(nbdkit = "nbdkit");
    let lab = Lab::new();
    let (one, two) = (lab.noise("one", 3_000_000), lab.noise("two", 3_000_000));
    let error = ["--filter=error", "file", &two, "error-pread-rate=100%"];
    let broken = Server::nbdkit(&nbdkit, &error);
    let uri = broken.uri();
    let failed = lab.backup(&[format!("one={one}"), format!("two={uri}")]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let list = json(&["repo", "list", "--json", &lab.repository]);
    assert_eq!(list["backups"][0], Value::Null, "{list}");
    assert_eq!(list["sessions"][0], Value::Null, "it has sent no pack: {list}");
    broken.end();
    let added = lab.added(&[("one", &one), ("two", &two)]);
    assert!(added < 6_200_000, "{added}");
    nbd_cli(&["repo", "gc", "--idle", "1ms", &lab.repository]).success();
    let checked = nbd_cli(&["repo", "check", "--read-data", &lab.repository]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
}

#[test]
fn each_disk_of_exported_backups_is_a_chain_of_its_own() {
    tools!(qemu_img = "qemu-img");
    let lab = Lab::new();
    let (one, two) = (lab.noise("one", 1 << 20), lab.noise("two", 2 << 20));
    lab.added(&[("one", &one), ("two", &two)]);
    lab.added(&[("two", &two)]);
    lab.added(&[("one", &two), ("two", &one)]);
    let folder = lab.disk.beside("folder");
    let export = |name: &str, folder: &str| {
        json(&["repo", "export", "--json", &lab.repository, name, folder])
    };
    let files = export("vm", &folder);
    let newest = |files: &Value, name: &str| {
        let paths = files.as_array().expect("a list").iter().map(|it| it["file"].as_str());
        let mut path = paths.map(|path| path.expect("a path").to_owned());
        path.rfind(|path| path.contains(name)).expect("a file of it")
    };
    assert_eq!(files.as_array().map(Vec::len), Some(5), "{files}");
    for (name, path) in [("vm_one-", &two), ("vm_two-", &one)] {
        let file = newest(&files, name);
        let compare = ["image", "compare", "-f", "raw", "-F", "qcow2", path, &file];
        nbd_cli(&compare).success();
        is_clean(&qemu_img, &file);
        nbd_cli(&["restore", &file, "null:"]).success();
    }
    // Called again, it makes nothing, and one disk alone is the same file.
    let again = export("vm#one", &folder);
    let again = again.as_array().expect("a list");
    assert!(again.len() == 2 && again.iter().all(|it| it["new"] == false), "{again:?}");
    let alone = export("vm@latest#two", &lab.disk.beside("alone"));
    assert_eq!(alone.as_array().map(Vec::len), Some(1), "{alone}");
    let missing = ["repo", "export", &lab.repository, "vm#three", &folder];
    says(nbd_cli(&missing), &["no disk 'three'", "one"]);
    // And back: they are other disks, of one identity each.
    for name in ["one", "two"] {
        let file = newest(&files, &format!("vm_{name}-"));
        nbd_cli(&["repo", "import", &lab.repository, "--name", name, &file]).success();
        nbd_cli(&["repo", "import", &lab.repository, "--name", name, &file]).success();
    }
    let imported = json(&["repo", "list", "--json", "--name", "one", &lab.repository]);
    assert_eq!(imported["backups"].as_array().map(Vec::len), Some(2), "{imported}");
    let compare = ["image", "compare", "-f", "raw", "-F", "raw", &one];
    nbd_cli(&[&compare[..], &[&format!("backup:{}/two", lab.repository)]].concat()).success();
}
