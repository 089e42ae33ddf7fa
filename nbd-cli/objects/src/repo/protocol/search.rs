//! All orders in which the requests of several parties can reach the store: none may lose a backup.
//! With any one rule left out, some order does.
//!
//! Two of the searches take a minute or more: with `NBD_SEARCH=complete` they are complete, and
//! otherwise they begin later, or try a number of orders.

mod compacting;

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;

use super::super::id::{Folder, Id, Key, PackId};
use super::{
    Answer, Backup, Collected, Collector, Committed, Forget, Moves, Object, Reader, Request, Rules,
    Step, Writer,
};

/// The store.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct Store {
    objects: BTreeMap<Key, Object>,
    packs: BTreeSet<PackId>,
    /// The maps of backups in compactions.
    maps: BTreeMap<(Id, Id), Arc<[PackId]>>,
}

impl Store {
    fn carry_out(&mut self, request: Request) -> Answer {
        match request {
            Request::Put(key, object) => {
                self.objects.insert(key, object);
                Answer::Done
            }
            Request::Create(key, _) if self.objects.contains_key(&key) => Answer::Exists,
            Request::Create(key, object) => self.carry_out(Request::Put(key, object)),
            Request::Get(key) => match self.objects.get(&key) {
                Some(object) => Answer::Found(object.clone()),
                None => Answer::Missing,
            },
            Request::GetMoves(id) => match self.objects.get(&Key::Backup(id)) {
                Some(Object::Live(_)) => Answer::Damaged,
                _ => self.carry_out(Request::Get(Key::Backup(id))),
            },
            Request::GetMap(id, moved) => match self.objects.get(&Key::Backup(id)) {
                Some(Object::Compaction(_)) => {
                    Answer::Found(Object::Live(backup(&self.maps[&(id, moved.backup)])))
                }
                _ => Answer::Missing,
            },
            Request::Delete(Key::Pack(pack)) => {
                self.packs.remove(&pack);
                Answer::Done
            }
            Request::Delete(key) => {
                self.objects.remove(&key);
                Answer::Done
            }
            Request::List(Folder::Packs) => {
                Answer::Listed(self.packs.iter().map(|&pack| Key::Pack(pack)).collect())
            }
            Request::List(folder) => {
                let keys = self.objects.keys().filter(|key| is_in(folder, key));
                Answer::Listed(keys.copied().collect())
            }
        }
    }

    /// A pack that a live backup needs, and that is not there.
    fn lost(&self) -> Option<PackId> {
        let live = self.objects.keys().filter_map(|key| match key {
            Key::Backup(id) => self.map_of(*id),
            _ => None,
        });
        live.flat_map(|packs| packs.iter().copied()).find(|pack| !self.packs.contains(pack))
    }

    /// What a writer finds; `None` if there is nothing to compact.
    fn packs_of(&self, base: Base) -> Option<Vec<PackId>> {
        match base {
            Base::Backup(id) => Some(self.map_of(id).map_or_else(Vec::new, |it| it.to_vec())),
            Base::Compacted => self.map_of(id(1)).map(|packs| packs.to_vec()),
            Base::PackOf(session) => {
                let of_session = |pack: &&PackId| pack.session == session;
                Some(self.packs.iter().filter(of_session).copied().collect())
            }
        }
    }

    /// The packs of the map that a reader would choose now.
    fn map_of(&self, id: Id) -> Option<&Arc<[PackId]>> {
        let Some(Object::Live(backup)) = self.objects.get(&Key::Backup(id)) else { return None };
        let mut moves = Moves::default();
        for key in self.objects.keys() {
            if let Key::Moved(id) = key
                && let Some(Object::Compaction(it)) = self.objects.get(&Key::Backup(*id))
            {
                moves.add(*id, Arc::clone(&it.moved));
            }
        }
        match moves.map_of(id) {
            Some((compaction, _)) => self.maps.get(&(compaction, id)),
            None => Some(&backup.packs),
        }
    }
}

fn is_in(folder: Folder, key: &Key) -> bool {
    matches!(
        (folder, key),
        (Folder::Backups, Key::Backup(_))
            | (Folder::Sessions, Key::Session(_))
            | (Folder::Condemned, Key::Condemned(_))
            | (Folder::Pins, Key::Pin(_))
            | (Folder::Moved, Key::Moved(_))
    )
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Actor {
    Writing { machine: Writer, id: Id, base: Base, stage: Stage, is_done: bool },
    Collecting(Collector),
    Forgetting(Forget),
    Reading { machine: Reader, has_read: bool },
}

/// What a writer builds on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Base {
    Backup(Id),
    /// A session that was interrupted.
    PackOf(Id),
    /// The backup 1, which is compacted.
    Compacted,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Stage {
    Begin,
    /// The pack of its own is written, with these others referred to.
    Pack(Vec<PackId>),
    Commit,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    store: Store,
    actors: Vec<Actor>,
}

fn id(number: u8) -> Id {
    Id::from_bytes([number; 16])
}

fn pack(session: u8) -> PackId {
    PackId { session: id(session), number: 0 }
}

fn backup(packs: &[PackId]) -> Backup {
    Backup { packs: packs.into(), object: Bytes::new() }
}

impl Actor {
    fn writer(number: u8, base: Base, rules: Rules) -> Self {
        let machine = Writer::new(id(number), Bytes::new(), rules);
        Self::Writing { machine, id: id(number), base, stage: Stage::Begin, is_done: false }
    }
}

impl World {
    /// The worlds after one step of an actor.
    fn after(&self, number: usize) -> Vec<Self> {
        let actor = self.actors[number].clone();
        let with = |store: &Store, actor: Actor| {
            let mut next = Self { store: store.clone(), actors: self.actors.clone() };
            next.actors[number] = actor;
            next
        };
        let carried_out = |request: Request| {
            let mut store = self.store.clone();
            let answer = store.carry_out(request);
            (store, answer)
        };
        match actor {
            Actor::Forgetting(mut machine) => {
                let Step::Request(request) = machine.step() else { return Vec::new() };
                let (store, answer) = carried_out(request);
                machine.answer(answer);
                vec![with(&store, Actor::Forgetting(machine))]
            }
            Actor::Reading { mut machine, has_read } => match machine.step() {
                Step::Request(request) => {
                    let (store, answer) = carried_out(request);
                    machine.answer(answer);
                    vec![with(&store, Actor::Reading { machine, has_read })]
                }
                Step::Reached(Some(_)) => {
                    machine.end();
                    vec![with(&self.store, Actor::Reading { machine, has_read: true })]
                }
                Step::Reached(None) => Vec::new(),
            },
            Actor::Collecting(mut machine) => match machine.step() {
                Step::Request(request) => {
                    let mut worlds = Vec::new();
                    if matches!(request, Request::Create(..)) {
                        // As for writers.
                        let mut busy = machine.clone();
                        busy.answer(Answer::Exists);
                        let (store, _) = carried_out(request.clone());
                        for store in [&self.store, &store] {
                            worlds.push(with(store, Actor::Collecting(busy.clone())));
                        }
                    }
                    let (store, answer) = carried_out(request);
                    machine.answer(answer);
                    worlds.push(with(&store, Actor::Collecting(machine)));
                    worlds
                }
                Step::Reached(Collected::Running(_)) => {
                    let decisions = [Collector::fence, Collector::look_again, Collector::give_up];
                    let decided = decisions.map(|decide| {
                        let mut machine = machine.clone();
                        decide(&mut machine);
                        with(&self.store, Actor::Collecting(machine))
                    });
                    decided.into()
                }
                Step::Reached(Collected::Done | Collected::Lost(_)) => Vec::new(),
            },
            Actor::Writing { machine, id, base, stage, is_done } => {
                let worlds = self.after_writer(machine, id, base, stage, is_done);
                worlds.into_iter().map(|(store, actor)| with(&store, actor)).collect()
            }
        }
    }

    fn after_writer(
        &self,
        mut machine: Writer,
        id: Id,
        base: Base,
        stage: Stage,
        is_done: bool,
    ) -> Vec<(Store, Actor)> {
        let mut store = self.store.clone();
        let actor = |machine, stage, is_done| Actor::Writing { machine, id, base, stage, is_done };
        match (machine.step(), stage) {
            (Step::Request(request), stage) => {
                let is_create = matches!(request, Request::Create(..));
                let mut worlds = Vec::new();
                if is_create {
                    // The store is busy and answers so, or its reply is lost and the request
                    // repeated.
                    let mut busy = machine.clone();
                    busy.answer(Answer::Exists);
                    worlds.push((store.clone(), actor(busy.clone(), stage.clone(), is_done)));
                    let mut store = store.clone();
                    store.carry_out(request.clone());
                    worlds.push((store, actor(busy, stage.clone(), is_done)));
                }
                let answer = store.carry_out(request);
                machine.answer(answer);
                worlds.push((store, actor(machine, stage, is_done)));
                worlds
            }
            (Step::Reached(Committed::Ready), Stage::Begin) => {
                let Some(packs) = store.packs_of(base) else { return Vec::new() };
                vec![(store, actor(machine, Stage::Pack(packs), is_done))]
            }
            (Step::Reached(Committed::Ready), Stage::Pack(mut packs)) => {
                // What is listed now.
                let may_refer =
                    |pack: &PackId| machine.may_refer(*pack) && store.packs.contains(pack);
                if base == Base::Compacted && !packs.iter().all(may_refer) {
                    // It is left out.
                    return Vec::new();
                }
                let own = PackId { session: id, number: 0 };
                if base == Base::Compacted {
                    packs.truncate(1);
                    // What an interrupted compaction has copied.
                    let copied = pack(9);
                    packs.extend(Some(copied).filter(|pack| store.packs.contains(pack)));
                }
                packs.retain(may_refer);
                packs.push(own);
                machine.commit(match base {
                    Base::Compacted => {
                        store.maps.insert((id, self::id(1)), packs[..].into());
                        compacting::compaction()
                    }
                    _ => Object::Live(backup(&packs)),
                });
                store.packs.insert(own);
                vec![(store, actor(machine, Stage::Commit, is_done))]
            }
            (Step::Reached(Committed::Yes), stage) if !is_done => {
                vec![(store, actor(machine, stage, true))]
            }
            _ => Vec::new(),
        }
    }

    /// What is wrong with this world.
    fn fault(&self) -> Option<String> {
        if let Some(pack) = self.store.lost() {
            return Some(format!("a live backup lacks {pack:?}"));
        }
        self.actors.iter().find_map(|actor| match actor {
            Actor::Reading { machine, has_read } => match machine.step() {
                Step::Reached(Some(opened)) => {
                    let is_lost = |pack: &&PackId| !self.store.packs.contains(pack);
                    let packs = opened.map.unwrap_or(opened.backup).packs;
                    let lost = packs.iter().find(is_lost)?;
                    Some(format!("a reader lacks {lost:?}"))
                }
                Step::Reached(None) if !has_read && self.store.map_of(id(1)).is_some() => {
                    Some("a reader of a backup that is there is refused".to_owned())
                }
                _ => None,
            },
            Actor::Writing { base: Base::Compacted, .. } => None,
            Actor::Writing { machine, id, .. } => {
                let is_done = machine.step() == Step::Reached(Committed::Yes);
                let found = self.store.objects.get(&Key::Backup(*id));
                let is_there = matches!(found, Some(Object::Live(_))) || self.is_forgotten(*id);
                (is_done && !is_there).then(|| "a committed backup is not there".to_owned())
            }
            _ => None,
        })
    }

    fn is_forgotten(&self, id: Id) -> bool {
        let is_it = |actor: &Actor| matches!(actor, Actor::Forgetting(it) if it.id() == id);
        self.actors.iter().any(is_it)
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// Searches until a fault or the end: `Err` is the fault and the number of steps that lead to it.
fn search(start: World, states_max: usize) -> Result<usize, (String, usize)> {
    let mut seen = HashSet::from([start.fingerprint()]);
    let mut layer = vec![start];
    for depth in 0.. {
        if layer.is_empty() {
            return Ok(seen.len());
        }
        let mut next = Vec::new();
        for world in layer {
            for after in (0..world.actors.len()).flat_map(|number| world.after(number)) {
                if let Some(fault) = after.fault() {
                    return Err((fault, depth + 1));
                }
                if seen.insert(after.fingerprint()) {
                    next.push(after);
                }
            }
        }
        assert!(seen.len() < states_max, "the search has become too large: {}", seen.len());
        layer = next;
    }
    unreachable!("a search ends")
}

/// Follows some orders to their ends: always the same ones.
fn sample(start: &World, orders: u32) -> Result<(), String> {
    let mut state = 1u64;
    let mut below = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % limit
    };
    for _ in 0..orders {
        let mut world = start.clone();
        // A collector may look at a session again without end.
        for _ in 0..300 {
            let first = below(world.actors.len());
            let next = (0..world.actors.len())
                .map(|number| world.after((first + number) % world.actors.len()))
                .find(|worlds| !worlds.is_empty());
            let Some(mut worlds) = next else { break };
            world = worlds.swap_remove(below(worlds.len()));
            if let Some(fault) = world.fault() {
                return Err(fault);
            }
        }
    }
    Ok(())
}

/// A repository with the backup 1 and the pack of the interrupted session 9.
fn repository() -> Store {
    let mut store = Store::default();
    store.objects.insert(Key::Backup(id(1)), Object::Live(backup(&[pack(1)])));
    store.objects.insert(Key::Session(id(9)), Object::Session(Bytes::new()));
    store.packs.extend([pack(1), pack(9)]);
    store
}

fn world(actors: Vec<Actor>) -> World {
    World { store: repository(), actors }
}

fn collector(number: u8, rules: Rules) -> Actor {
    Actor::Collecting(Collector::new(id(number), rules))
}

fn forget(number: u8) -> Actor {
    Actor::Forgetting(Forget::new(id(number)))
}

fn reader(rules: Rules) -> Actor {
    Actor::Reading { machine: Reader::new(id(30), id(1), rules), has_read: false }
}

/// A collector that listed the packs before the session 9 wrote its own.
fn early_collector(rules: Rules) -> Actor {
    let mut machine = Collector::new(id(20), rules);
    machine.answer(Answer::Listed(vec![Key::Pack(pack(1))]));
    Actor::Collecting(machine)
}

/// The same collector, when it is about to look at the lists of others, in its store.
fn late_collector(rules: Rules) -> World {
    let mut world = world(vec![early_collector(rules)]);
    let Some(Actor::Collecting(machine)) = world.actors.first_mut() else { unreachable!() };
    loop {
        match machine.step() {
            Step::Request(Request::List(Folder::Condemned)) => return world,
            Step::Request(request) => machine.answer(world.store.carry_out(request)),
            Step::Reached(_) => machine.give_up(),
        }
    }
}

fn is_complete() -> bool {
    std::env::var_os("NBD_SEARCH").is_some_and(|value| value == "complete")
}

/// A writer on a backup that is forgotten meanwhile, a collector, and one more.
fn small(rules: Rules) -> [World; 5] {
    let on_backup = || Actor::writer(2, Base::Backup(id(1)), rules);
    let after_interruption = || Actor::writer(3, Base::PackOf(id(9)), rules);
    let mut collectors = match is_complete() {
        true => world(vec![early_collector(rules)]),
        false => late_collector(rules),
    };
    collectors.actors.extend([after_interruption(), collector(21, rules)]);
    [
        world(vec![on_backup(), collector(20, rules), forget(1)]),
        world(vec![after_interruption(), collector(20, rules)]),
        world(vec![reader(rules), collector(20, rules), forget(1)]),
        world(vec![on_backup(), collector(20, rules), forget(2)]),
        collectors,
    ]
}

#[test]
fn no_order_of_requests_loses_a_backup() {
    for world in small(Rules::ALL) {
        let states = search(world, 2_000_000).unwrap();
        assert!(states > 100);
    }
}

type Drop = fn(&mut Rules);

#[test]
fn every_rule_is_needed() {
    let rules: [(&str, Drop); 9] = [
        ("session first", |rules| rules.session_first = false),
        ("heed condemned", |rules| rules.heed_condemned = false),
        ("wait for sessions", |rules| rules.wait_for_sessions = false),
        ("create", |rules| rules.create = false),
        ("mark again", |rules| rules.mark_again = false),
        ("heed pins", |rules| rules.heed_pins = false),
        ("pin first", |rules| rules.pin_first = false),
        ("keep tombstones", |rules| rules.keep_tombstones = false),
        ("list packs after a list", |rules| rules.list_packs_again = false),
    ];
    for (name, drop) in rules {
        is_needed(name, drop, &small);
    }
    // A sample of the orders finds what is frequent.
    let rules = Rules { wait_for_sessions: false, ..Rules::ALL };
    let actors = vec![Actor::writer(2, Base::Backup(id(1)), rules), collector(20, rules)];
    assert!(sample(&world(actors), 1000).is_err());
}

fn is_needed<const N: usize>(name: &str, drop: Drop, worlds: &dyn Fn(Rules) -> [World; N]) {
    let mut rules = Rules::ALL;
    drop(&mut rules);
    let fault = worlds(rules).into_iter().find_map(|world| search(world, 4_000_000).err());
    assert!(fault.is_some(), "without the rule '{name}' nothing is lost: is it searched?");
    println!("{name}: {fault:?}");
}

#[test]
fn two_writers_a_collector_and_who_forgets_lose_nothing() {
    let rules = Rules::ALL;
    let actors = vec![
        Actor::writer(2, Base::Backup(id(1)), rules),
        Actor::writer(3, Base::PackOf(id(9)), rules),
        collector(20, rules),
        forget(1),
    ];
    let start = world(actors);
    if is_complete() {
        println!("{} states", search(start, 20_000_000).unwrap());
    } else {
        sample(&start, 1000).unwrap();
    }
}

/// Runs a collector alone; `meanwhile` is called after the list of sessions.
fn run_collector(store: &mut Store, meanwhile: impl Fn(&mut Store)) -> (Collected, Vec<Request>) {
    let mut machine = Collector::new(id(20), Rules::ALL);
    let mut requests = Vec::new();
    loop {
        match machine.step() {
            Step::Request(request) => {
                let is_list = request == Request::List(Folder::Sessions);
                requests.push(request.clone());
                let answer = store.carry_out(request);
                machine.answer(answer);
                if is_list {
                    meanwhile(store);
                }
            }
            Step::Reached(Collected::Running(_)) => machine.fence(),
            Step::Reached(reached) => return (reached, requests),
        }
    }
}

#[test]
fn collector_deletes_nothing_if_a_name_of_a_backup_is_not_listed_any_more() {
    let mut store = repository();
    let (reached, _) = run_collector(&mut store, |store| {
        store.objects.remove(&Key::Backup(id(1)));
    });
    assert_eq!(reached, Collected::Lost(id(1)));
    assert_eq!(store.packs.len(), 2);
    assert!(!store.objects.contains_key(&Key::Condemned(id(20))));
}

#[test]
fn collector_deletes_nothing_if_a_backup_is_listed_and_not_there() {
    let mut machine = Collector::new(id(20), Rules::ALL);
    let mut store = repository();
    let reached = loop {
        match machine.step() {
            Step::Request(Request::Get(Key::Backup(_))) => machine.answer(Answer::Missing),
            Step::Request(request) => machine.answer(store.carry_out(request)),
            Step::Reached(reached) => break reached,
        }
    };
    assert_eq!(reached, Collected::Lost(id(1)));
    assert_eq!(store.packs.len(), 2);
}

#[test]
fn collector_reads_again_only_what_may_have_changed() {
    let mut store = repository();
    // Forgotten before it begins, and read by somebody meanwhile.
    for number in [2, 3] {
        let tombstone = Object::Tombstone(Some(backup(&[pack(number)])));
        store.objects.insert(Key::Backup(id(number)), tombstone);
        store.packs.insert(pack(number));
    }
    let (reached, requests) = run_collector(&mut store, |store| {
        store.objects.insert(Key::Pin(id(30)), Object::Pin(id(2)));
        store.objects.insert(Key::Backup(id(4)), Object::Live(backup(&[pack(9)])));
    });
    assert_eq!(reached, Collected::Done);
    assert_eq!(store.packs, BTreeSet::from([pack(1), pack(2), pack(9)]));
    let kept = store.objects.get(&Key::Backup(id(2)));
    assert!(matches!(kept, Some(Object::Tombstone(Some(_)))));
    assert_eq!(store.objects.get(&Key::Backup(id(3))), Some(&Object::Tombstone(None)));
    let reads = |number| {
        let read = Request::Get(Key::Backup(id(number)));
        requests.iter().filter(|request| **request == read).count()
    };
    assert_eq!([1, 2, 3, 4].map(reads), [1, 2, 1, 1]);
}
