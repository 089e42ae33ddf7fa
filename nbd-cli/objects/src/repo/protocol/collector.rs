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
    /// Backups that were tombstones in both rounds, with a root.
    shrinkable: BTreeSet<Id>,
    deleted: u64,
}

/// A look at what is needed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Round {
    is_second: bool,
    pinned: BTreeSet<Id>,
    /// Packs of live and of pinned backups.
    needed: BTreeSet<PackId>,
    /// Tombstones with a root that nobody has pinned.
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
    Ended,
}

/// Where a collector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Collected {
    /// This session runs. [`Collector::fence`] ends it, [`Collector::look_again`] waits for it,
    /// [`Collector::give_up`] deletes nothing.
    Running(Id),
    /// It is done: so many packs were deleted.
    Done(u64),
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
            deleted: 0,
        }
    }

    /// Packs that are condemned.
    pub(crate) fn condemned(&self) -> &BTreeSet<PackId> {
        &self.condemned
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
            State::ReadPins(keys) | State::ReadBackups(keys) | State::Sessions(keys) => {
                match keys.last() {
                    Some(Key::Session(id)) => Request::Get(Key::Backup(*id)),
                    Some(key) => Request::Get(*key),
                    None => return Step::Reached(Collected::Done(self.deleted)),
                }
            }
            State::Condemn => {
                let list = Object::Condemned(Arc::new(self.condemned.clone()));
                Request::Put(Key::Condemned(self.id), list)
            }
            State::ListSessions => Request::List(Folder::Sessions),
            State::Running(keys) | State::Fence(keys) | State::RemoveSession(keys) => {
                let Some(Key::Session(id)) = keys.last() else {
                    return Step::Reached(Collected::Done(self.deleted));
                };
                match &self.state {
                    State::Running(_) => return Step::Reached(Collected::Running(*id)),
                    State::Fence(_) => Request::Create(Key::Backup(*id), Object::Tombstone(None)),
                    _ => Request::Delete(Key::Session(*id)),
                }
            }
            State::Delete(packs) => match packs.last() {
                Some(pack) => Request::Delete(Key::Pack(*pack)),
                None => return Step::Reached(Collected::Done(self.deleted)),
            },
            State::Shrink(ids) => match (ids.last(), self.rules.keep_tombstones) {
                (Some(id), true) => Request::Put(Key::Backup(*id), Object::Tombstone(None)),
                (Some(id), false) => Request::Delete(Key::Backup(*id)),
                (None, _) => return Step::Reached(Collected::Done(self.deleted)),
            },
            State::Forgive => Request::Delete(Key::Condemned(self.id)),
            State::Ended => return Step::Reached(Collected::Done(self.deleted)),
        })
    }

    /// Takes the answer to the request.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let state = std::mem::replace(&mut self.state, State::Ended);
        self.state = match (state, answer) {
            (State::ListPacks, Answer::Listed(keys)) => {
                let packs = keys.iter().filter_map(|key| match key {
                    Key::Pack(pack) => Some(*pack),
                    _ => None,
                });
                self.condemned.extend(packs);
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
            (State::ListBackups, Answer::Listed(keys)) => self.reading_backups(keys),
            (State::ReadBackups(mut keys), answer) => {
                if let (Some(Key::Backup(id)), Answer::Found(object)) = (keys.pop(), answer) {
                    self.mark(id, object);
                }
                self.reading_backups(keys)
            }
            (State::Condemn, _) => State::ListSessions,
            (State::ListSessions, Answer::Listed(keys)) => match self.rules.wait_for_sessions {
                true => self.next_session(keys),
                false => self.looking_again(),
            },
            (State::Sessions(keys), Answer::Missing) => State::Running(keys),
            (State::Sessions(keys) | State::Fence(keys), _) => State::RemoveSession(keys),
            (State::RemoveSession(mut keys), _) => {
                keys.pop();
                self.next_session(keys)
            }
            (State::Delete(mut packs), _) => {
                packs.pop();
                self.deleted += 1;
                self.deleting(packs)
            }
            (State::Shrink(mut ids), _) => {
                ids.pop();
                Self::shrinking(ids)
            }
            (_, _) => State::Ended,
        };
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
            self.shrinkable.retain(|id| round.forgotten.contains(id));
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
