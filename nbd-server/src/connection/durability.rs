//! Requests whose reply confirms durability.
//!
//! The export makes a single change with FUA durable together with the change. If several are in
//! flight, each is carried out without durability and then waits for a flush that they share: one
//! sync of a disk takes as long as the sync of one block.

use std::sync::Arc;

use nbd_proto::transmission::Request;

use super::answer::Answer;
use super::dispatch::{PreparedRequest, can_flush, is_durable};
use super::writeback_errors::WritebackErrors;
use crate::export::{ExportEntry, ExportError, UnderWay, Waiter};
use crate::queue::GroupId;
use crate::scheduler::Scheduler;

/// A change with FUA, from its arrival to its answer.
pub(super) struct DurableChange {
    entry: ExportEntry,
    group: GroupId,
    under_way: UnderWay,
    /// The number of failed flushes when it arrived.
    since: u64,
}

impl DurableChange {
    /// Begins a change with FUA that may share a flush; `None` for other requests.
    pub(super) fn begin(
        work: &PreparedRequest,
        entry: &ExportEntry,
        group: GroupId,
    ) -> Option<Self> {
        // If every change is durable at once, a later flush saves nothing.
        if !is_durable(&work.request.command) || work.export.is_writethrough() || !can_flush(work) {
            return None;
        }
        let under_way = entry.flushes().begin_change();
        let since = work.writeback.count();
        Some(Self { entry: entry.clone(), group, under_way, since })
    }

    /// Whether other changes are to be made durable as well, so that a flush serves several.
    pub(super) fn has_company(&self) -> bool {
        self.under_way.has_company()
    }

    /// Answers the change, which was carried out, after a flush that begins now or later.
    pub(super) fn wait_for_flush(
        self,
        scheduler: &Scheduler,
        answer: Answer,
        writeback: Arc<WritebackErrors>,
    ) {
        let Self { entry, group, under_way, since } = self;
        let waiter = FlushWaiter::of_change(answer, writeback, since);
        let waiter = Box::new(FlushWaiter { _under_way: Some(under_way), ..waiter });
        entry.flushes().join(scheduler, group, entry.export(), entry.failures(), waiter);
    }
}

/// A FLUSH, or a change with FUA that was carried out, which waits for a flush that it may share.
pub(super) struct FlushWaiter {
    answer: Answer,
    writeback: Arc<WritebackErrors>,
    covers: Covered,
    _under_way: Option<UnderWay>,
}

/// The reason for waiting for a flush.
enum Covered {
    Flush(Request),
    /// A change that began when this many flushes had failed.
    Change(u64),
}

impl FlushWaiter {
    /// Creates the waiter for a FLUSH.
    pub(super) fn new(answer: Answer, writeback: Arc<WritebackErrors>, request: Request) -> Self {
        Self { answer, writeback, covers: Covered::Flush(request), _under_way: None }
    }

    /// Creates the waiter for a change that began when `since` flushes had failed.
    pub(super) fn of_change(answer: Answer, writeback: Arc<WritebackErrors>, since: u64) -> Self {
        Self { answer, writeback, covers: Covered::Change(since), _under_way: None }
    }
}

impl Waiter for FlushWaiter {
    fn is_abandoned(&self) -> bool {
        self.answer.is_abandoned()
    }

    fn answer(self: Box<Self>, result: Result<(), (u64, &ExportError)>) {
        let Self { answer, writeback, covers, _under_way } = *self;
        let result = match result {
            Ok(()) => match covers {
                Covered::Flush(request) => writeback.judge(&request, Ok(())),
                Covered::Change(since) => writeback.judge_change(since),
            },
            Err((count, error)) => {
                writeback.is_told(count);
                Err(error.clone())
            }
        };
        answer.send_short(result);
    }
}
