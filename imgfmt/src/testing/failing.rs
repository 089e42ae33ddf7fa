//! A storage that injects errors and delays.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{Begun, SECTOR, lock};
use crate::storage::{
    BegunWrite, Capabilities, Durability, FileIdentity, Storage, StorageExtent, TryRead,
};
use crate::units::HostOffset;

/// The system's error code for a failed medium.
const EIO: i32 = 5;

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
    /// `extend`.
    Extend,
    /// `sync`.
    Sync,
}

/// The numbers of the calls that fail, and their system error code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Numbers of calls, as [`FailingStorage::calls`] counts them; `n..n + 1` fails once,
    /// `n..u64::MAX` from then on.
    pub calls: Range<u64>,
    /// The system's error code, such as that of `EIO`.
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

/// The bytes at the last successful sync, and the number of syncs that will still succeed.
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

    /// Fails if the sync is to fail; the data that it would have made durable is lost then.
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
        // A lost sync does not affect the length.
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

    fn extend(&self, length: u64) -> io::Result<()> {
        self.call(Call::Extend, length, 1)?;
        self.inner.extend(length)
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

    fn begin_write(&self, _: HostOffset, _: u64) -> Option<Box<dyn BegunWrite>> {
        Some(Box::new(Begun))
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.inner.identity()
    }
}
