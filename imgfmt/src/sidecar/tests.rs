//! Tests of the sidecar alone. `tests/` covers crashes and concurrent threads.

mod crash;
mod rejection;
mod store;
mod threads;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::clock::now_nanoseconds;
use super::layout::{self, Layout, LogShape};
use super::location::SidecarStorage;
use super::open::set_bits;
use super::*;

pub(super) const BOOT: &str = "00000000-1111-2222-3333-444444444444";
pub(super) const OTHER_BOOT: &str = "55555555-1111-2222-3333-444444444444";

/// A sidecar for a disk with these granularities, with a log of 120 small extents.
pub(super) fn description(
    durability: BitmapDurability,
    disk_size: u64,
    granularities: &[u32],
) -> Description {
    let bitmap = |bits: &u32| BitmapDescriptor {
        name: format!("bitmap {bits}").into_bytes(),
        granularity_bits: *bits,
        bit_count: disk_size.div_ceil(1 << bits),
    };
    Description {
        durability,
        identity: Identity { uuid: *b"0123456789abcdef", generation: 7 },
        epoch: 1,
        disk_size,
        log: LogShape { extent_bits: 11, slots: 1 },
        boot_id: BOOT.into(),
        image: Fingerprint { inode: 5, length: 1000, modified: 1, header_crc: 9 },
        bitmaps: granularities.iter().map(bitmap).collect(),
    }
}

/// Examines bytes that should be trusted.
pub(super) fn recovery<R: FoundBytes>(
    bytes: R,
    description: &Description,
    boot_id: &str,
) -> Result<Recovery<R>, Rejection> {
    Recovery::examine(bytes, description.identity, description.image, boot_id)
}

impl FoundBytes for Vec<u8> {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_bytes(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = (offset as usize).saturating_add(buffer.len());
        let found = self.get(offset as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(found);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn bits_are_set_across_words_and_not_behind_the_end() {
    let words: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
    set_bits(&words, 62, 130);
    set_bits(&words, 190, 1 << 40);
    let values: Vec<u64> = words.iter().map(|word| u64::from_le(word.load(Relaxed))).collect();
    assert_eq!(values, [3 << 62, u64::MAX, 0b111 | 3 << 62]);
}

#[test]
fn a_hot_extent_costs_no_write_and_a_stream_is_seen_ahead() {
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[12]);
    let (sidecar, store) = store::sidecar(&description);
    drop(sidecar.before_change(0, 512).unwrap());
    assert_eq!(store.durable_writes(), 1);
    for _ in 0..100 {
        drop(sidecar.before_change(1024, 1024).unwrap());
    }
    assert_eq!(store.durable_writes(), 1);
    for extent in 1..64 {
        drop(sidecar.before_change(extent * 2048, 2048).unwrap());
    }
    assert!(store.durable_writes() < 20, "{} for 64 extents", store.durable_writes());
    assert!(sidecar.try_before_change(0, 4096).is_some());
    assert!(sidecar.try_before_change(1 << 19, 1).is_none(), "a cold one has to wait");
    assert_eq!(store.syncs(), 0);
}

#[test]
fn more_extents_than_the_log_holds_are_retired_together() {
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[12]);
    let (sidecar, store) = store::sidecar(&description);
    for extent in (0..512).rev() {
        drop(sidecar.before_change(extent * 2048, 1).unwrap());
    }
    assert!(store.syncs() <= 512 / 30, "{} syncs for 512 extents", store.syncs());
    // What is in flight stays hot, and what does not fit is made durable at once.
    let held: Vec<_> =
        (0..200).map(|extent| sidecar.before_change(extent * 2048, 1).unwrap()).collect();
    let log = sidecar.log.as_ref().unwrap();
    assert!((0..100).all(|extent| log.is_hot(extent)));
    assert!(store.covers(&description, 199 * 2048, 1));
    drop(held);
}

#[test]
fn a_change_of_half_the_disk_is_durable_without_the_log() {
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[12]);
    let (sidecar, store) = store::sidecar(&description);
    let in_flight = sidecar.before_change(4096, 1 << 19).unwrap();
    assert_eq!((store.durable_writes(), store.syncs()), (0, 1));
    assert!(store.covers(&description, 4096, 1 << 19));
    drop(in_flight);
}

#[test]
fn a_sidecar_that_cannot_be_written_is_taken_away_and_the_disk_stays_usable() {
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[12]);
    let (sidecar, store) = store::sidecar(&description);
    drop(sidecar.before_change(0, 512).unwrap());
    store.fail_writes(true);
    drop(sidecar.before_change(1 << 19, 512).unwrap());
    assert!(!sidecar.is_abandoned(), "the bits could be synced");
    store.fail_syncs(true);
    drop(sidecar.before_change(1 << 18, 512).unwrap());
    assert!(sidecar.is_abandoned() && store.is_removed());
    drop(sidecar.before_change(0, 512).unwrap());
}

#[test]
fn a_sidecar_that_can_neither_be_written_nor_removed_stops_changes() {
    let description = description(BitmapDurability::PowerLoss, 1 << 20, &[12]);
    let (sidecar, store) = store::sidecar(&description);
    store.fail_writes(true);
    store.fail_syncs(true);
    store.fail_remove(true);
    assert!(sidecar.before_change(0, 512).is_err());
    // A later sync that says it has worked does not bring back what was lost.
    store.fail_syncs(false);
    assert!(sidecar.before_change(0, 512).is_err());
    store.fail_remove(false);
    assert!(sidecar.before_change(0, 512).is_ok() && store.is_removed());
}
