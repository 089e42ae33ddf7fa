//! All orders in which the requests of several parties can reach the store: none may lose a backup.
//! With any one rule left out, some order does.
//!
//! With `NBD_SEARCH=complete` all searches are complete; otherwise the largest ones begin later, or
//! try a number of orders. This takes minutes, and memory, without optimisation much more:
//! `NBD_SEARCH=complete cargo test --release -p nbd-objects search -- --nocapture --test-threads
//! 1`.

mod actors;
mod collecting;
mod compacting;
mod explore;
mod store;
mod touched;

use bytes::Bytes;

use self::actors::{Actor, Base};
use self::explore::{Fault, Orders, World, sample, search};
use self::store::{Store, backup, id, pack};
use super::super::id::{Folder, Key};
use super::{Answer, Collector, Object, Request, Rules, Step};

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
    collectors.actors.extend([after_interruption(), Actor::collector(21, rules)]);
    [
        world(vec![on_backup(), Actor::collector(20, rules), Actor::forget(1)]),
        world(vec![after_interruption(), Actor::collector(20, rules)]),
        world(vec![Actor::reader(rules), Actor::collector(20, rules), Actor::forget(1)]),
        world(vec![on_backup(), Actor::collector(20, rules), Actor::forget(2)]),
        collectors,
    ]
}

/// Most worlds of a search.
const WORLDS_MAX: usize = 400_000_000;

/// Searches all orders, and once more without those that lead to the same: both find the same.
fn search_twice(name: &str, world: &World) -> Result<usize, Fault> {
    let all = search(world.clone(), Orders::All, WORLDS_MAX);
    let reduced = search(world.clone(), Orders::Reduced, WORLDS_MAX);
    println!("{name}: {all:?}, reduced {reduced:?}");
    assert_eq!(all.is_err(), reduced.is_err(), "{name}");
    reduced
}

#[test]
fn no_order_of_requests_loses_a_backup() {
    for world in small(Rules::ALL) {
        let worlds = search_twice("all rules", &world).unwrap();
        assert!(worlds > 100);
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
    let actors = vec![Actor::writer(2, Base::Backup(id(1)), rules), Actor::collector(20, rules)];
    assert!(sample(&world(actors), 1000).is_err());
}

fn is_needed<const N: usize>(name: &str, drop: Drop, worlds: &dyn Fn(Rules) -> [World; N]) {
    let mut rules = Rules::ALL;
    drop(&mut rules);
    let faults = worlds(rules).iter().filter(|world| search_twice(name, world).is_err()).count();
    assert!(faults > 0, "without the rule '{name}' nothing is lost: is it searched?");
}

/// How long a search takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    /// Seconds, without optimisation.
    Short,
    /// Minutes. The usual run searches some of the orders.
    Long,
    /// More than memory holds: some orders are searched, and more where there is time.
    TooLong,
}

/// Searches all orders, or some.
fn search_large(name: &str, length: Length, start: World) {
    if length == Length::Short || (length == Length::Long && is_complete()) {
        let worlds = search(start, Orders::Reduced, WORLDS_MAX).unwrap();
        println!("{name}: {worlds} worlds");
    } else {
        sample(&start, if is_complete() { 100_000 } else { 1000 }).unwrap();
    }
}

#[test]
fn two_writers_a_collector_and_who_forgets_or_reads_lose_nothing() {
    let rules = Rules::ALL;
    let writers_and = |others: Vec<Actor>| {
        let mut actors = vec![
            Actor::writer(2, Base::Backup(id(1)), rules),
            Actor::writer(3, Base::PackOf(id(9)), rules),
            Actor::collector(20, rules),
        ];
        actors.extend(others);
        world(actors)
    };
    let (reader, forget) = (|| Actor::reader(rules), || Actor::forget(1));
    search_large("two writers, gc, reader", Length::Short, writers_and(vec![reader()]));
    search_large("two writers, gc, forget", Length::Short, writers_and(vec![forget()]));
    let all = writers_and(vec![forget(), reader()]);
    search_large("two writers, gc, forget, reader", Length::Long, all);
}
