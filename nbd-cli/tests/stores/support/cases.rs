//! The commands that write to a store or a repository, and what holds after each of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nbd_objects::testing::Contents;
use serde_json::Value;

use super::live::{self, Live};
use super::random::noise;
use super::{Outcome, REPOSITORY, Scene};

/// A repository with backups, some of them forgotten, and the disks they were made of.
pub(crate) struct World {
    directory: tempfile::TempDir,
    passphrase: Option<PathBuf>,
    contents: Contents,
    /// The file of each backup that must be there, by its identity.
    backups: BTreeMap<String, &'static str>,
    /// The backup of `vm` that is not the last one.
    older: String,
    /// The key of the second passphrase.
    second_key: String,
    /// The newest file of a chain with the backups of `vm`.
    chain: String,
}

/// The disks in the files of that chain, from the bottom to the top.
const CHAIN: [&str; 2] = ["old", "middle"];

/// Disks that are in one backup.
const SEVERAL: [&str; 2] = ["other", "middle"];

/// MiB of noise in the disks: more than the 8 of a pack, where there is time.
fn noise_len() -> usize {
    if is_thorough() { 9 } else { 2 }
}

impl World {
    pub(crate) fn new(is_encrypted: bool) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, content: &[u8]| {
            std::fs::write(directory.path().join(name), content).expect("room");
        };
        let length = noise_len() << 20;
        let mut disk = noise(length, 1);
        disk.resize(length + (2 << 20), 0);
        disk.extend_from_slice(&[7; 777]);
        write("old", &disk);
        disk[..1 << 20].fill(3);
        write("middle", &disk);
        disk[length..][..1 << 20].copy_from_slice(&noise(1 << 20, 2));
        disk[1 << 20..][..512 << 10].copy_from_slice(&noise(512 << 10, 3));
        write("new", &disk);
        write("other", &noise(1 << 20, 4));
        write("passphrase", b"correct horse");
        write("second", b"battery staple");
        write("third", b"tape and glue");
        let passphrase = is_encrypted.then(|| directory.path().join("passphrase"));
        let mut world = Self {
            directory,
            passphrase,
            contents: Contents::default(),
            backups: BTreeMap::new(),
            older: String::new(),
            second_key: String::new(),
            chain: String::new(),
        };
        world.fill();
        world
    }

    fn fill(&mut self) {
        let scene = self.scene(&Contents::default());
        let encrypt: &[&str] = if self.passphrase.is_some() { &["--encrypt"] } else { &[] };
        scene.run(&[&["repo", "init", REPOSITORY], encrypt].concat()).success();
        let back_up = |name: &str, disk: &str| {
            let made =
                scene.json(&["backup", "--name", name, "--json", &self.path(disk), REPOSITORY]);
            made["id"].as_str().expect("text").to_owned()
        };
        // Its packs are garbage.
        let gone = back_up("gone", "new");
        scene.run(&["repo", "forget", REPOSITORY, &gone]).success();
        let disks = SEVERAL.map(|disk| format!("{disk}={}", self.path(disk)));
        let several = ["backup", "--name", "several", "--json", &disks[0], &disks[1], REPOSITORY];
        let several = scene.json(&several)["id"].as_str().expect("text").to_owned();
        let (older, middle) = (back_up("vm", "old"), back_up("vm", "middle"));
        let other = back_up("other", "other");
        self.older.clone_from(&older);
        self.backups = BTreeMap::from([(older, "old"), (middle, "middle"), (other, "other")]);
        // Its disks have the names of their files.
        self.backups.insert(several, "");
        let decrypt: &[&str] = if self.passphrase.is_some() { &["--decrypt"] } else { &[] };
        let export = ["repo", "export", "--json", REPOSITORY, "vm", &self.path("chain")];
        let files = scene.json(&[&export[..], decrypt].concat());
        self.chain = files[1]["file"].as_str().expect("a path").to_owned();
        if self.passphrase.is_some() {
            let add = ["repo", "key", "add", "--new-passphrase-file", &self.path("second")];
            scene.run(&[&add[..], &[REPOSITORY]].concat()).success();
            let keys = scene.run(&["repo", "key", "list", REPOSITORY]).success();
            let mut keys = keys.lines().filter_map(|line| line.split_whitespace().next());
            self.second_key = keys.next_back().expect("a key").to_owned();
        }
        self.contents = scene.store.contents();
    }

    /// A path of a disk or passphrase.
    pub(crate) fn path(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        path.to_str().expect("a temporary directory with a plain name").to_owned()
    }

    pub(crate) fn scene(&self, contents: &Contents) -> Scene {
        Scene::new(contents, self.passphrase.as_deref())
    }

    /// Checks that the backups that must be there have the content of their disks, that any other
    /// one has that of the new disk, and that the program finds nothing wrong.
    #[track_caller]
    pub(crate) fn judge(&self, scene: &Scene, forgettable: Option<&str>, context: &str) -> usize {
        let list = scene.json(&["repo", "list", "--json", REPOSITORY]);
        let mut missing = self.backups.clone();
        missing.retain(|id, _| Some(&**id) != forgettable);
        let (mut new, mut imported) = (0, CHAIN.iter());
        for backup in list["backups"].as_array().expect("a list") {
            if backup["forgotten"] == true {
                continue;
            }
            let id = backup["id"].as_str().expect("text");
            missing.remove(id);
            let disk = match backup["name"] == "imported" {
                true => Some(*imported.next().expect("no more than was imported")),
                false => self.backups.get(id).copied(),
            };
            let name = backup["name"].as_str().expect("text");
            let name = format!("backup:{REPOSITORY}/{name}@{id}");
            // Each of several has the name of its file.
            let several = backup["disks"].as_array().expect("a list").iter();
            let several = several.map(|disk| disk["name"].as_str().expect("text"));
            let mut disks: Vec<_> = several.map(|it| (it, format!("{name}#{it}"))).collect();
            new += usize::from(disk.is_none());
            if disks.is_empty() {
                disks.push((disk.unwrap_or("new"), name));
            }
            for (disk, name) in disks {
                let compare = ["image", "compare", "-f", "raw", &self.path(disk), &name];
                let compared = scene.run(&compare);
                assert!(compared.is_success(), "{context}: {name}: {compared:?}");
            }
        }
        assert!(missing.is_empty(), "{context}: {missing:?} are not in {list}");
        let checked = scene.run(&["repo", "check", "--read-data", REPOSITORY]);
        assert!(checked.is_success(), "{context}: {checked:?}");
        new
    }
}

/// A command that writes.
pub(crate) struct Case<'a> {
    pub(crate) name: &'static str,
    pub(crate) contents: Contents,
    pub(crate) arguments: Vec<String>,
    /// What has to run meanwhile.
    pub(crate) prepare: fn(&Scene) -> Option<Live>,
    /// Judges what is there after a run that may have been interrupted, without changing it.
    pub(crate) after: Judgement<'a>,
    /// Judges the outcome of another run, and what is there then.
    pub(crate) again: Judgement<'a>,
}

type Judgement<'a> = Box<dyn Fn(&Scene, &Outcome, &str) + 'a>;

/// Every command, with a repository and disks for it.
pub(crate) fn cases(world: &World) -> Vec<Case<'_>> {
    let mut cases = vec![
        push(world),
        full(world),
        next(world),
        forget(world),
        prune(world),
        gc(world),
        compact(world),
        gc_after_compact(world),
        several(world),
        restore(world),
        restore_several(world),
        export(world),
        import(world),
    ];
    cases.extend([init(world), live::case(), live::several()]);
    if world.passphrase.is_some() {
        cases.extend([key_add(world), key_remove(world)]);
    }
    cases
}

fn case<'a>(
    world: &'a World,
    name: &'static str,
    arguments: &[&str],
    forgettable: Option<&'a str>,
    again: impl Fn(&Scene, &Outcome, &str) + 'a,
) -> Case<'a> {
    Case {
        name,
        prepare: |_| None,
        contents: world.contents.clone(),
        arguments: arguments.iter().map(|&it| it.to_owned()).collect(),
        after: Box::new(move |scene, _, context| {
            world.judge(scene, forgettable, context);
        }),
        again: Box::new(again),
    }
}

fn push(world: &World) -> Case<'_> {
    const URL: &str = "s3://bucket/images/new.img";
    let is_file = |scene: &Scene, context: &str| {
        let file = std::fs::read(world.path("new")).expect("a disk");
        let object = scene.store.object("/bucket/images/new.img");
        assert!(object.as_ref().is_none_or(|object| *object == file), "{context}");
        object.is_some()
    };
    Case {
        name: "image push",
        prepare: |_| None,
        contents: Contents::default(),
        arguments: ["image", "push", "-q", &world.path("new"), URL].map(str::to_owned).into(),
        after: Box::new(move |scene, outcome, context| {
            assert!(is_file(scene, context) || !outcome.is_success(), "{context}: {outcome:?}");
        }),
        again: Box::new(move |scene, outcome, context| {
            let is_done = outcome.is_success() || outcome.stderr.contains("--replace");
            assert!(is_done && is_file(scene, context), "{context}: {outcome:?}");
        }),
    }
}

fn init(world: &World) -> Case<'_> {
    let encrypt = world.passphrase.is_some().then(|| "--encrypt".to_owned());
    let opens = |scene: &Scene| scene.run(&["repo", "check", "--read-data", REPOSITORY]);
    Case {
        name: "repo init",
        prepare: |_| None,
        contents: Contents::default(),
        arguments: ["repo", "init", REPOSITORY]
            .map(str::to_owned)
            .into_iter()
            .chain(encrypt)
            .collect(),
        after: Box::new(move |scene, outcome, context| {
            let opened = opens(scene);
            let is_none = opened.stderr.contains("there is no repository");
            assert!(opened.is_success() || is_none, "{context}: {opened:?}");
            assert!(opened.is_success() || !outcome.is_success(), "{context}: {opened:?}");
        }),
        again: Box::new(move |scene, outcome, context| {
            let is_done =
                outcome.is_success() || outcome.stderr.contains("is a repository already");
            assert!(is_done, "{context}: {outcome:?}");
            opens(scene).success();
        }),
    }
}

/// The first backup of a disk.
fn full(world: &World) -> Case<'_> {
    backup(world, "backup, full", "fresh")
}

/// A backup that has a base.
fn next(world: &World) -> Case<'_> {
    backup(world, "backup, incremental", "vm")
}

/// Two disks, of which the repository has parts of one.
fn several(world: &World) -> Case<'_> {
    let disks = ["new", "other"].map(|disk| format!("{disk}={}", world.path(disk)));
    backup_of(world, "backup, several", "fresh", &[&disks[0], &disks[1]])
}

fn backup<'a>(world: &'a World, title: &'static str, name: &str) -> Case<'a> {
    backup_of(world, title, name, &[&world.path("new")])
}

fn backup_of<'a>(world: &'a World, title: &'static str, name: &str, disks: &[&str]) -> Case<'a> {
    let arguments = [&["backup", "-q", "--name", name], disks, &[REPOSITORY]].concat();
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        assert!(world.judge(scene, None, context) >= 1, "{context}: it is not there");
        // What an interrupted session left is swept up, and nothing else.
        scene.run(&["repo", "gc", "--idle", "1ms", REPOSITORY]).success();
        assert!(world.judge(scene, None, context) >= 1, "{context}: gc took it");
        is_swept(scene, context);
    };
    let mut case = case(world, title, &arguments, None, again);
    case.after = Box::new(move |scene, outcome, context| {
        let made = world.judge(scene, None, context);
        assert!(made == 1 || !outcome.is_success(), "{context}: {made} backups: {outcome:?}");
    });
    case
}

/// Nothing is left of sessions, lists and garbage.
#[track_caller]
fn is_swept(scene: &Scene, context: &str) {
    let list = scene.json(&["repo", "list", "--json", REPOSITORY]);
    assert_eq!(list["sessions"], Value::Array(Vec::new()), "{context}");
    let checked = scene.json(&["repo", "check", "--json", REPOSITORY]);
    assert_eq!(checked["packs-unneeded"], 0, "{context}: {checked}");
    let keys = scene.store.keys();
    assert!(!keys.iter().any(|key| key.contains("/condemned/")), "{context}: {keys:?}");
}

fn forget(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        let is_done = outcome.is_success() || outcome.stderr.contains("there is no backup");
        assert!(is_done, "{context}: {outcome:?}");
        is_forgotten(world, scene, context);
    };
    case(
        world,
        "repo forget",
        &["repo", "forget", REPOSITORY, &world.older],
        Some(&world.older),
        again,
    )
}

fn prune(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        is_forgotten(world, scene, context);
    };
    case(
        world,
        "repo prune",
        &["repo", "prune", "--keep-last", "1", REPOSITORY],
        Some(&world.older),
        again,
    )
}

#[track_caller]
fn is_forgotten(world: &World, scene: &Scene, context: &str) {
    let list = scene.json(&["repo", "list", "--json", REPOSITORY]);
    let mut backups = list["backups"].as_array().expect("a list").iter();
    assert!(
        backups.all(|it| it["id"] != *world.older || it["forgotten"] == true),
        "{context}: {list}"
    );
}

fn gc(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        world.judge(scene, None, context);
        is_swept(scene, context);
    };
    case(world, "repo gc", &["repo", "gc", "--idle", "1ms", REPOSITORY], None, again)
}

const COMPACT: [&str; 6] = ["repo", "compact", "-q", "--max-unused", "0%", REPOSITORY];

/// What is there when the older backup of `vm` is forgotten: a part of its packs is needed.
fn to_compact(world: &World) -> Scene {
    let scene = world.scene(&world.contents);
    scene.run(&["repo", "forget", REPOSITORY, &world.older]).success();
    scene
}

fn compact(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        // The first one ends what was interrupted, the second one sweeps what that left.
        for _ in 0..2 {
            scene.run(&["repo", "gc", "--idle", "1ms", REPOSITORY]).success();
            world.judge(scene, Some(&world.older), context);
        }
        is_swept(scene, context);
        is_compacted(scene, context);
    };
    let mut case = case(world, "repo compact", &COMPACT, Some(&world.older), again);
    case.contents = to_compact(world).store.contents();
    case
}

/// Every mark is that of a compaction, and nothing is left to compact.
#[track_caller]
fn is_compacted(scene: &Scene, context: &str) {
    let keys = scene.store.keys();
    let marks = keys.iter().filter(|key| key.contains("/moved/")).count();
    assert_eq!(marks, 1, "{context}: {keys:?}");
    let left = ["repo", "compact", "--json", "--dry-run", "--max-unused", "20%", REPOSITORY];
    assert_eq!(scene.json(&left)["packs"], 0, "{context}");
}

/// A collector that finds packs of before a compaction.
fn gc_after_compact(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        world.judge(scene, Some(&world.older), context);
        is_swept(scene, context);
        is_compacted(scene, context);
    };
    let gc = ["repo", "gc", "--idle", "1ms", REPOSITORY];
    let mut case = case(world, "repo gc, compacted", &gc, Some(&world.older), again);
    let scene = to_compact(world);
    scene.run(&COMPACT).success();
    case.contents = scene.store.contents();
    case
}

fn restore(world: &World) -> Case<'_> {
    let name = format!("backup:{REPOSITORY}/vm@latest");
    // A file of this name is complete, whenever it is there.
    let is_there = |scene: &Scene, context: &str| {
        let Ok(restored) = std::fs::read(scene.beside("restored")) else { return false };
        assert!(restored == std::fs::read(world.path("middle")).expect("a disk"), "{context}");
        true
    };
    let arguments = ["restore", &name, "{here}/restored"];
    let once_more = arguments.map(str::to_owned);
    let again = move |scene: &Scene, outcome: &Outcome, context: &str| {
        if outcome.stderr.contains("restored.partial' is left over") {
            std::fs::remove_file(scene.beside("restored.partial")).expect("it is left over");
            scene.run(&once_more).success();
        } else {
            let is_done = outcome.is_success() || outcome.stderr.contains("exists already");
            assert!(is_done, "{context}: {outcome:?}");
        }
        assert!(is_there(scene, context), "{context}");
    };
    let mut case = case(world, "restore", &arguments, None, again);
    case.after = Box::new(move |scene, outcome, context| {
        assert!(is_there(scene, context) || !outcome.is_success(), "{context}: {outcome:?}");
        world.judge(scene, None, context);
    });
    case
}

/// All disks of a backup.
fn restore_several(world: &World) -> Case<'_> {
    // A file of this name is complete, whenever it is there.
    let count = |scene: &Scene, context: &str| {
        let is_there = |disk: &&&str| {
            let Ok(restored) = std::fs::read(scene.beside(&format!("folder/{disk}.img"))) else {
                return false;
            };
            assert!(restored == std::fs::read(world.path(disk)).expect("a disk"), "{context}");
            true
        };
        SEVERAL.iter().filter(is_there).count()
    };
    let arguments = ["restore", &format!("backup:{REPOSITORY}/several@latest"), "{here}/folder"];
    let again = move |scene: &Scene, outcome: &Outcome, context: &str| {
        let said = &outcome.stderr;
        if said.contains(".partial' is left over") || said.contains("exists already") {
            for name in SEVERAL {
                let _ = std::fs::remove_file(scene.beside(&format!("folder/{name}.img.partial")));
                if !Path::new(&scene.beside(&format!("folder/{name}.img"))).exists() {
                    let disk = format!("backup:{REPOSITORY}/several@latest#{name}");
                    let to = format!("{{here}}/folder/{name}.img");
                    scene.run(&["restore", &disk, &to]).success();
                }
            }
        } else {
            assert!(outcome.is_success(), "{context}: {outcome:?}");
        }
        assert_eq!(count(scene, context), SEVERAL.len(), "{context}");
    };
    let mut case = case(world, "restore, several", &arguments, None, again);
    case.prepare = |scene| {
        std::fs::create_dir(scene.beside("folder")).expect("a folder");
        None
    };
    case.after = Box::new(move |scene, outcome, context| {
        let is_whole = count(scene, context) == SEVERAL.len();
        assert!(is_whole || !outcome.is_success(), "{context}: {outcome:?}");
        world.judge(scene, None, context);
    });
    case
}

/// All backups of a disk as a chain of files.
fn export(world: &World) -> Case<'_> {
    // A file of such a name is complete, whenever it is there.
    let files = |scene: &Scene, context: &str| {
        let Ok(entries) = std::fs::read_dir(scene.beside("chain")) else { return 0 };
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let complete = paths.filter(|path| path.extension().is_some_and(|it| it == "qcow2"));
        let is_good = |path: PathBuf| {
            let path = path.to_str().expect("a plain name");
            let disk = world.backups.iter().find(|(id, _)| path.contains(&***id));
            let disk = world.path(disk.expect("a file of a backup").1);
            let compared = scene.run(&["image", "compare", "-f", "raw", &disk, path]);
            assert!(compared.is_success(), "{context}: {path}: {compared:?}");
            assert!(scene.run(&["image", "check", path]).is_success(), "{context}: {path}");
        };
        complete.map(is_good).count()
    };
    let decrypt = world.passphrase.is_some().then_some("--decrypt");
    let arguments = ["repo", "export", "-q", REPOSITORY, "vm", "{here}/chain"];
    let arguments: Vec<_> = arguments.into_iter().chain(decrypt).collect();
    let again = move |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        assert_eq!(files(scene, context), 2, "{context}");
        let left = std::fs::read_dir(scene.beside("chain")).expect("a folder").count();
        assert_eq!(left, 2, "{context}: nothing is left over");
    };
    let mut case = case(world, "repo export", &arguments, None, again);
    case.after = Box::new(move |scene, outcome, context| {
        assert!(files(scene, context) == 2 || !outcome.is_success(), "{context}: {outcome:?}");
        world.judge(scene, None, context);
    });
    case
}

/// A chain of files as backups of another disk.
fn import(world: &World) -> Case<'_> {
    let count = |scene: &Scene| {
        let list = scene.json(&["repo", "list", "--json", "--name", "imported", REPOSITORY]);
        list["backups"].as_array().map_or(0, Vec::len)
    };
    let again = move |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        assert_eq!(count(scene), CHAIN.len(), "{context}");
        world.judge(scene, None, context);
        scene.run(&["repo", "gc", "--idle", "1ms", REPOSITORY]).success();
        world.judge(scene, None, context);
        is_swept(scene, context);
    };
    let import = ["repo", "import", "-q", REPOSITORY, "--name", "imported", &world.chain];
    let mut case = case(world, "repo import", &import, None, again);
    case.after = Box::new(move |scene, outcome, context| {
        world.judge(scene, None, context);
        assert!(count(scene) == CHAIN.len() || !outcome.is_success(), "{context}: {outcome:?}");
    });
    case
}

fn key_add(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        assert!(outcome.is_success(), "{context}: {outcome:?}");
        let third = ["--passphrase-file", &world.path("third")];
        scene.run(&[&["repo", "list", REPOSITORY], &third[..]].concat()).success();
        let keys = scene.run(&["repo", "key", "list", REPOSITORY]).success();
        assert_eq!(keys.lines().count(), 3, "{context}: one for each passphrase: {keys}");
        world.judge(scene, None, context);
    };
    let add = ["repo", "key", "add", "--new-passphrase-file", &world.path("third"), REPOSITORY];
    case(world, "repo key add", &add, None, again)
}

fn key_remove(world: &World) -> Case<'_> {
    let again = |scene: &Scene, outcome: &Outcome, context: &str| {
        let is_done = outcome.is_success() || outcome.stderr.contains("has no key");
        assert!(is_done, "{context}: {outcome:?}");
        let second = ["--passphrase-file", &world.path("second")];
        let opened = scene.run(&[&["repo", "list", REPOSITORY], &second[..]].concat());
        assert!(opened.stderr.contains("the passphrase is none"), "{context}: {opened:?}");
        world.judge(scene, None, context);
    };
    let remove = ["repo", "key", "remove", REPOSITORY, &world.second_key];
    case(world, "repo key remove", &remove, None, again)
}

/// Whether there is time for all fates of each request, and for large disks.
pub(crate) fn is_thorough() -> bool {
    std::env::var_os("NBD_SEED").is_some()
}
