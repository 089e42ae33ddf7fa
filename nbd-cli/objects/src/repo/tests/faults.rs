//! Stores that are busy, replies that are lost, and objects that others damaged or removed.

use std::time::Duration;

use super::super::id::Key;
use super::super::objects::Objects;
use super::super::protocol::{Answer, Backup, Object, Request};
use super::*;
use crate::testing::{Fault, TestStore};
use crate::transport::WHOLE_MAX;
use crate::{Environment, StoreSettings, Timeouts};

pub(super) fn place_in(store: &TestStore) -> Place {
    let variables = [("AWS_ACCESS_KEY_ID", "AKIAKEY"), ("AWS_SECRET_ACCESS_KEY", "s3cr3t")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let settings = StoreSettings {
        endpoint: Some(store.endpoint()),
        environment: Environment::new(variables),
        timeouts: Timeouts {
            connect: Duration::from_secs(20),
            idle: Duration::from_secs(20),
            request: Duration::from_secs(20),
            total: Duration::from_secs(20),
        },
        ..StoreSettings::default()
    };
    Place::open(&"s3://bucket/repo".parse().unwrap(), &settings).unwrap()
}

/// The first put of the name of a backup meets this fault.
fn fail_once(store: &TestStore, fault: Fault) {
    let mut is_met = false;
    store.fail(move |seen| {
        if seen.method == "PUT" && seen.key.contains("/backups/") && !is_met {
            is_met = true;
            return fault;
        }
        Fault::None
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_is_found_out_about_if_its_reply_is_lost_or_the_store_is_busy() {
    for fault in [Fault::ReplyLost, Fault::Status(409), Fault::None] {
        let store = TestStore::start().unwrap();
        let repository = Repository::init(place_in(&store), None).await.unwrap();
        let disk = disk(20, 9);
        fail_once(&store, fault);
        let made = back_up(&repository, "vm1", &disk, None).await;
        assert!(content(&repository, made.id).await.unwrap() == disk, "{fault:?}");
        assert!(names(&repository, "sessions").await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conflict_of_any_request_is_settled_by_repeating_it() {
    let disk = disk(20, 9);
    let run = async |failing: Option<usize>| {
        let store = TestStore::start().unwrap();
        store.fail(move |seen| match Some(seen.number) == failing {
            true => Fault::Status(409),
            false => Fault::None,
        });
        let repository = Repository::init(place_in(&store), None).await.unwrap();
        let made = back_up(&repository, "vm1", &disk, None).await;
        assert!(content(&repository, made.id).await.unwrap() == disk, "{failing:?}");
        repository.collect(&at_once()).await.unwrap();
        store.take_seen().len()
    };
    let count = run(None).await;
    for failing in 0..count {
        assert!(run(Some(failing)).await > count, "request {failing}");
    }
    // One that does not end is not an object that exists.
    for method in ["PUT", "GET"] {
        let store = TestStore::start().unwrap();
        store.fail(move |seen| match seen.method == method {
            true => Fault::Status(409),
            false => Fault::None,
        });
        let error = Repository::init(place_in(&store), None).await.unwrap_err().to_string();
        assert!(error.contains("409") && error.contains("repeat"), "{error}");
        assert!(!error.contains("exists"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repository_is_made_although_a_reply_is_lost() {
    for fault in [Fault::ReplyLost, Fault::Dropped, Fault::Status(503)] {
        let store = TestStore::start().unwrap();
        let mut is_met = false;
        store.fail(move |seen| {
            let meets = seen.method == "PUT" && seen.key.ends_with("repo.json") && !is_met;
            is_met |= meets;
            if meets { fault } else { Fault::None }
        });
        let made = Repository::init(place_in(&store), Some(b"secret")).await.unwrap();
        let opened = Repository::open(place_in(&store), Some(b"secret")).await.unwrap();
        assert_eq!(made.id(), opened.id());
        let again = Repository::init(place_in(&store), Some(b"secret")).await.unwrap_err();
        assert_eq!(again.kind(), RepositoryErrorKind::Exists);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passphrase_that_was_added_before_keeps_its_key() {
    let repository = Repository::init(place(), Some(b"first")).await.unwrap();
    let second = repository.add_key(b"second").await.unwrap();
    assert_eq!(repository.add_key(b"second").await.unwrap(), second);
    let first = repository.add_key(b"first").await.unwrap();
    let mut keys = [first, second];
    keys.sort_unstable();
    assert_eq!(repository.keys().await.unwrap(), keys);
}

#[tokio::test(flavor = "multi_thread")]
async fn session_is_ended_although_the_store_is_busy_or_the_reply_is_lost() {
    for fault in [Fault::Status(409), Fault::ReplyLost] {
        for by_gc in [true, false] {
            let store = TestStore::start().unwrap();
            let repository = Repository::init(place_in(&store), None).await.unwrap();
            let disk = disk(20, 9);
            let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
            give_all(&mut session, &disk).await;
            fail_once(&store, fault);
            if by_gc {
                let garbage = repository.collect(&at_once()).await.unwrap();
                assert_eq!(garbage.ended, [session.id()]);
            } else {
                assert!(repository.end_session(session.id()).await.unwrap());
            }
            assert_eq!(names(&repository, "backups").await.len(), 1);
            let error = session.commit().await.unwrap_err();
            assert_eq!(error.kind(), RepositoryErrorKind::Fenced);
            assert_eq!(repository.check(100.0).await.unwrap().problems, []);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_list_of_a_gc_costs_time_and_no_backup() {
    let repository = repository().await;
    let disk = disk(40, 9);
    let first = back_up(&repository, "vm1", &disk, None).await;
    let list = Id::random().unwrap();
    let name = Key::Condemned(list).to_string();
    repository.objects.write(&name, "nonsense".into()).await.unwrap();
    // Any pack may be on it.
    let second = back_up(&repository, "vm1", &disk, Some(first.id)).await;
    assert_eq!(second.found, 0);
    assert!(second.added > first.added / 10 * 9, "{second:?} {first:?}");
    repository.forget(first.id, false).await.unwrap();
    let garbage = repository.collect(&at_once()).await.unwrap();
    assert_eq!(garbage.lists, [list]);
    assert!(content(&repository, second.id).await.unwrap() == disk);
    repository.forget_list(list).await.unwrap();
    let error = repository.forget_list(list).await.unwrap_err();
    assert_eq!(error.kind(), RepositoryErrorKind::NotFound);
    let third = back_up(&repository, "vm1", &disk, Some(second.id)).await;
    assert!(third.added < second.added / 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_of_a_session_that_has_ended_are_not_looked_at() {
    let repository = repository().await;
    let disk = disk(900, 7);
    let id = {
        let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
        give_all(&mut session, &disk[..700 * BLOCK_SIZE as usize]).await;
        while !session.puts_are_done().await {}
        session.id()
    };
    let tombstone = Request::Put(Key::Backup(id), Object::Tombstone(None));
    assert_eq!(repository.objects.carry_out(tombstone).await.unwrap(), Answer::Done);
    assert_eq!(back_up(&repository, "vm1", &disk, None).await.found, 0);
}

/// As if the store ignored `If-None-Match`.
pub(super) fn overwriting(mut repository: Repository) -> Repository {
    let mut objects = Objects::clone(&repository.objects);
    objects.creates = Creates::Overwriting;
    repository.objects = Arc::new(objects);
    repository
}

#[tokio::test(flavor = "multi_thread")]
async fn session_that_was_ended_makes_no_backup_where_creates_overwrite() {
    let repository = overwriting(repository().await);
    let disk = disk(20, 9);
    let made = back_up(&repository, "vm1", &disk, None).await;
    assert!(content(&repository, made.id).await.unwrap() == disk);
    let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut session, &disk).await;
    let id = session.id();
    assert!(repository.end_session(id).await.unwrap());
    repository.collect(&at_once()).await.unwrap();
    let error = session.commit().await.unwrap_err();
    assert_eq!(error.kind(), RepositoryErrorKind::Fenced);
    assert_eq!(repository.list().await.unwrap().len(), 1);
    assert_eq!(repository.check(100.0).await.unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn tombstone_is_put_back_where_creates_overwrite() {
    // The record of the session is gone when it is looked for the first or the second time.
    for gone in [1, 2] {
        let store = TestStore::start().unwrap();
        let repository = Repository::init(place_in(&store), None).await.unwrap();
        let repository = overwriting(repository);
        let disk = disk(20, 9);
        let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
        give_all(&mut session, &disk).await;
        let (backup, mut looks) = (Key::Backup(session.id()), 0);
        store.fail(move |seen| {
            looks += u32::from(seen.method == "HEAD" && seen.key.contains("/sessions/"));
            let is_it = seen.method == "HEAD" && seen.key.contains("/sessions/") && looks == gone;
            if is_it { Fault::Status(404) } else { Fault::None }
        });
        let error = session.commit().await.unwrap_err();
        assert_eq!(error.kind(), RepositoryErrorKind::Fenced);
        let found = repository.objects.carry_out(Request::Get(backup)).await.unwrap();
        assert_eq!(found, Answer::Found(Object::Tombstone(None)));
        // Nor is it written over later.
        let live = Object::Live(Backup { packs: Arc::new([]), object: "a backup".into() });
        let created = repository.objects.carry_out(Request::Create(backup, live)).await.unwrap();
        assert_eq!(created, Answer::Exists);
        assert!(repository.list().await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_packs_are_removed_from_a_folder_when_their_session_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let url = folder.path().to_str().unwrap().parse().unwrap();
    let place = Place::open(&url, &StoreSettings::default()).unwrap();
    let repository = Repository::init(place, None).await.unwrap();
    let disk = disk(20, 9);
    let made = back_up(&repository, "vm1", &disk, None).await;
    let part = |id: Id, name: &str| {
        let directory = folder.path().join(format!("packs/{id}"));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(name), "a part").unwrap();
        directory.join(name)
    };
    let ended = part(made.id, "00000009#1");
    let others = [part(made.id, "notes#1"), part(made.id, "00000009#a")];
    let running = part(Id::random().unwrap(), "00000000#2");
    repository.collect(&at_once()).await.unwrap();
    assert!(!ended.exists());
    assert!(others.iter().all(|it| it.exists()) && running.exists());
    assert!(content(&repository, made.id).await.unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_of_a_disk_of_many_terabytes_is_read_by_one_request() {
    let store = TestStore::start().unwrap();
    let repository = Repository::init(place_in(&store), None).await.unwrap();
    // Such a map may have more than 64 MiB.
    let long = Bytes::from(vec![7; 65 << 20]);
    repository.objects.write("backups/long", long.clone()).await.unwrap();
    store.take_seen();
    let read = repository.objects.read("backups/long", WHOLE_MAX).await.unwrap();
    assert!(read.is_some_and(|read| read == long));
    let gets = store.take_seen();
    assert_eq!(gets.len(), 1, "{gets:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn extent_of_a_backup_costs_one_request_for_its_map() {
    let store = TestStore::start().unwrap();
    let repository = Repository::init(place_in(&store), None).await.unwrap();
    // Two pages that are not read together, and are all data.
    let (page, zero) = (BLOCK_SIZE * PAGE_BLOCKS, 15 * PAGE_BLOCKS);
    let new = NewBackup { size: 17 * page, ..new("vm1", &[], None) };
    let mut session = repository.begin(new).await.unwrap();
    session.zero(zero).await.unwrap();
    give_all(&mut session, &vec![1; 2 * page as usize]).await;
    let made = session.commit().await.unwrap();
    let backup = repository.read(made.id, Damage::Refused).await.unwrap();
    store.take_seen();
    let extents = tokio::task::spawn_blocking(move || {
        let extent = |page: u64, at: u64| backup.next_extent(HostOffset::new(at * page), 17 * page);
        [15, 16, 15, 0].map(|at| extent(page, at).unwrap())
    });
    let extents = extents.await.unwrap();
    let lengths = extents.map(|extent| (extent.kind, extent.length / page));
    let (hole, data) = (imgfmt::ExtentKind::Hole, imgfmt::ExtentKind::Data);
    assert_eq!(lengths, [(data, 1), (data, 1), (data, 2), (hole, 15)]);
    let seen = store.take_seen();
    assert_eq!(seen.iter().filter(|seen| seen.key.contains("/packs/")).count(), 2, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_does_not_miss_packs_of_a_backup_that_was_forgotten_meanwhile() {
    let store = TestStore::start().unwrap();
    let repository = Repository::init(place_in(&store), None).await.unwrap();
    let made = back_up(&repository, "vm1", &disk(400, 9), None).await;
    let packs = names(&repository, "packs").await;
    assert!(packs.len() > 1, "the last one has the map");
    repository.objects.delete(&packs[0]).await.unwrap();
    let problems = repository.check(100.0).await.unwrap().problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].backups, [(made.id, "vm1".to_owned())]);
    // It is listed, and perhaps opened, and then it is gone. At last its map is deleted, too.
    for (most, deleted) in [(1, None), (2, None), (2, packs.last())] {
        if let Some(deleted) = deleted {
            repository.objects.delete(deleted).await.unwrap();
        }
        let (key, mut reads) = (Key::Backup(made.id).to_string(), 0);
        store.fail(move |seen| {
            let is_it = seen.key.ends_with(&key);
            reads += u32::from(is_it);
            if is_it && reads > most { Fault::Status(404) } else { Fault::None }
        });
        let found = repository.check(100.0).await.unwrap();
        assert_eq!(found.problems, [], "{most} {deleted:?}");
        assert_eq!(found.backups, u64::from(most > 1), "{most}: it was opened");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn page_of_a_proxy_is_not_taken_for_an_empty_list() {
    for folder in ["packs", "pins", "backups", "sessions"] {
        let store = TestStore::start().unwrap();
        let repository = Repository::init(place_in(&store), None).await.unwrap();
        let disk = disk(20, 9);
        let made = back_up(&repository, "vm1", &disk, None).await;
        let gone = back_up(&repository, "vm1", &disk[..100], None).await;
        repository.forget(gone.id, false).await.unwrap();
        store.fail(move |seen| {
            let is_it = seen.query.contains("list-type") && seen.query.contains(folder);
            if is_it { Fault::Nonsense } else { Fault::None }
        });
        let error = repository.collect(&at_once()).await.unwrap_err();
        assert!(error.to_string().contains("not a list of objects"), "{error}");
        store.fail(|_| Fault::None);
        assert!(content(&repository, made.id).await.unwrap() == disk, "{folder}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_backups_that_were_exchanged_are_damaged_and_nothing_is_deleted() {
    for passphrase in [None, Some(&b"secret"[..])] {
        let repository = Repository::init(place(), passphrase).await.unwrap();
        let disks = [disk(20, 9), disk(30, 8)];
        let mut names = Vec::new();
        for (name, disk) in ["vm1", "vm2"].into_iter().zip(&disks) {
            let made = back_up(&repository, name, disk, None).await;
            names.push(Key::Backup(made.id).to_string());
        }
        let read =
            async |name: &String| repository.objects.read(name, 64 << 20).await.unwrap().unwrap();
        let (one, two) = (read(&names[0]).await, read(&names[1]).await);
        repository.objects.write(&names[0], two).await.unwrap();
        repository.objects.write(&names[1], one).await.unwrap();
        for info in repository.list().await.unwrap() {
            let error = info.head.unwrap_err().to_string();
            assert!(error.contains(&info.id.to_string()), "{error}");
        }
        assert_eq!(repository.check(0.0).await.unwrap().problems.len(), 2);
        repository.collect(&at_once()).await.unwrap_err();
    }
}
