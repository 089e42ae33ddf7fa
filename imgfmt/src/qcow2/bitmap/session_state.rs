//! The state of the session, in which bitmaps survive a crash.

use std::sync::Arc;

use crate::access::BitmapDurability;
use crate::sidecar::{FoundBytes, Identity, Recovery, RecoveryPrecision, Rejection, Sidecar};

/// The state of the session.
#[derive(Debug, Default)]
pub(super) struct Session {
    pub(super) durability: BitmapDurability,
    pub(super) identity: Option<Identity>,
    /// The generation of the session that was found in the header.
    pub(super) found_generation: u64,
    pub(super) epoch: u64,
    pub(super) sidecar: Option<Arc<Sidecar>>,
    /// The reason for a lower durability than requested, as a clause.
    pub(super) degraded: Option<String>,
    pub(super) recovered: Vec<String>,
    pub(super) precision: RecoveryPrecision,
    /// Whether recovered bits are in memory only: the header and the sidecar are as they were
    /// found.
    pub(super) is_recovery_unfinished: bool,
}

/// A sidecar that was found and is trusted, or the reason why it is not.
pub(in crate::qcow2) type Found = Result<Recovery<Box<dyn FoundBytes>>, Rejection>;

impl Session {
    pub(super) fn new(durability: BitmapDurability) -> Self {
        Self { durability, ..Self::default() }
    }
}
