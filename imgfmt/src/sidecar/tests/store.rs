//! A store in memory that tracks durability and injects errors.

use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};

use super::*;
use crate::sidecar::file::write_all;

/// The bytes of a sidecar: as they are, and as a loss of power at this moment would leave them at
/// worst.
#[derive(Debug)]
pub(super) struct MemoryStore {
    words: Vec<AtomicU64>,
    durable: Mutex<Vec<u8>>,
    durable_writes: AtomicU32,
    syncs: AtomicU32,
    holds_writes: AtomicBool,
    fails_writes: AtomicBool,
    fails_syncs: AtomicBool,
    fails_remove: AtomicBool,
    is_removed: AtomicBool,
}

/// A sidecar with no bits set, and its store.
pub(super) fn sidecar(description: &Description) -> (Arc<Sidecar>, Arc<MemoryStore>) {
    let store = Arc::new(MemoryStore::new(new_bytes(description)));
    let boxed = Box::new(Arc::clone(&store));
    (Sidecar::new(boxed, description).unwrap(), store)
}

/// The bytes of a new sidecar without bits.
pub(super) fn new_bytes(description: &Description) -> Vec<u8> {
    let layout = Layout::of(description).unwrap();
    let mut bytes = vec![0; layout.length as usize];
    write_all(description, &layout, &|_, _| 0, &mut |offset, part| {
        bytes[offset as usize..][..part.len()].copy_from_slice(part);
        Ok(())
    })
    .unwrap();
    bytes
}

impl MemoryStore {
    fn new(bytes: Vec<u8>) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let words = words.iter().map(|word| AtomicU64::new(u64::from_le_bytes(*word).to_le()));
        Self {
            words: words.collect(),
            durable: Mutex::new(bytes),
            durable_writes: AtomicU32::new(0),
            syncs: AtomicU32::new(0),
            holds_writes: AtomicBool::new(false),
            fails_writes: AtomicBool::new(false),
            fails_syncs: AtomicBool::new(false),
            fails_remove: AtomicBool::new(false),
            is_removed: AtomicBool::new(false),
        }
    }

    pub(super) fn durable_writes(&self) -> u32 {
        self.durable_writes.load(SeqCst)
    }

    pub(super) fn syncs(&self) -> u32 {
        self.syncs.load(SeqCst)
    }

    pub(super) fn is_removed(&self) -> bool {
        self.is_removed.load(SeqCst)
    }

    /// Lets writes to the log begin and not end.
    pub(super) fn hold_writes(&self, holds: bool) {
        self.holds_writes.store(holds, SeqCst);
    }

    pub(super) fn fail_writes(&self, fails: bool) {
        self.fails_writes.store(fails, SeqCst);
    }

    pub(super) fn fail_syncs(&self, fails: bool) {
        self.fails_syncs.store(fails, SeqCst);
    }

    pub(super) fn fail_remove(&self, fails: bool) {
        self.fails_remove.store(fails, SeqCst);
    }

    /// Whether a loss of power now would leave every bit of a range recoverable.
    pub(super) fn covers(&self, description: &Description, start: u64, length: u64) -> bool {
        let durable = self.durable.lock().unwrap().clone();
        let recovery = recovery(durable, description, OTHER_BOOT).unwrap();
        description.bitmaps.iter().all(|bitmap| {
            let words = recovery.words(bitmap).unwrap().unwrap();
            let bits = bitmap.granularity_bits;
            (start >> bits..=(start + length - 1) >> bits)
                .all(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
        })
    }
}

impl SidecarStorage for Arc<MemoryStore> {
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    fn write_durable(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.fails_writes.load(SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        self.durable_writes.fetch_add(1, SeqCst);
        while self.holds_writes.load(SeqCst) {
            std::thread::yield_now();
        }
        self.durable.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.fails_syncs.load(SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        self.syncs.fetch_add(1, SeqCst);
        let mut durable = self.durable.lock().unwrap();
        let bits = layout::DESCRIPTORS_OFFSET as usize;
        for (bytes, word) in durable[bits..].chunks_exact_mut(8).zip(&self.words[bits / 8..]) {
            bytes.copy_from_slice(&u64::from_le(word.load(SeqCst)).to_le_bytes());
        }
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        if self.fails_remove.load(SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        self.is_removed.store(true, SeqCst);
        Ok(())
    }
}
