//! The memory budget for large requests, shared by all connections and reserved before allocation.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests below this size, in bytes, are covered by the buffers that every connection has.
pub(crate) const FREE_LEN: usize = 64 * 1024;

/// Longest request, in bytes, that a connection may have beyond an exhausted budget, one at a time.
/// So clients that hold the budget and stall cannot stop clients with smaller requests.
const RESERVE_LEN: usize = 1 << 20;

const UNIT: usize = 4096;

/// The limit of the bytes of large requests of all connections together.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    total: u32,
}

/// A part of the budget, which is returned on drop.
#[derive(Debug)]
pub(crate) struct Permit {
    part: Held,
}

/// The kind of permit. The fields exist for their drops.
#[derive(Debug)]
enum Held {
    /// A small request, which needs no budget.
    Nothing,
    Units {
        units: OwnedSemaphorePermit,
    },
    Reserve {
        _reserve: Reserved,
    },
}

/// The reserve of a connection, for when the budget is exhausted.
#[derive(Debug, Default)]
struct Reserve {
    state: Mutex<ReserveState>,
}

#[derive(Debug, Default)]
struct ReserveState {
    is_taken: bool,
    /// The task of the connection, if it waits.
    waker: Option<Waker>,
}

/// The taken reserve of a connection, which is returned on drop.
#[derive(Debug)]
struct Reserved {
    reserve: Arc<Reserve>,
}

type Waiting = Pin<Box<dyn Future<Output = Permit> + Send>>;

/// One connection's access to the budget: at most one request waits at a time.
pub(crate) struct BudgetQueue {
    budget: Budget,
    waiting: Option<Waiting>,
    reserve: Arc<Reserve>,
}

impl Budget {
    /// A budget of `bytes`.
    pub(crate) fn new(bytes: usize) -> Self {
        let total = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).max(1);
        let total = total.min(u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self { units: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Takes `length` bytes if they are free now.
    pub(crate) fn try_take(&self, length: usize) -> Option<Permit> {
        let units = u32::try_from(length.div_ceil(UNIT)).ok()?;
        let units = Arc::clone(&self.units).try_acquire_many_owned(units).ok()?;
        Some(Permit { part: Held::Units { units } })
    }

    /// The bytes taken.
    pub(crate) fn taken(&self) -> u64 {
        let taken = (self.total as usize).saturating_sub(self.units.available_permits());
        (taken as u64).saturating_mul(UNIT as u64)
    }

    /// Whether most of it is taken.
    pub(crate) fn is_scarce(&self) -> bool {
        self.units.available_permits() < self.total as usize / 4
    }
}

impl Permit {
    /// A permit for a request that needs no budget.
    pub(crate) const fn nothing() -> Self {
        Self { part: Held::Nothing }
    }

    /// Returns the part beyond `length` bytes.
    pub(crate) fn shrink(&mut self, length: usize) {
        if let Held::Units { units } = &mut self.part {
            let excess = units.num_permits().saturating_sub(length.div_ceil(UNIT));
            drop(units.split(excess));
        }
    }
}

impl BudgetQueue {
    pub(crate) fn new(budget: Budget) -> Self {
        Self { budget, waiting: None, reserve: Arc::default() }
    }

    /// Takes `length` bytes, or waits for them. A request larger than the complete budget gets all
    /// of it. Call with the same length until it is ready.
    pub(crate) fn poll_take(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<Permit> {
        if length <= FREE_LEN {
            return Poll::Ready(Permit::nothing());
        }
        let units = u32::try_from(length.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let units = units.min(self.budget.total);
        let semaphore = &self.budget.units;
        if self.waiting.is_none()
            && let Ok(units) = Arc::clone(semaphore).try_acquire_many_owned(units)
        {
            return Poll::Ready(Permit { part: Held::Units { units } });
        }
        if length <= RESERVE_LEN
            && let Some(reserve) = self.reserve.take(cx)
        {
            self.waiting = None;
            return Poll::Ready(Permit { part: Held::Reserve { _reserve: reserve } });
        }
        let waiting = self.waiting.get_or_insert_with(|| {
            let semaphore = Arc::clone(semaphore);
            Box::pin(async move {
                // The semaphore is never closed.
                let units = semaphore.acquire_many_owned(units).await.ok();
                let part = units.map_or(Held::Nothing, |units| Held::Units { units });
                Permit { part }
            })
        });
        let permit = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(permit)
    }
}

impl BudgetQueue {
    /// Stops waiting.
    pub(crate) fn give_up(&mut self) {
        self.waiting = None;
    }
}

impl Reserve {
    /// Takes the reserve, or wakes the task of `cx` when it is returned.
    fn take(self: &Arc<Self>, cx: &Context<'_>) -> Option<Reserved> {
        let mut state = self.state();
        if state.is_taken {
            state.waker = Some(cx.waker().clone());
            return None;
        }
        state.is_taken = true;
        Some(Reserved { reserve: Arc::clone(self) })
    }

    fn state(&self) -> MutexGuard<'_, ReserveState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut state = self.reserve.state();
        state.is_taken = false;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_request_waits_until_another_gives_its_part_back() {
        let budget = Budget::new(4 << 20);
        let mut first = BudgetQueue::new(budget.clone());
        let mut second = BudgetQueue::new(budget);
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(permit) = first.poll_take(&mut cx, 4 << 20) else {
            panic!("the budget is free")
        };
        assert!(second.poll_take(&mut cx, 2 << 20).is_pending());
        assert!(first.poll_take(&mut cx, 100).is_ready(), "small requests never wait");
        drop(permit);
        assert!(second.poll_take(&mut cx, 2 << 20).is_ready());
    }

    #[test]
    fn one_request_of_each_connection_goes_on_when_the_budget_is_used_up() {
        let budget = Budget::new(4 << 20);
        let mut greedy = BudgetQueue::new(budget.clone());
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(all) = greedy.poll_take(&mut cx, 32 << 20) else {
            panic!("the budget is free")
        };
        for _ in 0..10 {
            let mut other = BudgetQueue::new(budget.clone());
            let Poll::Ready(first) = other.poll_take(&mut cx, RESERVE_LEN) else {
                panic!("it has a reserve")
            };
            let woken = Arc::new(Woken::default());
            let waker = Waker::from(Arc::clone(&woken));
            let mut waiting = Context::from_waker(&waker);
            assert!(other.poll_take(&mut waiting, FREE_LEN + 1).is_pending(), "one at a time");
            drop(first);
            assert!(woken.0.load(Ordering::Relaxed), "a waiter is told");
            assert!(other.poll_take(&mut waiting, FREE_LEN + 1).is_ready());
            assert!(other.poll_take(&mut cx, RESERVE_LEN + 1).is_pending(), "large ones wait");
        }
        drop(all);
        assert!(greedy.poll_take(&mut cx, 4 << 20).is_ready(), "who has gone waits no more");
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_a_reply_does_not_need_is_given_back() {
        let budget = Budget::new(4 << 20);
        let (mut first, mut second) = (BudgetQueue::new(budget.clone()), BudgetQueue::new(budget));
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(mut permit) = first.poll_take(&mut cx, 4 << 20) else {
            panic!("the budget is free")
        };
        permit.shrink(8 << 20);
        assert!(second.poll_take(&mut cx, 2 << 20).is_pending(), "nothing is left");
        permit.shrink(2 << 20);
        assert!(second.poll_take(&mut cx, 2 << 20).is_ready());
    }

    #[test]
    fn a_request_larger_than_the_budget_is_served_alone() {
        let mut queue = BudgetQueue::new(Budget::new(1 << 20));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(queue.poll_take(&mut cx, 32 << 20).is_ready());
    }
}
