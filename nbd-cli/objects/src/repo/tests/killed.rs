//! A compaction that ends at any of its requests, and the next one.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

use super::faults::place_in;
use super::*;
use crate::testing::{Contents, Fault, TestStore};

/// How a compaction meets one of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is killed before the request has its effect.
    Before,
    /// It is killed when the request has had its effect.
    After,
    /// It gets no reply, although the request has its effect, and goes on.
    ReplyLost,
}

/// A repository with packs of which a part is needed, and what the backups hold.
async fn to_compact() -> (Contents, Vec<(Id, Vec<u8>)>) {
    let store = TestStore::start().unwrap();
    let repository = Repository::init(place_in(&store), None).await.unwrap();
    let mut made = Vec::new();
    for (name, seed) in [("vm1", 5), ("vm2", 6)] {
        let mut disk = disk(24, seed);
        let first = back_up(&repository, name, &disk, None).await.id;
        for block in [3, 8, 13] {
            disk[block * BLOCK_SIZE as usize..][..16].copy_from_slice(&[block as u8; 16]);
        }
        let second = back_up(&repository, name, &disk, Some(first)).await.id;
        repository.forget(first, false).await.unwrap();
        made.push((second, disk));
    }
    repository.collect(&at_once()).await.unwrap();
    (store.contents(), made)
}

fn options() -> CompactOptions {
    CompactOptions::default()
}

/// Runs a compaction, whose `point`-th request is its last one, or loses its reply. Returns what is
/// in the store then, and the number of requests.
async fn end(contents: &Contents, point: usize, how: End) -> (Contents, usize) {
    let store = TestStore::start().unwrap();
    store.set_contents(contents);
    let repository = Repository::open(place_in(&store), None).await.unwrap();
    let (count, is_met) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let (counter, notify) = (Arc::clone(&count), Arc::clone(&is_met));
    store.fail(move |_| {
        let number = counter.fetch_add(1, Ordering::SeqCst);
        match (number.cmp(&point), how) {
            (std::cmp::Ordering::Equal, End::ReplyLost) => return Fault::ReplyLost,
            (std::cmp::Ordering::Less, _) | (_, End::ReplyLost) => return Fault::None,
            (std::cmp::Ordering::Equal, End::After) => {
                notify.notify_one();
                return Fault::Hang;
            }
            _ => notify.notify_one(),
        }
        Fault::Dropped
    });
    let options = options();
    tokio::select! {
        compacted = repository.compact(&options) => drop(compacted.unwrap()),
        () = is_met.notified() => {}
    }
    // A request that was met before this one has had its effect: the store has one thread.
    let mut stream = TcpStream::connect(store.endpoint().trim_start_matches("http://")).unwrap();
    stream.write_all(b"HEAD / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
    (store.contents(), count.load(Ordering::SeqCst) - 1)
}

async fn are_whole(repository: &Repository, made: &[(Id, Vec<u8>)], context: &str) {
    for (id, disk) in made {
        assert!(content(repository, *id).await.unwrap() == *disk, "{context}: {id}");
    }
    assert_eq!(repository.check(100.0).await.unwrap().problems, [], "{context}");
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_that_ends_at_any_request_is_completed_by_the_next_one() {
    let (contents, made) = to_compact().await;
    let (done, requests) = end(&contents, usize::MAX, End::Before).await;
    assert!(requests > 20, "{requests} requests");
    assert!(done.keys().any(|key| key.contains("/moved/")));
    for point in 0..requests {
        for how in [End::Before, End::After, End::ReplyLost] {
            let context = format!("{how:?} request {point} of {requests}");
            let (left, met) = end(&contents, point, how).await;
            assert!(met >= point, "{context}: {met}");
            let store = TestStore::start().unwrap();
            store.set_contents(&left);
            let repository = Repository::open(place_in(&store), None).await.unwrap();
            are_whole(&repository, &made, &context).await;
            repository.compact(&options()).await.unwrap();
            are_whole(&repository, &made, &context).await;
            // The first one ends what was interrupted, the second one sweeps what that left.
            for _ in 0..2 {
                repository.collect(&at_once()).await.unwrap();
                are_whole(&repository, &made, &context).await;
            }
            assert_eq!(names(&repository, "sessions").await, [""; 0], "{context}");
            assert_eq!(names(&repository, "condemned").await, [""; 0], "{context}");
            assert_eq!(names(&repository, "moved").await.len(), 1, "{context}");
            assert_eq!(repository.check(0.0).await.unwrap().unneeded, 0, "{context}");
            let planned = CompactOptions { dry_run: true, max_unused: 0.2, ..options() };
            let planned = repository.compact(&planned).await.unwrap();
            assert_eq!(planned.packs, 0, "{context}: {planned:?}");
        }
    }
}
