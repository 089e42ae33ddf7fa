//! Failed syncs, and the operations that have to report them.
//!
//! The kernel reports a failed write of a file once only, and may drop the data. So the sync of one
//! thread can receive the error for data of another thread, whose own sync then succeeds. Failures
//! are therefore counted: an operation that writes and syncs compares the count after its sync with
//! the count before its write, and the next flush of a caller reports failures that no flush has
//! reported.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use crate::error::{Error, Result};
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::write_map::SyncFailures;

const EIO: i32 = libc::EIO;

impl MetadataFile {
    /// The number of failed syncs so far.
    pub(in crate::qcow2) fn failed_syncs(&self) -> u64 {
        self.failed_syncs.load(Acquire)
    }

    /// Counts a sync, or a change of the header that ends with one, if it failed.
    pub(in crate::qcow2) fn count_failed<T>(&self, synced: Result<T>) -> Result<T> {
        if let Err(error) = &synced {
            self.note_failed(error.raw_os_error());
        }
        synced
    }

    fn note_failed(&self, code: Option<i32>) {
        self.failed_sync_code.store(code.unwrap_or(EIO), Release);
        self.failed_syncs.fetch_add(1, AcqRel);
    }

    /// Whether a sync has failed that no flush has reported.
    pub(in crate::qcow2) fn owes_report(&self) -> bool {
        self.reported_syncs.load(Acquire) < self.failed_syncs()
    }

    /// Fails if the number of failed syncs is no longer `since`: data written meanwhile may be
    /// lost, although the last sync succeeded.
    pub(in crate::qcow2) fn refuse_lost_since(&self, since: u64) -> Result<()> {
        if self.failed_syncs() == since {
            return Ok(());
        }
        Err(self.lost("what was written just now may be lost; try again"))
    }

    /// The result of a flush for its caller, which relies on it for everything written since the
    /// last successful flush.
    pub(in crate::qcow2) fn report_failed(&self, flushed: Result<()>) -> Result<()> {
        let failed = self.failed_syncs();
        let reported = self.reported_syncs.fetch_max(failed, AcqRel);
        if flushed.is_ok() && reported < failed {
            let detail = "what was written since the last flush that succeeded may be lost";
            return Err(self.lost(detail).for_writers());
        }
        flushed.map_err(Error::for_writers)
    }

    fn lost(&self, consequence: &str) -> Error {
        let code = self.failed_sync_code.load(Acquire);
        let error = Error::from_io("flush", std::io::Error::from_raw_os_error(code));
        let explanation = format!("a sync of another operation has failed, so {consequence}");
        self.named(error.explained(&explanation).of_sync())
    }
}

impl SyncFailures for MetadataFile {
    fn sync_has_failed(&self, error: &std::io::Error) {
        self.note_failed(error.raw_os_error());
    }
}
