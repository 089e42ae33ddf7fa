//! Backups of disks in memory, into stores in memory and in folders.

mod compacting;
mod failed;
mod faults;
mod killed;
mod maps;
mod reading;
mod succession;

use std::sync::Arc;

use bytes::Bytes;
use imgfmt::{HostOffset, Storage as _};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};

use super::*;
use crate::Place;

fn place() -> Place {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (path, name) = (Path::from("some/prefix"), "memory".to_owned());
    Place { store, path, name: name.clone(), identity: name, directory: None }
}

async fn repository() -> Repository {
    Repository::init(place(), None).await.unwrap()
}

/// A disk of so many blocks and a bit, with zeroes, text and noise in it.
fn disk(blocks: u64, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::new();
    for block in 0..blocks {
        match (block ^ seed) % 5 {
            0 => bytes.resize(bytes.len() + BLOCK_SIZE as usize, 0),
            1 | 2 => bytes.extend((0..BLOCK_SIZE).map(|n| ((n / 50) ^ block ^ seed) as u8)),
            _ => bytes.extend((0..BLOCK_SIZE).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })),
        }
    }
    bytes.extend_from_slice(&[seed as u8; 777]);
    bytes
}

fn new(name: &str, disk: &[u8], base: Option<Id>) -> NewBackup {
    let name = BackupName::of_earlier_version(name);
    NewBackup { size: disk.len() as u64, base, ..NewBackup::new(name) }
}

async fn give_all(session: &mut Session, disk: &[u8]) {
    for piece in disk.chunks(8 * BLOCK_SIZE as usize) {
        session.data(Bytes::copy_from_slice(piece)).await.unwrap();
    }
}

async fn back_up(repository: &Repository, name: &str, disk: &[u8], base: Option<Id>) -> Made {
    let mut session = repository.begin(new(name, disk, base)).await.unwrap();
    give_all(&mut session, disk).await;
    session.commit().await.unwrap()
}

/// Gives the blocks whose numbers are `dirty`, and nothing else.
async fn back_up_dirty(repository: &Repository, disk: &[u8], base: Id, dirty: &[u64]) -> Made {
    let mut session = repository.begin(new("vm1", disk, Some(base))).await.unwrap();
    let blocks = (disk.len() as u64).div_ceil(BLOCK_SIZE);
    let mut at = 0;
    while at < blocks {
        if !dirty.contains(&at) {
            let next = dirty.iter().copied().find(|&block| block > at).unwrap_or(blocks);
            let taken = session.unchanged(next - at).await.unwrap();
            at += taken;
            if at >= next {
                continue;
            }
        }
        let start = (at * BLOCK_SIZE) as usize;
        let end = (start + BLOCK_SIZE as usize).min(disk.len());
        session.data(Bytes::copy_from_slice(&disk[start..end])).await.unwrap();
        at += 1;
    }
    session.commit().await.unwrap()
}

async fn content(repository: &Repository, id: Id) -> Result<Vec<u8>> {
    let backup = repository.read(id, Damage::Refused).await?;
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0xee; backup.len().unwrap() as usize];
        let mut at = 0;
        let mut result = Ok(());
        while at < bytes.len() {
            let end = (at + 300_001).min(bytes.len());
            if let Err(error) =
                backup.read_exact_at(HostOffset::new(at as u64), &mut bytes[at..end])
            {
                result = Err(RepositoryError::damaged(error.to_string()));
            }
            at = end;
        }
        result.map(|()| bytes)
    });
    read.await.unwrap()
}

async fn names(repository: &Repository, folder: &str) -> Vec<String> {
    let names = repository.objects.list_names(folder).await.unwrap();
    names.into_iter().map(|(name, _)| name).collect()
}

fn at_once() -> CollectOptions {
    CollectOptions { idle: std::time::Duration::ZERO, ..CollectOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_is_read_as_it_was_backed_up() {
    let folder = tempfile::tempdir().unwrap();
    let url = folder.path().to_str().unwrap().parse().unwrap();
    let folder = Place::open(&url, &crate::StoreSettings::default()).unwrap();
    for (place, passphrase) in [(place(), None), (place(), Some(&b"secret"[..])), (folder, None)] {
        let repository = Repository::init(place.clone(), passphrase).await.unwrap();
        assert_eq!(repository.creates(), Creates::Exclusive);
        let again = Repository::init(place.clone(), passphrase).await.unwrap_err();
        assert_eq!(again.kind(), RepositoryErrorKind::Exists);
        for blocks in [0, 1, 600] {
            let disk = disk(blocks, 3);
            let made = back_up(&repository, "vm1", &disk, None).await;
            let opened = Repository::open(place.clone(), passphrase).await.unwrap();
            assert!(content(&opened, made.id).await.unwrap() == disk);
            let (found, head) = opened.find("vm1@latest").await.unwrap();
            assert_eq!((found, head.size), (made.id, disk.len() as u64));
        }
        assert_eq!(repository.check(100.0).await.unwrap().problems, []);
        assert!(names(&repository, "sessions").await.is_empty());
        assert!(names(&repository, "pins").await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn incremental_backup_sends_only_what_changed_and_stands_alone() {
    let repository = repository().await;
    let mut disk = disk(1300, 5);
    let full = back_up(&repository, "vm1", &disk, None).await;
    let dirty = [3, 4, 700, 1299];
    for block in dirty {
        disk[(block * BLOCK_SIZE) as usize + 9] ^= 0xff;
    }
    let before = names(&repository, "packs").await.len();
    let made = back_up_dirty(&repository, &disk, full.id, &dirty).await;
    assert!(made.added < 400_000 && full.added > 30 << 20, "{made:?} {full:?}");
    assert_eq!(names(&repository, "packs").await.len(), before + 1);
    assert!(content(&repository, made.id).await.unwrap() == disk);
    // Read whole, it sends as little.
    let whole = back_up(&repository, "vm1", &disk, Some(full.id)).await;
    assert!(whole.added < 400_000, "{whole:?}");
    // Without the one on which it was built, nothing is missing.
    assert!(repository.forget(full.id, false).await.unwrap());
    let garbage = repository.collect(&at_once()).await.unwrap();
    assert_eq!((garbage.running, garbage.lists), (None, vec![]));
    assert!(content(&repository, made.id).await.unwrap() == disk);
    assert_eq!(
        content(&repository, full.id).await.unwrap_err().kind(),
        RepositoryErrorKind::Fenced
    );
    for info in repository.list().await.unwrap() {
        repository.forget(info.id, false).await.unwrap();
    }
    repository.collect(&at_once()).await.unwrap();
    assert!(names(&repository, "packs").await.is_empty());
    assert_eq!(names(&repository, "backups").await.len(), 3);
    assert!(repository.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_backup_is_not_sent_again() {
    let repository = repository().await;
    let disk = disk(900, 7);
    {
        let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
        give_all(&mut session, &disk[..700 * BLOCK_SIZE as usize]).await;
        while !session.puts_are_done().await {}
    }
    assert_eq!(repository.sessions().await.unwrap().len(), 1);
    assert!(repository.list().await.unwrap().is_empty());
    let made = back_up(&repository, "vm1", &disk, None).await;
    assert!(made.found > 300 * BLOCK_SIZE, "{made:?}");
    // The collector ends the interrupted session, and keeps what the backup took from it.
    let garbage = repository.collect(&at_once()).await.unwrap();
    assert_eq!(garbage.ended.len(), 1);
    assert!(content(&repository, made.id).await.unwrap() == disk);
    assert_eq!(repository.check(100.0).await.unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn session_that_a_collector_ended_makes_no_backup() {
    let repository = repository().await;
    let disk = disk(20, 9);
    let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut session, &disk).await;
    let garbage = repository.collect(&at_once()).await.unwrap();
    assert_eq!(garbage.ended, [session.id()]);
    let error = session.commit().await.unwrap_err();
    assert_eq!(error.kind(), RepositoryErrorKind::Fenced);
    assert!(repository.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_does_not_end_a_session_that_lives() {
    let repository = repository().await;
    let disk = disk(20, 9);
    let session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    let wait = std::time::Duration::from_millis(50);
    let garbage = repository.collect(&CollectOptions { wait, ..CollectOptions::default() }).await;
    assert_eq!(garbage.unwrap().running, Some(session.id()));
    assert!(names(&repository, "condemned").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_is_kept_although_it_was_forgotten() {
    let repository = repository().await;
    let disk = disk(300, 11);
    let made = back_up(&repository, "vm1", &disk, None).await;
    let backup = repository.read(made.id, Damage::Refused).await.unwrap();
    repository.forget(made.id, false).await.unwrap();
    assert_eq!(repository.collect(&at_once()).await.unwrap().packs, 0);
    let found = backup.blocks(100..101).await.unwrap();
    assert_eq!(found[0].as_deref().unwrap(), &disk[100 * 65536..101 * 65536]);
    backup.close().await;
    assert!(repository.collect(&at_once()).await.unwrap().packs > 0);
    assert!(names(&repository, "packs").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_and_named_and_the_rest_is_readable() {
    for passphrase in [None, Some(&b"x"[..])] {
        let place = place();
        let repository = Repository::init(place.clone(), passphrase).await.unwrap();
        let (one, other) = (disk(600, 13), disk(300, 15));
        let first = back_up(&repository, "one", &one, None).await;
        let second = back_up(&repository, "other", &other, None).await;
        let packs = names(&repository, "packs").await;
        let own = |id: Id| packs.iter().filter(move |name| name.contains(&id.to_string()));
        let victim = own(first.id).next().unwrap().clone();
        let path = Path::from(format!("some/prefix/{victim}"));
        let good = place.store.get(&path).await.unwrap().bytes().await.unwrap();
        let mut bad = good.to_vec();
        bad[1_000_000] ^= 1;
        place.store.put(&path, bad.into()).await.unwrap();
        let checked = repository.check(100.0).await.unwrap();
        assert_eq!(checked.problems.len(), 1);
        assert!(checked.problems[0].message.contains(&victim), "{checked:?}");
        assert_eq!(checked.problems[0].backups, [(first.id, "one".to_owned())]);
        let error = content(&repository, first.id).await.unwrap_err();
        assert!(error.to_string().contains(&victim), "{error}");
        assert!(content(&repository, second.id).await.unwrap() == other);
        // All but the damaged block.
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let tell = Arc::clone(&told);
        let damage = Damage::Told(Arc::new(move |offset, _| tell.lock().unwrap().push(offset)));
        let backup = repository.read(first.id, damage).await.unwrap();
        let blocks = backup.blocks(0..601).await.unwrap();
        let told = told.lock().unwrap().clone();
        assert_eq!(told.len(), 1);
        for (number, block) in blocks.iter().enumerate() {
            let start = number * BLOCK_SIZE as usize;
            let expected = &one[start..(start + BLOCK_SIZE as usize).min(one.len())];
            let is_same =
                block.as_ref().map_or(expected.iter().all(|it| *it == 0), |it| it == expected);
            assert_eq!(is_same, start as u64 != told[0]);
        }
        // A pack of another session in its place, and none.
        let foreign = Path::from(format!("some/prefix/{}", own(second.id).next().unwrap()));
        let foreign = place.store.get(&foreign).await.unwrap().bytes().await.unwrap();
        place.store.put(&path, foreign.into()).await.unwrap();
        assert!(content(&repository, first.id).await.is_err());
        assert!(!repository.check(100.0).await.unwrap().problems.is_empty());
        place.store.delete(&path).await.unwrap();
        let checked = repository.check(0.0).await.unwrap();
        assert!(checked.problems.iter().any(|it| it.message.ends_with("is missing")));
        assert!(content(&repository, second.id).await.unwrap() == other);
        // A new backup does not build on what is gone: what is read is sent.
        place.store.put(&path, good.into()).await.unwrap();
        assert!(content(&repository, first.id).await.unwrap() == one);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passphrases_are_added_and_removed_and_nothing_is_readable_without() {
    let place = place();
    let repository = Repository::init(place.clone(), Some(b"first")).await.unwrap();
    let text = b"something that nobody else should read".repeat(2000);
    let made = back_up(&repository, "a secret name", &text, None).await;
    let mut listed = place.store.list(None);
    use futures_util::TryStreamExt as _;
    while let Some(meta) = listed.try_next().await.unwrap() {
        let bytes = place.store.get(&meta.location).await.unwrap().bytes().await.unwrap();
        let has = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
        assert!(!has(b"nobody else") && !has(b"secret name"), "{}", meta.location);
    }
    for wrong in [None, Some(&b"second"[..])] {
        let error = Repository::open(place.clone(), wrong).await.unwrap_err();
        assert_eq!(error.kind(), RepositoryErrorKind::Key);
    }
    let keys = repository.keys().await.unwrap();
    assert!(repository.remove_key(keys[0]).await.is_err());
    let second = repository.add_key(b"second").await.unwrap();
    let opened = Repository::open(place.clone(), Some(b"second")).await.unwrap();
    opened.remove_key(keys[0]).await.unwrap();
    assert!(Repository::open(place, Some(b"first")).await.is_err());
    assert!(content(&opened, made.id).await.unwrap() == text);
    // The process that has the first passphrase does not know yet that it is gone.
    let error = repository.remove_key(second).await.unwrap_err();
    assert_eq!(error.kind(), RepositoryErrorKind::Fenced);
    assert_eq!(opened.keys().await.unwrap(), [second]);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_a_template_are_not_sent_again() {
    let repository = repository().await;
    let template = disk(400, 17);
    let base = back_up(&repository, "template", &template, None).await;
    // The same blocks at other places.
    let mut disk = vec![1; BLOCK_SIZE as usize];
    disk.extend_from_slice(&template[..300 * BLOCK_SIZE as usize]);
    let mut session = repository
        .begin(NewBackup { like: vec![base.id], ..new("vm2", &disk, None) })
        .await
        .unwrap();
    give_all(&mut session, &disk).await;
    let made = session.commit().await.unwrap();
    assert!(made.added < 100_000, "{made:?}");
    assert!(content(&repository, made.id).await.unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn resized_disk_builds_on_the_smaller_and_the_larger_one() {
    let repository = repository().await;
    let large = disk(700, 19);
    let small = &large[..521 * BLOCK_SIZE as usize + 5];
    let first = back_up(&repository, "vm1", small, None).await;
    let second = back_up(&repository, "vm1", &large, Some(first.id)).await;
    assert!(content(&repository, second.id).await.unwrap() == large);
    let third = back_up(&repository, "vm1", small, Some(second.id)).await;
    assert!(third.added < 200_000, "{third:?}");
    assert!(content(&repository, third.id).await.unwrap() == small);
}

#[tokio::test(flavor = "multi_thread")]
async fn last_block_of_a_smaller_disk_is_not_taken_for_a_whole_one() {
    let repository = repository().await;
    let large = disk(700, 19);
    let small = &large[..521 * BLOCK_SIZE as usize + 5];
    let first = back_up(&repository, "vm1", small, None).await;
    let second = back_up_dirty(&repository, &large, first.id, &[]).await;
    assert!(content(&repository, second.id).await.unwrap() == large);
    let third = back_up_dirty(&repository, small, second.id, &[]).await;
    assert!(content(&repository, third.id).await.unwrap() == small);
    assert!(third.added < 200_000, "{third:?}");
    // A block that ends with the disk, and is a whole one then.
    let whole = &large[..522 * BLOCK_SIZE as usize];
    let fourth = back_up_dirty(&repository, whole, third.id, &[]).await;
    assert!(content(&repository, fourth.id).await.unwrap() == whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_or_cut_pack_held_is_sent_again() {
    let place = place();
    let repository = Repository::init(place.clone(), None).await.unwrap();
    let disk = disk(900, 23);
    let full = back_up(&repository, "vm1", &disk, None).await;
    let packs = names(&repository, "packs").await;
    assert!(packs.len() > 2, "{packs:?}");
    let path = |name: &String| Path::from(format!("some/prefix/{name}"));
    place.store.delete(&path(&packs[0])).await.unwrap();
    let cut = place.store.get(&path(&packs[1])).await.unwrap().bytes().await.unwrap();
    place.store.put(&path(&packs[1]), cut.slice(..0).into()).await.unwrap();
    assert!(content(&repository, full.id).await.is_err());
    // Each is built on the damaged one.
    let dirty = back_up_dirty(&repository, &disk, full.id, &[3]).await;
    assert!(content(&repository, dirty.id).await.unwrap() == disk);
    let whole = back_up(&repository, "vm1", &disk, Some(full.id)).await;
    assert!(content(&repository, whole.id).await.unwrap() == disk);
    assert!(whole.found > 0);
    // The last one has the map.
    place.store.delete(&path(packs.last().unwrap())).await.unwrap();
    let dirty = back_up_dirty(&repository, &disk, full.id, &[3]).await;
    assert!(content(&repository, dirty.id).await.unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn key_of_an_interrupted_init_does_not_count() {
    let (place, other) = (place(), place());
    Repository::init(other.clone(), Some(b"secret")).await.unwrap();
    let repository = Repository::init(place.clone(), Some(b"secret")).await.unwrap();
    let own = repository.keys().await.unwrap();
    let listed =
        Repository::open(other.clone(), Some(b"secret")).await.unwrap().keys().await.unwrap();
    let path = Path::from(format!("some/prefix/keys/{}", listed[0]));
    let foreign = other.store.get(&path).await.unwrap().bytes().await.unwrap();
    place.store.put(&path, foreign.into()).await.unwrap();
    assert_eq!(repository.keys().await.unwrap(), own);
    assert!(repository.remove_key(own[0]).await.is_err());
    repository.remove_key(listed[0]).await.unwrap();
    assert!(Repository::open(place, Some(b"secret")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn passphrase_is_refused_where_nothing_is_encrypted() {
    let place = place();
    Repository::init(place.clone(), Some(b"secret")).await.unwrap();
    let path = Path::from("some/prefix/repo.json");
    let config = place.store.get(&path).await.unwrap().bytes().await.unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    for field in ["encryption", "key-check"] {
        config.as_object_mut().unwrap().remove(field).unwrap();
    }
    place.store.put(&path, config.to_string().into()).await.unwrap();
    let error = Repository::open(place, Some(b"secret")).await.unwrap_err();
    assert_eq!(error.kind(), RepositoryErrorKind::Key);
}

/// A memory, a folder and an S3 store.
fn places() -> (Vec<Place>, tempfile::TempDir, crate::testing::TestStore) {
    let folder = tempfile::tempdir().unwrap();
    let url = folder.path().to_str().unwrap().parse().unwrap();
    let in_folder = Place::open(&url, &crate::StoreSettings::default()).unwrap();
    let store = crate::testing::TestStore::start().unwrap();
    let url = "s3://bucket/some/prefix".parse().unwrap();
    let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
    let keys = keys.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let settings = crate::StoreSettings {
        endpoint: Some(store.endpoint()),
        environment: crate::Environment::new(keys),
        ..crate::StoreSettings::default()
    };
    let on_store = Place::open(&url, &settings).unwrap();
    (vec![place(), in_folder, on_store], folder, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_and_cut_objects_are_damage_and_no_failure_of_the_store() {
    let (places, _folder, _store) = places();
    for place in places {
        let repository = Repository::init(place.clone(), None).await.unwrap();
        let disk = disk(200, 27);
        let made = back_up(&repository, "vm1", &disk, None).await;
        let path = |name: &str| name.split('/').fold(place.path.clone(), |path, it| path.join(it));
        let pack = names(&repository, "packs").await.remove(0);
        let good = place.store.get(&path(&pack)).await.unwrap().bytes().await.unwrap();
        for length in [0, 1, 1_000_000] {
            place.store.put(&path(&pack), good.slice(..length).into()).await.unwrap();
            let told = Arc::new(std::sync::Mutex::new(0));
            let tell = Arc::clone(&told);
            let damage = Damage::Told(Arc::new(move |_, _| *tell.lock().unwrap() += 1));
            let backup = repository.read(made.id, damage).await.unwrap();
            backup.blocks(0..201).await.unwrap();
            backup.close().await;
            assert!(*told.lock().unwrap() > 50, "{length}");
            assert!(!repository.check(0.0).await.unwrap().problems.is_empty());
        }
        place.store.put(&path(&pack), good.into()).await.unwrap();
        // A session that was killed while its first pack was put.
        let session = repository.begin(new("vm1", &disk, None)).await.unwrap();
        let empty = format!("packs/{}/00000001", session.id());
        place.store.put(&path(&empty), Bytes::new().into()).await.unwrap();
        drop(session);
        let second = back_up(&repository, "vm1", &disk, Some(made.id)).await;
        assert!(content(&repository, second.id).await.unwrap() == disk);
        place.store.put(&path(&format!("backups/{}", made.id)), Bytes::new().into()).await.unwrap();
        let listed = repository.list().await.unwrap();
        assert_eq!(listed.iter().filter(|info| info.head.is_err()).count(), 1);
        assert_eq!(repository.find("vm1").await.unwrap().0, second.id);
        assert_eq!(repository.check(0.0).await.unwrap().problems.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn latest_backup_is_not_an_older_one_because_the_newest_cannot_be_read() {
    let place = place();
    let repository = Repository::init(place.clone(), None).await.unwrap();
    let first = back_up(&repository, "vm1", &disk(3, 1), None).await;
    let second = back_up(&repository, "vm1", &disk(3, 2), None).await;
    let path = Path::from(format!("some/prefix/backups/{}", second.id));
    let mut object = place.store.get(&path).await.unwrap().bytes().await.unwrap().to_vec();
    object[40] ^= 1;
    place.store.put(&path, object.into()).await.unwrap();
    for name in ["vm1", "vm1@latest", "vm1@2999-01-01T00:00", &format!("vm1@{}", second.id)] {
        let error = repository.find(name).await.unwrap_err();
        assert_eq!(error.kind(), RepositoryErrorKind::Damaged, "{name}");
        assert!(error.to_string().contains(&second.id.to_string()), "{error}");
    }
    assert_eq!(repository.find(&format!("vm1@{}", first.id)).await.unwrap().0, first.id);
    assert_eq!(
        repository.find("vm1@2001-01-01T00:00").await.unwrap_err().kind(),
        RepositoryErrorKind::NotFound
    );
    repository.forget(second.id, true).await.unwrap();
    assert_eq!(repository.find("vm1").await.unwrap().0, first.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn last_backup_of_a_name_is_known_whatever_became_of_it() {
    let repository = repository().await;
    let disk = disk(3, 1);
    assert_eq!(repository.last("vm1").await.unwrap(), None);
    for _ in 0..2 {
        let made = back_up(&repository, "vm1", &disk, None).await;
        assert_eq!(repository.last("vm1").await.unwrap(), Some(made.id));
        back_up(&repository, "other", &disk, None).await;
        repository.forget(made.id, false).await.unwrap();
        repository.collect(&at_once()).await.unwrap();
        assert_eq!(repository.last("vm1").await.unwrap(), Some(made.id));
    }
    // With which of two a bitmap started is not known.
    let mut first = repository.begin(new("vm1", &disk, None)).await.unwrap();
    let mut second = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut first, &disk).await;
    give_all(&mut second, &disk).await;
    let mut third = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut third, &disk).await;
    second.commit().await.unwrap();
    first.commit().await.unwrap();
    third.commit().await.unwrap();
    let last = repository.last("vm1").await.unwrap();
    assert!(repository.list().await.unwrap().iter().all(|info| Some(info.id) != last));
    // The next one is the last again: it began when both had ended.
    let made = back_up(&repository, "vm1", &disk, None).await;
    assert_eq!(repository.last("vm1").await.unwrap(), Some(made.id));
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_of_which_a_part_was_not_sent_is_never_committed() {
    use crate::testing::Fault;
    let (places, _folder, store) = places();
    let repository = Repository::init(places[2].clone(), None).await.unwrap();
    let disk = disk(700, 29);
    let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    let mut refused = false;
    store.fail(move |seen| {
        let is_first = seen.key.contains("/packs/") && !std::mem::replace(&mut refused, true);
        if is_first { Fault::Status(403) } else { Fault::None }
    });
    // The caller goes on after the error.
    for piece in disk.chunks(8 * BLOCK_SIZE as usize) {
        let _ = session.data(Bytes::copy_from_slice(piece)).await;
    }
    session.commit().await.unwrap_err();
    assert!(repository.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn reader_that_fails_leaves_no_pin_and_does_not_hang() {
    let place = place();
    let repository = Repository::init(place.clone(), None).await.unwrap();
    let made = back_up(&repository, "vm1", &disk(20, 31), None).await;
    let path = |name: &str| Path::from(format!("some/prefix/{name}"));
    let pack = names(&repository, "packs").await.remove(0);
    let good = place.store.get(&path(&pack)).await.unwrap().bytes().await.unwrap();
    // A read whose task panics ends, for all who wait for it.
    let damage = Damage::Told(Arc::new(|_, _| panic!("as the test wants")));
    let backup = Arc::new(repository.read(made.id, damage).await.unwrap());
    let page = backup.blocks(0..1).await;
    assert!(page.is_ok());
    let mut bad = good.to_vec();
    bad[100] ^= 1;
    bad[400_000] ^= 1;
    place.store.put(&path(&pack), bad.into()).await.unwrap();
    assert!(backup.blocks(1..20).await.is_err());
    // Others still hold it.
    let other = Arc::clone(&backup);
    backup.close().await;
    assert!(names(&repository, "pins").await.is_empty());
    drop(other);
    // A backup that cannot be read.
    let name = format!("backups/{}", made.id);
    let mut object = place.store.get(&path(&name)).await.unwrap().bytes().await.unwrap().to_vec();
    *object.last_mut().unwrap() ^= 1;
    place.store.put(&path(&name), object.into()).await.unwrap();
    repository.read(made.id, Damage::Refused).await.unwrap_err();
    assert!(names(&repository, "pins").await.is_empty());
}
