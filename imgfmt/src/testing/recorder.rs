//! Storages that record the states that a crash could leave.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

use super::{Begun, SECTOR, lock};
use crate::storage::{
    BegunWrite, Capabilities, Durability, FileIdentity, MemoryStorage, Storage, StorageExtent,
    TryRead,
};
use crate::units::HostOffset;

/// The recorded operations of several storages, in one order: an image and its data file crash at
/// the same instant.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    log: Arc<Mutex<Log>>,
    storages: Arc<Mutex<usize>>,
}

#[derive(Debug, Default)]
struct Log {
    changes: Vec<(usize, Change)>,
    /// Stores there are in the page cache at once, like changes of a storage.
    mapped: Vec<Weak<MappedWords>>,
}

/// A storage that is mapped into memory.
#[derive(Debug)]
pub(crate) struct MappedWords {
    words: Vec<AtomicU64>,
    /// The words that are in the recording.
    recorded: Mutex<Vec<u64>>,
    inner: Arc<MemoryStorage>,
    number: usize,
}

impl MappedWords {
    /// All bytes, as little-endian words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    /// Records what was stored since the last time.
    fn capture(&self, changes: &mut Vec<(usize, Change)>) -> io::Result<()> {
        let mut recorded = lock(&self.recorded);
        for (index, (word, old)) in self.words.iter().zip(recorded.iter_mut()).enumerate() {
            let now = word.load(Relaxed);
            if now != *old {
                let (offset, data) = (index as u64 * 8, u64::from_le(now).to_le_bytes());
                self.inner.write_at(HostOffset::new(offset), &data, Durability::Cached)?;
                let data = data.as_slice().into();
                let change = Change::Write { offset, data, durability: Durability::Cached };
                changes.push((self.number, change));
                *old = now;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: u64, data: Arc<[u8]>, durability: Durability },
    Zero { offset: u64, length: u64 },
    SetLength(u64),
    Extend(u64),
    Sync,
}

/// The unsynced changes that a crash takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// None: the process was killed, and the page cache survives.
    Nothing,
    /// All of them.
    Everything,
    /// Some complete changes; earlier ones may be lost and later ones kept.
    SomeChanges,
    /// Some sectors of some changes, so that changes may be torn.
    SomeSectors,
}

impl Loss {
    /// All variants.
    pub const ALL: [Self; 4] =
        [Self::Nothing, Self::Everything, Self::SomeChanges, Self::SomeSectors];
}

impl Recorder {
    /// Creates an empty recording.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a storage that holds a copy of `bytes`, all of them durable, and records from now
    /// on.
    pub fn storage(&self, bytes: &[u8]) -> Arc<RecordingStorage> {
        let mut storages = lock(&self.storages);
        let number = *storages;
        *storages += 1;
        Arc::new(RecordingStorage {
            inner: Arc::new(MemoryStorage::from_bytes(bytes)),
            start: bytes.into(),
            number,
            recorder: self.clone(),
        })
    }

    /// Returns the number of recorded changes.
    pub fn position(&self) -> usize {
        lock(&self.log).changes.len()
    }
}

/// Records every change and reconstructs the state that a crash after any of them could leave.
#[derive(Debug)]
pub struct RecordingStorage {
    inner: Arc<MemoryStorage>,
    start: Arc<[u8]>,
    number: usize,
    recorder: Recorder,
}

impl RecordingStorage {
    /// Returns the bytes found after a crash that happened after `position` changes of the
    /// recording. `below` returns a random number below its argument.
    ///
    /// As with a page cache, each sector is in one of its states since the last sync.
    pub fn after_crash(
        &self,
        position: usize,
        loss: Loss,
        below: &mut dyn FnMut(u64) -> u64,
    ) -> Vec<u8> {
        let log = lock(&self.recorder.log);
        let own = log.changes[..position].iter().filter(|(number, _)| *number == self.number);
        let changes: Vec<&Change> = own.map(|(_, change)| change).collect();
        drop_after(&self.start, &changes, loss, below)
    }

    /// Returns the bytes of every state that a crash after `position` changes of the recording can
    /// leave: each sector that was written since the last sync is in any of its versions.
    ///
    /// # Panics
    ///
    /// If there are more than 13 such sectors.
    pub fn all_after_crash(&self, position: usize) -> Vec<Vec<u8>> {
        let mut states = Vec::new();
        let mut choice = 0_u64;
        loop {
            let mut draws = 0;
            let mut below = |bound: u64| {
                if bound == 3 {
                    return 1; // The odds, which do not matter.
                }
                draws += 1;
                if choice >> (draws - 1) & 1 == 0 { bound - 1 } else { 0 }
            };
            states.push(self.after_crash(position, Loss::SomeSectors, &mut below));
            assert!(draws < 14, "too many sectors between two syncs");
            choice += 1;
            if choice >> draws != 0 {
                return states;
            }
        }
    }

    /// Returns the number of changes of this storage after its last sync.
    pub fn unsynced_changes(&self) -> usize {
        let log = lock(&self.recorder.log);
        let own = log.changes.iter().rev().filter(|(number, _)| *number == self.number);
        own.take_while(|(_, change)| !matches!(change, Change::Sync)).count()
    }

    /// Returns the number of syncs of this storage, since `position`, that follow another sync with
    /// no change of it in between.
    pub fn needless_syncs(&self, position: usize) -> usize {
        let log = lock(&self.recorder.log);
        let own = log.changes.iter().enumerate().filter(|(_, (number, _))| *number == self.number);
        let (mut is_synced, mut needless) = (false, 0);
        for (index, (_, change)) in own {
            let is_sync = matches!(change, Change::Sync);
            needless += usize::from(is_sync && is_synced && index >= position);
            is_synced = is_sync;
        }
        needless
    }

    /// Returns the current bytes.
    pub fn content(&self) -> Vec<u8> {
        let length = self.inner.len().unwrap_or(0);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        let read = self.inner.read_at(HostOffset::new(0), &mut bytes);
        bytes.truncate(read.unwrap_or(0));
        bytes
    }

    /// Carries a change out and records it, so that no sync can come between the two.
    fn change(&self, change: Change, apply: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut log = lock(&self.recorder.log);
        let Log { changes, mapped } = &mut *log;
        mapped.retain(|mapped| mapped.strong_count() > 0);
        for mapped in mapped.iter().filter_map(Weak::upgrade) {
            mapped.capture(changes)?;
        }
        apply()?;
        changes.push((self.number, change));
        Ok(())
    }

    /// Maps the storage. From now on, mapped places must not be written in any other way. Stores
    /// before a change of any storage of the recording are recorded before that change.
    pub(crate) fn map(&self) -> Arc<MappedWords> {
        let mut bytes = self.content();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let (words, _) = bytes.as_chunks::<8>();
        let recorded: Vec<u64> =
            words.iter().map(|word| u64::from_le_bytes(*word).to_le()).collect();
        let mapped = Arc::new(MappedWords {
            words: recorded.iter().map(|word| AtomicU64::new(*word)).collect(),
            recorded: Mutex::new(recorded),
            inner: Arc::clone(&self.inner),
            number: self.number,
        });
        lock(&self.recorder.log).mapped.push(Arc::downgrade(&mapped));
        mapped
    }
}

fn drop_after(
    start: &[u8],
    changes: &[&Change],
    loss: Loss,
    below: &mut dyn FnMut(u64) -> u64,
) -> Vec<u8> {
    let synced = changes.iter().rposition(|change| matches!(change, Change::Sync)).unwrap_or(0);
    let mut cached = start.to_vec();
    for change in &changes[..synced] {
        apply(&mut cached, change);
    }
    let mut disk = cached.clone();
    // Sometimes nearly everything survives, and sometimes nearly nothing.
    let odds = [1, 4, 7][below(3) as usize];
    for change in &changes[synced..] {
        let touched = apply(&mut cached, change);
        let is_durable = matches!(change, Change::Write { durability: Durability::Fua, .. });
        let mut survives = || match loss {
            Loss::Nothing => true,
            Loss::Everything => false,
            Loss::SomeChanges | Loss::SomeSectors => below(8) < odds,
        };
        let whole = is_durable || survives();
        match change {
            Change::SetLength(length) if whole => disk.resize(*length as usize, 0),
            Change::Extend(length) if whole => disk.resize(disk.len().max(*length as usize), 0),
            _ => {}
        }
        for sector in touched {
            if is_durable || if loss == Loss::SomeSectors { survives() } else { whole } {
                let from = (sector * SECTOR) as usize;
                let to = cached.len().min(from + SECTOR as usize);
                let length = disk.len().max(to);
                disk.resize(length, 0);
                disk[from..to].copy_from_slice(&cached[from..to]);
            }
        }
    }
    disk
}

/// Applies a change; returns the sectors it touched.
fn apply(bytes: &mut Vec<u8>, change: &Change) -> Range<u64> {
    let (offset, length) = match change {
        Change::Write { offset, data, .. } => {
            let (from, to) = (*offset as usize, *offset as usize + data.len());
            bytes.resize(bytes.len().max(to), 0);
            bytes[from..to].copy_from_slice(data);
            (*offset, data.len() as u64)
        }
        Change::Zero { offset, length } => {
            let length = (bytes.len() as u64).saturating_sub(*offset).min(*length);
            bytes[*offset as usize..(*offset + length) as usize].fill(0);
            (*offset, length)
        }
        Change::SetLength(length) => {
            bytes.resize(*length as usize, 0);
            (0, 0)
        }
        Change::Extend(length) => {
            bytes.resize(bytes.len().max(*length as usize), 0);
            (0, 0)
        }
        Change::Sync => (0, 0),
    };
    match length {
        0 => 0..0,
        _ => offset / SECTOR..(offset + length).div_ceil(SECTOR),
    }
}

impl Storage for RecordingStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        let change = Change::Write { offset: offset.bytes(), data: data.into(), durability };
        self.change(change, || self.inner.write_at(offset, data, durability))
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Change::SetLength(length), || self.inner.set_len(length))
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        let extend = || self.inner.set_len(self.inner.len()?.max(length));
        self.change(Change::Extend(length), extend)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        let change = Change::Zero { offset: offset.bytes(), length };
        self.change(change, || self.inner.punch_hole(offset, length))
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Change::Sync, || Ok(()))
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.inner.try_read_at(offset, buffer)
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.inner.next_extent(offset, length)
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        self.inner.is_known_data(offset, length)
    }

    fn begin_write(&self, _: HostOffset, _: u64) -> Option<Box<dyn BegunWrite>> {
        Some(Box::new(Begun))
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(FileIdentity { device: 0, inode: self.number as u64 + 1 })
    }
}
