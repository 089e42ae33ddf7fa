//! A plan that the tasks of a copy share.

use std::sync::{Mutex as SyncMutex, MutexGuard, PoisonError};

use tokio::sync::Mutex;

use super::plan::{Plan, PlannedRange, Step};
use crate::error::JobError;

/// Hands out the ranges of a disk, each of them once.
///
/// A task that waits for a fair lock is given it while its thread may be busy with another piece of
/// the disk, and all other threads then wait for that one. So this lock is not fair, and only who
/// asks another program waits in turn.
pub(crate) struct SharedPlan {
    plan: SyncMutex<Plan>,
    asking: Mutex<()>,
}

impl SharedPlan {
    pub(crate) fn new(plan: Plan) -> Self {
        Self { plan: SyncMutex::new(plan), asking: Mutex::default() }
    }

    /// Returns the next range, or `None` at the end of the disk. `begun` sees it before any other
    /// task learns that the plan has passed it.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: what another program was about to tell is lost, and later calls that need
    /// it fail.
    pub(crate) async fn next(
        &self,
        begun: impl Fn(&PlannedRange),
    ) -> Result<Option<PlannedRange>, JobError> {
        loop {
            {
                let mut plan = self.lock();
                if let Step::Next(range) = plan.step()? {
                    range.iter().for_each(&begun);
                    return Ok(range);
                }
            }
            let _turn = self.asking.lock().await;
            let look = self.lock().begin_look()?;
            // Without one, the answer has come in the meantime.
            if let Some(mut look) = look {
                let answer = look.answer().await;
                self.lock().end_look(look, answer)?;
            }
        }
    }

    /// Locks the plan. Nothing may be awaited meanwhile.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "object-storage"))]
mod tests {
    use std::sync::Arc;

    use tokio::sync::mpsc;
    use tokio::task::yield_now;

    use super::*;
    use crate::copy::content::Content;
    use crate::copy::plan::{Extents, Lengths};

    const PIECE: u64 = 65_536;

    fn plan(size: u64, extents: Extents) -> SharedPlan {
        let longest = Lengths { data: PIECE, zeroes: u64::MAX };
        SharedPlan::new(Plan::new(0, size, 1, longest, extents))
    }

    #[tokio::test]
    async fn tasks_that_wait_for_the_same_answer_get_the_ranges_in_it_once() {
        let (tell, told) = mpsc::channel(1);
        let plan = Arc::new(plan(3 * PIECE, Extents::Told(told)));
        let take = || {
            let plan = plan.clone();
            tokio::spawn(async move { plan.next(|_| {}).await.unwrap().map(|range| range.offset) })
        };
        let tasks = [take(), take(), take(), take()];
        yield_now().await;
        tell.send(Ok((3 * PIECE, Content::Data))).await.unwrap();
        let mut offsets = Vec::new();
        for task in tasks {
            offsets.push(task.await.unwrap());
        }
        offsets.sort();
        assert_eq!(offsets, [None, Some(0), Some(PIECE), Some(2 * PIECE)]);
    }

    #[tokio::test]
    async fn every_task_gets_an_error_after_one_was_stopped_while_it_asked() {
        let (_tell, told) = mpsc::channel(1);
        let plan = plan(PIECE, Extents::Told(told));
        let mut stopped = Box::pin(plan.next(|_| {}));
        assert!(waits(&mut stopped).await);
        drop(stopped);
        for _ in 0..2 {
            plan.next(|_| {}).await.unwrap_err();
        }
    }

    /// Polls once; returns whether the future waits.
    async fn waits<T>(future: &mut (impl Future<Output = T> + Unpin)) -> bool {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_pending())
        })
        .await
    }
}
