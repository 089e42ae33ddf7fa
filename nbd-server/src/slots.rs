//! A limit of the threads that do something at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Limits the number of threads of a server that do something at the same time, such as polling.
/// Clones share the limit.
#[derive(Debug, Clone)]
pub(crate) struct Slots(Arc<AtomicUsize>);

impl Slots {
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(count)))
    }

    pub(crate) fn take(&self) -> Option<Seat<'_>> {
        let less = |free: usize| free.checked_sub(1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok().map(|_| Seat(&self.0))
    }
}

/// A slot, which is returned on drop.
#[derive(Debug)]
pub(crate) struct Seat<'a>(&'a AtomicUsize);

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
