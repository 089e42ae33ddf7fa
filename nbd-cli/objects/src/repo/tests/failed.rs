//! Backups and compactions that fail in order: no gc waits for them.

use super::faults::overwriting;
use super::*;

/// A gc that waits for nothing and ends no session that may live.
fn without_patience() -> CollectOptions {
    CollectOptions { wait: std::time::Duration::ZERO, ..CollectOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_that_sent_nothing_leaves_no_session() {
    let repository = repository().await;
    let disk = disk(20, 9);
    let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut session, &disk[..BLOCK_SIZE as usize]).await;
    session.give_up().await;
    assert_eq!(repository.sessions().await.unwrap(), []);
    let missing = Id::random().unwrap();
    repository.begin(new("vm1", &disk, Some(missing))).await.unwrap_err();
    assert_eq!(repository.sessions().await.unwrap(), []);
    let garbage = repository.collect(&without_patience()).await.unwrap();
    assert_eq!((garbage.running, garbage.ended), (None, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_that_failed_is_used_by_the_next_one_and_ended_at_once_by_gc() {
    for repository in [repository().await, overwriting(repository().await)] {
        let disk = disk(900, 7);
        for is_first in [true, false] {
            let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
            give_all(&mut session, &disk[..700 * BLOCK_SIZE as usize]).await;
            while !session.puts_are_done().await {}
            session.give_up().await;
            let left = repository.sessions().await.unwrap();
            assert_eq!(left.len(), 1);
            assert!(left[0].record.as_ref().unwrap().failed);
            let made = match is_first {
                true => Some(back_up(&repository, "vm1", &disk, None).await),
                false => None,
            };
            assert!(made.is_none_or(|made| made.found > 300 * BLOCK_SIZE));
            let garbage = repository.collect(&without_patience()).await.unwrap();
            assert_eq!((garbage.running, garbage.ended), (None, vec![left[0].id]));
            assert_eq!(repository.sessions().await.unwrap(), []);
            assert_eq!(repository.check(100.0).await.unwrap().problems, []);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_tells_once_for_which_session_it_waits() {
    let repository = repository().await;
    let session = repository.begin(new("vm1", &disk(20, 9), None)).await.unwrap();
    let told = std::sync::Mutex::new(Vec::new());
    let waits = |info: &SessionInfo| told.lock().unwrap().push(info.clone());
    // Several looks.
    let wait = std::time::Duration::from_millis(600);
    let options = CollectOptions { wait, ..CollectOptions::default() };
    let garbage = repository.collect_and_tell(&options, &waits).await.unwrap();
    assert_eq!(garbage.running, Some(session.id()));
    let told = told.into_inner().unwrap();
    assert_eq!(told.iter().map(|info| info.id).collect::<Vec<_>>(), [session.id()]);
    assert_eq!(told[0].record.as_ref().unwrap().name, "vm1");
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_that_was_ended_by_another_program_is_not_there_and_leaves_no_session() {
    let repository = repository().await;
    let disk = disk(20, 9);
    let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut session, &disk).await;
    repository.collect(&at_once()).await.unwrap();
    session.commit().await.unwrap_err();
    session.give_up().await;
    assert_eq!(repository.sessions().await.unwrap(), []);
    assert!(repository.list().await.unwrap().is_empty());
    // One that was committed stays.
    let mut session = repository.begin(new("vm1", &disk, None)).await.unwrap();
    give_all(&mut session, &disk).await;
    let made = session.commit().await.unwrap();
    session.give_up().await;
    assert_eq!(repository.sessions().await.unwrap(), []);
    assert!(content(&repository, made.id).await.unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn sum_of_what_backups_added_is_what_the_repository_holds() {
    let repository = repository().await;
    let mut added = 0;
    for (name, blocks) in [("vm1", 0), ("vm1", 20), ("vm2", 300)] {
        let disk = if blocks == 0 { Vec::new() } else { disk(blocks, 3) };
        let made = back_up(&repository, name, &disk, None).await;
        let list = repository.list().await.unwrap();
        let info = list.iter().find(|info| info.id == made.id).unwrap();
        assert_eq!(info.head.as_ref().unwrap().added + info.bytes, made.added);
        added += made.added;
        assert_eq!(repository.space().await.unwrap().1, added);
    }
}
