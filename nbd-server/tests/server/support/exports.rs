//! An export that does as it is told.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName, TransmissionFlags};
use nbd_server::export::{
    Durability, Export, ExportError, ExportInfo, FastExport, Holes, MayBlock, MemoryExport,
    Operation, Speed, TryRead, TryWrite, ZeroMode,
};

/// What is wrong with a [`Scripted`] disk, and where. Ranges are in bytes.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Cannot be read or written.
    pub bad: Option<Range<u64>>,
    /// Takes the server down with it.
    pub panics: Option<Range<u64>>,
    /// Waits until the gate is opened.
    pub gated: Option<Range<u64>>,
    /// Flags the disk does not have.
    pub without: Option<TransmissionFlags>,
    /// Further contexts; their status is one extent whose flags are the context's place here plus
    /// 100.
    pub contexts: Vec<MetaContextName>,
    /// Can be written without waiting even if calls may block in general.
    pub quick: Option<Range<u64>>,
    /// Cannot be zeroed fast.
    pub slow_zeroes: Option<Range<u64>>,
    /// Flushes wait until the gate is opened.
    pub flushes_at_gate: bool,
    /// Flushes take the server down.
    pub flushes_panic: bool,
    /// Every change is durable when it returns.
    pub is_writethrough: bool,
    /// Whether calls are made where the server stands. Off by default.
    pub prompt: Option<MayBlock>,
}

/// Something to wait at.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    waiting: AtomicUsize,
}

#[derive(Debug, Default)]
struct GateState {
    is_open: bool,
    /// Calls that may pass although it is not.
    admitted: usize,
}

impl Gate {
    pub fn open(&self) {
        self.state.lock().unwrap().is_open = true;
        self.changed.notify_all();
    }

    /// Lets one call through.
    pub fn pass_one(&self) {
        self.state.lock().unwrap().admitted += 1;
        self.changed.notify_all();
    }

    /// Calls that have come to the gate so far.
    pub fn arrived(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let state = self.state.lock().unwrap();
        let closed = |state: &mut GateState| !state.is_open && state.admitted == 0;
        let mut state = self.changed.wait_while(state, closed).unwrap();
        state.admitted = state.admitted.saturating_sub(1);
    }
}

/// A disk in memory with a [`Script`], which counts the calls.
#[derive(Debug)]
pub struct Scripted {
    pub disk: MemoryExport,
    pub script: Script,
    pub gate: Gate,
    pub reads: AtomicUsize,
    /// Bytes that calls of `read_at` were to read.
    pub bytes_read: AtomicUsize,
    pub writes: AtomicUsize,
    pub quick_writes: AtomicUsize,
    /// TRIM and WRITE_ZEROES that were carried out.
    pub discards: AtomicUsize,
    pub durable_writes: AtomicUsize,
    pub flushes: AtomicUsize,
    /// How many of the next flushes fail.
    pub bad_flushes: AtomicUsize,
    /// How many succeed before those.
    pub good_flushes_first: AtomicUsize,
    pub cached: AtomicUsize,
}

impl Scripted {
    pub fn new(size: u64, script: Script) -> Arc<Self> {
        Arc::new(Self {
            disk: MemoryExport::new(size),
            script,
            gate: Gate::default(),
            reads: AtomicUsize::new(0),
            bytes_read: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            quick_writes: AtomicUsize::new(0),
            discards: AtomicUsize::new(0),
            durable_writes: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
            bad_flushes: AtomicUsize::new(0),
            good_flushes_first: AtomicUsize::new(0),
            cached: AtomicUsize::new(0),
        })
    }

    fn act(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        let touches = |range: &Option<Range<u64>>| {
            range.as_ref().is_some_and(|range| offset < range.end && range.start < offset + length)
        };
        if touches(&self.script.gated) {
            self.gate.pass();
        }
        assert!(!touches(&self.script.panics), "the script says so");
        if touches(&self.script.bad) {
            return Err(ExportError::new(Errno::EIO, "a bad sector"));
        }
        Ok(())
    }

    fn is_prompt(&self) -> bool {
        self.script.prompt == Some(MayBlock::No)
    }
}

fn count(counter: &AtomicUsize) {
    counter.fetch_add(1, Ordering::SeqCst);
}

impl Export for Scripted {
    fn info(&self) -> ExportInfo {
        let mut info = self.disk.info();
        info.flags -= self.script.without.unwrap_or(TransmissionFlags::empty());
        info.meta_contexts.extend_from_slice(&self.script.contexts);
        info
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        count(&self.reads);
        self.bytes_read.fetch_add(buffer.len(), Ordering::SeqCst);
        self.act(offset, buffer.len() as u64)?;
        self.disk.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8], durable: Durability) -> Result<(), ExportError> {
        count(&self.writes);
        self.act(offset, data.len() as u64)?;
        if durable == Durability::Fua {
            count(&self.durable_writes);
        }
        self.disk.write_at(offset, data, durable)
    }

    fn flush(&self) -> Result<(), ExportError> {
        count(&self.flushes);
        assert!(!self.script.flushes_panic, "the script says so");
        if self.script.flushes_at_gate {
            self.gate.pass();
        }
        let left = |count: usize| count.checked_sub(1);
        let good = &self.good_flushes_first;
        if good.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok() {
            return Ok(());
        }
        match self.bad_flushes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left) {
            Ok(_) => Err(ExportError::new(Errno::ENOSPC, "no room for what was written")),
            Err(_) => Ok(()),
        }
    }

    fn trim(&self, offset: u64, length: u64, durable: Durability) -> Result<(), ExportError> {
        self.act(offset, length)?;
        if durable == Durability::Fua {
            count(&self.durable_writes);
        }
        self.disk.trim(offset, length, durable)?;
        count(&self.discards);
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durable: Durability,
    ) -> Result<(), ExportError> {
        self.act(offset, length)?;
        let slow = self.script.slow_zeroes.as_ref();
        let is_slow = slow.is_some_and(|slow| offset < slow.end && slow.start < offset + length);
        if speed == Speed::FastOnly && (is_slow || mode == ZeroMode::KeepAllocated) {
            return Err(ExportError::new(Errno::ENOTSUP, "not fast"));
        }
        if durable == Durability::Fua {
            count(&self.durable_writes);
        }
        self.disk.write_zeroes(offset, length, mode, speed, durable)?;
        count(&self.discards);
        Ok(())
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        count(&self.cached);
        self.act(offset, length)
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        self.act(offset, length)?;
        match self.script.contexts.iter().position(|known| known == context) {
            Some(place) => Ok(vec![BlockDescriptor { length, flags: 100 + place as u64 }]),
            None => self.disk.block_status(context, offset, length, max_count),
        }
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for Scripted {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        _: Holes,
    ) -> Result<TryRead, ExportError> {
        if !self.is_prompt() {
            return Ok(TryRead::WouldBlock);
        }
        self.read_at(offset, buffer).map(|()| TryRead::Complete)
    }

    fn is_writethrough(&self) -> bool {
        self.script.is_writethrough
    }

    fn may_block(&self, _: Operation) -> MayBlock {
        self.script.prompt.unwrap_or(MayBlock::Yes)
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        let end = offset + data.len() as u64;
        let quick = self.script.quick.as_ref();
        if !quick.is_some_and(|range| range.start <= offset && end <= range.end) {
            return Ok(TryWrite::WouldBlock);
        }
        count(&self.quick_writes);
        self.act(offset, data.len() as u64)?;
        self.disk.write_at(offset, data, Durability::Cached).map(|()| TryWrite::Complete)
    }
}
