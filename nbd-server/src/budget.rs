//! Memory for large requests, shared by all connections and taken before it is allocated.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests below this size are covered by what every connection holds anyway, in bytes.
pub(crate) const FREE_LEN: usize = 64 * 1024;

const UNIT: usize = 4096;

/// The bytes all connections together may hold in large requests.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    total: u32,
}

/// A part of the budget. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _permit: Option<OwnedSemaphorePermit>,
}

type Waiting = Pin<Box<dyn Future<Output = Permit> + Send>>;

/// One connection's access to the budget: at most one request waits at a time.
pub(crate) struct BudgetQueue {
    budget: Budget,
    waiting: Option<Waiting>,
}

impl Budget {
    /// A budget of `bytes`.
    pub(crate) fn new(bytes: usize) -> Self {
        let total = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).max(1);
        let total = total.min(u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self { units: Arc::new(Semaphore::new(total as usize)), total }
    }
}

impl BudgetQueue {
    pub(crate) const fn new(budget: Budget) -> Self {
        Self { budget, waiting: None }
    }

    /// Takes `length` bytes, or waits for them. A request larger than the whole budget gets all of
    /// it rather than never being served. Call with the same length until it is ready.
    pub(crate) fn poll_take(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<Permit> {
        if length <= FREE_LEN {
            return Poll::Ready(Permit { _permit: None });
        }
        if self.waiting.is_none() {
            let units = u32::try_from(length.div_ceil(UNIT)).unwrap_or(u32::MAX);
            let units = units.min(self.budget.total);
            let semaphore = Arc::clone(&self.budget.units);
            if let Ok(permit) = Arc::clone(&semaphore).try_acquire_many_owned(units) {
                return Poll::Ready(Permit { _permit: Some(permit) });
            }
            self.waiting = Some(Box::pin(async move {
                // The semaphore is never closed.
                Permit { _permit: semaphore.acquire_many_owned(units).await.ok() }
            }));
        }
        let Some(waiting) = &mut self.waiting else { return Poll::Pending };
        let permit = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(permit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn a_request_waits_until_another_gives_its_part_back() {
        let budget = Budget::new(1 << 20);
        let mut first = BudgetQueue::new(budget.clone());
        let mut second = BudgetQueue::new(budget);
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(permit) = first.poll_take(&mut cx, 1 << 20) else {
            panic!("the budget is free")
        };
        assert!(second.poll_take(&mut cx, 1 << 19).is_pending());
        assert!(first.poll_take(&mut cx, 100).is_ready(), "small requests never wait");
        drop(permit);
        assert!(second.poll_take(&mut cx, 1 << 19).is_ready());
    }

    #[test]
    fn a_request_larger_than_the_budget_is_served_alone() {
        let mut queue = BudgetQueue::new(Budget::new(1 << 20));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(queue.poll_take(&mut cx, 32 << 20).is_ready());
    }
}
