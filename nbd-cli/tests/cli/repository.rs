//! Backups in a repository in a folder.

use std::path::Path;

use serde_json::Value;

use crate::support::image::{are_equal, write};
use crate::support::{Disk, Server, json, nbd_cli, peer, says};
use crate::tools;

/// A repository, beside a disk with data.
fn repository(directory: &Disk) -> String {
    let repository = directory.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    repository
}

fn packs(repository: &str) -> Vec<std::path::PathBuf> {
    let sessions = std::fs::read_dir(Path::new(repository).join("packs")).expect("a folder");
    let sessions = sessions.map(|session| session.expect("an entry").path());
    sessions
        .flat_map(|session| std::fs::read_dir(session).expect("a folder"))
        .map(|pack| pack.expect("an entry").path())
        .collect()
}

#[test]
fn backup_of_an_image_is_listed_checked_restored_and_forgotten() {
    let disk = Disk::sparse();
    let repository = repository(&disk);
    says(nbd_cli(&["repo", "init", &repository]), &["is a repository already"]);
    let made =
        json(&["backup", "--name", "vm1", "--verify=all", "--json", disk.path(), &repository]);
    assert_eq!(made["incremental"], false, "{made}");
    let again = json(&["backup", "--name", "vm1", "--json", disk.path(), &repository]);
    assert_eq!(again["base"], made["id"]);
    assert!(again["added"].as_u64() < Some(64 << 10), "{again}");
    let list = json(&["repo", "list", "--json", &repository]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(2), "{list}");
    for nobody in ["sessions", "readers"] {
        assert_eq!(list[nobody].as_array().map(Vec::len), Some(0), "{list}");
    }
    let checked = json(&["repo", "check", "--read-data", "--json", &repository]);
    assert_eq!(checked["problems"], Value::from(Vec::<i32>::new()));

    let restored = disk.beside("restored");
    let name = format!("backup:{repository}/vm1@latest");
    nbd_cli(&["restore", "--verify", &name, &restored]).success();
    disk.assert_equals(&restored);
    // Without the first one, the second is whole.
    let first = format!("vm1@{}", made["id"].as_str().expect("text"));
    nbd_cli(&["repo", "forget", &repository, &first]).success();
    nbd_cli(&["repo", "gc", "--idle", "1ms", &repository]).success();
    nbd_cli(&["restore", &name, "null:"]).success();
    says(nbd_cli(&["restore", &format!("backup:{repository}/{first}"), "null:"]), &["no backup"]);
    says(nbd_cli(&["repo", "prune", &repository]), &["--keep-last"]);
    nbd_cli(&["repo", "prune", "--keep-last", "1", &repository]).success();
    assert_eq!(json(&["repo", "stats", "--json", &repository])["disks"][0]["backups"], 1);
    // What is read stays when it is forgotten, and who reads it is told.
    let program = env!("CARGO_BIN_EXE_nbd-cli");
    let while_read = format!(
        "{program} repo forget {repository} vm1@latest && {program} repo stats {repository}"
    );
    let told = nbd_cli(&["serve", "--read-only", "--run", &while_read, &name]).success();
    let id = again["id"].as_str().expect("text");
    let end = format!(": vm1@{id}, which is forgotten");
    let reader = told.lines().find(|line| line.ends_with(&end)).unwrap_or_else(|| panic!("{told}"));
    assert!(reader.contains("read by process ") && reader.contains(" since 20"), "{told}");
    let stats = json(&["repo", "stats", "--json", &repository]);
    assert_eq!(stats["readers"].as_array().map(Vec::len), Some(0), "{stats}");
    nbd_cli(&["repo", "gc", "--idle", "1ms", &repository]).success();
    assert!(packs(&repository).is_empty());
}

#[test]
fn compaction_says_what_it_frees_and_changes_no_backup() {
    let disk = Disk::sparse();
    let repository = repository(&disk);
    let noise = |seed: u8| -> Vec<u8> {
        let mut state = u64::from(seed);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..2 << 20).map(|_| next()).collect()
    };
    let (file, mut content) = (disk.beside("disk"), noise(1));
    std::fs::write(&file, &content).expect("room");
    let back_up = || json(&["backup", "--name", "vm1", "--json", &file, &repository]);
    let first = back_up();
    content[..1 << 20].copy_from_slice(&noise(2)[..1 << 20]);
    std::fs::write(&file, &content).expect("room");
    let second = back_up();
    let compact = ["repo", "compact", "--json", &repository];
    let nothing = json(&compact);
    assert_eq!((&nothing["packs"], &nothing["backups"]), (&0.into(), &0.into()), "{nothing}");
    let first = first["id"].as_str().expect("text");
    nbd_cli(&["repo", "forget", &repository, first]).success();
    let planned = json(&["repo", "compact", "--json", "--dry-run", &repository]);
    assert_eq!((&planned["packs"], &planned["backups"]), (&1.into(), &0.into()), "{planned}");
    let told = nbd_cli(&["repo", "compact", &repository]).success();
    assert!(
        told.contains("moved: 1 backup,") && told.contains("'repo gc' frees 2.0 MiB"),
        "{told}"
    );
    let listed = json(&["repo", "list", "--json", &repository]);
    assert_eq!(listed["backups"].as_array().map(Vec::len), Some(2), "{listed}");
    let collected = json(&["repo", "gc", "--json", &repository]);
    assert!(collected["bytes"].as_u64() > Some(2 << 20), "{collected}");
    let restored = disk.beside("restored");
    let id = second["id"].as_str().expect("text");
    nbd_cli(&["restore", &format!("backup:{repository}/vm1@{id}"), &restored]).success();
    assert!(std::fs::read(&restored).expect("a disk") == content);
    // What stands for a compaction is no backup.
    let compaction = std::fs::read_dir(Path::new(&repository).join("moved")).expect("a folder");
    let names = compaction.map(|entry| entry.expect("an entry").file_name());
    let names: Vec<_> = names.map(|name| name.into_string().expect("text")).collect();
    assert_eq!(names.len(), 1);
    let forget = ["repo", "forget", &repository, &names[0]];
    says(nbd_cli(&forget), &["is a compaction", "'repo gc' removes it"]);
    let third = back_up();
    assert!(third["added"].as_u64() < Some(64 << 10), "{third}");
    nbd_cli(&["repo", "check", "--read-data", &repository]).success();
}

#[test]
fn compaction_that_runs_or_was_interrupted_is_shown_as_one() {
    let disk = Disk::sparse();
    let repository = repository(&disk);
    let of = |name: &str| {
        let record = format!("{{\"name\":\"{name}\",\"host\":\"h1\",\"time\":1000}}");
        [&b"nbdsess1\0\0\0\0\0"[..], record.as_bytes()].concat()
    };
    let sessions = Path::new(&repository).join("sessions");
    std::fs::create_dir_all(&sessions).expect("a folder");
    let (backup, compaction) = ("0".repeat(31) + "1", "0".repeat(31) + "2");
    std::fs::write(sessions.join(&backup), of("vm1")).expect("room");
    std::fs::write(sessions.join(&compaction), of("@compact")).expect("room");
    let since = "h1 since 1970-01-01";
    for show in ["list", "stats"] {
        let shown = nbd_cli(&["repo", show, &repository]).success();
        assert!(!shown.contains("@compact"), "{shown}");
        for line in [
            format!("{backup}  being made or interrupted: vm1 on {since}"),
            format!("{compaction}  a compaction that runs or was interrupted, on {since}"),
        ] {
            assert!(shown.lines().any(|it| it.starts_with(&line)), "{show}: {shown}");
        }
        let shown = json(&["repo", show, "--json", &repository]);
        let sessions = &shown["sessions"];
        assert_eq!((&sessions[0]["kind"], &sessions[0]["name"]), (&"backup".into(), &"vm1".into()));
        assert_eq!(
            (&sessions[1]["kind"], sessions[1]["name"].is_null()),
            (&"compaction".into(), true)
        );
    }
    for (id, what) in [(&backup, "backup"), (&compaction, "compaction")] {
        let forget = ["repo", "forget", &repository, id];
        says(nbd_cli(&forget), &[&format!("is a {what} that"), "'repo forget-session' ends it"]);
    }
    nbd_cli(&["repo", "forget-session", &repository, &backup]).success();
    let gc = ["repo", "gc", "--wait", "1ms", "--idle", "60m", &repository];
    says(
        nbd_cli(&gc),
        &[&format!("the compaction {compaction} is being made"), "end the compaction"],
    );
    let gc = ["repo", "gc", "--idle", "1ms", &repository];
    let told = nbd_cli(&gc).success();
    assert!(told.contains(&format!("ended: the interrupted session {compaction}")), "{told}");
}

#[test]
fn damaged_small_objects_stop_no_list_and_gc_says_what_to_do() {
    let disk = Disk::sparse();
    let repository = repository(&disk);
    let back_up = || {
        let made = json(&["backup", "--name", "vm1", "--json", disk.path(), &repository]);
        made["id"].as_str().expect("text").to_owned()
    };
    let (gone, kept) = (back_up(), back_up());
    nbd_cli(&["repo", "forget", &repository, &gone]).success();
    let of = |place: &str| Path::new(&repository).join(place);
    let write = |place: &str, content: &[u8]| {
        let path = of(place);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("it is made");
        std::fs::write(path, content).expect("room");
    };
    let (pin, session) = ("00000000000000000000000000000001", "00000000000000000000000000000002");
    let gc = ["repo", "gc", "--idle", "1ms", &repository];
    let before = packs(&repository).len();
    // Empty, of another kind, or longer than any.
    for content in [&b""[..], b"{\"backup\":7}", &vec![b'x'; 100_000]] {
        write(&format!("pins/{pin}"), content);
        write(&format!("sessions/{session}"), content);
        for show in ["list", "stats"] {
            let shown = nbd_cli(&["repo", show, &repository]).success();
            for line in
                [format!("{pin}  damaged: a reader"), format!("{session}  damaged: a backup")]
            {
                assert!(shown.lines().any(|it| it.starts_with(&line)), "{show}: {shown}");
            }
            assert!(shown.contains("vm1"), "{shown}");
        }
        let list = json(&["repo", "list", "--json", &repository]);
        assert!(list["readers"][0]["backup"].is_null(), "{list}");
        assert_eq!(list["sessions"][0]["damaged"], true, "{list}");
        let remedy = format!("'repo forget-session {pin}'");
        says(nbd_cli(&gc), &[&format!("pins/{pin}"), "nothing was deleted", &remedy]);
        assert_eq!(packs(&repository).len(), before);
        nbd_cli(&["restore", "-q", &format!("backup:{repository}/vm1"), "null:"]).success();
        nbd_cli(&["repo", "forget-session", &repository, pin]).success();
        nbd_cli(&["repo", "gc", "--dry-run", &repository]).success();
    }
    // What the tombstone needs might be what a reader has pinned.
    write(&format!("backups/{gone}"), b"nonsense");
    let remedy = format!("'repo forget --damaged {gone}'");
    says(nbd_cli(&gc), &[&gone, "nothing was deleted", &remedy]);
    let stats = json(&["repo", "stats", "--json", &repository]);
    assert_eq!(stats["damaged"][0]["id"], *gone, "{stats}");
    let shown = nbd_cli(&["repo", "stats", &repository]).success();
    assert!(shown.contains(&format!("{gone}  damaged: ")), "{shown}");
    nbd_cli(&["repo", "forget", "--damaged", &repository, &gone]).success();
    // The session of which nothing is known gives no sign of life.
    let collected = nbd_cli(&gc).success();
    assert!(
        collected.contains(&format!("ended: the interrupted session {session}")),
        "{collected}"
    );
    nbd_cli(&["restore", "-q", &format!("backup:{repository}/vm1@{kept}"), "null:"]).success();
    let checked = json(&["repo", "check", "--read-data", "--json", &repository]);
    assert_eq!(checked["problems"], Value::from(Vec::<i32>::new()), "{checked}");
}

#[test]
fn damaged_packs_are_named_and_the_rest_is_restored() {
    let disk = Disk::sparse();
    let repository = repository(&disk);
    nbd_cli(&["backup", "--name", "vm1", disk.path(), &repository]).success();
    let pack = packs(&repository).pop().expect("a pack");
    let mut content = std::fs::read(&pack).expect("a pack");
    content[5] ^= 1;
    std::fs::write(&pack, content).expect("it is written");
    let session = pack.parent().and_then(Path::file_name).expect("a name").to_string_lossy();
    let checked = nbd_cli(&["repo", "check", "--read-data", &repository]);
    assert_eq!(checked.code, Some(1));
    assert!(
        checked.stdout.contains(&*session) && checked.stdout.contains("vm1@"),
        "{}",
        checked.stdout
    );
    let name = format!("backup:{repository}/vm1");
    let restored = disk.beside("restored");
    says(nbd_cli(&["restore", &name, &restored]), &[&session]);
    assert!(!Path::new(&restored).exists());
    let list = json(&["repo", "list", "--json", &repository]);
    assert_eq!(list["readers"].as_array().map(Vec::len), Some(0), "{list}");
    let skipped = nbd_cli(&["restore", "--skip-damaged", &name, &restored]);
    assert_eq!(skipped.code, Some(1), "{skipped:?}");
    let said =
        ["1 blocks", "everything else", &*session].iter().all(|it| skipped.stderr.contains(it));
    assert!(said, "{skipped:?}");
    let found = std::fs::read(&restored).expect("it is there");
    let differ = found.iter().zip(disk.content()).filter(|(one, other)| one != other).count();
    assert!(found.len() == disk.content().len() && differ > 0 && differ <= 65536, "{differ}");
}

#[test]
fn encrypted_repository_needs_its_passphrase() {
    let disk = Disk::sparse();
    let (repository, first, second) =
        (disk.beside("repository"), disk.beside("first"), disk.beside("second"));
    std::fs::write(&first, "correct horse\n").expect("it is written");
    std::fs::write(&second, "battery staple").expect("it is written");
    let refused = nbd_cli(&["repo", "init", "--encrypt", &repository]);
    assert!(refused.code == Some(1) && refused.stderr.contains("--passphrase-file"), "{refused:?}");
    says(nbd_cli(&["repo", "init", "--passphrase-file", &first, &repository]), &["add --encrypt"]);
    nbd_cli(&["repo", "init", "--encrypt", "--passphrase-file", &first, &repository]).success();
    let with_first = ["--passphrase-file", &*first];
    nbd_cli(&[&["backup", "--name", "vm1"], &with_first[..], &[disk.path(), &repository]].concat())
        .success();
    says(nbd_cli(&["repo", "list", &repository]), &["--passphrase-file"]);
    says(
        nbd_cli(&["repo", "list", "--passphrase-file", &second, &repository]),
        &["the passphrase is none of"],
    );
    let add = ["repo", "key", "add", "--new-passphrase-file", &second];
    nbd_cli(&[&add[..], &with_first, &[&repository]].concat()).success();
    let restored = disk.beside("restored");
    let name = format!("backup:{repository}/vm1");
    nbd_cli(&["restore", "--passphrase-file", &second, &name, &restored]).success();
    disk.assert_equals(&restored);
}

#[test]
fn incremental_backups_of_a_disk_in_use_are_each_complete() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let repository = repository(&directory);
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &disk, "200M"]);
    write(&qemu_io, &disk, "write -P 1 0 90M");
    let server = Server::ours(&["--control", &control, &format!("vm={disk}")]);
    let write = |command: &str| {
        let said = peer(&qemu_io, &["-f", "raw", "-c", command, server.uri()]);
        assert!(!said.contains("failed"), "{said}");
    };
    let backup = || {
        let arguments = ["backup", "--name", "vm", "--control", &control, "--export", "vm"];
        json(&[&arguments[..], &["-B", "daily", "--verify=all", "--json", &repository]].concat())
    };
    let mut states = Vec::new();
    let mut keep = |made: &Value, is_incremental: bool| {
        let copied = directory.beside(&format!("{}.img", states.len()));
        nbd_cli(&["copy", server.uri(), &copied]).success();
        assert_eq!(made["incremental"], is_incremental, "{made}");
        states.push((made["id"].as_str().expect("text").to_owned(), copied));
    };
    keep(&backup(), false);
    write("write -P 2 70M 100k");
    write("write -z 3M 128k");
    let made = backup();
    assert!(made["read"].as_u64() <= Some(384 << 10), "{made}");
    keep(&made, true);
    // A backup that fails forgets nothing: its repository is gone at its end.
    write("write -P 3 150M 64k");
    let broken = Path::new(&repository).join("backups");
    let aside = directory.beside("aside");
    std::fs::rename(&broken, &aside).expect("it is renamed");
    std::fs::write(&broken, "").expect("it is written");
    let arguments = ["backup", "--name", "vm", "--control", &control, "--export", "vm"];
    nbd_cli(&[&arguments[..], &["-B", "daily", &repository]].concat()).failure();
    std::fs::remove_file(&broken).expect("it is removed");
    std::fs::rename(&aside, &broken).expect("it is renamed");
    let made = backup();
    assert!(made["read"].as_u64() >= Some(64 << 10), "{made}");
    keep(&made, true);
    // The one with which the bitmap started is gone: everything is read.
    nbd_cli(&["repo", "forget", &repository, &states[2].0]).success();
    write("write -P 4 199M 64k");
    let made = backup();
    assert_eq!(made["incremental"], false, "{made}");
    server.end();
    for (id, copied) in &states[..2] {
        let restored = directory.beside("restored.img");
        nbd_cli(&["restore", &format!("backup:{repository}/vm@{id}"), &restored]).success();
        are_equal(&qemu_img, copied, &restored);
        std::fs::remove_file(restored).expect("it is there");
    }
}

#[test]
fn bitmap_of_another_server_is_used_only_for_the_backup_that_it_follows() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let repository = repository(&directory);
    let disk = super::backup_chain::disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let backup = |more: &[&str]| {
        let server = super::backup_chain::serve(&qemu_nbd, &disk);
        let made = nbd_cli(
            &[&["backup", "--name", "vm", "--json"], more, &[server.uri(), &repository]].concat(),
        );
        server.end();
        made
    };
    let parsed = |text: String| serde_json::from_str::<Value>(&text).expect("JSON");
    // What the bitmap does not tell is read, and why is said.
    let reads_all = |why: &str| {
        let made = backup(&["-B", "b0"]);
        assert!(made.stderr.contains(why) && made.stderr.contains("the whole disk"), "{made:?}");
        let made = parsed(made.success());
        assert_eq!(made["incremental"], false, "{made}");
        made
    };
    // One without the bitmap is none that it follows.
    backup(&[]).success();
    reads_all("without a bitmap");
    super::backup_chain::change(&qemu_io, &disk);
    let made = parsed(backup(&["-B", "b0", "--verify=all"]).success());
    assert_eq!(made["incremental"], true, "{made}");
    assert!(made["read"].as_u64() <= Some(512 << 10), "{made}");
    // The bitmap is that of a backup that is gone: not of the one before.
    backup(&["-B", "b0"]).success();
    nbd_cli(&["repo", "forget", &repository, "vm@latest"]).success();
    reads_all("was forgotten");
    nbd_cli(&["repo", "forget", &repository, "vm@latest"]).success();
    nbd_cli(&["repo", "gc", "--idle", "1ms", &repository]).success();
    let full = reads_all("was forgotten");
    let head = Path::new(&repository).join("backups").join(full["id"].as_str().expect("text"));
    let good = std::fs::read(&head).expect("a backup");
    std::fs::write(&head, &good[..40]).expect("it is written");
    reads_all("cannot be read");
    std::fs::write(&head, good).expect("it is written");
    let made = parsed(backup(&["-B", "b0"]).success());
    assert_eq!(made["incremental"], true, "{made}");
    // A slip does not lead to another disk.
    says(backup(&["-B", "b1"]), &["for the bitmap 'b0'", "--full"]);
    let restored = directory.beside("restored.img");
    nbd_cli(&["restore", &format!("backup:{repository}/vm"), &restored]).success();
    are_equal(&qemu_img, &disk, &restored);
}

#[test]
fn disk_in_a_backup_is_never_taken_for_an_image() {
    let disk = Disk::sparse();
    let repository = repository(&disk);
    let inside = disk.beside("inside.qcow2");
    nbd_cli(&["image", "create", "--format", "qcow2", &inside, "1M"]).success();
    let source =
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{inside}"}}}}"#);
    nbd_cli(&["backup", "-q", "--name", "vm", &source, &repository]).success();
    let name = format!("backup:{repository}/vm");
    assert_eq!(json(&["image", "info", "--json", &name])["format"], "raw");
    let checked = nbd_cli(&["image", "check", &name]);
    assert_eq!(checked.code, Some(63), "raw disks are not checked: {checked:?}");
    nbd_cli(&["image", "check", "--format", "qcow2", &name]).success();
    nbd_cli(&["image", "compare", "-f", "raw", &inside, &name]).success();
}
