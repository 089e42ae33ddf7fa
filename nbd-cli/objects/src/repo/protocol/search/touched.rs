//! What steps read and write, now and later: which of them commute.

use super::super::super::id::{Folder, Id, Key};
use super::super::{Committed, Request, Step};
use super::actors::{Actor, Base, Stage};
use super::store::id;

/// Objects of the store, each a bit: those that are read, and those that are written. A list reads
/// all objects of its folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Touched {
    pub(super) reads: u64,
    pub(super) writes: u64,
}

/// The numbers of packs, backups, sessions and marks are below this.
const NUMBERS: u32 = 10;
const PACKS: u64 = (1 << NUMBERS) - 1;
const BACKUPS: u64 = PACKS << NUMBERS;
const SESSIONS: u64 = BACKUPS << NUMBERS;
const MOVED: u64 = SESSIONS << NUMBERS;
const CONDEMNED: u64 = 0b11 << (4 * NUMBERS);
const PINS: u64 = 0b100 << (4 * NUMBERS);

fn bit(key: Key) -> u64 {
    let number = |id: Id| u32::from(id.bytes()[0]);
    let (folder, number) = match key {
        Key::Pack(pack) => (0, number(pack.session)),
        Key::Backup(id) => (1, number(id)),
        Key::Session(id) => (2, number(id)),
        Key::Moved(id) => (3, number(id)),
        // The collectors 20 and 21, and the pin 30.
        Key::Condemned(id) => (4, number(id) - 20),
        Key::Pin(id) => (4, number(id) - 28),
    };
    assert!(number < NUMBERS, "{key:?}");
    1 << (folder * NUMBERS + number)
}

fn folder(folder: Folder) -> u64 {
    match folder {
        Folder::Packs | Folder::PacksOf(_) => PACKS,
        Folder::Backups => BACKUPS,
        Folder::Sessions => SESSIONS,
        Folder::Moved => MOVED,
        Folder::Condemned => CONDEMNED,
        Folder::Pins => PINS,
    }
}

impl Touched {
    fn reading(reads: u64) -> Self {
        Self { reads, writes: 0 }
    }

    fn writing(writes: u64) -> Self {
        Self { reads: 0, writes }
    }

    fn and(self, other: Self) -> Self {
        Self { reads: self.reads | other.reads, writes: self.writes | other.writes }
    }

    fn of(request: &Request) -> Self {
        match request {
            Request::Put(key, _) | Request::Delete(key) => Self::writing(bit(*key)),
            Request::Create(key, _) => Self { reads: bit(*key), writes: bit(*key) },
            Request::Get(key) => Self::reading(bit(*key)),
            Request::GetMoves(id) | Request::GetMap(id, _) => Self::reading(bit(Key::Backup(*id))),
            Request::List(it) => Self::reading(folder(*it)),
        }
    }

    pub(super) fn is_within(self, other: Self) -> bool {
        self.reads & !other.reads == 0 && self.writes & !other.writes == 0
    }

    /// Returns whether the order of the two does not matter.
    pub(super) fn commutes(self, other: Self) -> bool {
        self.writes & (other.reads | other.writes) == 0 && self.reads & other.writes == 0
    }
}

impl Actor {
    /// What its next step touches.
    pub(super) fn touches(&self) -> Touched {
        match self {
            Self::Forgetting(machine) => of_step(&machine.step()),
            Self::Collecting(machine) => of_step(&machine.step()),
            Self::Reading { machine, .. } => {
                let beside = machine.beside().as_ref().map(Touched::of);
                of_step(&machine.step()).and(beside.unwrap_or_default())
            }
            Self::Writing { machine, id, base, stage, .. } => match (machine.step(), stage) {
                (Step::Reached(Committed::Ready), Stage::Begin) => of_base(*base),
                (Step::Reached(Committed::Ready), Stage::Pack(_)) => of_pack(*id),
                (step, _) => of_step(&step),
            },
        }
    }

    /// What this step and all those after it may touch, whatever the others do.
    pub(super) fn ahead(&self) -> Touched {
        match self {
            Self::Forgetting(machine) => match machine.step() {
                Step::Request(_) => {
                    let key = bit(Key::Backup(machine.id()));
                    Touched { reads: key, writes: key }
                }
                Step::Reached(_) => Touched::default(),
            },
            Self::Reading { machine, .. } => {
                let pin = Touched::writing(bit(Key::Pin(id(30))));
                match machine.step() {
                    Step::Request(Request::Delete(_)) | Step::Reached(Some(_)) => pin,
                    Step::Request(_) => pin.and(Touched::reading(BACKUPS | MOVED)),
                    Step::Reached(None) => Touched::default(),
                }
            }
            Self::Collecting(machine) => {
                let own = bit(Key::Condemned(machine.id()));
                let phases = [
                    Touched::reading(PACKS),
                    Touched::reading(PINS),
                    Touched::reading(BACKUPS | MOVED),
                    Touched::writing(own),
                    Touched::reading(SESSIONS),
                    Touched { reads: BACKUPS, writes: BACKUPS | SESSIONS },
                    Touched::reading(PINS),
                    Touched::reading(BACKUPS),
                    Touched::writing(PACKS),
                    Touched::writing(BACKUPS | MOVED),
                    Touched::writing(own),
                    Touched { reads: CONDEMNED | PACKS, writes: CONDEMNED },
                ];
                let left = phases.into_iter().skip(machine.progress());
                left.fold(Touched::default(), Touched::and)
            }
            Self::Writing { machine, id, base, stage, .. } => {
                let session = Touched::writing(bit(Key::Session(*id)));
                let backup = bit(Key::Backup(*id));
                let backup = Touched { reads: backup, writes: backup };
                let commit = backup.and(Touched::writing(bit(Key::Moved(*id)))).and(session);
                let write = commit.and(of_pack(*id));
                match (machine.step(), stage) {
                    (Step::Request(Request::Delete(_)), _) => session,
                    (Step::Request(_), Stage::Commit) => commit,
                    (Step::Reached(Committed::Ready), Stage::Pack(_)) => write,
                    (Step::Reached(Committed::Ready), _) => write.and(of_base(*base)),
                    (Step::Request(_), _) => {
                        write.and(of_base(*base)).and(Touched::reading(CONDEMNED))
                    }
                    (Step::Reached(_), _) => Touched::default(),
                }
            }
        }
    }

    /// Returns whether [`fault`](Self::fault) looks at the store when the actor is here.
    pub(super) fn is_watched(&self) -> bool {
        match self {
            Self::Reading { machine, .. } => matches!(machine.step(), Step::Reached(_)),
            Self::Writing { machine, .. } => {
                matches!(machine.step(), Step::Reached(Committed::Yes))
            }
            _ => false,
        }
    }

    /// Returns whether its next step may be one of a loop: a create that is repeated, and a session
    /// that is looked at again.
    pub(super) fn may_loop(&self) -> bool {
        match self {
            Self::Collecting(machine) => {
                matches!(machine.step(), Step::Reached(_) | Step::Request(Request::Create(..)))
            }
            Self::Writing { machine, .. } => {
                matches!(machine.step(), Step::Request(Request::Create(..)))
            }
            _ => false,
        }
    }
}

/// What decides whether a backup is whole: writes to these are seen.
pub(super) const WATCHED: u64 = BACKUPS | MOVED;

/// Packs that are deleted are seen. A writer creates its pack before anything refers to it.
pub(super) fn deletes_pack(actor: &Actor) -> bool {
    let Actor::Collecting(machine) = actor else { return false };
    matches!(machine.step(), Step::Request(Request::Delete(Key::Pack(_))))
}

fn of_step<T>(step: &Step<T>) -> Touched {
    match step {
        Step::Request(request) => Touched::of(request),
        Step::Reached(_) => Touched::default(),
    }
}

/// A map is found by all compactions that are marked.
fn of_base(base: Base) -> Touched {
    match base {
        Base::PackOf(_) => Touched::reading(PACKS),
        Base::Backup(_) | Base::Compacted => Touched::reading(BACKUPS | MOVED),
    }
}

/// The pack is written; and packs that it refers to have to be there. That is looked up in a list.
fn of_pack(own: Id) -> Touched {
    let pack = super::super::super::id::PackId { session: own, number: 0 };
    Touched { reads: PACKS, writes: bit(Key::Pack(pack)) }
}
