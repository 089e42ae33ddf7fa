//! A writer of a backup or of a compaction.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::super::id::{Folder, Id, Key, PackId};
use super::{Answer, Object, Request, Rules, Step};

/// Registers a session, learns what must not be referred to, and commits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Writer {
    id: Id,
    record: Bytes,
    rules: Rules,
    state: State,
    condemned: Vec<Arc<BTreeSet<PackId>>>,
    /// A list cannot be read: any pack may be on it.
    lacks_list: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Register,
    ListCondemned,
    /// The lists that are still to be read, last one first.
    ReadCondemned(Vec<Key>),
    Writing,
    /// A compaction is marked.
    Mark(Object),
    Create(Object),
    /// The create found an object: whose is it?
    Look(Object),
    /// Only the search ever marks a compaction when it is there.
    MarkLate,
    EndSession(Committed),
    Ended(Committed),
}

/// How a writer ends, and the point before: nothing is referred to yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Committed {
    /// Packs may be written and referred to now.
    Ready,
    /// The backup is in the repository.
    Yes,
    /// Another process ended the session: there is no backup.
    Fenced,
}

impl Writer {
    pub(crate) fn new(id: Id, record: Bytes, rules: Rules) -> Self {
        let state = match rules.session_first {
            true => State::Register,
            false => State::ListCondemned,
        };
        Self { id, record, rules, state, condemned: Vec::new(), lacks_list: false }
    }

    /// Returns whether the backup may refer to a pack that is in the store. Those of this session
    /// are not asked about.
    pub(crate) fn may_refer(&self, pack: PackId) -> bool {
        let is_condemned = || self.condemned.iter().any(|list| list.contains(&pack));
        !self.rules.heed_condemned || !(self.lacks_list || is_condemned())
    }

    /// Commits, once it is [`Committed::Ready`].
    pub(crate) fn commit(&mut self, object: Object) {
        if self.state == State::Writing {
            self.state = match &object {
                Object::Compaction(_) if self.rules.mark_first => State::Mark(object),
                _ => State::Create(object),
            };
        }
    }

    /// Lets go of what does not matter any more, so that a search finds fewer different states.
    #[cfg(test)]
    pub(super) fn settle(&mut self) {
        let refers = matches!(
            self.state,
            State::Register | State::ListCondemned | State::ReadCondemned(_) | State::Writing
        );
        if !refers {
            (self.condemned, self.lacks_list) = (Vec::new(), false);
        }
    }

    /// Returns the next request.
    pub(crate) fn step(&self) -> Step<Committed> {
        Step::Request(match &self.state {
            State::Register => {
                Request::Put(Key::Session(self.id), Object::Session(self.record.clone()))
            }
            State::ListCondemned => Request::List(Folder::Condemned),
            State::ReadCondemned(keys) => match keys.last() {
                Some(key) => Request::Get(*key),
                None => return Step::Reached(Committed::Ready),
            },
            State::Writing => return Step::Reached(Committed::Ready),
            State::Mark(_) | State::MarkLate => Request::Put(Key::Moved(self.id), Object::Mark),
            State::Create(object) => match self.rules.create {
                true => Request::Create(Key::Backup(self.id), object.clone()),
                false => Request::Put(Key::Backup(self.id), object.clone()),
            },
            State::Look(_) => Request::Get(Key::Backup(self.id)),
            State::EndSession(_) => Request::Delete(Key::Session(self.id)),
            State::Ended(committed) => return Step::Reached(*committed),
        })
    }

    /// Takes the answer to the request.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let state = std::mem::replace(&mut self.state, State::Writing);
        self.state = match (state, answer) {
            (State::Register, _) => match self.rules.session_first {
                true => State::ListCondemned,
                false => State::Writing,
            },
            (State::ListCondemned, Answer::Listed(keys)) => self.reading(keys),
            (State::ReadCondemned(mut keys), answer) => {
                keys.pop();
                match answer {
                    Answer::Found(Object::Condemned(list)) => self.condemned.push(list),
                    // It was removed meanwhile: its packs were kept, or are gone.
                    Answer::Missing => {}
                    _ => self.lacks_list = true,
                }
                self.reading(keys)
            }
            (State::Mark(object), _) => State::Create(object),
            (State::Create(object), Answer::Done) => self.created(&object),
            (State::Create(object), _) => State::Look(object),
            (State::Look(object), answer) => match answer {
                // The reply to an earlier attempt was lost.
                Answer::Found(found) if is_own(&object, &found) => self.created(&object),
                Answer::Missing => State::Create(object),
                _ => State::EndSession(Committed::Fenced),
            },
            (State::MarkLate, _) => State::EndSession(Committed::Yes),
            (State::EndSession(committed), _) => State::Ended(committed),
            (state, _) => state,
        };
    }

    fn created(&self, object: &Object) -> State {
        match object {
            Object::Compaction(_) if !self.rules.mark_first => State::MarkLate,
            _ => State::EndSession(Committed::Yes),
        }
    }

    fn reading(&self, keys: Vec<Key>) -> State {
        match (keys.is_empty(), self.rules.session_first) {
            (false, _) => State::ReadCondemned(keys),
            (true, true) => State::Writing,
            (true, false) => State::Register,
        }
    }
}

/// Returns whether what was found is what was created, or the tombstone of it.
fn is_own(own: &Object, found: &Object) -> bool {
    match (own, found) {
        (Object::Live(own), Object::Live(found) | Object::Tombstone(Some(found))) => own == found,
        (Object::Compaction(own), Object::Compaction(found)) => own.is(found),
        _ => false,
    }
}
