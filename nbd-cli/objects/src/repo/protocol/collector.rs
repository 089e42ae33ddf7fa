//! The collector: deletes packs that no backup needs.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::id::{Folder, Id, Key, PackId};
use super::{Answer, Object, Request, Rules, Step};

/// Deletions of packs at a time.
const DELETIONS: usize = 16;

/// Condemns what no backup needs, waits for the sessions that may not know of it, looks again, and
/// deletes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Collector {
    id: Id,
    rules: Rules,
    state: State,
    /// What may be deleted.
    condemned: BTreeSet<PackId>,
    round: Round,
    /// Backups that were tombstones with a root in the first round, and that nobody has pinned.
    shrinkable: BTreeSet<Id>,
    /// Backups and tombstones that were listed in the first round.
    names: BTreeSet<Id>,
    /// Packs that were listed at the start; only the search ever uses them.
    packs: BTreeSet<PackId>,
    /// Lists of other collectors that stay.
    lists: Vec<Id>,
}

/// A look at what is needed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Round {
    is_second: bool,
    pinned: BTreeSet<Id>,
    /// Packs of live and of pinned backups.
    needed: BTreeSet<PackId>,
    /// Tombstones with a root that are not pinned.
    forgotten: BTreeSet<Id>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    ListPacks,
    ListPins,
    ReadPins(Vec<Key>),
    ListBackups,
    ReadBackups(Vec<Key>),
    Condemn,
    ListSessions,
    /// The first is looked at: has it ended?
    Sessions(Vec<Key>),
    /// It has not; the user says what to do.
    Running(Vec<Key>),
    /// It is ended by a tombstone in its place.
    Fence(Vec<Key>),
    /// The record of an ended session is removed.
    RemoveSession(Vec<Key>),
    Delete(Vec<PackId>),
    Shrink(Vec<Id>),
    Forgive,
    /// A name of a backup that was listed is not there any more: nothing is deleted.
    ForgiveLost(Id),
    Lost(Id),
    ListOthers,
    /// Lists of other collectors.
    ReadOthers(Vec<Key>),
    /// The last one has these packs: is one of them there?
    ListPacksAgain(Vec<Key>, Arc<BTreeSet<PackId>>),
    RemoveOther(Vec<Key>),
    Ended,
}

/// Where a collector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Collected {
    /// This session runs. [`Collector::fence`] ends it, [`Collector::look_again`] waits for it,
    /// [`Collector::give_up`] deletes nothing.
    Running(Id),
    /// The store has listed this backup and lacks it now. None is ever deleted, so the store cannot
    /// be relied on. Nothing was deleted.
    Lost(Id),
    /// It is done.
    Done,
}

impl Collector {
    pub(crate) fn new(id: Id, rules: Rules) -> Self {
        Self {
            id,
            rules,
            state: State::ListPacks,
            condemned: BTreeSet::new(),
            round: Round::default(),
            shrinkable: BTreeSet::new(),
            names: BTreeSet::new(),
            packs: BTreeSet::new(),
            lists: Vec::new(),
        }
    }

    /// Packs that are condemned.
    pub(crate) fn condemned(&self) -> &BTreeSet<PackId> {
        &self.condemned
    }

    /// Lists of other collectors that stay: packs of theirs are there, or they are damaged.
    pub(crate) fn lists(&self) -> &[Id] {
        &self.lists
    }

    /// Ends the session that runs.
    pub(crate) fn fence(&mut self) {
        if let State::Running(keys) = &mut self.state {
            self.state = State::Fence(std::mem::take(keys));
        }
    }

    /// Looks whether the session that ran has ended.
    pub(crate) fn look_again(&mut self) {
        if let State::Running(keys) = &mut self.state {
            self.state = State::Sessions(std::mem::take(keys));
        }
    }

    /// Deletes nothing, because a session runs.
    pub(crate) fn give_up(&mut self) {
        if matches!(self.state, State::Running(_)) {
            self.state = State::Forgive;
        }
    }

    /// The next requests, if they are deletions of packs, which may be carried out in any order.
    /// [`deleted`](Self::deleted) takes the answers.
    pub(crate) fn deletions(&self) -> &[PackId] {
        match &self.state {
            State::Delete(packs) => &packs[packs.len().saturating_sub(DELETIONS)..],
            _ => &[],
        }
    }

    /// All of [`deletions`](Self::deletions) were answered.
    pub(crate) fn deleted(&mut self) {
        for _ in 0..self.deletions().len() {
            self.answer(Answer::Done);
        }
    }

    /// Returns the next request.
    pub(crate) fn step(&self) -> Step<Collected> {
        Step::Request(match &self.state {
            State::ListPacks => Request::List(Folder::Packs),
            State::ListPins => Request::List(Folder::Pins),
            State::ListBackups => Request::List(Folder::Backups),
            State::ReadPins(keys)
            | State::ReadBackups(keys)
            | State::Sessions(keys)
            | State::ReadOthers(keys) => match keys.last() {
                Some(Key::Session(id)) => Request::Get(Key::Backup(*id)),
                Some(key) => Request::Get(*key),
                None => return Step::Reached(Collected::Done),
            },
            State::Condemn => {
                let list = Object::Condemned(Arc::new(self.condemned.clone()));
                Request::Put(Key::Condemned(self.id), list)
            }
            State::ListSessions => Request::List(Folder::Sessions),
            State::Running(keys) | State::Fence(keys) | State::RemoveSession(keys) => {
                let Some(Key::Session(id)) = keys.last() else {
                    return Step::Reached(Collected::Done);
                };
                match &self.state {
                    State::Running(_) => return Step::Reached(Collected::Running(*id)),
                    State::Fence(_) => Request::Create(Key::Backup(*id), Object::Tombstone(None)),
                    _ => Request::Delete(Key::Session(*id)),
                }
            }
            State::Delete(packs) => match packs.last() {
                Some(pack) => Request::Delete(Key::Pack(*pack)),
                None => return Step::Reached(Collected::Done),
            },
            State::Shrink(ids) => match (ids.last(), self.rules.keep_tombstones) {
                (Some(id), true) => Request::Put(Key::Backup(*id), Object::Tombstone(None)),
                (Some(id), false) => Request::Delete(Key::Backup(*id)),
                (None, _) => return Step::Reached(Collected::Done),
            },
            State::Forgive | State::ForgiveLost(_) => Request::Delete(Key::Condemned(self.id)),
            State::Lost(id) => return Step::Reached(Collected::Lost(*id)),
            State::ListOthers => Request::List(Folder::Condemned),
            State::ListPacksAgain(..) => Request::List(Folder::Packs),
            State::RemoveOther(keys) => match keys.last() {
                Some(key) => Request::Delete(*key),
                None => return Step::Reached(Collected::Done),
            },
            State::Ended => return Step::Reached(Collected::Done),
        })
    }

    /// Takes the answer to the request.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let state = std::mem::replace(&mut self.state, State::Ended);
        self.state = match (state, answer) {
            (State::ListPacks, Answer::Listed(keys)) => {
                self.condemned.extend(packs(&keys));
                if !self.rules.list_packs_again {
                    self.packs.clone_from(&self.condemned);
                }
                State::ListPins
            }
            (State::ListPins, Answer::Listed(keys)) => Self::reading_pins(keys),
            (State::ReadPins(mut keys), answer) => {
                keys.pop();
                if let Answer::Found(Object::Pin(id)) = answer
                    && self.rules.heed_pins
                {
                    self.round.pinned.insert(id);
                }
                Self::reading_pins(keys)
            }
            (State::ListBackups, Answer::Listed(keys)) => self.after_list(keys),
            (State::ReadBackups(mut keys), answer) => match (keys.pop().and_then(name), answer) {
                // Names are never deleted.
                (Some(id), Answer::Missing) if self.rules.keep_tombstones => State::ForgiveLost(id),
                (Some(id), Answer::Found(object)) => {
                    self.mark(id, object);
                    self.reading_backups(keys)
                }
                _ => self.reading_backups(keys),
            },
            (State::Condemn, _) => State::ListSessions,
            (State::ListSessions, Answer::Listed(keys)) => match self.rules.wait_for_sessions {
                true => self.next_session(keys),
                false => self.looking_again(),
            },
            (State::Sessions(keys), Answer::Missing) => State::Running(keys),
            // The backup is there, or the store was busy, which it tells in the same way.
            (State::Fence(keys), Answer::Exists) => State::Sessions(keys),
            (State::Sessions(keys) | State::Fence(keys), _) => State::RemoveSession(keys),
            (State::RemoveSession(mut keys), _) => {
                keys.pop();
                self.next_session(keys)
            }
            (State::Delete(mut packs), _) => {
                packs.pop();
                self.deleting(packs)
            }
            (State::Shrink(mut ids), _) => {
                ids.pop();
                Self::shrinking(ids)
            }
            (State::Forgive, _) => State::ListOthers,
            (State::ForgiveLost(id), _) => State::Lost(id),
            (state, answer) => self.answer_of_others(state, answer),
        };
    }

    /// Lists of interrupted collectors are removed when none of their packs is there: packs are
    /// never written twice, so these collectors cannot delete anything any more. Packs are listed
    /// after the list was read, because it may be of a collector that began later and lives.
    fn answer_of_others(&mut self, state: State, answer: Answer) -> State {
        match (state, answer) {
            (State::ListOthers, Answer::Listed(keys)) => Self::reading_others(keys),
            (State::ReadOthers(keys), Answer::Found(Object::Condemned(list))) => {
                match self.rules.list_packs_again {
                    true => State::ListPacksAgain(keys, list),
                    false => self.judge(keys, list.is_disjoint(&self.packs)),
                }
            }
            (State::ReadOthers(mut keys), Answer::Missing) => {
                keys.pop();
                Self::reading_others(keys)
            }
            (State::ReadOthers(keys), _) => self.judge(keys, false),
            (State::ListPacksAgain(keys, list), Answer::Listed(listed)) => {
                let is_over = !packs(&listed).any(|pack| list.contains(&pack));
                self.judge(keys, is_over)
            }
            (State::RemoveOther(mut keys), _) => {
                keys.pop();
                Self::reading_others(keys)
            }
            (_, _) => State::Ended,
        }
    }

    /// Decides about the list of another collector.
    fn judge(&mut self, mut keys: Vec<Key>, is_over: bool) -> State {
        if is_over {
            return State::RemoveOther(keys);
        }
        if let Some(Key::Condemned(id)) = keys.pop() {
            self.lists.push(id);
        }
        Self::reading_others(keys)
    }

    fn reading_others(keys: Vec<Key>) -> State {
        if keys.is_empty() { State::Ended } else { State::ReadOthers(keys) }
    }

    /// Chooses what is read of the backups. The second round reads those that came since the first
    /// one, and tombstones that a reader has pinned since. All others are known: a backup never
    /// changes but into a tombstone, and what was needed once is not condemned any more.
    fn after_list(&mut self, mut keys: Vec<Key>) -> State {
        let names = keys.iter().copied().filter_map(name).collect();
        if !self.round.is_second {
            self.names = names;
            return self.reading_backups(keys);
        }
        let lost = self.names.difference(&names).next();
        if let Some(id) = lost.filter(|_| self.rules.keep_tombstones) {
            return State::ForgiveLost(*id);
        }
        let is_pinned = |id: &Id| self.round.pinned.contains(id) && self.shrinkable.contains(id);
        let is_new = |id: Id| !self.names.contains(&id) || is_pinned(&id);
        keys.retain(|&key| name(key).is_some_and(is_new));
        self.reading_backups(keys)
    }

    fn reading_pins(keys: Vec<Key>) -> State {
        if keys.is_empty() { State::ListBackups } else { State::ReadPins(keys) }
    }

    fn mark(&mut self, id: Id, object: Object) {
        let is_pinned = self.round.pinned.contains(&id);
        match object {
            Object::Live(backup) => self.round.needed.extend(backup.packs.iter()),
            Object::Tombstone(Some(backup)) if is_pinned => {
                self.round.needed.extend(backup.packs.iter());
            }
            Object::Tombstone(Some(_)) => drop(self.round.forgotten.insert(id)),
            _ => {}
        }
    }

    /// Reads the next backup, or uses what was learnt.
    fn reading_backups(&mut self, keys: Vec<Key>) -> State {
        if !keys.is_empty() {
            return State::ReadBackups(keys);
        }
        let round = std::mem::take(&mut self.round);
        self.condemned.retain(|pack| !round.needed.contains(pack));
        if round.is_second {
            self.shrinkable.retain(|id| !round.pinned.contains(id));
            let packs = self.condemned.iter().copied().collect();
            return self.deleting(packs);
        }
        self.shrinkable = round.forgotten;
        State::Condemn
    }

    fn next_session(&mut self, keys: Vec<Key>) -> State {
        if keys.is_empty() { self.looking_again() } else { State::Sessions(keys) }
    }

    fn looking_again(&mut self) -> State {
        if !self.rules.mark_again {
            return self.deleting(self.condemned.iter().copied().collect());
        }
        self.round = Round { is_second: true, ..Round::default() };
        State::ListPins
    }

    fn deleting(&mut self, packs: Vec<PackId>) -> State {
        if packs.is_empty() {
            return Self::shrinking(self.shrinkable.iter().copied().collect());
        }
        State::Delete(packs)
    }

    fn shrinking(ids: Vec<Id>) -> State {
        if ids.is_empty() { State::Forgive } else { State::Shrink(ids) }
    }
}

fn name(key: Key) -> Option<Id> {
    match key {
        Key::Backup(id) => Some(id),
        _ => None,
    }
}

fn packs(keys: &[Key]) -> impl Iterator<Item = PackId> {
    keys.iter().filter_map(|key| match key {
        Key::Pack(pack) => Some(*pack),
        _ => None,
    })
}
