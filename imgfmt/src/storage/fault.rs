//! Storages for tests: one records the states that a crash could leave, the other injects errors
//! and delays.
//!
//! Built only with the feature `test-util`.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use super::{
    Capabilities, Durability, FileIdentity, MemoryStorage, Storage, StorageExtent, TryRead,
};
use crate::units::HostOffset;

pub use crate::sidecar::RecordedDirectory;

/// What a disk writes at once or not at all, in bytes.
pub const SECTOR: u64 = 512;

/// The system's code for a medium that failed.
const EIO: i32 = 5;

/// The recorded operations of several storages, in one order: an image and its data file crash at
/// the same instant.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    log: Arc<Mutex<Log>>,
    storages: Arc<Mutex<usize>>,
}

#[derive(Debug, Default)]
struct Log {
    changes: Vec<(usize, Change)>,
    /// What is stored there belongs to the page cache at once, as changes of a storage.
    mapped: Vec<Weak<MappedWords>>,
}

/// A storage as it looks mapped into memory.
#[derive(Debug)]
pub(crate) struct MappedWords {
    words: Vec<AtomicU64>,
    /// What the recording knows of it.
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
    Sync,
}

/// The unsynced changes that a crash takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// None: the process was killed, and the page cache survives.
    Nothing,
    /// All of them.
    Everything,
    /// Each change as a whole or not at all; earlier ones may be lost and later ones kept.
    SomeChanges,
    /// Each sector of each change, so that changes may be torn.
    SomeSectors,
}

impl Loss {
    /// All variants.
    pub const ALL: [Self; 4] =
        [Self::Nothing, Self::Everything, Self::SomeChanges, Self::SomeSectors];
}

impl Recording {
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
            recording: self.clone(),
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
    recording: Recording,
}

impl RecordingStorage {
    /// Returns the bytes found after a crash that came after `position` changes of the recording.
    /// `below` returns a random number below its argument.
    ///
    /// As with a page cache, each sector is in one of its states since the last sync: a later write
    /// of a sector is never lost in favour of an earlier one that was lost, too.
    pub fn after_crash(
        &self,
        position: usize,
        loss: Loss,
        below: &mut dyn FnMut(u64) -> u64,
    ) -> Vec<u8> {
        let log = lock(&self.recording.log);
        let own = log.changes[..position].iter().filter(|(number, _)| *number == self.number);
        let changes: Vec<&Change> = own.map(|(_, change)| change).collect();
        drop_after(&self.start, &changes, loss, below)
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
        let mut log = lock(&self.recording.log);
        let Log { changes, mapped } = &mut *log;
        mapped.retain(|mapped| mapped.strong_count() > 0);
        for mapped in mapped.iter().filter_map(Weak::upgrade) {
            mapped.capture(changes)?;
        }
        apply()?;
        changes.push((self.number, change));
        Ok(())
    }

    /// Maps the storage, which must not be written in any other way from now on to places that are
    /// stored to. Whatever was stored before a change of any storage of the recording is in the
    /// recording before it.
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
        lock(&self.recording.log).mapped.push(Arc::downgrade(&mapped));
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
    // Now and then nearly everything survives, and now and then nearly nothing.
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
        if let (Change::SetLength(length), true) = (change, whole) {
            disk.resize(*length as usize, 0);
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

    fn identity(&self) -> Option<FileIdentity> {
        Some(FileIdentity { device: 0, inode: self.number as u64 + 1 })
    }
}

/// A kind of call of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `read_at` and `try_read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `punch_hole`.
    PunchHole,
    /// `set_len`.
    SetLength,
    /// `sync`.
    Sync,
}

/// The calls to fail: those whose number is in `calls`, with a system error code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Numbers of calls, as [`FailingStorage::calls`] counts them; `n..n + 1` fails once,
    /// `n..u64::MAX` from then on.
    pub calls: Range<u64>,
    /// For example `EIO`.
    pub code: i32,
}

/// Forwards everything to another storage, except for calls that are set to fail or to wait.
///
/// A failed write has written half of its sectors.
#[derive(Debug)]
pub struct FailingStorage {
    inner: Arc<dyn Storage>,
    state: Mutex<FaultState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct FaultState {
    calls: u64,
    failed: u64,
    fault: Option<Fault>,
    hold: Option<(Call, Range<u64>)>,
    held: usize,
    loss_at_sync: Option<LossAtSync>,
}

/// The bytes of the last sync that succeeded, and how many more will.
#[derive(Debug)]
struct LossAtSync {
    durable: Vec<u8>,
    syncs_left: u64,
}

impl FailingStorage {
    /// Creates a storage that does not fail yet.
    pub fn new(inner: Arc<dyn Storage>) -> Arc<Self> {
        Arc::new(Self { inner, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Sets the calls to fail from now on; `None` clears that.
    pub fn set_fault(&self, fault: Option<Fault>) {
        lock(&self.state).fault = fault;
    }

    /// From now on `syncs` syncs succeed; the next one fails with `EIO`, and all unsynced data is
    /// lost at once, as when a kernel drops dirty pages that it could not write. The length is
    /// kept. The remaining data is durable, and afterwards nothing fails.
    ///
    /// # Errors
    ///
    /// Those of reading the inner storage.
    pub fn lose_at_sync(&self, syncs: u64) -> io::Result<()> {
        let durable = self.all_bytes()?;
        lock(&self.state).loss_at_sync = Some(LossAtSync { durable, syncs_left: syncs });
        Ok(())
    }

    fn all_bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.inner.len()?).unwrap_or(0)];
        self.inner.read_exact_at(HostOffset::new(0), &mut bytes)?;
        Ok(bytes)
    }

    /// Whether a sync may go on; if not, what it would have made durable is gone.
    fn lose_or_keep(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        let Some(loss) = &mut state.loss_at_sync else { return Ok(()) };
        let now = self.all_bytes()?;
        if loss.syncs_left > 0 {
            loss.syncs_left -= 1;
            loss.durable = now;
            return Ok(());
        }
        let mut durable = std::mem::take(&mut loss.durable);
        state.loss_at_sync = None;
        state.failed += 1;
        // The length is kept in another way than the pages.
        durable.resize(now.len(), 0);
        for (index, sector) in durable.chunks(SECTOR as usize).enumerate() {
            let start = index * SECTOR as usize;
            if now.get(start..start + sector.len()) != Some(sector) {
                self.inner.write_at(HostOffset::new(start as u64), sector, Durability::Cached)?;
            }
        }
        Err(io::Error::from_raw_os_error(EIO))
    }

    /// Returns the number of calls made.
    pub fn calls(&self) -> u64 {
        lock(&self.state).calls
    }

    /// Returns the number of failed calls.
    pub fn failed(&self) -> u64 {
        lock(&self.state).failed
    }

    /// Makes calls of a kind that touch a byte range of the storage wait until
    /// [`release`](Self::release). Syncs touch every range.
    pub fn hold(&self, call: Call, range: Range<u64>) {
        lock(&self.state).hold = Some((call, range));
    }

    /// Returns the number of waiting calls.
    pub fn held(&self) -> usize {
        lock(&self.state).held
    }

    /// Releases all waiting calls, and holds no more.
    pub fn release(&self) {
        lock(&self.state).hold = None;
        self.changed.notify_all();
    }

    /// Counts a call; waits if it is to be held, and fails if it is to fail.
    fn call(&self, call: Call, offset: u64, length: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        let number = state.calls;
        state.calls += 1;
        let end = offset.saturating_add(length);
        let is_held = |state: &FaultState| {
            state.hold.as_ref().is_some_and(|(kind, range)| {
                *kind == call && (call == Call::Sync || offset < range.end && range.start < end)
            })
        };
        if is_held(&state) {
            state.held += 1;
            while is_held(&state) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.held -= 1;
        }
        match &state.fault {
            Some(fault) if fault.calls.contains(&number) => {
                let code = fault.code;
                state.failed += 1;
                Err(io::Error::from_raw_os_error(code))
            }
            _ => Ok(()),
        }
    }
}

impl Storage for FailingStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.call(Call::Read, offset.bytes(), buffer.len() as u64)?;
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        let (start, length) = (offset.bytes(), data.len() as u64);
        let result = self.call(Call::Write, start, length);
        if result.is_err() {
            let middle = (start + length / 2) / SECTOR * SECTOR;
            let part = middle.saturating_sub(start) as usize;
            if part > 0 {
                self.inner.write_at(offset, &data[..part], Durability::Cached)?;
            }
            return result;
        }
        self.inner.write_at(offset, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.call(Call::SetLength, length, 1)?;
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.call(Call::PunchHole, offset.bytes(), length)?;
        self.inner.punch_hole(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.call(Call::Sync, 0, u64::MAX)?;
        self.lose_or_keep()?;
        self.inner.sync()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.call(Call::Read, offset.bytes(), buffer.len() as u64)?;
        self.inner.try_read_at(offset, buffer)
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.inner.next_extent(offset, length)
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        self.inner.is_known_data(offset, length)
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.inner.identity()
    }
}

// A thread that panicked while it held a lock has already failed the test.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
