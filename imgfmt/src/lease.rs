//! Leases: what is being read or written in place is not given away meanwhile.
//!
//! Every lease belongs to a generation. When places in a file are freed, the generation that was
//! current until then is closed; once all leases of it and of older ones have ended, no thread can
//! still be moving bytes by a mapping that named those places. Each thread counts its own leases: taking one
//! touches no memory that other threads write.

use std::sync::Arc;
use std::sync::atomic::{Ordering::Acquire, fence};

use crate::ordered_lock::{OrderedMutex, rank};
use crate::per_thread::PerThread;

/// Proof that no place that was mapped while it lived is reused. Dropping it ends the lease.
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

/// Hands out leases.
#[derive(Debug)]
pub(crate) struct Leases {
    current: PerThread<OrderedMutex<{ rank::LEASES }, Arc<Generation>>>,
}

impl Leases {
    pub(crate) fn new() -> Self {
        Self { current: PerThread::new(OrderedMutex::default) }
    }

    /// Takes a lease. Only what is mapped afterwards is protected.
    pub(crate) fn take(&self) -> Lease {
        Lease { _generation: Arc::clone(&self.current.mine().lock()) }
    }

    /// Closes the current generation, after the mappings to what is freed have been removed: a thread
    /// whose part of it is closed sees that they are.
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
        // What was done under the leases was done before what follows.
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
