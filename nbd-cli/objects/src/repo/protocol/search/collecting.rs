//! A collector alone with a store that loses names, or in which something changes meanwhile.

use std::collections::BTreeSet;

use super::super::super::id::{Folder, Key};
use super::super::{Answer, Collected, Collector, Object, Request, Rules, Step};
use super::repository;
use super::store::{Store, backup, id, pack};

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
    // Forgotten before the collection begins, and read while it runs.
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
