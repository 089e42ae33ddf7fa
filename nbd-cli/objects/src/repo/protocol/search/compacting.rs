//! Orders in which a compaction takes part.

use bytes::Bytes;

use super::super::super::seal::Hash;
use super::super::{Compaction, Moved, Part};
use super::{
    Actor, Base, Drop, Key, Length, Object, Rules, Store, World, backup, id, is_needed, pack,
    search_large, search_twice,
};

/// The object of a compaction of the backup 1.
pub(super) fn compaction() -> Object {
    let hash = Hash([0; 16]);
    let part = Part { number: 0, offset: 0, length: 0, content: 0, hash };
    let moved = [Moved { backup: id(1), part }].into();
    Object::Compaction(Compaction { moved, object: Bytes::new() })
}

fn compactor(number: u8, rules: Rules) -> Actor {
    Actor::writer(number, Base::Compacted, rules)
}

/// A repository with the backup 1, which has a pack of which little is needed, and perhaps was
/// compacted before.
fn to_compact(is_compacted: bool) -> Store {
    let mut store = Store::default();
    store.objects.insert(Key::Backup(id(1)), Object::Live(backup(&[pack(1), pack(8)])));
    store.packs.extend([pack(1), pack(8)]);
    if is_compacted {
        store.objects.insert(Key::Backup(id(4)), compaction());
        store.objects.insert(Key::Moved(id(4)), Object::Mark);
        store.maps.insert((id(4), id(1)), [pack(1), pack(4)].into());
        store.packs.insert(pack(4));
    }
    store
}

/// A compaction of the backup 1, a collector, and one more.
fn compacting(rules: Rules) -> [World; 7] {
    let world = |is_compacted: bool, actors: Vec<Actor>| {
        let store = to_compact(is_compacted);
        World { store, actors }
    };
    let collector = || Actor::collector(20, rules);
    let mut after_interruption = world(false, vec![compactor(5, rules), collector()]);
    after_interruption.store.objects.insert(Key::Session(id(9)), Object::Session(Bytes::new()));
    after_interruption.store.packs.insert(pack(9));
    [
        world(false, vec![compactor(5, rules), collector(), Actor::reader(rules)]),
        world(true, vec![compactor(5, rules), collector(), Actor::reader(rules)]),
        world(false, vec![compactor(5, rules), collector(), Actor::forget(1)]),
        world(
            false,
            vec![compactor(5, rules), collector(), Actor::writer(2, Base::Backup(id(1)), rules)],
        ),
        world(false, vec![compactor(5, rules), collector(), compactor(6, rules)]),
        world(true, vec![collector(), Actor::forget(1), Actor::reader(rules)]),
        after_interruption,
    ]
}

#[test]
fn no_order_of_requests_loses_what_is_compacted() {
    for world in compacting(Rules::ALL) {
        let worlds = search_twice("all rules", &world).unwrap();
        assert!(worlds > 100);
    }
}

#[test]
fn every_rule_of_compactions_is_needed() {
    let rules: [(&str, Drop); 8] = [
        ("keep maps of pinned", |rules| rules.keep_maps = false),
        ("keep them in the second look", |rules| rules.keep_maps_again = false),
        ("list moved after the pin", |rules| rules.list_moved_after_pin = false),
        // One of both would do. With the first a crash leaves no compaction that is never used,
        // with the second a mark that was removed by hand costs no backup.
        ("mark first, and heed marks", |rules| {
            (rules.mark_first, rules.heed_marks) = (false, false);
        }),
        ("session first", |rules| rules.session_first = false),
        ("wait for sessions", |rules| rules.wait_for_sessions = false),
        ("mark again", |rules| rules.mark_again = false),
        ("pin first", |rules| rules.pin_first = false),
    ];
    for (name, drop) in rules {
        is_needed(name, drop, &compacting);
    }
}

#[test]
fn compaction_beside_writers_a_collector_a_reader_and_who_forgets_loses_nothing() {
    let rules = Rules::ALL;
    let compactor = || compactor(5, rules);
    let writer = || Actor::writer(2, Base::Backup(id(1)), rules);
    let collector = || Actor::collector(20, rules);
    let reader = || Actor::reader(rules);
    let forget = || Actor::forget(1);
    // What the interrupted compaction wrote is used as well.
    let after = || Actor::writer(3, Base::PackOf(id(5)), rules);
    let other = || self::compactor(6, rules);
    let second = || Actor::collector(21, rules);
    let all = || vec![compactor(), writer(), collector(), forget(), reader()];
    for (name, length, actors) in [
        ("gc, reader, forget", Length::Short, vec![compactor(), collector(), reader(), forget()]),
        ("gc, reader, writer", Length::Short, vec![compactor(), collector(), reader(), writer()]),
        ("another, gc, reader", Length::Long, vec![compactor(), other(), collector(), reader()]),
        ("two gcs, reader", Length::Long, vec![compactor(), collector(), second(), reader()]),
        ("writer, gc, forget, reader", Length::Long, all()),
        ("two writers, gc, forget, reader", Length::TooLong, [all(), vec![after()]].concat()),
    ] {
        let start = World { store: to_compact(true), actors };
        search_large(&format!("compaction, {name}"), length, start);
    }
}
