//! Leases: what is being read or written in place is not given away meanwhile.
//!
//! Every lease belongs to a generation. When clusters are freed, the generation that was current
//! until then is closed; once all leases of it and of older ones have ended, nobody can still be
//! moving bytes by a mapping that named those clusters.

use std::sync::Arc;

use crate::mapping::LeaseGuard;
use crate::ordered_lock::{OrderedRwLock, rank};

/// Proof that no cluster that was mapped while it lived is reused. Dropping it ends the lease.
#[derive(Debug)]
pub(crate) struct ClusterLease {
    _generation: Arc<Generation>,
}

#[derive(Debug)]
struct Generation;

/// A closed generation: waits for its leases.
#[derive(Debug)]
pub(crate) struct ClosedGeneration(Arc<Generation>);

/// Hands out leases.
#[derive(Debug)]
pub(crate) struct Leases {
    current: OrderedRwLock<{ rank::LEASES }, Arc<Generation>>,
}

impl Leases {
    pub(crate) fn new() -> Self {
        Self { current: OrderedRwLock::new(Arc::new(Generation)) }
    }

    /// Takes a lease. Only what is mapped afterwards is protected.
    pub(crate) fn take(&self) -> ClusterLease {
        let current = self.current.read();
        ClusterLease { _generation: Arc::clone(&current) }
    }

    /// Closes the current generation, after the mappings to what is freed have been removed.
    pub(crate) fn close_generation(&self) -> ClosedGeneration {
        let mut current = self.current.write();
        ClosedGeneration(std::mem::replace(&mut current, Arc::new(Generation)))
    }
}

impl ClosedGeneration {
    /// Whether all leases of this generation have ended. Nobody can take new ones.
    pub(crate) fn has_ended(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl LeaseGuard for ClusterLease {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_ends_with_its_last_lease_and_not_before() {
        let leases = Leases::new();
        let (one, two) = (leases.take(), leases.take());
        let closed = leases.close_generation();
        let later = leases.take();
        assert!(!closed.has_ended());
        drop((one, later));
        assert!(!closed.has_ended());
        drop(two);
        assert!(closed.has_ended());
    }
}
