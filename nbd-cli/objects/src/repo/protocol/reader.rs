//! A reader of a backup.

use super::super::id::{Id, Key};
use super::{Answer, Backup, Object, Request, Rules, Step};

/// Pins a backup and reads its root. At the end of its use the pin is removed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reader {
    pin: Id,
    backup: Id,
    is_pinned: bool,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Pin,
    Read,
    Reading(Backup),
    Unpin,
    Ended,
}

impl Reader {
    pub(crate) fn new(pin: Id, backup: Id, rules: Rules) -> Self {
        let state = if rules.pin_first { State::Pin } else { State::Read };
        Self { pin, backup, is_pinned: false, state }
    }

    /// Returns the next request, or the backup while it may be read, or `None` at the end.
    pub(crate) fn step(&self) -> Step<Option<Backup>> {
        Step::Request(match &self.state {
            State::Read => Request::Get(Key::Backup(self.backup)),
            State::Reading(backup) if self.is_pinned => {
                return Step::Reached(Some(backup.clone()));
            }
            // Only the search ever pins a backup that is read already.
            State::Pin | State::Reading(_) => {
                Request::Put(Key::Pin(self.pin), Object::Pin(self.backup))
            }
            State::Unpin => Request::Delete(Key::Pin(self.pin)),
            State::Ended => return Step::Reached(None),
        })
    }

    /// Takes the answer to the request.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let state = std::mem::replace(&mut self.state, State::Ended);
        self.state = match (state, answer) {
            (State::Pin, _) => {
                self.is_pinned = true;
                State::Read
            }
            (State::Read, Answer::Found(Object::Live(backup))) => State::Reading(backup),
            (State::Read, _) => State::Unpin,
            (State::Reading(backup), _) => {
                self.is_pinned = true;
                State::Reading(backup)
            }
            _ => State::Ended,
        };
    }

    /// Ends the use of the backup, or the attempt at it: the pin may be there although its request
    /// failed.
    pub(crate) fn end(&mut self) {
        if self.state != State::Ended {
            self.state = State::Unpin;
        }
    }
}
