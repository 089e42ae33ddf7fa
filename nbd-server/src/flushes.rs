//! Flushes of one export, shared by concurrent requests.
//!
//! A flush makes durable what was written before it began. So a flush that begins after a request
//! has arrived answers that request, and all others that have arrived by then: however many clients
//! request a flush, one runs and one waits. Requests that arrive while it runs are answered by the
//! next.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nbd_proto::wire::Errno;

use crate::export::{DurabilityFailures, Export, ExportError};
use crate::queue::{Class, Cost, GroupId};
use crate::scheduler::{Job, Scheduler};

/// What a flush is expected to take, in nanoseconds.
const ESTIMATE: u64 = 2_000_000;

/// Who waits for a flush. Dropped without an answer it has to see to itself.
pub(crate) trait Waiter: Send {
    /// Nobody wants the answer any more.
    fn is_abandoned(&self) -> bool;

    /// The flush has ended. One that failed was the `Err`th failure of this export.
    fn answer(self: Box<Self>, result: Result<(), (u64, &ExportError)>);
}

/// The flushes of one export. A clone is the same.
#[derive(Clone, Default)]
pub(crate) struct Flushes {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Box<dyn Waiter>>,
    /// A job is queued or running that will see to those who wait.
    is_scheduled: bool,
}

impl Flushes {
    /// Has `waiter` answered by a flush of `export` that begins after this call.
    pub(crate) fn join(
        &self,
        scheduler: &Scheduler,
        group: GroupId,
        export: &Arc<dyn Export>,
        failures: &DurabilityFailures,
        waiter: Box<dyn Waiter>,
    ) {
        let mut state = self.state();
        state.waiting.push(waiter);
        if std::mem::replace(&mut state.is_scheduled, true) {
            return;
        }
        drop(state);
        let job = FlushJob {
            flushes: self.clone(),
            export: Arc::clone(export),
            failures: failures.clone(),
            is_done: false,
        };
        scheduler.submit_own(group, Box::new(job));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Flushes as long as somebody waits for it.
struct FlushJob {
    flushes: Flushes,
    export: Arc<dyn Export>,
    failures: DurabilityFailures,
    is_done: bool,
}

impl Job for FlushJob {
    fn cost(&self) -> Cost {
        Cost { class: Class::Wait, estimate: ESTIMATE }
    }

    fn step(mut self: Box<Self>) -> Option<Box<dyn Job>> {
        // From here on it begins: who comes later waits for the next.
        let mut waiting = std::mem::take(&mut self.flushes.state().waiting);
        waiting.retain(|waiter| !waiter.is_abandoned());
        if !waiting.is_empty() {
            self.flush_for(waiting);
        }
        let mut state = self.flushes.state();
        if state.waiting.is_empty() {
            state.is_scheduled = false;
            drop(state);
            self.is_done = true;
            return None;
        }
        drop(state);
        Some(self)
    }
}

impl FlushJob {
    fn flush_for(&self, waiting: Vec<Box<dyn Waiter>>) {
        let flushed = catch_unwind(AssertUnwindSafe(|| self.export.flush()));
        let result = flushed.unwrap_or_else(|_| {
            tracing::error!("a flush panicked");
            Err(ExportError::new(Errno::EIO, "the server failed"))
        });
        // It failed once, however many hear of it.
        let result = result.map_err(|error| (self.failures.add(), error));
        for waiter in waiting {
            waiter.answer(match &result {
                Ok(()) => Ok(()),
                Err((count, error)) => Err((*count, error)),
            });
        }
    }
}

impl Drop for FlushJob {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        // It will never run: the server ends.
        let mut state = self.flushes.state();
        state.is_scheduled = false;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
    }
}
