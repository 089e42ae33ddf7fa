//! Mappings: the location of a disk's bytes, for callers that move the bytes themselves.

use std::sync::Arc;

use crate::lease;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset};

/// What a map or a read makes of parts of which metadata knows that they read as zero: those that
/// no layer has, zero clusters, and holes of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// They are told apart from data.
    Told,
    /// They need not be: holes of files are bytes like any other.
    AsData,
}

/// Whether a map may read metadata from a file, or ask the system for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// It may, and so may have to wait.
    MayRead,
    /// It uses what is in memory.
    CachedOnly,
}

/// Where a part of a disk is stored.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Mapping {
    /// The bytes lie in one piece in a storage, most often a file whose descriptor
    /// [`Storage::as_fd`] gives.
    File {
        /// Which part of the disk this is; never empty.
        range: GuestRange,
        /// The storage that holds it.
        storage: Arc<dyn Storage>,
        /// Where in the storage it starts.
        offset: HostOffset,
    },
    /// The part reads as zero.
    Zero {
        /// Which part of the disk this is; never empty.
        range: GuestRange,
    },
    /// The part is stored in another form: read it with [`Image::read_at`](crate::Image::read_at).
    Encoded {
        /// Which part of the disk this is; never empty.
        range: GuestRange,
    },
}

impl Mapping {
    /// Which part of the disk this is.
    pub fn range(&self) -> GuestRange {
        match self {
            Self::File { range, .. } | Self::Zero { range } | Self::Encoded { range } => *range,
        }
    }
}

/// The mappings of a range and the promise that they stay true.
///
/// While a lease lives, the places its mappings name are not given to other parts of the disk.
/// Writes to the range itself still show. Keep it until the bytes have been moved, also out of a
/// socket's queue if they were sent without a copy, and drop it soon after.
#[derive(Debug)]
pub struct Lease {
    mappings: Vec<Mapping>,
    guard: Option<lease::Lease>,
}

impl Lease {
    /// A lease for an image whose places never move.
    pub(crate) fn fixed(mappings: Vec<Mapping>) -> Self {
        Self { mappings, guard: None }
    }

    /// A lease whose end somebody waits for.
    pub(crate) fn guarded(mappings: Vec<Mapping>, guard: lease::Lease) -> Self {
        Self { mappings, guard: Some(guard) }
    }

    /// The mappings in order of their offsets; together they cover the range that was asked for.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The mappings hold the files open; let them go before the places are given away.
        self.mappings.clear();
        self.guard = None;
    }
}
