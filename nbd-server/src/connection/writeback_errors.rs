//! Per-connection reporting of write-back errors, like the kernel's `errseq_t`.
//!
//! An operating system reports only once for each open file that a write failed, and may drop the
//! data. So a failed FLUSH consumes the error, and may lose the data, of every other client of the
//! same disk, whose own FLUSH succeeds a moment later. Therefore each connection receives the error
//! with its next FLUSH or FUA, if not earlier.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use nbd_proto::transmission::{Command, Durability, Request};
use nbd_proto::wire::Errno;

use crate::export::{DurabilityFailures, ExportError, OwnSync};

/// One connection's knowledge of write-back errors.
#[derive(Debug)]
pub(super) struct WritebackErrors {
    failures: DurabilityFailures,
    known: AtomicU64,
    /// Whether the client still has to be told of a failure in another server.
    is_owed: AtomicBool,
}

impl WritebackErrors {
    /// On a new connection nothing was written yet, so the `known` failures before it do not
    /// matter. On a connection that another server has begun, the client may still have to be told
    /// of one (`owes_failure`).
    pub(super) fn new(failures: DurabilityFailures, known: u64, owes_failure: bool) -> Self {
        let known = AtomicU64::new(known);
        Self { failures, known, is_owed: AtomicBool::new(owes_failure) }
    }

    /// The number of failed flushes of the disk so far, of all clients.
    pub(super) fn count(&self) -> u64 {
        self.failures.count()
    }

    /// Has successful flushes wait, until the returned value is dropped, for the call that makes a
    /// change durable, if `request` is one: the call may take their error. It is dropped after the
    /// result is judged.
    pub(super) fn begin_sync(&self, request: &Request) -> Option<OwnSync> {
        let is_change = request.command != Command::Flush;
        (is_change && promises_durability(&request.command)).then(|| self.failures.begin_sync())
    }

    /// The result for a durable change that a successful flush has covered. A flush that failed
    /// after the change began, when there were `since` failures, may have consumed the error of its
    /// data: the system reports an error once.
    pub(super) fn judge_change(&self, since: u64) -> Result<(), ExportError> {
        let count = self.failures.count();
        if self.known.load(Acquire) == count && count == since && !self.is_owed.load(Acquire) {
            return Ok(());
        }
        self.is_told(count);
        let why = "a FLUSH failed meanwhile; data written before may be lost";
        Err(ExportError::new(Errno::EIO, why))
    }

    /// Returns the error of a write to stable storage for its client. The error may be that of
    /// other clients' data, so they are told as well: lost data is reported as `ENOSPC`, too, where
    /// its place on the disk is chosen late.
    pub(super) fn has_lost(&self, error: ExportError) -> ExportError {
        self.is_told(self.failures.add());
        error
    }

    /// Whether the client still has to be told of a failure.
    pub(super) fn owes_failure(&self) -> bool {
        self.is_owed.load(Acquire) || self.known.load(Acquire) < self.failures.count()
    }

    /// Records that the client is told of the `count`th failure, and of all before it.
    pub(super) fn is_told(&self, count: u64) {
        self.is_owed.store(false, Release);
        self.known.fetch_max(count, AcqRel);
    }

    /// The result of a request for the client. It is unchanged for requests that do not promise
    /// durability.
    pub(super) fn judge(
        &self,
        request: &Request,
        result: Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        if !promises_durability(&request.command) {
            return result;
        }
        match &result {
            Err(error) if request.command == Command::Flush || error.errno == Errno::EIO => {
                self.is_told(self.failures.add());
                result
            }
            Err(_) => result,
            Ok(()) => {
                let count = self.failures.count();
                let was_owed = self.is_owed.swap(false, AcqRel);
                if self.known.fetch_max(count, AcqRel) == count && !was_owed {
                    return result;
                }
                let why = "a FLUSH of another client failed; data written before may be lost";
                Err(ExportError::new(Errno::EIO, why))
            }
        }
    }
}

fn promises_durability(command: &Command) -> bool {
    matches!(
        command,
        Command::Flush
            | Command::Write(Durability::Fua)
            | Command::Trim(Durability::Fua)
            | Command::WriteZeroes(_, _, Durability::Fua)
    )
}
