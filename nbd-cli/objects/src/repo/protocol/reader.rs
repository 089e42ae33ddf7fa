//! A reader of a backup.

use super::super::id::{Folder, Id, Key};
use super::{Answer, Backup, Moved, Moves, Object, Request, Rules, Step};

/// Pins a backup, chooses its map, and reads its root. At the end of its use the pin is removed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reader {
    pin: Id,
    backup: Id,
    rules: Rules,
    is_pinned: bool,
    has_listed: bool,
    moves: Moves,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Pin,
    ListMoved,
    /// The compactions that are still to be read, last one first.
    ReadMoves(Vec<Key>),
    Read,
    ReadMap(Backup, Id, Moved),
    Reading(Opened),
    Unpin,
    Ended,
}

/// A backup that is open.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Opened {
    pub(crate) backup: Backup,
    /// Its map, if it is not its own: in place of an object the content of the body.
    pub(crate) map: Option<Backup>,
}

impl Reader {
    pub(crate) fn new(pin: Id, backup: Id, rules: Rules) -> Self {
        let (is_pinned, has_listed, moves) = (false, false, Moves::default());
        let state = match rules.pin_first && rules.list_moved_after_pin {
            true => State::Pin,
            false => State::ListMoved,
        };
        Self { pin, backup, rules, is_pinned, has_listed, moves, state }
    }

    /// Returns the next request, or the backup while it may be read, or `None` at the end.
    pub(crate) fn step(&self) -> Step<Option<Opened>> {
        Step::Request(match &self.state {
            State::ListMoved => Request::List(Folder::Moved),
            State::ReadMoves(keys) => match keys.last() {
                Some(Key::Moved(id)) => Request::GetMoves(*id),
                _ => return Step::Reached(None),
            },
            State::Read => Request::Get(Key::Backup(self.backup)),
            State::ReadMap(_, compaction, moved) => Request::GetMap(*compaction, *moved),
            State::Reading(opened) if self.is_pinned => {
                return Step::Reached(Some(opened.clone()));
            }
            // Only the search ever pins a backup that is read already.
            State::Pin | State::Reading(_) => {
                Request::Put(Key::Pin(self.pin), Object::Pin(self.backup))
            }
            State::Unpin => Request::Delete(Key::Pin(self.pin)),
            State::Ended => return Step::Reached(None),
        })
    }

    /// Returns a request that may be made at the same time as the [next](Self::step) one, or as
    /// those before it is asked for, which is when its answer is taken.
    pub(crate) fn beside(&self) -> Option<Request> {
        let is_early = matches!(self.state, State::ListMoved | State::ReadMoves(_));
        (is_early && self.is_pinned).then_some(Request::Get(Key::Backup(self.backup)))
    }

    /// Lets go of what does not matter any more, so that a search finds fewer different states.
    #[cfg(test)]
    pub(super) fn settle(&mut self) {
        match self.state {
            State::ReadMap(..) | State::Reading(_) | State::Unpin => self.moves = Moves::default(),
            State::Ended => {
                self.moves = Moves::default();
                (self.is_pinned, self.has_listed) = (false, false);
            }
            _ => {}
        }
    }

    /// Takes the answer to the request.
    pub(crate) fn answer(&mut self, answer: Answer) {
        let state = std::mem::replace(&mut self.state, State::Ended);
        self.state = match (state, answer) {
            (State::Pin, _) => {
                self.is_pinned = true;
                if self.has_listed { State::Read } else { State::ListMoved }
            }
            (State::ListMoved, Answer::Listed(keys)) => self.reading_moves(keys),
            (State::ReadMoves(mut keys), answer) => {
                // One that is not there, or a tombstone, moves nothing. If one is damaged, an older
                // map is read, as far as its packs are there: a collector deletes nothing now.
                if let (Some(Key::Moved(id)), Answer::Found(Object::Compaction(it))) =
                    (keys.pop(), answer)
                {
                    self.moves.add(id, it.moved);
                }
                self.reading_moves(keys)
            }
            (State::Read, Answer::Found(Object::Live(backup))) => {
                match self.moves.map_of(self.backup) {
                    Some((compaction, moved)) => State::ReadMap(backup, compaction, moved),
                    None => State::Reading(Opened { backup, map: None }),
                }
            }
            (State::ReadMap(backup, ..), Answer::Found(Object::Live(map))) => {
                State::Reading(Opened { backup, map: Some(map) })
            }
            (State::Read | State::ReadMap(..), _) => State::Unpin,
            (State::Reading(opened), _) => {
                self.is_pinned = true;
                State::Reading(opened)
            }
            _ => State::Ended,
        };
    }

    fn reading_moves(&mut self, keys: Vec<Key>) -> State {
        if !keys.is_empty() {
            return State::ReadMoves(keys);
        }
        self.has_listed = true;
        if self.is_pinned || !self.rules.pin_first { State::Read } else { State::Pin }
    }

    /// Ends the use of the backup, or the attempt at it: the pin may be there although its request
    /// failed.
    pub(crate) fn end(&mut self) {
        if self.state != State::Ended {
            self.state = State::Unpin;
        }
    }
}
