//! Options of a copy.

use std::num::NonZeroUsize;

use imgfmt::Locking;

use crate::checksum::{Checksum, ChecksumAlgorithm};
use crate::connect::ConnectOptions;
use crate::error::JobError;
use crate::target::Durable;

/// Most requests in flight.
const REQUESTS_MAX: usize = 4096;
/// Most connections to a server.
const CONNECTIONS_MAX: usize = 256;
/// Smallest request, and smallest unit of zero detection, in bytes.
const REQUEST_SIZE_MIN: u64 = 512;
/// Largest request, in bytes; larger ones would only need more memory.
const REQUEST_SIZE_MAX: u64 = 32 << 20;

/// The treatment of zero ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Zeroes {
    /// They become holes where the destination supports them.
    #[default]
    PunchHoles,
    /// They are written so that they occupy space, like data.
    Allocate,
    /// They are skipped: the destination already reads as zero.
    Skip,
}

/// Options of a copy.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CopyOptions {
    /// Connection options.
    pub connect: ConnectOptions,
    /// Requests in flight: 1 to 4096. By default 64.
    pub requests: NonZeroUsize,
    /// Size of a request in bytes: a power of two from 512 to 32 MiB. By default 256 KiB. Between
    /// files, at least 1 MiB is copied at a time, in the same memory.
    pub request_size: u64,
    /// The treatment of zero ranges.
    pub zeroes: Zeroes,
    /// Whether to ask the source for its holes. By default true.
    pub knowledge: Knowledge,
    /// Unit of zero detection in data, in bytes: a power of two of at least 512, or `None` to
    /// switch detection off. By default 4096.
    pub sparse: Option<u64>,
    /// Whether the copy is durable when the job is complete. By default false.
    pub durability: Durable,
    /// Locking of a file as the source.
    pub source_locking: Locking,
    /// Locking of a file as the destination.
    pub destination_locking: Locking,
    /// The checksum of what is copied, computed on the way. By default none.
    pub checksum: Option<ChecksumAlgorithm>,
    /// The checksum to which that must be equal; its algorithm is used.
    pub expected: Option<Checksum>,
}

/// The block status to request from a server or file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// None: all of the disk is read.
    Nothing,
    /// Zero ranges.
    Holes,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            connect: ConnectOptions::default(),
            requests: NonZeroUsize::new(64).unwrap_or(NonZeroUsize::MIN),
            request_size: 256 << 10,
            zeroes: Zeroes::default(),
            knowledge: Knowledge::Holes,
            sparse: Some(4096),
            durability: Durable::Later,
            source_locking: Locking::Auto,
            destination_locking: Locking::Auto,
            checksum: None,
            expected: None,
        }
    }
}

impl CopyOptions {
    /// Refuses options that are out of range.
    pub(super) fn check(&self) -> Result<(), JobError> {
        let in_range = REQUEST_SIZE_MIN..=REQUEST_SIZE_MAX;
        if !self.request_size.is_power_of_two() || !in_range.contains(&self.request_size) {
            return Err(JobError::invalid(format!(
                "requests of {} bytes are not possible; give a power of two from 512 to 32 MiB",
                self.request_size
            )));
        }
        if let Some(sparse) = self.sparse
            && !(sparse.is_power_of_two() && sparse >= REQUEST_SIZE_MIN)
        {
            return Err(JobError::invalid(format!(
                "zeroes cannot be detected in units of {sparse} bytes; give a power of two of at \
                 least 512"
            )));
        }
        check_concurrency(self.requests, &self.connect)
    }
}

/// Refuses too many requests or connections.
pub(crate) fn check_concurrency(
    requests: NonZeroUsize,
    connect: &ConnectOptions,
) -> Result<(), JobError> {
    match requests.get() > REQUESTS_MAX || connect.connections.get() > CONNECTIONS_MAX {
        true => Err(JobError::invalid(format!(
            "there can be {REQUESTS_MAX} requests in flight and {CONNECTIONS_MAX} connections to a \
             server at most; give smaller numbers"
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JobErrorKind;

    #[test]
    fn what_is_out_of_range_is_refused() {
        assert!(CopyOptions::default().check().is_ok());
        let changes: [fn(&mut CopyOptions); 6] = [
            |options| options.request_size = 0,
            |options| options.request_size = 3 << 20,
            |options| options.request_size = 64 << 20,
            |options| options.sparse = Some(4095),
            |options| options.requests = NonZeroUsize::MAX,
            |options| options.connect.connections = NonZeroUsize::MAX,
        ];
        for change in changes {
            let mut options = CopyOptions::default();
            change(&mut options);
            let error = options.check().unwrap_err();
            assert_eq!(error.kind(), JobErrorKind::InvalidArgument, "{error}");
        }
    }
}
