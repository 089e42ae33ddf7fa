//! Compactions, and what is beside them.

use super::super::id::{Folder, Key};
use super::super::map::Map;
use super::super::protocol::{Answer, Object, Request};
use super::super::root::{self, Kind};
use super::super::seal::Sealer;
use super::*;

/// A repository in which much of the packs is not needed any more: the backups that are there, and
/// their disks.
async fn versions(repository: &Repository) -> Vec<(Id, Vec<u8>)> {
    let mut made = Vec::new();
    for (name, seed) in [("vm1", 3), ("vm2", 4)] {
        let mut disk = disk(600, seed);
        let mut last = back_up(repository, name, &disk, None).await.id;
        made.push((last, disk.clone()));
        for version in 0..5u64 {
            // A third of the blocks changes each time.
            for block in (0..600).filter(|block| (block + version) % 3 == 0) {
                let start = (block * BLOCK_SIZE) as usize;
                let noise = Sealer::default().hash(&[version as u8, block as u8, seed as u8]).0;
                disk[start..start + 16].copy_from_slice(&noise);
            }
            last = back_up(repository, name, &disk, Some(last)).await.id;
            made.push((last, disk.clone()));
        }
    }
    // The first ones go.
    let (gone, kept): (Vec<_>, Vec<_>) =
        made.into_iter().enumerate().partition(|(number, _)| number % 6 < 4);
    for (_, (id, _)) in gone {
        assert!(repository.forget(id, false).await.unwrap());
    }
    repository.collect(&at_once()).await.unwrap();
    kept.into_iter().map(|(_, made)| made).collect()
}

fn options(max_unused: f64) -> CompactOptions {
    CompactOptions { max_unused, ..CompactOptions::default() }
}

async fn are_whole(repository: &Repository, made: &[(Id, Vec<u8>)]) {
    for (id, disk) in made {
        assert!(content(repository, *id).await.unwrap() == *disk, "{id}");
    }
    assert_eq!(repository.check(100.0).await.unwrap().problems, []);
}

/// The names of compactions, live or not.
async fn compactions(repository: &Repository) -> (usize, usize) {
    let (_, live) = repository.list_all().await.unwrap();
    (live.len(), names(repository, "moved").await.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_frees_space_and_changes_no_backup() {
    let folder = tempfile::tempdir().unwrap();
    let url = folder.path().to_str().unwrap().parse().unwrap();
    let folder = Place::open(&url, &crate::StoreSettings::default()).unwrap();
    for (place, passphrase) in [(place(), None), (place(), Some(&b"secret"[..])), (folder, None)] {
        let repository = Repository::init(place, passphrase).await.unwrap();
        let made = versions(&repository).await;
        let (_, before) = repository.space().await.unwrap();
        let dry = CompactOptions { dry_run: true, ..options(0.05) };
        let planned = repository.compact(&dry).await.unwrap();
        assert!(planned.packs > 0 && planned.needed < planned.bytes, "{planned:?}");
        assert!(names(&repository, "sessions").await.is_empty());
        assert_eq!(compactions(&repository).await, (0, 0));
        let done = repository.compact(&options(0.05)).await.unwrap();
        assert_eq!(
            (done.packs, done.bytes, done.needed),
            (planned.packs, planned.bytes, planned.needed)
        );
        assert_eq!((done.backups, &done.left, &done.damaged), (4, &vec![], &vec![]), "{done:?}");
        are_whole(&repository, &made).await;
        let garbage = repository.collect(&at_once()).await.unwrap();
        assert_eq!(garbage.bytes, done.garbage, "{done:?}");
        assert!(done.garbage >= done.bytes && done.garbage_before == 0, "{done:?}");
        let (_, after) = repository.space().await.unwrap();
        assert!(after < before * 9 / 10, "{before} {after}");
        are_whole(&repository, &made).await;
        assert!(names(&repository, "sessions").await.is_empty());
        // It ends: after the pages, nothing is left to do.
        for _ in 0..2 {
            repository.compact(&options(0.05)).await.unwrap();
            repository.collect(&at_once()).await.unwrap();
        }
        let idle = repository.compact(&options(0.05)).await.unwrap();
        assert_eq!((idle.packs, idle.backups, idle.written), (0, 0, 0), "{idle:?}");
        are_whole(&repository, &made).await;
        let unneeded = repository.check(0.0).await.unwrap().unneeded;
        assert_eq!(unneeded, 0);
        // The next backup builds on what was moved.
        let (last, disk) = &made[1];
        let next = back_up_dirty(&repository, disk, *last, &[5]).await;
        assert!(next.added < 300_000, "{next:?}");
        assert!(content(&repository, next.id).await.unwrap() == *disk);
        // Without backups, nothing is left but names.
        for info in repository.list().await.unwrap() {
            repository.forget(info.id, false).await.unwrap();
        }
        repository.collect(&at_once()).await.unwrap();
        assert!(names(&repository, "packs").await.is_empty());
        assert_eq!(compactions(&repository).await, (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_backups_are_moved_by_several_compactions_and_nothing_is_copied_twice() {
    for passphrase in [None, Some(&b"secret"[..])] {
        let repository = Repository::init(place(), passphrase).await.unwrap();
        let made = versions(&repository).await;
        let few = CompactOptions { moved_max: Some(1), ..options(0.05) };
        let done = repository.compact(&few).await.unwrap();
        assert!(done.backups >= 4 && done.left.is_empty(), "{done:?}");
        assert!(compactions(&repository).await.0 >= 4);
        assert!(done.written < done.needed + (1 << 20), "{done:?}");
        are_whole(&repository, &made).await;
        repository.collect(&at_once()).await.unwrap();
        are_whole(&repository, &made).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn allowed_part_is_left_unneeded() {
    let repository = repository().await;
    let made = versions(&repository).await;
    let nothing = repository.compact(&options(1.0)).await.unwrap();
    assert_eq!((nothing.packs, nothing.backups), (0, 0));
    let mut last = 0;
    for part in [0.6, 0.3, 0.0] {
        let dry = CompactOptions { dry_run: true, ..options(part) };
        let planned = repository.compact(&dry).await.unwrap();
        assert!(planned.packs >= last, "{planned:?}");
        last = planned.packs;
    }
    assert!(last > 0);
    repository.compact(&options(0.0)).await.unwrap();
    repository.collect(&at_once()).await.unwrap();
    are_whole(&repository, &made).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_keep_what_they_read_before_and_after_a_compaction() {
    let repository = repository().await;
    let made = versions(&repository).await;
    let (id, disk) = &made[0];
    let early = repository.read(*id, Damage::Refused).await.unwrap();
    repository.compact(&options(0.0)).await.unwrap();
    let late = repository.read(*id, Damage::Refused).await.unwrap();
    repository.compact(&options(0.0)).await.unwrap();
    repository.forget(*id, false).await.unwrap();
    for _ in 0..2 {
        repository.collect(&at_once()).await.unwrap();
    }
    for backup in [early, late] {
        let blocks = backup.blocks(0..601).await.unwrap();
        for (block, expected) in blocks.iter().zip(disk.chunks(BLOCK_SIZE as usize)) {
            match block {
                Some(block) => assert!(block == expected),
                None => assert!(expected.iter().all(|byte| *byte == 0)),
            }
        }
        backup.close().await;
    }
    repository.collect(&at_once()).await.unwrap();
    let left = repository.check(0.0).await.unwrap();
    assert_eq!((left.unneeded, left.problems), (0, vec![]));
    are_whole(&repository, &made[1..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_that_was_superseded_becomes_a_tombstone_without_a_mark() {
    let repository = repository().await;
    let made = versions(&repository).await;
    for _ in 0..3 {
        // Another third is not needed any more.
        let (id, disk) = &made[3];
        let mut disk = disk.clone();
        disk[..20 << 20].fill(7);
        back_up(&repository, "vm2", &disk, Some(*id)).await;
        let all = repository.list().await.unwrap();
        let last = all.iter().rfind(|info| info.head.as_ref().unwrap().name == "vm2").unwrap();
        repository.forget(last.id, false).await.unwrap();
        repository.compact(&options(0.0)).await.unwrap();
        repository.collect(&at_once()).await.unwrap();
    }
    let (live, marked) = compactions(&repository).await;
    assert_eq!(live, marked);
    are_whole(&repository, &made).await;
    for (id, _) in &made[..2] {
        repository.forget(*id, false).await.unwrap();
    }
    repository.collect(&at_once()).await.unwrap();
    are_whole(&repository, &made[2..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_compaction_is_used_by_the_next_one_and_leaves_nothing() {
    let repository = repository().await;
    let made = versions(&repository).await;
    // As if it had been killed before its commit.
    let store = repository.objects.clone();
    let all: Vec<_> = names(&repository, "packs").await;
    let done = repository.compact(&options(0.05)).await.unwrap();
    let (_, live) = repository.list_all().await.unwrap();
    store.delete(&Key::Backup(live[0]).to_string()).await.unwrap();
    let record =
        SessionRecord { name: "@compact".into(), host: "h".into(), time: 1, failed: false };
    let record = Object::Session(record.encode(&store.sealer, live[0], 0).unwrap());
    store.carry_out(Request::Put(Key::Session(live[0]), record)).await.unwrap();
    are_whole(&repository, &made).await;
    assert!(names(&repository, "packs").await.len() > all.len());
    let again = repository.compact(&options(0.05)).await.unwrap();
    assert!(again.written < done.written / 4, "{again:?} {done:?}");
    repository.collect(&at_once()).await.unwrap();
    are_whole(&repository, &made).await;
    assert!(names(&repository, "sessions").await.is_empty());
    repository.collect(&at_once()).await.unwrap();
    assert_eq!(compactions(&repository).await, (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_of_a_backup_that_lacks_a_pack_leaves_it_as_it_is() {
    let repository = repository().await;
    let made = versions(&repository).await;
    let map = Map::open(&repository, &repository.moves().await.unwrap(), made[0].0).await.unwrap();
    let lost = map.root().packs()[0];
    repository.objects.delete(&Key::Pack(lost).to_string()).await.unwrap();
    let done = repository.compact(&options(0.0)).await.unwrap();
    assert!(done.left.contains(&made[0].0), "{done:?}");
    repository.collect(&at_once()).await.unwrap();
    for (id, disk) in &made {
        if !done.left.contains(id) {
            assert!(content(&repository, *id).await.unwrap() == *disk);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_compaction_is_named_and_stops_a_gc() {
    for passphrase in [None, Some(&b"secret"[..])] {
        let repository = Repository::init(place(), passphrase).await.unwrap();
        let made = versions(&repository).await;
        repository.compact(&options(0.05)).await.unwrap();
        let (_, live) = repository.list_all().await.unwrap();
        let name = Key::Backup(live[0]).to_string();
        let object = repository.objects.read(&name, 64 << 20).await.unwrap().unwrap();
        assert_eq!(root::kind(&object), Some(Kind::Compaction));
        let write = async |content: Vec<u8>| {
            repository.objects.write(&name, content.into()).await.unwrap();
        };
        // It is none of a backup: it cannot be forgotten, and is not listed.
        assert!(!repository.forget(live[0], false).await.unwrap());
        assert_eq!(repository.list().await.unwrap().len(), made.len());
        let step = object.len() / 40;
        for at in (7..object.len()).step_by(step).chain(9..60) {
            let mut damaged = object.to_vec();
            damaged[at] ^= 0x20;
            write(damaged).await;
            let checked = repository.check(0.0).await.unwrap();
            let collected = repository.collect(&at_once()).await;
            match at {
                9..12 => assert!(collected.is_ok(), "nothing is there"),
                _ => {
                    assert!(!checked.problems.is_empty(), "byte {at}");
                    let error = collected.unwrap_err().to_string();
                    assert!(error.contains(&name), "byte {at}: {error}");
                    assert!(error.contains("nothing was deleted"), "byte {at}: {error}");
                }
            }
            if (9..12).contains(&at) {
                // The old packs are gone now.
                break;
            }
            assert!(repository.compact(&options(0.0)).await.is_err() || at > 60, "byte {at}");
        }
        for end in [0, 1, 8, 31, 32, 33, object.len() / 2, object.len() - 1] {
            write(object[..end].to_vec()).await;
            assert!(repository.collect(&at_once()).await.is_err(), "{end} bytes");
            assert!(!repository.check(0.0).await.unwrap().problems.is_empty(), "{end} bytes");
        }
        write(object.to_vec()).await;
        are_whole(&repository, &made).await;
        let answer = repository.objects.carry_out(Request::GetMoves(made[0].0)).await.unwrap();
        assert_eq!(answer, Answer::Damaged);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_map_in_a_compaction_costs_its_backup_alone() {
    for passphrase in [None, Some(&b"secret"[..])] {
        let repository = Repository::init(place(), passphrase).await.unwrap();
        let made = versions(&repository).await;
        repository.compact(&options(0.0)).await.unwrap();
        // The old packs go.
        repository.collect(&at_once()).await.unwrap();
        let (_, live) = repository.list_all().await.unwrap();
        let name = Key::Backup(live[0]).to_string();
        let object = repository.objects.read(&name, 64 << 20).await.unwrap().unwrap();
        let mut damaged = object.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        repository.objects.write(&name, damaged.into()).await.unwrap();
        let refused = repository.collect(&at_once()).await.unwrap_err().to_string();
        let (_, advice) = refused.split_once("'repo forget --damaged ").expect(&refused);
        let advised: Id = advice.split_once('\'').unwrap().0.parse().unwrap();
        assert!(made.iter().any(|(id, _)| *id == advised), "{refused}");
        assert!(repository.forget(advised, true).await.unwrap());
        repository.collect(&at_once()).await.unwrap();
        let others: Vec<_> = made.into_iter().filter(|(id, _)| *id != advised).collect();
        are_whole(&repository, &others).await;
        repository.compact(&options(0.0)).await.unwrap();
        repository.collect(&at_once()).await.unwrap();
        are_whole(&repository, &others).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mark_that_is_missing_or_of_a_backup_costs_no_backup() {
    let repository = repository().await;
    let made = versions(&repository).await;
    // A backup with a mark is not a compaction.
    let stray = Request::Put(Key::Moved(made[0].0), Object::Mark);
    repository.objects.carry_out(stray).await.unwrap();
    repository.compact(&options(0.05)).await.unwrap();
    let (_, live) = repository.list_all().await.unwrap();
    repository.objects.delete(&Key::Moved(live[0]).to_string()).await.unwrap();
    let problems = repository.check(0.0).await.unwrap().problems;
    assert!(problems[0].message.contains("there is no object moved/"), "{problems:?}");
    repository.collect(&at_once()).await.unwrap();
    for (id, disk) in &made {
        assert!(content(&repository, *id).await.unwrap() == *disk);
    }
    let mark = Request::Put(Key::Moved(live[0]), Object::Mark);
    repository.objects.carry_out(mark).await.unwrap();
    repository.collect(&at_once()).await.unwrap();
    are_whole(&repository, &made).await;
    assert_eq!(repository.objects.list(Folder::Moved).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn compactions_collectors_writers_and_readers_at_once_lose_nothing() {
    let repository = repository().await;
    let made = Arc::new(versions(&repository).await);
    let is_over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut tasks = Vec::new();
    let go_on = || {
        let is_over = Arc::clone(&is_over);
        move || !is_over.load(std::sync::atomic::Ordering::Relaxed)
    };
    for number in 0..2 {
        let (repository, go_on) = (repository.clone(), go_on());
        tasks.push(tokio::spawn(async move {
            while go_on() {
                let compacted = repository.compact(&options(0.1 * f64::from(number))).await;
                // A collector of this test may have taken it for dead.
                if let Err(error) = compacted {
                    assert_eq!(error.kind(), RepositoryErrorKind::Fenced, "{error}");
                }
            }
        }));
    }
    let (other, still) = (repository.clone(), go_on());
    tasks.push(tokio::spawn(async move {
        let idle = std::time::Duration::from_millis(300);
        while still() {
            other.collect(&CollectOptions { idle, ..at_once() }).await.unwrap();
        }
    }));
    let (other, still, expected) = (repository.clone(), go_on(), Arc::clone(&made));
    tasks.push(tokio::spawn(async move {
        while still() {
            for (id, disk) in &*expected {
                assert!(content(&other, *id).await.unwrap() == *disk, "{id}");
            }
        }
    }));
    let mut disk = made[1].1.clone();
    let mut base = made[1].0;
    let mut committed = Vec::new();
    for round in 0..12u64 {
        let dirty = [round * 45, round * 45 + 20];
        for block in dirty {
            disk[(block * BLOCK_SIZE) as usize + 5] ^= 0xff;
        }
        let mut session = repository.begin(new("vm1", &disk, Some(base))).await.unwrap();
        give_all(&mut session, &disk).await;
        if let Ok(made) = session.commit().await {
            base = made.id;
            committed.push((made.id, disk.clone()));
            if committed.len() > 3 {
                repository.forget(committed.remove(0).0, false).await.unwrap();
            }
        }
    }
    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    are_whole(&repository, &made).await;
    repository.compact(&options(0.0)).await.unwrap();
    repository.collect(&at_once()).await.unwrap();
    are_whole(&repository, &made).await;
    are_whole(&repository, &committed).await;
}
