use std::io;
use std::sync::Arc;

use super::*;
use crate::storage::{Durability, MemoryStorage, Storage};
use crate::units::HostOffset;

fn numbers() -> impl FnMut(u64) -> u64 {
    let mut state = 1u64;
    move |bound| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % bound
    }
}

fn write(storage: &dyn Storage, offset: u64, data: &[u8]) -> io::Result<()> {
    storage.write_at(HostOffset::new(offset), data, Durability::Cached)
}

#[test]
fn synced_writes_survive_and_others_may_be_lost_torn_or_kept() {
    let recorder = Recorder::new();
    let storage = recorder.storage(&[0; 2048]);
    write(&*storage, 0, &[1; 2048]).unwrap();
    storage.sync().unwrap();
    write(&*storage, 0, &[2; 1024]).unwrap();
    storage.punch_hole(HostOffset::new(1024), 512).unwrap();
    let mut below = numbers();
    assert_eq!(storage.after_crash(0, Loss::Nothing, &mut below), [0; 2048]);
    assert_eq!(storage.after_crash(4, Loss::Everything, &mut below), [1; 2048]);
    assert_eq!(storage.after_crash(4, Loss::Nothing, &mut below), storage.content());
    let found: Vec<[u8; 4]> = (0..200)
        .map(|_| storage.after_crash(4, Loss::SomeSectors, &mut below))
        .map(|bytes| [bytes[0], bytes[512], bytes[1024], bytes[1536]])
        .collect();
    for expected in [[2, 2, 0, 1], [1, 2, 1, 1], [2, 1, 0, 1], [1, 1, 1, 1]] {
        assert!(found.contains(&expected), "{expected:?} was never found");
    }
    assert!(found.iter().all(|sectors| sectors[3] == 1), "a synced sector was lost");
}

#[test]
fn a_sector_never_holds_a_later_write_without_the_earlier_one() {
    let recorder = Recorder::new();
    let storage = recorder.storage(&[0; 512]);
    write(&*storage, 0, &[1; 100]).unwrap();
    write(&*storage, 100, &[2; 100]).unwrap();
    let mut below = numbers();
    for _ in 0..50 {
        let bytes = storage.after_crash(2, Loss::SomeChanges, &mut below);
        assert!(bytes[100] == 0 || bytes[0] == 1, "{:?}", &bytes[..200]);
    }
}

#[test]
fn storages_of_one_recording_crash_together() {
    let recorder = Recorder::new();
    let (one, two) = (recorder.storage(&[0]), recorder.storage(&[0]));
    write(&*one, 0, &[1]).unwrap();
    let position = recorder.position();
    write(&*two, 0, &[1]).unwrap();
    let mut below = numbers();
    assert_eq!(one.after_crash(position, Loss::Nothing, &mut below), [1]);
    assert_eq!(two.after_crash(position, Loss::Nothing, &mut below), [0]);
}

#[test]
fn only_the_chosen_calls_fail_and_a_failed_write_is_half_done() {
    let storage = FailingStorage::new(Arc::new(MemoryStorage::new(4096)));
    storage.set_fault(Some(Fault { calls: 1..2, code: libc::ENOSPC }));
    write(&*storage, 0, &[1; 1024]).unwrap();
    let error = write(&*storage, 0, &[2; 1024]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let mut bytes = [0; 1024];
    storage.read_exact_at(HostOffset::new(0), &mut bytes).unwrap();
    assert_eq!((bytes[511], bytes[512]), (2, 1));
    assert_eq!((storage.calls(), storage.failed()), (3, 1));
}

#[test]
fn a_held_write_waits_until_it_is_released() {
    let storage = FailingStorage::new(Arc::new(MemoryStorage::new(4096)));
    storage.hold(Call::Write, 0..512);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&*storage, 0, &[1; 512]));
        while storage.held() == 0 {
            std::thread::yield_now();
        }
        write(&*storage, 512, &[2; 512]).unwrap();
        let mut bytes = [9; 1];
        storage.read_exact_at(HostOffset::new(0), &mut bytes).unwrap();
        assert_eq!(bytes, [0]);
        storage.release();
        writer.join().unwrap().unwrap();
    });
}
