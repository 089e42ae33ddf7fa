//! How many requests commands make, and how much memory they take: stores charge for requests, and
//! each waits for a round trip.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nbd_objects::testing::{Contents, Fault, Seen};

use crate::support::{REPOSITORY, Scene, noise};

/// A part of a GiB, in MiB.
const PART: usize = 256;

fn repository() -> Scene {
    let scene = Scene::new(&Contents::default(), None);
    scene.run(&["repo", "init", REPOSITORY]).success();
    scene.store.take_seen();
    scene
}

/// The requests of this kind for a GiB, as far as they are for packs, and all others.
fn per_gib(seen: &[Seen], method: &str) -> usize {
    let seen = seen.iter().filter(|seen| seen.method == method);
    let (packs, others): (Vec<_>, Vec<_>) = seen.partition(|seen| seen.key.contains("/packs/"));
    packs.len() * 1024 / PART + others.len()
}

/// The number of the pack that is read, if it is one.
fn pack(seen: &Seen) -> Option<u32> {
    let is_read = seen.method == "GET" && seen.key.contains("/packs/");
    seen.key.rsplit('/').next().filter(|_| is_read)?.parse().ok()
}

#[test]
fn full_backup_and_its_restore_make_few_requests_and_take_little_memory() {
    let scene = repository();
    let disk = scene.beside("disk");
    std::fs::write(&disk, noise(PART << 20, 11)).expect("room");
    // As many packs as may be are on their way.
    scene.store.fail(|seen| match seen.method == "PUT" {
        true => Fault::Late(100),
        false => Fault::None,
    });
    let peak = peak_of(scene.command(&["backup", "-q", "--name", "vm", &disk, REPOSITORY]));
    assert!(peak <= 256, "backup: {peak} MiB");
    let seen = scene.store.take_seen();
    let puts = per_gib(&seen, "PUT");
    assert!((100..=128).contains(&puts), "{puts} PUTs a GiB: {seen:?}");
    let name = format!("backup:{REPOSITORY}/vm");
    // By then it is known that everything is read in order. The last pack has the pages.
    scene.store.fail(|seen| match pack(seen) {
        Some(5..=24) => Fault::Held,
        _ => Fault::None,
    });
    let peak = std::thread::scope(|scope| {
        let restore = ["restore", "-q", &name, &scene.beside("restored")];
        let restoring = scene.command(&restore);
        let restoring = scope.spawn(|| peak_of(restoring));
        for (count, limit) in [(1, 100), (5, 25)] {
            let start = Instant::now();
            while scene.store.held() < count {
                let held = scene.store.held();
                assert!(start.elapsed().as_secs() < limit, "{held} requests at a time");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        scene.store.fail(|_| Fault::None);
        scene.store.release();
        restoring.join().expect("a restore")
    });
    assert!(peak <= 256, "restore: {peak} MiB");
    let seen = scene.store.take_seen();
    let gets = per_gib(&seen, "GET");
    // How many there are until it is known that everything is read in order depends on how the
    // threads take turns: 145 to 233 were seen. One for each block would be 4096.
    assert!((100..=400).contains(&gets), "{gets} GETs a GiB: {seen:?}");
    let (restored, disk) = (std::fs::read(scene.beside("restored")), std::fs::read(disk));
    assert!(restored.expect("a disk") == disk.expect("a disk"));
}

#[test]
fn collection_reads_each_backup_once() {
    let scene = repository();
    let disk = scene.beside("disk");
    let mut made = Vec::new();
    for seed in 0..5 {
        std::fs::write(&disk, noise(1 << 20, seed)).expect("room");
        let backup = scene.json(&["backup", "--name", "vm", "--json", &disk, REPOSITORY]);
        made.push(backup["id"].as_str().expect("text").to_owned());
    }
    for id in &made[..2] {
        scene.run(&["repo", "forget", REPOSITORY, id]).success();
    }
    scene.store.take_seen();
    scene.run(&["repo", "gc", REPOSITORY]).success();
    let seen = scene.store.take_seen();
    for id in &made {
        let of = |it: &&Seen| it.method == "GET" && it.key.ends_with(&format!("/backups/{id}"));
        assert_eq!(seen.iter().filter(of).count(), 1, "{id}: {seen:?}");
    }
    let lists = seen.iter().filter(|it| it.query.contains("list-type"));
    let lists_of = |folder| {
        lists.clone().filter(|it| it.query.contains(&format!("prefix=repo%2F{folder}"))).count()
    };
    assert_eq!(lists_of("packs"), 1, "{seen:?}");
    assert_eq!(lists_of("backups"), 2, "{seen:?}");
    scene.run(&["repo", "check", "--read-data", REPOSITORY]).success();
}

/// A server that ends with the test.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(scene: &Scene, name: &str) -> Self {
        let socket = scene.beside("socket");
        let mut command = scene.command(&["serve", "--read-only", "--socket", &socket, name]);
        let mut child = command.spawn().expect("the program");
        let mut uri = String::new();
        let stdout = child.stdout.as_mut().expect("its output");
        BufReader::new(stdout).read_line(&mut uri).expect("text");
        Self { child, uri: uri.trim_end().to_owned() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most memory that a process has had, in MiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

#[test]
fn first_bytes_of_a_served_backup_take_few_round_trips() {
    let scene = repository();
    let disk = scene.beside("disk");
    std::fs::write(&disk, noise(64 << 20, 12)).expect("room");
    scene.run(&["backup", "-q", "--name", "vm", &disk, REPOSITORY]).success();
    let server = Server::start(&scene, &format!("backup:{REPOSITORY}/vm"));
    scene.store.take_seen();
    let connector = server.uri.parse().expect("a URI");
    let client = nbd_client::blocking::Client::connect(&connector).expect("a server");
    assert!(client.read(0..4096).expect("data") == noise(4096, 12));
    let seen = scene.store.take_seen();
    assert!((1..=3).contains(&seen.len()), "{seen:?}");
}

#[test]
fn sixteen_tebibytes_take_little_memory() {
    let scene = repository();
    let disk = scene.beside("disk");
    let file = File::create(&disk).expect("a file");
    // The largest file of ext4, where that is the limit.
    let size = (16_u64 << 40) - 4096;
    if file.set_len(size).is_err() {
        eprintln!("skipped: the file system of the temporary directory has no files of 16 TiB");
        return;
    }
    let block = noise(64 << 10, 13);
    for place in 0..400_u64 {
        file.write_all_at(&block, place * (40 << 30)).expect("room");
    }
    let name = format!("backup:{REPOSITORY}/vm");
    for arguments in [
        &["backup", "-q", "--name", "vm", &disk, REPOSITORY][..],
        &["restore", "-q", &name, "null:"],
    ] {
        let peak = peak_of(scene.command(arguments));
        assert!(peak <= 256, "{arguments:?}: {peak} MiB");
    }
    let server = Server::start(&scene, &name);
    scene.run(&["map", &server.uri]).success();
    let peak = peak(server.child.id());
    assert!(peak <= 256, "serve: {peak} MiB");
}

/// Runs a program to its end, and returns the most memory that it had, in MiB.
pub(crate) fn peak_of(mut command: Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a program");
    let mut peak = 0;
    loop {
        // Of one that has ended, nothing is known.
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
        let line = status.ok().and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        peak = peak.max(line.unwrap_or_default() / 1024);
        if let Some(status) = child.try_wait().expect("a child") {
            assert!(status.success() && peak > 0, "{command:?}: {status}");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
