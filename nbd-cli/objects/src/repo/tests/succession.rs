//! Backups of one name that are made at the same time: the orders in which their requests can reach
//! the store.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use futures_util::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use super::super::id::Key;
use super::*;

/// Most changes of turns in an order, unless one has ended: all orders take minutes, and say the
/// same.
const SWITCHES_MAX: usize = 3;

/// A store at which one party at a time has its turn: each request waits for one.
#[derive(Debug)]
struct Turns(InMemory);

impl fmt::Display for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("turns")
    }
}

async fn turn() {
    let mut has_waited = false;
    std::future::poll_fn(|_| match std::mem::replace(&mut has_waited, true) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

#[async_trait::async_trait]
impl ObjectStore for Turns {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        turn().await;
        self.0.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(location, options).await
    }

    async fn get_opts(
        &self,
        location: &Path,
        options: GetOptions,
    ) -> object_store::Result<GetResult> {
        turn().await;
        self.0.get_opts(location, options).await
    }

    async fn get_ranges(
        &self,
        location: &Path,
        ranges: &[Range<u64>],
    ) -> object_store::Result<Vec<Bytes>> {
        self.0.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

/// What happened to a backup, and when.
#[derive(Clone, Debug)]
struct Party {
    id: Id,
    /// The one that it follows.
    last: Option<Id>,
    started: u32,
    /// When it began to read the disk.
    begun: u32,
    /// When it had told that it was committed, if it was.
    ended: Option<u32>,
    /// When it looked whether it had been overtaken.
    looked: u32,
}

/// Runs one party alone.
fn alone<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(result) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return result;
        }
    }
}

/// One backup: as [`Session`] does it, without its data. With `is_incremental`, it fails if it was
/// overtaken.
async fn party(repository: &Repository, clock: &Cell<u32>, is_incremental: bool) -> Party {
    let tick = || {
        clock.set(clock.get() + 1);
        clock.get()
    };
    let id = Id::random().unwrap();
    let started = tick();
    let line = repository.line("vm").await.unwrap();
    // From here on it reads the bitmap and the disk.
    let begun = tick();
    let mut incremental = line.last().unwrap().filter(|_| is_incremental);
    if let Some(last) = incremental
        && !repository.objects.exists(Key::Backup(last)).await.unwrap()
    {
        incremental = None;
    }
    turn().await;
    // It was all read.
    let looked = tick();
    let is_alone = repository.line("vm").await.unwrap() == line;
    let party = Party { id, last: incremental, started, begun, ended: None, looked };
    if incremental.is_some() && !is_alone {
        return party;
    }
    repository.objects.write(&Key::Backup(id).to_string(), "backup".into()).await.unwrap();
    repository.succeed("vm", line, id, is_alone).await.unwrap();
    Party { ended: Some(tick()), ..party }
}

/// Checks what holds after any number of backups of which some were made at the same time.
fn judge(repository: &Repository, parties: &[Party], last: Id, order: &[bool]) {
    for party in parties.iter().filter(|party| party.ended.is_some()) {
        let others = parties.iter().filter(|other| other.id != party.id);
        for other in others {
            // Its bitmap may be cleared from then on.
            let cleared = other.ended.unwrap_or(u32::MAX);
            if party.last.is_some() {
                let is_between = party.begun < cleared && cleared < party.looked;
                assert!(!is_between, "{order:?}: the bitmap was cleared while it was read");
                let followed = parties.iter().find(|it| Some(it.id) == party.last).unwrap();
                let is_older = followed.ended.is_some_and(|end| end < cleared);
                assert!(!(is_older && cleared < party.begun), "{order:?}: it follows an older one");
            }
            if last == party.id && other.ended.is_some() {
                assert!(cleared < party.begun, "{order:?}: it is not the last one alone");
            }
        }
    }
    // An identity of no backup is right only if there was company.
    let ended: Vec<_> = parties.iter().filter(|party| party.ended.is_some()).collect();
    let is_one = alone(repository.objects.exists(Key::Backup(last))).unwrap();
    let apart = ended.iter().all(|one| {
        ended.iter().all(|two| {
            one.id == two.id || one.ended < Some(two.started) || two.ended < Some(one.started)
        })
    });
    assert!(is_one || !apart, "{order:?}: the last one is not known, without need");
    assert!(!ended.is_empty(), "{order:?}: all of them failed");
}

/// Runs two backups in the order in which `order` gives turns, `true` to the second one; returns
/// the turns for which there was a choice.
fn run(order: &[bool], kinds: [bool; 2]) -> Vec<bool> {
    let store: Arc<dyn ObjectStore> = Arc::new(Turns(InMemory::new()));
    let place = Place { store, ..place() };
    let repository = alone(Repository::init(place, None)).unwrap();
    let clock = Cell::new(0);
    let mut parties = vec![alone(party(&repository, &clock, true))];
    let mut taken = Vec::new();
    {
        let mut one = pin!(party(&repository, &clock, kinds[0]));
        let mut two = pin!(party(&repository, &clock, kinds[1]));
        let mut has_ended = [false; 2];
        while has_ended != [true; 2] {
            let second = match has_ended {
                [false, false] => {
                    taken.push(order.get(taken.len()).copied().unwrap_or(false));
                    taken[taken.len() - 1]
                }
                [one_has_ended, _] => one_has_ended,
            };
            let work = if second { two.as_mut() } else { one.as_mut() };
            if let Poll::Ready(party) = work.poll(&mut Context::from_waker(Waker::noop())) {
                has_ended[usize::from(second)] = true;
                parties.push(party);
            }
        }
    }
    // One that begins when all have ended knows what it follows, and is the last one again.
    for is_incremental in [true, false] {
        let last = alone(repository.last("vm")).unwrap().unwrap();
        judge(&repository, &parties, last, &taken);
        let next = alone(party(&repository, &clock, is_incremental));
        assert!(next.ended.is_some(), "{taken:?}: the next one fails");
        parties.push(next);
    }
    taken
}

#[test]
fn bitmap_is_used_for_the_right_backup_in_the_orders_of_two() {
    let mut seen = BTreeSet::new();
    for kinds in [[true, true], [true, false], [false, false]] {
        let mut orders = vec![Vec::new()];
        while let Some(order) = orders.pop() {
            let taken = run(&order, kinds);
            // Each turn that was not chosen is chosen in another run.
            for at in order.len()..taken.len() {
                let mut other = taken[..at].to_vec();
                other.push(!taken[at]);
                let switches = other.windows(2).filter(|pair| pair[0] != pair[1]).count();
                if switches <= SWITCHES_MAX {
                    orders.push(other);
                }
            }
            assert!(seen.insert((kinds, taken)), "an order came twice");
        }
    }
    assert!(seen.len() > 1000, "{}", seen.len());
}
