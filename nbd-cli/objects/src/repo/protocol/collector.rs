//! The collector: deletes packs that no backup needs.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::id::{Folder, Id, Key, PackId};
use super::{Answer, Moves, Object, Request, Rules, Step};

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
    /// Backups that were tombstones with a root in the first round, and that nobody has pinned; and
    /// compactions of which no map was chosen then, and which move no pinned backup.
    shrinkable: BTreeSet<Id>,
    /// What the compactions of the first round move.
    moves: Moves,
    /// Names that are marked as those of compactions.
    marked: BTreeSet<Id>,
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
    /// Tombstones with a root that are not pinned, and those of compactions.
    forgotten: BTreeSet<Id>,
    /// Compactions that have the map of a live backup.
    chosen: BTreeSet<Id>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    ListPacks,
    ListPins,
    ReadPins(Vec<Key>),
    ListBackups,
    /// The compactions are read before these backups.
    ListMoved(Vec<Request>),
    /// Backups, compactions and maps, last one first.
    ReadBackups(Vec<Request>),
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
    /// The last one is a tombstone now.
    RemoveMark(Vec<Id>),
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
            moves: Moves::default(),
            marked: BTreeSet::new(),
            names: BTreeSet::new(),
            packs: BTreeSet::new(),
            lists: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> Id {
        self.id
    }

    /// How far it is. It never goes back.
    #[cfg(test)]
    pub(super) fn progress(&self) -> usize {
        match (&self.state, self.round.is_second) {
            (State::ListPacks, _) => 0,
            (State::ListPins | State::ReadPins(_), false) => 1,
            (State::ListBackups | State::ListMoved(_) | State::ReadBackups(_), false) => 2,
            (State::Condemn, _) => 3,
            (State::ListSessions, _) => 4,
            (State::Sessions(_) | State::Running(_), _) => 5,
            (State::Fence(_) | State::RemoveSession(_), _) => 5,
            (State::ListPins | State::ReadPins(_), true) => 6,
            (State::ListBackups | State::ListMoved(_) | State::ReadBackups(_), true) => 7,
            (State::Delete(_), _) => 8,
            (State::Shrink(_) | State::RemoveMark(_), _) => 9,
            (State::Forgive | State::ForgiveLost(_), _) => 10,
            (State::ListOthers | State::ReadOthers(_), _) => 11,
            (State::ListPacksAgain(..) | State::RemoveOther(_), _) => 11,
            (State::Ended | State::Lost(_), _) => 12,
        }
    }

    /// Lets go of what does not matter any more, so that a search finds fewer different states.
    #[cfg(test)]
    pub(super) fn settle(&mut self) {
        let progress = self.progress();
        let condemned = &self.condemned;
        self.lists.clear();
        self.round.needed.retain(|pack| condemned.contains(pack));
        if progress > 2 {
            self.marked.retain(|id| self.shrinkable.contains(id));
        }
        if progress > 5 {
            // A second look decides by its pins and by what is needed alone.
            (self.round.forgotten, self.round.chosen) = Default::default();
        }
        if matches!((&self.state, progress), (State::ReadBackups(_), 7) | (_, 8..)) {
            self.names.clear();
        }
        if progress > 7 {
            self.condemned.clear();
            self.moves = Moves::default();
            self.round = Round::default();
        }
        if progress > 8 {
            self.shrinkable.clear();
        }
        if progress > 9 {
            self.marked.clear();
        }
        if progress > 11 {
            self.packs.clear();
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
            State::ListMoved(_) => Request::List(Folder::Moved),
            State::ReadBackups(requests) => match requests.last() {
                Some(request) => request.clone(),
                None => return Step::Reached(Collected::Done),
            },
            State::ReadPins(keys) | State::Sessions(keys) | State::ReadOthers(keys) => {
                match keys.last() {
                    Some(Key::Session(id)) => Request::Get(Key::Backup(*id)),
                    Some(key) => Request::Get(*key),
                    None => return Step::Reached(Collected::Done),
                }
            }
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
            State::RemoveMark(ids) => match ids.last() {
                Some(id) => Request::Delete(Key::Moved(*id)),
                None => return Step::Reached(Collected::Done),
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
            (State::ListMoved(requests), Answer::Listed(keys)) => {
                self.reading_moves(requests, &keys)
            }
            (State::ReadBackups(requests), answer) => self.answer_of_backup(requests, answer),
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
            (State::Shrink(ids), _) if ids.last().is_some_and(|id| self.marked.contains(id)) => {
                State::RemoveMark(ids)
            }
            (State::Shrink(mut ids) | State::RemoveMark(mut ids), _) => {
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
            return State::ListMoved(keys.into_iter().map(Request::Get).collect());
        }
        let lost = self.names.difference(&names).next();
        if let Some(id) = lost.filter(|_| self.rules.keep_tombstones) {
            return State::ForgiveLost(*id);
        }
        let is_moved = |id: Id| self.keeps_maps() && self.moves.map_of(id).is_some();
        let is_pinned = |id: Id| {
            self.round.pinned.contains(&id) && (self.shrinkable.contains(&id) || is_moved(id))
        };
        let is_new = |id: Id| !self.names.contains(&id) || is_pinned(id);
        keys.retain(|&key| name(key).is_some_and(is_new));
        self.reading_backups(keys.into_iter().map(Request::Get).collect())
    }

    /// Puts the compactions that are marked behind the backups, so that they are read first.
    fn reading_moves(&mut self, mut requests: Vec<Request>, keys: &[Key]) -> State {
        let marked = keys.iter().filter_map(|key| match key {
            Key::Moved(id) => Some(*id),
            _ => None,
        });
        // Others are new: the second round reads them.
        self.marked = marked.filter(|id| self.names.contains(id)).collect();
        requests.retain(|request| match request {
            Request::Get(Key::Backup(id)) => !self.marked.contains(id),
            _ => true,
        });
        requests.extend(self.marked.iter().map(|id| Request::GetMoves(*id)));
        self.reading_backups(requests)
    }

    /// Returns whether pinned backups keep all their maps: their readers may have chosen any of
    /// them.
    fn keeps_maps(&self) -> bool {
        self.rules.keep_maps && (!self.round.is_second || self.rules.keep_maps_again)
    }

    fn answer_of_backup(&mut self, mut requests: Vec<Request>, answer: Answer) -> State {
        match (requests.pop(), answer) {
            // Names are never deleted.
            (Some(Request::GetMoves(id) | Request::Get(Key::Backup(id))), Answer::Missing)
                if self.rules.keep_tombstones =>
            {
                return State::ForgiveLost(id);
            }
            (Some(Request::GetMoves(id)), Answer::Found(Object::Compaction(it))) => {
                self.moves.add(id, it.moved);
            }
            // Its mark is left.
            (Some(Request::GetMoves(id)), Answer::Found(_)) => {
                self.round.forgotten.insert(id);
            }
            // What is damaged says so itself, and stops this. A backup is read behind all
            // compactions: they may move it.
            (Some(Request::GetMoves(id)), _) => requests.insert(0, Request::Get(Key::Backup(id))),
            // It is new, or not marked. What reads by it is not known, so all of it stays.
            (Some(Request::Get(Key::Backup(id))), Answer::Found(Object::Compaction(it))) => {
                if self.rules.heed_marks || self.round.is_second {
                    let maps = it.moved.iter().map(|moved| Request::GetMap(id, *moved));
                    requests.extend(maps);
                } else {
                    self.moves.add(id, it.moved);
                }
            }
            (Some(Request::Get(Key::Backup(id))), Answer::Found(object)) => {
                self.mark(id, object, &mut requests);
            }
            (Some(Request::GetMap(..)), Answer::Found(Object::Live(map))) => {
                self.round.needed.extend(map.packs.iter());
            }
            // A compaction without this map is a tombstone: another collector saw that nobody reads
            // by it.
            _ => {}
        }
        self.reading_backups(requests)
    }

    fn reading_pins(keys: Vec<Key>) -> State {
        if keys.is_empty() { State::ListBackups } else { State::ReadPins(keys) }
    }

    /// Notes what a backup needs: its own packs, or those of maps that are read next.
    fn mark(&mut self, id: Id, object: Object, requests: &mut Vec<Request>) {
        let is_pinned = self.round.pinned.contains(&id);
        let keeps_maps = is_pinned && self.keeps_maps();
        match (object, self.moves.map_of(id)) {
            (Object::Live(_), Some((compaction, moved))) if !keeps_maps => {
                self.round.chosen.insert(compaction);
                requests.push(Request::GetMap(compaction, moved));
            }
            (Object::Tombstone(Some(_)), _) if !is_pinned => drop(self.round.forgotten.insert(id)),
            (Object::Live(backup) | Object::Tombstone(Some(backup)), _) => {
                self.round.needed.extend(backup.packs.iter());
                if keeps_maps {
                    let maps = self.moves.all_of(id);
                    requests.extend(maps.map(|(id, moved)| Request::GetMap(id, moved)));
                }
            }
            _ => {}
        }
    }

    /// Reads the next backup, or uses what was learnt.
    fn reading_backups(&mut self, requests: Vec<Request>) -> State {
        if !requests.is_empty() {
            return State::ReadBackups(requests);
        }
        let Round { is_second, pinned, needed, mut forgotten, chosen } =
            std::mem::take(&mut self.round);
        self.condemned.retain(|pack| !needed.contains(pack));
        let is_read = |id: &Id| pinned.contains(id) || self.moves.has_any(*id, &pinned);
        if is_second {
            self.shrinkable.retain(|id| !is_read(id));
            let packs = self.condemned.iter().copied().collect();
            return self.deleting(packs);
        }
        forgotten.extend(self.moves.ids().filter(|id| !chosen.contains(id) && !is_read(id)));
        self.shrinkable = forgotten;
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
