//! Many threads and more extents than the log holds: every submitted write is covered on disk.

use super::*;
use std::sync::Barrier;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

#[test]
fn every_change_is_covered_when_it_is_submitted() {
    const SIZE: u64 = 1 << 20;
    let description = description(BitmapDurability::PowerLoss, SIZE, &[10, 14]);
    let (sidecar, store) = store::sidecar(&description);
    let uncovered = AtomicU32::new(0);
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (sidecar, store, description) = (&sidecar, &store, &description);
            let (uncovered, barrier) = (&uncovered, &barrier);
            scope.spawn(move || {
                let mut state = 0x9E37_79B9_7F4A_7C15_u64 ^ (thread << 32);
                let mut below = |limit: u64| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state % limit
                };
                barrier.wait();
                for _ in 0..300 {
                    // Threads often meet in a part of the disk that has just become cold.
                    let start = match below(3) {
                        0 => below(SIZE - 70_000),
                        _ => below(16) * 2048,
                    };
                    let length = 1 + if below(50) == 0 { below(60_000) } else { below(5000) };
                    let in_flight = match sidecar.try_before_change(start, length) {
                        Some(in_flight) => in_flight,
                        None => sidecar.before_change(start, length).unwrap(),
                    };
                    if !store.covers(description, start, length) {
                        uncovered.fetch_add(1, SeqCst);
                    }
                    drop(in_flight);
                }
            });
        }
    });
    assert_eq!(uncovered.load(SeqCst), 0);
    assert!(store.syncs() > 0, "the log was never full");
}

#[test]
fn nobody_writes_into_an_extent_whose_log_write_is_under_way() {
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[12]);
    let (sidecar, store) = store::sidecar(&description);
    store.hold_writes(true);
    let submitted = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let change = || {
            let in_flight = sidecar.before_change(0, 4096).unwrap();
            submitted.fetch_add(1, SeqCst);
            assert!(store.covers(&description, 0, 4096));
            drop(in_flight);
        };
        scope.spawn(change);
        while store.durable_writes() == 0 {
            std::thread::yield_now();
        }
        // The second one waits for the same write, or for the next.
        scope.spawn(change);
        let could_go_on = sidecar.try_before_change(0, 4096).is_some();
        let is_hot = sidecar.log.as_ref().unwrap().is_hot(0);
        let too_early = submitted.load(SeqCst);
        store.hold_writes(false);
        assert_eq!((could_go_on, is_hot, too_early), (false, false, 0));
    });
    assert_eq!(submitted.load(SeqCst), 2);
    assert_eq!(store.durable_writes(), 1, "what is hot is not written again");
}
