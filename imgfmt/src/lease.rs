//! Leases: clusters that are being read or written in place are not reused meanwhile.
//!
//! Every lease belongs to a generation. When places in a file are freed, the current generation is
//! closed. Once all leases of it and of older ones have ended, no thread can still transfer bytes
//! by a mapping to those places. Each thread counts its own leases: taking one touches no memory
//! that other threads write.

use std::sync::Arc;
use std::sync::atomic::{Ordering::Acquire, fence};

use crate::ordered_lock::{OrderedMutex, rank};
use crate::per_thread::PerThread;

/// While this lives, places that are mapped are not reused. Dropping it ends the lease.
#[derive(Debug)]
pub(crate) struct Lease {
    _generation: Arc<Generation>,
}

/// The leases of one thread; its count shares no cache line with another's.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Generation;

/// A closed generation: waits for its leases.
#[derive(Debug)]
pub(crate) struct ClosedGeneration(Vec<Arc<Generation>>);

/// Issues leases.
#[derive(Debug)]
pub(crate) struct Leases {
    current: PerThread<OrderedMutex<{ rank::LEASES }, Arc<Generation>>>,
}

impl Leases {
    pub(crate) fn new() -> Self {
        Self { current: PerThread::new(OrderedMutex::default) }
    }

    /// Takes a lease. It protects only what is mapped afterwards.
    pub(crate) fn take(&self) -> Lease {
        Lease { _generation: Arc::clone(&self.current.mine().lock()) }
    }

    /// Closes the current generation, after the mappings to the freed places have been removed: a
    /// thread that takes a lease of the next one sees that.
    pub(crate) fn close_generation(&self) -> ClosedGeneration {
        ClosedGeneration(
            self.current.all().map(|current| std::mem::take(&mut *current.lock())).collect(),
        )
    }
}

impl ClosedGeneration {
    /// Whether all leases of this generation have ended. New ones belong to a later one.
    pub(crate) fn has_ended(&self) -> bool {
        let has_ended = self.0.iter().all(|generation| Arc::strong_count(generation) == 1);
        // Orders everything done under the leases before what follows.
        fence(Acquire);
        has_ended
    }
}

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

    #[test]
    fn a_generation_waits_for_the_leases_of_all_threads() {
        let leases = Leases::new();
        let held: Vec<Lease> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..9).map(|_| scope.spawn(|| leases.take())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let closed = leases.close_generation();
        for lease in held {
            assert!(!closed.has_ended());
            drop(lease);
        }
        assert!(closed.has_ended());
    }
}
