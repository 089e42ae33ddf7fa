//! What the connections of a load have in common.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nbd_proto::NbdUri;

use super::ledger::Mismatch;
use super::recorder::Recorder;
use super::report::{BadBlock, VerifyReport};

/// How many bad blocks are told one by one.
const MAX_EXAMPLES: usize = 8;

/// What all connections know, and where they put their results.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) uri: NbdUri,
    /// How long a lost connection is tried to be made again.
    pub(super) reconnect: Duration,
    /// How long a request may take.
    pub(super) timeout: Option<Duration>,
    /// Whether requests are counted: not during the warm-up.
    pub(super) counts: AtomicBool,
    /// No request is made any more.
    pub(super) is_over: AtomicBool,
    /// Requests in flight are not waited for long either.
    pub(super) is_cancelled: AtomicBool,
    pub(super) reconnects: AtomicU64,
    totals: Mutex<Totals>,
    verified: Mutex<VerifyReport>,
    /// Random bytes: the data of writes that are not verified.
    pub(super) pool: Arc<[u8]>,
}

/// What was done until now.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) all: Recorder,
    /// Since this was last taken.
    pub(super) interval: Recorder,
}

impl Shared {
    pub(super) fn new(
        uri: NbdUri,
        reconnect: Duration,
        timeout: Option<Duration>,
        pool: Arc<[u8]>,
    ) -> Self {
        Self {
            uri,
            reconnect,
            timeout,
            counts: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            is_cancelled: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            totals: Mutex::default(),
            verified: Mutex::default(),
            pool,
        }
    }

    /// What was done.
    pub(super) fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was verified.
    pub(super) fn verified(&self) -> MutexGuard<'_, VerifyReport> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no request is to be made any more.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed) || self.is_cancelled()
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    /// Counts a block that is not as it has to be.
    pub(super) fn add_mismatch(&self, mismatch: Mismatch) {
        let mut verified = self.verified();
        verified.bad_blocks += 1;
        if verified.examples.len() < MAX_EXAMPLES {
            let Mismatch { offset, what } = mismatch;
            verified.examples.push(BadBlock { offset, found: what });
        }
    }
}
