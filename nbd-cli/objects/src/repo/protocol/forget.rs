//! A backup is forgotten.

use super::super::id::{Id, Key};
use super::{Answer, Backup, Object, Request, Step};

/// Writes a tombstone over a backup.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Forget {
    id: Id,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Read,
    Overwrite(Backup),
    Ended(bool),
}

impl Forget {
    pub(crate) fn new(id: Id) -> Self {
        Self { id, state: State::Read }
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> Id {
        self.id
    }

    /// Returns the next request; at the end whether there was a backup.
    pub(crate) fn step(&self) -> Step<bool> {
        let key = Key::Backup(self.id);
        Step::Request(match &self.state {
            State::Read => Request::Get(key),
            State::Overwrite(backup) => Request::Put(key, Object::Tombstone(Some(backup.clone()))),
            State::Ended(was_there) => return Step::Reached(*was_there),
        })
    }

    /// Takes the answer to the request.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let state = std::mem::replace(&mut self.state, State::Ended(false));
        self.state = match (state, answer) {
            (State::Read, Answer::Found(Object::Live(backup))) => State::Overwrite(backup),
            (State::Overwrite(_), _) => State::Ended(true),
            _ => State::Ended(false),
        };
    }
}
