//! Requests whose reply says that something is durable.
//!
//! A change with FUA that is alone is made durable by the export, together with the change. Where several
//! are under way each is carried out as if it need not be durable, and then waits for a flush, which they
//! share: one sync of a disk takes as long as the sync of one block.

use std::sync::Arc;

use nbd_proto::transmission::Request;

use super::answer::Answer;
use super::dispatch::{PreparedRequest, can_flush, is_durable};
use super::writeback_errors::WritebackErrors;
use crate::export::{ExportEntry, ExportError, UnderWay, Waiter};
use crate::queue::GroupId;
use crate::scheduler::Scheduler;

/// A change with FUA, from when it arrives until it is answered.
pub(super) struct DurableChange {
    entry: ExportEntry,
    group: GroupId,
    under_way: UnderWay,
    /// The flushes that had failed when it arrived.
    since: u64,
}

impl DurableChange {
    /// For a request that is such a change, and may share a flush.
    pub(super) fn begin(
        work: &PreparedRequest,
        entry: &ExportEntry,
        group: GroupId,
    ) -> Option<Self> {
        // Where every change is durable at once, nothing is saved by flushing later.
        if !is_durable(&work.request.command) || work.export.is_writethrough() || !can_flush(work) {
            return None;
        }
        let under_way = entry.flushes().begin_change();
        let since = work.writeback.count();
        Some(Self { entry: entry.clone(), group, under_way, since })
    }

    /// Whether others are to be made durable as well, so that a flush serves several.
    pub(super) fn has_company(&self) -> bool {
        self.under_way.has_company()
    }

    /// Has the change, which was carried out, answered after a flush that begins now or later.
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

/// A FLUSH, or a change with FUA that was carried out: it waits for a flush that it may share.
pub(super) struct FlushWaiter {
    answer: Answer,
    writeback: Arc<WritebackErrors>,
    covers: Covered,
    _under_way: Option<UnderWay>,
}

/// What a flush is waited for.
enum Covered {
    Flush(Request),
    /// A change that was begun when so many flushes had failed.
    Change(u64),
}

impl FlushWaiter {
    /// For a FLUSH.
    pub(super) fn new(answer: Answer, writeback: Arc<WritebackErrors>, request: Request) -> Self {
        Self { answer, writeback, covers: Covered::Flush(request), _under_way: None }
    }

    /// For a change that was begun when `since` flushes had failed.
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
