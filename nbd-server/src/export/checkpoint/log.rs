//! Copies of small parts of a disk, one after the other.
//!
//! Small writes come in random order. Copies to the same places of a sparse file would cost the
//! kernel more than the writes themselves: a page, a lookup and an extent each, and writing back in
//! random order. Here they are collected and written a MiB at a time.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Longest part of a disk that is kept here, in bytes. Longer ones are cheap enough at their own
/// offsets of the file.
pub(super) const PART_LEN_MAX: usize = 32 << 10;

/// Most granules that are kept here. The place of each takes 10 to 20 bytes of memory, all together
/// 40 to 80 MiB.
const SLOTS_MAX: u32 = 4 << 20;
/// Bytes that are written at a time.
const STAGE_LEN: usize = 1 << 20;
/// Parts of the map. A part that grows moves its entries: small parts keep that pause short.
const SHARDS: u64 = 256;

/// The slot of each granule; slots are counted in granules from the start of the log. Keys are
/// granules divided by the number of shards.
type Shard = Mutex<HashMap<u32, u32>>;

/// Granules in the order of their arrival.
pub(super) struct Log {
    /// The offset of slot 0 in the file.
    start: u64,
    granule_len: usize,
    capacity: u32,
    is_used: AtomicBool,
    shards: Box<[Shard]>,
    /// Slots below this are in the file.
    written: AtomicU32,
    stage: Mutex<Stage>,
}

/// The last slots, which are not in the file yet.
struct Stage {
    /// The slot of the first byte.
    first: u32,
    bytes: Vec<u8>,
}

impl Log {
    /// An empty log from offset `start` on of a file, which must be able to have [`end`](Self::end)
    /// bytes. `granule_len` is a power of two.
    pub(super) fn new(start: u64, granule_len: u64) -> Self {
        let granule_len = usize::try_from(granule_len).unwrap_or(usize::MAX);
        let room = i64::MAX as u64 - start.min(i64::MAX as u64);
        let slots = if granule_len <= PART_LEN_MAX { room / granule_len as u64 } else { 0 };
        Self {
            start,
            granule_len,
            capacity: u32::try_from(slots).unwrap_or(u32::MAX).min(SLOTS_MAX),
            is_used: AtomicBool::new(false),
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            written: AtomicU32::new(0),
            stage: Mutex::new(Stage { first: 0, bytes: Vec::new() }),
        }
    }

    /// The end of the last slot in the file.
    pub(super) fn end(&self) -> u64 {
        self.start + u64::from(self.capacity) * self.granule_len as u64
    }

    /// Disables the log: the file cannot be that long.
    pub(super) fn close(&mut self) {
        self.capacity = 0;
    }

    /// Appends the content of a run of granules, which no reader looks for yet; false if there is
    /// no space. The disk may end in the last granule.
    ///
    /// # Errors
    ///
    /// If collected bytes cannot be written.
    pub(super) fn append(&self, file: &File, run: &Range<u64>, bytes: &[u8]) -> io::Result<bool> {
        // A run is at most PART_LEN_MAX.
        let count = (run.end - run.start) as u32;
        let mut stage = self.stage();
        let staged = stage.bytes.len() / self.granule_len;
        let slot = stage.first + staged as u32;
        if count > self.capacity.saturating_sub(slot) {
            return Ok(false);
        }
        stage.bytes.extend_from_slice(bytes);
        let whole = (staged + count as usize) * self.granule_len;
        stage.bytes.resize(whole, 0);
        if whole >= STAGE_LEN {
            file.write_all_at(&stage.bytes, self.position(stage.first))?;
            stage.first = slot + count;
            stage.bytes.clear();
            self.written.store(stage.first, Ordering::SeqCst);
        }
        drop(stage);
        for (granule, slot) in run.clone().zip(slot..) {
            self.shard(granule).insert(key(granule), slot);
        }
        self.is_used.store(true, Ordering::SeqCst);
        Ok(true)
    }

    /// The slots of the first granules of a run, as far as they can be read together, or the number
    /// of them that are not here.
    pub(super) fn find(&self, run: &Range<u64>) -> Found {
        if !self.is_used.load(Ordering::SeqCst) {
            return Found::Elsewhere(run.end - run.start);
        }
        let slot_of = |granule| self.shard(granule).get(&key(granule)).copied();
        let rest = run.start + 1..run.end;
        match slot_of(run.start) {
            Some(first) => {
                let follow =
                    rest.zip(first + 1..).take_while(|&(at, slot)| slot_of(at) == Some(slot));
                Found::Here(first..first + 1 + follow.count() as u32)
            }
            None => {
                Found::Elsewhere(1 + rest.take_while(|&at| slot_of(at).is_none()).count() as u64)
            }
        }
    }

    /// Reads from `skipped` bytes after the start of `slot` on, from consecutive slots.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub(super) fn read(
        &self,
        file: &File,
        slot: u32,
        skipped: usize,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let position = self.position(slot) + skipped as u64;
        if position + buffer.len() as u64 <= self.position(self.written.load(Ordering::SeqCst)) {
            return file.read_exact_at(buffer, position);
        }
        let stage = self.stage();
        let staged_from = self.position(stage.first);
        let in_file = usize::try_from(staged_from.saturating_sub(position)).unwrap_or(usize::MAX);
        let (written, staged) = buffer.split_at_mut(in_file.min(buffer.len()));
        if !staged.is_empty() {
            let from = usize::try_from(position.saturating_sub(staged_from)).unwrap_or(usize::MAX);
            let found = stage.bytes.get(from..).and_then(|bytes| bytes.get(..staged.len()));
            staged.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        }
        // Bytes in the file stay there.
        drop(stage);
        file.read_exact_at(written, position)
    }

    fn position(&self, slot: u32) -> u64 {
        self.start + u64::from(slot) * self.granule_len as u64
    }

    fn shard(&self, granule: u64) -> MutexGuard<'_, HashMap<u32, u32>> {
        let shard = &self.shards[(granule % SHARDS) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key in the shard of a granule. `Granules` has at most 2^35 of them.
fn key(granule: u64) -> u32 {
    (granule / SHARDS) as u32
}

/// The place of the granules at the start of a run.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// They are in these slots.
    Here(Range<u32>),
    /// This many are not here.
    Elsewhere(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1 << 20;

    fn bytes_of(granule: u64) -> Vec<u8> {
        (0..4096_u64).map(|at| (granule * 31 + at / 7) as u8).collect()
    }

    #[test]
    fn every_granule_is_found_whether_it_was_written_or_not() {
        let file = tempfile::tempfile().unwrap();
        let log = Log::new(START, 4096);
        assert_eq!(log.find(&(0..9)), Found::Elsewhere(9));
        // More than the stage holds, the last ones first.
        for first in (0..300).rev().map(|step| step * 3) {
            let bytes = [bytes_of(first), bytes_of(first + 1)].concat();
            assert!(log.append(&file, &(first..first + 2), &bytes).unwrap());
        }
        for first in (0..300).map(|step| step * 3) {
            let Found::Here(slots) = log.find(&(first..first + 3)) else { panic!("{first}") };
            assert_eq!(slots.len(), 2);
            let mut found = vec![0; 6000];
            log.read(&file, slots.start, 1000, &mut found).unwrap();
            let expected = [bytes_of(first), bytes_of(first + 1)].concat();
            assert!(found == expected[1000..7000], "{first}");
            assert_eq!(log.find(&(first + 2..first + 3)), Found::Elsewhere(1));
        }
    }

    #[test]
    fn a_part_that_spans_file_and_memory_is_read_as_one() {
        let file = tempfile::tempfile().unwrap();
        let log = Log::new(START, 4096);
        for granule in 0..260 {
            log.append(&file, &(granule..granule + 1), &bytes_of(granule)).unwrap();
        }
        let Found::Here(slots) = log.find(&(250..260)) else { panic!("they are here") };
        let mut found = vec![0; 10 * 4096];
        log.read(&file, slots.start, 0, &mut found).unwrap();
        let expected: Vec<u8> = (250..260).flat_map(bytes_of).collect();
        assert!(found == expected);
    }

    #[test]
    fn the_end_of_a_disk_is_padded_and_a_full_log_takes_nothing() {
        let file = tempfile::tempfile().unwrap();
        let mut log = Log::new(START, 4096);
        assert!(log.append(&file, &(7..8), &[9; 100]).unwrap());
        assert!(log.append(&file, &(3..4), &bytes_of(3)).unwrap());
        let Found::Here(slots) = log.find(&(3..4)) else { panic!("it is here") };
        let mut found = vec![0; 4096];
        log.read(&file, slots.start, 0, &mut found).unwrap();
        assert!(found == bytes_of(3));
        log.close();
        assert!(!log.append(&file, &(8..9), &bytes_of(8)).unwrap());
        assert_eq!(Log::new(i64::MAX as u64 - 5000, 4096).end(), i64::MAX as u64 - 5000 + 4096);
        assert_eq!(Log::new(0, 1 << 20).end(), 0, "granules are too long");
    }
}
