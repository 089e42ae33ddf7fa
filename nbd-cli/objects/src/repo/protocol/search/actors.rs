//! The parties of a search: each takes one step at a time, which is one request at most.

use bytes::Bytes;

use super::super::super::id::{Id, Key, PackId};
use super::super::{
    Answer, Collected, Collector, Committed, Forget, Object, Reader, Request, Rules, Step, Writer,
};
use super::compacting::compaction;
use super::store::{Store, backup, id};

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Actor {
    Writing {
        machine: Writer,
        id: Id,
        base: Base,
        stage: Stage,
        is_done: bool,
    },
    Collecting(Collector),
    Forgetting(Forget),
    /// `early` is the answer to a request that was carried out before the machine asked for it.
    Reading {
        machine: Reader,
        early: Option<Answer>,
        has_read: bool,
    },
}

/// What a writer builds on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Base {
    Backup(Id),
    /// A session that was interrupted.
    PackOf(Id),
    /// The backup 1, which is compacted.
    Compacted,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Begin,
    /// The pack of its own is written, with these others referred to.
    Pack(Vec<PackId>),
    Commit,
}

/// What can come of a step: stores, and the actor in them.
pub(super) type Outcomes = Vec<(Store, Actor)>;

impl Actor {
    pub(super) fn writer(number: u8, base: Base, rules: Rules) -> Self {
        let machine = Writer::new(id(number), Bytes::new(), rules);
        Self::Writing { machine, id: id(number), base, stage: Stage::Begin, is_done: false }
    }

    pub(super) fn collector(number: u8, rules: Rules) -> Self {
        Self::Collecting(Collector::new(id(number), rules))
    }

    pub(super) fn forget(number: u8) -> Self {
        Self::Forgetting(Forget::new(id(number)))
    }

    pub(super) fn reader(rules: Rules) -> Self {
        let machine = Reader::new(id(30), id(1), rules);
        Self::Reading { machine, early: None, has_read: false }
    }

    /// What can come of its next step; nothing if it has ended.
    pub(super) fn after(&self, store: &Store) -> Outcomes {
        match self.clone() {
            Self::Forgetting(mut machine) => {
                let Step::Request(request) = machine.step() else { return Vec::new() };
                let (store, answer) = carried_out(store, request);
                machine.answer(answer);
                vec![(store, Self::Forgetting(machine))]
            }
            Self::Reading { machine, early, has_read } => {
                after_reader(store, machine, early, has_read)
            }
            Self::Collecting(machine) => after_collector(store, machine),
            Self::Writing { machine, id, base, stage, is_done } => {
                let actor =
                    |machine, stage, is_done| Self::Writing { machine, id, base, stage, is_done };
                match (machine.step(), stage) {
                    (Step::Request(request), stage) => {
                        after_create(store, &machine, request, Writer::answer)
                            .into_iter()
                            .map(|(store, machine)| (store, actor(machine, stage.clone(), is_done)))
                            .collect()
                    }
                    (Step::Reached(Committed::Ready), Stage::Begin) => {
                        let Some(packs) = packs_of(store, base) else { return Vec::new() };
                        vec![(store.clone(), actor(machine, Stage::Pack(packs), is_done))]
                    }
                    (Step::Reached(Committed::Ready), Stage::Pack(packs)) => {
                        let committing = write_pack(store, machine, (id, base), packs);
                        let committing = committing.map(|(store, machine)| {
                            (store, actor(machine, Stage::Commit, is_done))
                        });
                        committing.into_iter().collect()
                    }
                    (Step::Reached(Committed::Yes), stage) if !is_done => {
                        vec![(store.clone(), actor(machine, stage, true))]
                    }
                    _ => Vec::new(),
                }
            }
        }
    }

    /// Lets go of what does not matter any more.
    pub(super) fn settle(&mut self) {
        match self {
            Self::Writing { machine, .. } => machine.settle(),
            Self::Collecting(machine) => machine.settle(),
            Self::Reading { machine, .. } => machine.settle(),
            Self::Forgetting(_) => {}
        }
    }

    /// What is wrong with it in this store. Backups that are `forgotten` need not be there.
    pub(super) fn fault(&self, store: &Store, forgotten: &[Id]) -> Option<String> {
        match self {
            Self::Reading { machine, has_read, .. } => match machine.step() {
                Step::Reached(Some(opened)) => {
                    let is_lost = |pack: &&PackId| !store.packs.contains(pack);
                    let packs = opened.map.unwrap_or(opened.backup).packs;
                    let lost = packs.iter().find(is_lost)?;
                    Some(format!("a reader lacks {lost:?}"))
                }
                Step::Reached(None) if !has_read && store.map_of(id(1)).is_some() => {
                    Some("a reader of a backup that is there is refused".to_owned())
                }
                _ => None,
            },
            Self::Writing { base: Base::Compacted, .. } => None,
            Self::Writing { machine, id, .. } => {
                let is_done = machine.step() == Step::Reached(Committed::Yes);
                let found = store.objects.get(&Key::Backup(*id));
                let is_there = matches!(found, Some(Object::Live(_))) || forgotten.contains(id);
                (is_done && !is_there).then(|| "a committed backup is not there".to_owned())
            }
            _ => None,
        }
    }
}

fn carried_out(store: &Store, request: Request) -> (Store, Answer) {
    let mut store = store.clone();
    let answer = store.carry_out(request);
    (store, answer)
}

/// Carries out a request. Of a create the store may be busy, and say so in the same way as of an
/// object that exists; or its reply is lost, and the request repeated.
fn after_create<M: Clone>(
    store: &Store,
    machine: &M,
    request: Request,
    take: fn(&mut M, Answer),
) -> Vec<(Store, M)> {
    let is_create = matches!(request, Request::Create(..));
    let (written, answer) = carried_out(store, request);
    let after = |store: &Store, answer| {
        let mut machine = machine.clone();
        take(&mut machine, answer);
        (store.clone(), machine)
    };
    let mut outcomes = vec![after(&written, answer)];
    if is_create {
        outcomes.push(after(store, Answer::Exists));
        outcomes.push(after(&written, Answer::Exists));
    }
    outcomes
}

fn after_collector(store: &Store, machine: Collector) -> Outcomes {
    match machine.step() {
        Step::Request(request) => after_create(store, &machine, request, Collector::answer)
            .into_iter()
            .map(|(store, machine)| (store, Actor::Collecting(machine)))
            .collect(),
        Step::Reached(Collected::Running(_)) => {
            let decisions = [Collector::fence, Collector::look_again, Collector::give_up];
            let decided = decisions.map(|decide| {
                let mut machine = machine.clone();
                decide(&mut machine);
                (store.clone(), Actor::Collecting(machine))
            });
            decided.into()
        }
        Step::Reached(Collected::Done | Collected::Lost(_)) => Vec::new(),
    }
}

fn after_reader(
    store: &Store,
    mut machine: Reader,
    mut early: Option<Answer>,
    has_read: bool,
) -> Outcomes {
    let mut outcomes = Vec::new();
    if let Some(request) = machine.beside().filter(|_| early.is_none()) {
        let (store, answer) = carried_out(store, request);
        let (machine, early) = (machine.clone(), Some(answer));
        outcomes.push((store, Actor::Reading { machine, early, has_read }));
    }
    match machine.step() {
        Step::Request(request) => {
            let is_early = matches!(request, Request::Get(Key::Backup(_)));
            let (store, answer) = match early.take_if(|_| is_early) {
                Some(answer) => (store.clone(), answer),
                None => carried_out(store, request),
            };
            machine.answer(answer);
            outcomes.push((store, Actor::Reading { machine, early, has_read }));
        }
        Step::Reached(Some(_)) => {
            machine.end();
            outcomes.push((store.clone(), Actor::Reading { machine, early, has_read: true }));
        }
        Step::Reached(None) => {}
    }
    outcomes
}

/// What a writer finds; `None` if there is nothing to compact.
fn packs_of(store: &Store, base: Base) -> Option<Vec<PackId>> {
    match base {
        Base::Backup(id) => Some(store.map_of(id).map_or_else(Vec::new, |it| it.to_vec())),
        Base::Compacted => store.map_of(id(1)).map(|packs| packs.to_vec()),
        Base::PackOf(session) => {
            let of_session = |pack: &&PackId| pack.session == session;
            Some(store.packs.iter().filter(of_session).copied().collect())
        }
    }
}

/// Writes the pack of a writer, which commits then; `None` if there is nothing to commit.
fn write_pack(
    store: &Store,
    mut machine: Writer,
    (own, base): (Id, Base),
    mut packs: Vec<PackId>,
) -> Option<(Store, Writer)> {
    // What is listed now.
    let may_refer = |pack: &PackId| machine.may_refer(*pack) && store.packs.contains(pack);
    if base == Base::Compacted && !packs.iter().all(may_refer) {
        // It is left out.
        return None;
    }
    let pack = PackId { session: own, number: 0 };
    if base == Base::Compacted {
        packs.truncate(1);
        // What an interrupted compaction has copied.
        let copied = super::store::pack(9);
        packs.extend(Some(copied).filter(|pack| store.packs.contains(pack)));
    }
    packs.retain(may_refer);
    packs.push(pack);
    let mut store = store.clone();
    machine.commit(match base {
        Base::Compacted => {
            store.maps.insert((own, id(1)), packs[..].into());
            compaction()
        }
        _ => Object::Live(backup(&packs)),
    });
    store.packs.insert(pack);
    Some((store, machine))
}
