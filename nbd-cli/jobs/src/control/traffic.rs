//! The requests of clients, as the control socket reports them.

use serde::{Deserialize, Serialize};

/// The answered requests of an export or a client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Traffic {
    /// Answered requests of all commands, failed ones included.
    pub requests: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Bytes of READ requests that succeeded.
    pub bytes_read: u64,
    /// Bytes of WRITE requests that succeeded.
    pub bytes_written: u64,
    /// Bytes of TRIM and WRITE_ZEROES requests that succeeded.
    pub bytes_zeroed: u64,
    /// Requests that are not answered yet.
    pub in_flight: u64,
}

#[cfg(feature = "server")]
impl Traffic {
    pub(super) fn new(
        requests: &nbd_server::statistics::RequestStatistics,
        in_flight: u64,
    ) -> Self {
        use nbd_server::statistics::RequestKind::{Read, Trim, Write, WriteZeroes};
        Self {
            requests: requests.requests(),
            errors: requests.errors(),
            bytes_read: requests.get(Read).bytes,
            bytes_written: requests.get(Write).bytes,
            bytes_zeroed: requests.get(Trim).bytes.wrapping_add(requests.get(WriteZeroes).bytes),
            in_flight,
        }
    }
}
