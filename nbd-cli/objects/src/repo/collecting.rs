//! Forgets backups, and deletes the packs that no backup needs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Folder, Id, Key, PackId};
use super::listing::bytes_of;
use super::objects::Creates;
use super::protocol::{Answer, Collected, Collector, Forget, Object, Request, Rules, Step};
use super::repository::Repository;
use super::sessions::SessionInfo;
use super::staging::remove_staged;
use super::tries::Tries;

/// How a gc treats backups that are being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CollectOptions {
    /// A session that gives no sign of life for so long is ended. Backups give one each minute, by
    /// default this is 5 minutes. Where the store ignores creates, no session is ended.
    pub idle: Duration,
    /// Time to wait for sessions that live; then nothing is deleted. By default an hour.
    pub wait: Duration,
    /// Whether only to say what would be deleted.
    pub dry_run: bool,
}

impl Default for CollectOptions {
    fn default() -> Self {
        let (idle, wait) = (Duration::from_secs(300), Duration::from_secs(3600));
        Self { idle, wait, dry_run: false }
    }
}

/// The result of a gc.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Garbage {
    /// Packs that were deleted, or would be.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Sessions that were ended, because they gave no sign of life.
    pub ended: Vec<Id>,
    /// The session that runs, because of which nothing was deleted.
    pub running: Option<Id>,
    /// Lists of condemned packs of others that are still there.
    pub lists: Vec<Id>,
}

impl Repository {
    /// Forgets a backup. Its packs stay until the next gc. Returns whether it was there.
    ///
    /// # Errors
    ///
    /// If its object is damaged, unless `damaged` says that this is known; and as for all requests
    /// to the store.
    pub async fn forget(&self, id: Id, damaged: bool) -> Result<bool> {
        let mut machine = Forget::new(id);
        loop {
            match machine.step() {
                Step::Reached(was_there) => return Ok(was_there),
                Step::Request(request) => match self.objects.carry_out(request).await {
                    Ok(answer) => machine.answer(answer),
                    Err(error) if damaged && error.kind() == RepositoryErrorKind::Damaged => {
                        let tombstone = Object::Tombstone(None);
                        self.objects.carry_out(Request::Put(Key::Backup(id), tombstone)).await?;
                        return Ok(true);
                    }
                    Err(error) => return Err(error),
                },
            }
        }
    }

    /// Returns the number of packs, and the bytes of packs and backups.
    ///
    /// # Errors
    ///
    /// As for all requests to the store.
    pub async fn space(&self) -> Result<(u64, u64)> {
        let packs = self.objects.list(Folder::Packs).await?;
        let backups = self.objects.list(Folder::Backups).await?;
        let bytes = bytes_of(packs.iter().chain(&backups).map(|listed| &listed.size));
        Ok((packs.len() as u64, bytes))
    }

    /// Deletes the packs that no backup needs.
    ///
    /// # Errors
    ///
    /// If a backup or a pin cannot be read: nothing is deleted then, because it is not known what
    /// it needs; and as for all requests to the store.
    ///
    /// # Cancel safety
    ///
    /// A gc may be killed at any time. What it condemned is not used by new backups; the next gc
    /// deletes it.
    pub async fn collect(&self, options: &CollectOptions) -> Result<Garbage> {
        self.collect_and_tell(options, &|_| {}).await
    }

    /// As [`collect`](Self::collect); calls `waits` for each session for which it begins to wait.
    ///
    /// # Errors
    ///
    /// As [`collect`](Self::collect).
    ///
    /// # Cancel safety
    ///
    /// As [`collect`](Self::collect).
    pub async fn collect_and_tell(
        &self,
        options: &CollectOptions,
        waits: &(dyn Fn(&SessionInfo) + Sync),
    ) -> Result<Garbage> {
        let id = Id::random()?;
        let mut machine = Collector::new(id, Rules::ALL);
        let mut sizes = BTreeMap::new();
        let mut garbage = Garbage::default();
        let mut patience = Patience::new(options);
        let mut tries = Tries::default();
        loop {
            let deletions = machine.deletions().to_vec();
            if !deletions.is_empty() {
                let deleting = deletions
                    .iter()
                    .map(|&pack| self.objects.carry_out(Request::Delete(Key::Pack(pack))));
                // If one fails, the list stays: a deletion may still be on its way.
                join_all(deleting).await.into_iter().collect::<Result<Vec<_>>>()?;
                garbage.packs += deletions.len() as u64;
                let deleted: Vec<_> =
                    deletions.iter().filter_map(|pack| sizes.remove(pack)).collect();
                garbage.bytes = garbage.bytes.saturating_add(bytes_of(&deleted));
                machine.deleted();
                continue;
            }
            match machine.step() {
                Step::Request(Request::List(Folder::Packs)) => {
                    let listed = self.objects.list(Folder::Packs).await?;
                    sizes = listed.iter().filter_map(|it| Some((pack(it.key)?, it.size))).collect();
                    machine.answer(Answer::Listed(listed.iter().map(|it| it.key).collect()));
                }
                Step::Request(Request::Put(Key::Condemned(_), _)) if options.dry_run => {
                    let condemned = machine.condemned();
                    garbage.packs = condemned.len() as u64;
                    garbage.bytes = bytes_of(condemned.iter().filter_map(|pack| sizes.get(pack)));
                    return Ok(garbage);
                }
                Step::Request(request @ Request::Create(..)) => {
                    machine.answer(tries.create(&self.objects, request).await?);
                }
                Step::Request(request) => machine.answer(self.carry_out(request).await?),
                Step::Reached(Collected::Running(session)) => {
                    match self.decide(session, &mut patience, waits).await? {
                        Decision::End => {
                            // One that is to be ended again could not be ended before.
                            if garbage.ended.last() != Some(&session) {
                                garbage.ended.push(session);
                                tries = Tries::default();
                            }
                            machine.fence();
                        }
                        Decision::Wait => machine.look_again(),
                        Decision::GiveUp => {
                            garbage.running = Some(session);
                            machine.give_up();
                        }
                    }
                }
                Step::Reached(Collected::Lost(id)) => return Err(self.lost(id)),
                Step::Reached(Collected::Done) => break,
            }
        }
        remove_staged(&self.objects).await?;
        garbage.lists = machine.lists().to_vec();
        Ok(garbage)
    }

    /// Carries a request out; of an object that is damaged, the error says what to do.
    async fn carry_out(&self, request: Request) -> Result<Answer> {
        let key = match request {
            Request::Get(key) => Some(key),
            // Without this backup the map is not needed, and the others in that object stay.
            Request::GetMap(_, moved) => Some(Key::Backup(moved.backup)),
            _ => None,
        };
        let answer = self.objects.carry_out(request).await;
        answer.map_err(|error| match key {
            Some(key) => with_remedy(key, error),
            None => error,
        })
    }

    fn lost(&self, id: Id) -> RepositoryError {
        RepositoryError::new(
            RepositoryErrorKind::Store,
            format!(
                "{} listed the object {} and does not have it any more, although such objects are \
                 never removed; nothing was deleted",
                self.name(),
                Key::Backup(id)
            ),
        )
    }

    /// Removes the list of a gc that was interrupted. The caller knows that it does not run any
    /// more.
    ///
    /// # Errors
    ///
    /// If there is no such list.
    pub async fn forget_list(&self, id: Id) -> Result<()> {
        let key = Key::Condemned(id);
        if !self.objects.exists(key).await? {
            return Err(RepositoryError::not_found(format!("{} has no list {id}", self.name())));
        }
        self.objects.delete(&key.to_string()).await
    }

    /// Decides about a session that runs, perhaps after a while.
    async fn decide(
        &self,
        session: Id,
        patience: &mut Patience,
        waits: &(dyn Fn(&SessionInfo) + Sync),
    ) -> Result<Decision> {
        let (record, counter) = self.record(session).await?.unzip();
        if record.as_ref().is_some_and(|record| record.failed) {
            // Its writer says so: no create is on its way.
            return Ok(Decision::End);
        }
        let is_new = !patience.seen.contains_key(&session);
        let decision = patience.decide(session, counter, Instant::now());
        let decision = match (decision, self.creates()) {
            (Decision::End, Creates::Overwriting) => Decision::GiveUp,
            (decision, _) => decision,
        };
        if decision == Decision::Wait {
            if is_new {
                waits(&SessionInfo { id: session, record });
            }
            tokio::time::sleep(patience.interval(Instant::now())).await;
        }
        Ok(decision)
    }
}

/// Says what to do about an object because of which nothing is deleted.
fn with_remedy(key: Key, error: RepositoryError) -> RepositoryError {
    if error.kind() != RepositoryErrorKind::Damaged {
        return error;
    }
    let remedy = match key {
        Key::Pin(id) => format!(
            "so which backup it keeps is not known, and nothing was deleted; when its reader has \
             ended, remove it ('repo forget-session {id}')"
        ),
        Key::Backup(id) => format!(
            "so what it needs is not known, and nothing was deleted; forget it ('repo forget \
             --damaged {id}') if it cannot be put back"
        ),
        _ => return error,
    };
    RepositoryError::damaged(format!("{error}, {remedy}"))
}

fn pack(key: Key) -> Option<PackId> {
    match key {
        Key::Pack(pack) => Some(pack),
        _ => None,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    End,
    Wait,
    GiveUp,
}

/// What is known of the sessions for which a gc waits.
struct Patience {
    idle: Duration,
    until: Instant,
    /// The first wait.
    since: Option<Instant>,
    /// When the counter of a session had its value first.
    seen: BTreeMap<Id, (Option<u32>, Instant)>,
}

impl Patience {
    fn new(options: &CollectOptions) -> Self {
        let now = Instant::now();
        // So long that it does not matter.
        let until = now.checked_add(options.wait).unwrap_or(now + Duration::from_secs(86_400));
        Self { idle: options.idle, until, since: None, seen: BTreeMap::new() }
    }

    /// How long to wait before the next look: not much in comparison with what the wait has taken,
    /// and never long. Each look is two requests.
    fn interval(&mut self, now: Instant) -> Duration {
        let longest = (self.idle / 10).clamp(Duration::from_millis(20), Duration::from_secs(15));
        let waited = now.saturating_duration_since(*self.since.get_or_insert(now));
        (waited / 2).clamp(Duration::from_millis(250).min(longest), longest)
    }

    fn decide(&mut self, session: Id, counter: Option<u32>, now: Instant) -> Decision {
        let seen = self.seen.entry(session).or_insert((counter, now));
        if seen.0 != counter {
            *seen = (counter, now);
        }
        if now.saturating_duration_since(seen.1) >= self.idle {
            return Decision::End;
        }
        if now >= self.until { Decision::GiveUp } else { Decision::Wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_backup_is_not_waited_for_much_longer_than_it_takes() {
        let mut patience = Patience::new(&CollectOptions::default());
        let start = Instant::now();
        let mut waited = Duration::ZERO;
        for seconds in [0.25, 0.25, 0.25, 0.375] {
            let interval = patience.interval(start + waited);
            assert_eq!(interval.as_secs_f64(), seconds);
            waited += interval;
        }
        assert_eq!(patience.interval(start + Duration::from_secs(60)), Duration::from_secs(15));
        let hasty = CollectOptions { idle: Duration::ZERO, ..CollectOptions::default() };
        let interval = Patience::new(&hasty).interval(start);
        assert_eq!(interval, Duration::from_millis(20));
    }

    #[test]
    fn only_sessions_without_a_sign_of_life_are_ended() {
        let options =
            CollectOptions { wait: Duration::from_secs(400), ..CollectOptions::default() };
        let mut patience = Patience::new(&options);
        let (slow, dead) = (Id::from_bytes([1; 16]), Id::from_bytes([2; 16]));
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(patience.decide(dead, Some(3), after(0)), Decision::Wait);
        assert_eq!(patience.decide(slow, Some(3), after(0)), Decision::Wait);
        assert_eq!(patience.decide(slow, Some(4), after(200)), Decision::Wait);
        assert_eq!(patience.decide(dead, Some(3), after(299)), Decision::Wait);
        assert_eq!(patience.decide(dead, Some(3), after(300)), Decision::End);
        assert_eq!(patience.decide(slow, Some(6), after(390)), Decision::Wait);
        assert_eq!(patience.decide(slow, Some(6), after(401)), Decision::GiveUp);
    }
}
