//! Searches all orders in which actors can take their steps.
//!
//! Every store and every state of an actor has a number, and what can come of a step of an actor in
//! a store is found out once. A world is these numbers, in 128 bits, and nothing else is kept of
//! it.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::rc::Rc;

use super::super::super::id::Id;
use super::actors::Actor;
use super::store::Store;
use super::touched::{Touched, WATCHED, deletes_pack};

#[derive(Clone)]
pub(super) struct World {
    pub(super) store: Store,
    pub(super) actors: Vec<Actor>,
}

/// Which orders are searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Orders {
    /// Each.
    All,
    /// Not those that differ from another one by steps that commute. And worlds are the same that
    /// differ in what nobody looks at any more.
    ///
    /// Where the next step of one actor commutes with all steps that the others may still take,
    /// only this step is taken: what the others do before it, they can do after it as well, and
    /// both lead to the same world. It must not be a step that a fault can begin or end with, or
    /// the worlds between would be lost; nor one of a loop, or the others might be put off for
    /// ever. (It is a persistent set of one actor, as of Godefroid, with the conditions of ample
    /// sets.) What the steps that are left may touch is an estimate; each step is compared with it.
    Reduced,
}

/// A fault, and the number of steps that lead to it.
pub(super) type Fault = (String, usize);

/// Values and their numbers.
struct Numbered<T> {
    numbers: HashMap<Rc<T>, u32>,
    values: Vec<Rc<T>>,
}

impl<T: Eq + Hash> Numbered<T> {
    fn new() -> Self {
        Self { numbers: HashMap::new(), values: Vec::new() }
    }

    fn get(&self, number: u32) -> &Rc<T> {
        &self.values[number as usize]
    }

    fn number(&mut self, value: T) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let (value, number) = (Rc::new(value), self.values.len() as u32);
        self.values.push(Rc::clone(&value));
        self.numbers.insert(value, number);
        number
    }
}

/// What can come of a step of an actor in a store.
#[derive(Clone, Copy)]
struct Cell {
    /// Where its outcomes begin.
    first: u32,
    count: u32,
    is_faulty: bool,
    /// It may be the only one that is taken, if it commutes with what the others may do.
    may_be_alone: bool,
}

/// The states of an actor.
struct States {
    numbered: Numbered<Actor>,
    /// What the next step touches, and this and all others.
    touched: Vec<(Touched, Touched)>,
    cells: HashMap<u64, Cell, BuildHasherDefault<Mixed>>,
}

struct Explorer {
    orders: Orders,
    stores: Numbered<Store>,
    /// Whether a store lacks what a backup needs.
    lacks: Vec<bool>,
    states: Vec<States>,
    /// Numbers of states and stores.
    outcomes: Vec<(u32, u32)>,
    forgotten: Vec<Id>,
}

impl Explorer {
    fn new(world: &World, orders: Orders) -> Self {
        let forgotten = world.actors.iter().filter_map(|actor| match actor {
            Actor::Forgetting(machine) => Some(machine.id()),
            _ => None,
        });
        let states = |_: &Actor| States {
            numbered: Numbered::new(),
            touched: Vec::new(),
            cells: HashMap::default(),
        };
        Self {
            orders,
            stores: Numbered::new(),
            lacks: Vec::new(),
            states: world.actors.iter().map(states).collect(),
            outcomes: Vec::new(),
            forgotten: forgotten.collect(),
        }
    }

    fn store(&mut self, store: Store) -> u32 {
        let number = self.stores.number(store);
        if number as usize == self.lacks.len() {
            self.lacks.push(self.stores.get(number).lost().is_some());
        }
        number
    }

    fn state(&mut self, actor: usize, mut state: Actor) -> u32 {
        if self.orders == Orders::Reduced {
            state.settle();
        }
        let states = &mut self.states[actor];
        let number = states.numbered.number(state);
        if number as usize == states.touched.len() {
            let state = states.numbered.get(number);
            states.touched.push((state.touches(), state.ahead()));
        }
        number
    }

    fn cell(&mut self, actor: usize, state: u32, store: u32) -> Cell {
        let key = u64::from(state) << 32 | u64::from(store);
        if let Some(cell) = self.states[actor].cells.get(&key) {
            return *cell;
        }
        let here = Rc::clone(self.states[actor].numbered.get(state));
        let store_here = Rc::clone(self.stores.get(store));
        let (step, ahead) = self.states[actor].touched[state as usize];
        let first = self.outcomes.len() as u32;
        let mut is_seen = step.writes & WATCHED != 0 || deletes_pack(&here) || here.is_watched();
        for (store, after) in here.after(&store_here) {
            is_seen |= after.is_watched();
            let outcome = (self.state(actor, after), self.store(store));
            let (_, ahead_then) = self.states[actor].touched[outcome.0 as usize];
            assert!(step.is_within(ahead) && ahead_then.is_within(ahead), "an estimate is wrong");
            self.outcomes.push(outcome);
        }
        let count = self.outcomes.len() as u32 - first;
        let cell = Cell {
            first,
            count,
            is_faulty: here.fault(&store_here, &self.forgotten).is_some(),
            may_be_alone: count > 0 && !is_seen && !here.may_loop(),
        };
        self.states[actor].cells.insert(key, cell);
        cell
    }

    fn fault(&self, world: &[u32]) -> Option<String> {
        let (store, states) = world.split_last()?;
        let store = self.stores.get(*store);
        let lost = store.lost().map(|pack| format!("a live backup lacks {pack:?}"));
        lost.or_else(|| {
            let mut actors = self.states.iter().zip(states);
            actors
                .find_map(|(actor, state)| actor.numbered.get(*state).fault(store, &self.forgotten))
        })
    }

    /// Returns the actor whose step is the only one that is taken here.
    fn alone(&self, world: &[u32], cells: &[Cell]) -> Option<usize> {
        let touched = |actor: usize| self.states[actor].touched[world[actor] as usize];
        (0..cells.len()).filter(|&actor| cells[actor].may_be_alone).find(|&actor| {
            let (step, _) = touched(actor);
            let mut others = (0..cells.len()).filter(|&other| other != actor);
            others.all(|other| step.commutes(touched(other).1))
        })
    }
}

/// The numbers of the states of all actors, and that of the store, in 128 bits.
#[derive(Clone, Copy)]
struct Packing {
    count: usize,
    bits: u32,
}

impl Packing {
    fn pack(self, numbers: &[u32]) -> u128 {
        numbers.iter().fold(0, |packed, number| {
            assert!(self.bits >= 32 || number >> self.bits == 0, "the search has become too large");
            packed << self.bits | u128::from(*number)
        })
    }

    fn unpack(self, mut packed: u128, numbers: &mut Vec<u32>) {
        numbers.clear();
        for _ in 0..self.count {
            numbers.push((packed & ((1 << self.bits) - 1)) as u32);
            packed >>= self.bits;
        }
        numbers.reverse();
    }
}

/// Searches until a fault or the end, and returns the number of different worlds.
pub(super) fn search(start: World, orders: Orders, worlds_max: usize) -> Result<usize, Fault> {
    let mut explorer = Explorer::new(&start, orders);
    let count = start.actors.len() + 1;
    let packing = Packing { count, bits: (128 / count as u32).min(32) };
    let mut world: Vec<u32> = Vec::new();
    for (actor, state) in start.actors.into_iter().enumerate() {
        world.push(explorer.state(actor, state));
    }
    world.push(explorer.store(start.store));
    let mut seen: HashSet<u128, BuildHasherDefault<Mixed>> = HashSet::default();
    let mut layer = vec![packing.pack(&world)];
    seen.extend(&layer);
    let mut cells = Vec::new();
    for depth in 0.. {
        if layer.is_empty() {
            return Ok(seen.len());
        }
        let mut next = Vec::new();
        for packed in layer {
            packing.unpack(packed, &mut world);
            let store = world[count - 1];
            cells.clear();
            cells.extend((0..count - 1).map(|actor| explorer.cell(actor, world[actor], store)));
            if explorer.lacks[store as usize] || cells.iter().any(|cell| cell.is_faulty) {
                return Err((explorer.fault(&world).unwrap_or_default(), depth));
            }
            let alone = match orders {
                Orders::All => None,
                Orders::Reduced => explorer.alone(&world, &cells),
            };
            for actor in alone.map_or(0..count - 1, |actor| actor..actor + 1) {
                let Cell { first, count: outcomes, .. } = cells[actor];
                for at in first..first + outcomes {
                    let before = (world[actor], store);
                    (world[actor], world[count - 1]) = explorer.outcomes[at as usize];
                    let after = packing.pack(&world);
                    (world[actor], world[count - 1]) = before;
                    if seen.insert(after) {
                        next.push(after);
                    }
                }
            }
        }
        assert!(seen.len() < worlds_max, "the search has become too large: {}", seen.len());
        layer = next;
    }
    unreachable!("a search ends")
}

/// Follows some orders to their ends: always the same ones.
pub(super) fn sample(start: &World, orders: u32) -> Result<(), String> {
    let mut state = 1u64;
    let mut below = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % limit
    };
    let mut explorer = Explorer::new(start, Orders::All);
    let count = start.actors.len();
    let mut begin = Vec::new();
    for (actor, state) in start.actors.iter().enumerate() {
        begin.push(explorer.state(actor, state.clone()));
    }
    begin.push(explorer.store(start.store.clone()));
    for _ in 0..orders {
        let mut world = begin.clone();
        // A collector may look at a session again without end.
        for _ in 0..300 {
            if let Some(fault) = explorer.fault(&world) {
                return Err(fault);
            }
            let first = below(count);
            let next = (0..count).map(|number| (first + number) % count).find_map(|actor| {
                let cell = explorer.cell(actor, world[actor], world[count]);
                (cell.count > 0).then_some((actor, cell))
            });
            let Some((actor, cell)) = next else { break };
            let chosen = cell.first as usize + below(cell.count as usize);
            (world[actor], world[count]) = explorer.outcomes[chosen];
        }
    }
    Ok(())
}

/// A hasher of numbers.
#[derive(Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ (self.0 >> 29) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u128(&mut self, number: u128) {
        self.write_u64(number as u64);
        self.write_u64((number >> 64) as u64);
    }
}
