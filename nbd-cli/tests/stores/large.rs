//! What commands cost in a repository of a large disk with many backups: memory and requests. With
//! `NBD_LARGE=complete` the disk has a TiB, and otherwise 16 GiB.

use std::time::Instant;

use nbd_objects::repo::large::Large;
use nbd_objects::testing::{Contents, Seen};

use crate::counts::peak_of;
use crate::support::{REPOSITORY, Scene};

/// Most memory of any command, in MiB.
const MEMORY_MAX: u64 = 256;
const BACKUPS: u64 = 30;

/// The requests of a command.
struct Cost {
    lists: usize,
    roots: usize,
    packs: usize,
    all: usize,
}

impl Cost {
    fn of(seen: &[Seen]) -> Self {
        let count = |is_it: fn(&Seen) -> bool| seen.iter().filter(|seen| is_it(seen)).count();
        Self {
            lists: count(|it| it.query.contains("list-type")),
            roots: count(|it| it.method == "GET" && it.key.contains("/backups/")),
            packs: count(|it| it.method == "GET" && it.key.contains("/packs/")),
            all: seen.len(),
        }
    }
}

/// Runs a command, and checks its memory.
fn cost(scene: &Scene, arguments: &[&str]) -> Cost {
    scene.store.take_seen();
    let start = Instant::now();
    let peak = peak_of(scene.command(arguments));
    let Cost { lists, roots, packs, all } = Cost::of(&scene.store.take_seen());
    println!(
        "{}: {peak} MiB, {lists} lists, {roots} roots, {packs} reads of packs, {all} requests, {:?}",
        arguments[..2].join(" "),
        start.elapsed()
    );
    assert!(peak <= MEMORY_MAX, "{arguments:?}: {peak} MiB");
    Cost { lists, roots, packs, all }
}

#[test]
fn commands_on_a_large_repository_take_little_memory_and_few_requests() {
    let scene = Scene::new(&Contents::default(), None);
    scene.run(&["repo", "init", REPOSITORY]).success();
    let size: u64 = match std::env::var_os("NBD_LARGE").is_some_and(|it| it == "complete") {
        true => 1 << 40,
        false => 16 << 30,
    };
    let pages = (size >> 25) as usize;
    let large = Large { size, backups: BACKUPS, changed: pages as u64 / 100 + 3 };
    let mut objects = Vec::new();
    let made = large.make(|name, content| objects.push((format!("/bucket/repo/{name}"), content)));
    let made: Vec<_> = made.expect("maps").iter().map(ToString::to_string).collect();
    let packs = objects.iter().filter(|(name, _)| name.contains("/packs/")).count();
    println!("{packs} packs, {pages} pages");
    scene.store.put_all(objects);
    // Each page of the store's answers has 1000 names.
    let lists = packs / 1000 + 8;
    let list = cost(&scene, &["repo", "list", REPOSITORY]);
    assert!(list.all <= BACKUPS as usize + 8, "{} requests", list.all);
    let check = cost(&scene, &["repo", "check", REPOSITORY]);
    assert!(check.lists <= lists && check.roots <= 2 * BACKUPS as usize);
    assert!(check.packs <= pages, "{} reads of packs", check.packs);
    for id in made.iter().skip(1).step_by(2) {
        scene.run(&["repo", "forget", REPOSITORY, id]).success();
    }
    let gc = cost(&scene, &["repo", "gc", REPOSITORY]);
    assert!(gc.lists <= lists && gc.roots <= BACKUPS as usize);
    let compact = ["repo", "compact", "--max-unused", "0%", REPOSITORY];
    let dry = [&compact[..], &["--dry-run"]].concat();
    let live = BACKUPS as usize / 2;
    let planned = cost(&scene, &dry);
    assert!(planned.lists <= lists && planned.roots <= 2 * live && planned.packs <= pages);
    cost(&scene, &compact);
    cost(&scene, &["repo", "gc", REPOSITORY]);
    cost(&scene, &["repo", "check", REPOSITORY]);
}
