//! The common state of the connections of a load.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nbd_proto::NbdUri;

use super::recorder::Recorder;
use super::report::{BadBlock, VerifyReport};
use super::verdict::Mismatch;

/// Number of bad blocks that are reported one by one.
const MAX_EXAMPLES: usize = 8;

/// The parameters and the results of all connections.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) uri: NbdUri,
    /// Time limit for restoring a lost connection.
    pub(super) reconnect: Duration,
    /// Time limit of a request.
    pub(super) timeout: Option<Duration>,
    /// Whether requests are counted: not during the warm-up.
    pub(super) counts: AtomicBool,
    /// No more requests are made.
    pub(super) is_over: AtomicBool,
    /// Requests in flight are waited for briefly only.
    pub(super) is_cancelled: AtomicBool,
    pub(super) reconnects: AtomicU64,
    totals: Mutex<Totals>,
    verified: Mutex<VerifyReport>,
    /// Random bytes: the data of writes that are not verified.
    pub(super) pool: Arc<[u8]>,
}

/// The progress so far.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) all: Recorder,
    /// Since it was last taken.
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

    /// The counts.
    pub(super) fn totals(&self) -> MutexGuard<'_, Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The result of the verification.
    pub(super) fn verified(&self) -> MutexGuard<'_, VerifyReport> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether no more requests may be made.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed) || self.is_cancelled()
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    /// Counts a block with other contents than expected.
    pub(super) fn add_mismatch(&self, mismatch: Mismatch) {
        let mut verified = self.verified();
        verified.bad_blocks += 1;
        if verified.examples.len() < MAX_EXAMPLES {
            let Mismatch { offset, what } = mismatch;
            verified.examples.push(BadBlock { offset, found: what });
        }
    }
}
