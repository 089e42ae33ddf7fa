//! Flows and groups: the connections and exports whose jobs are queued.

use std::collections::{BTreeSet, VecDeque};

/// The kind of work of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Waiting for a disk, a network or another thread. Many of them at once keep a disk busy.
    Wait,
    /// Changing or moving much of one disk: work of the kernel, under a lock of the file. More than
    /// a few of them at once on one disk achieve nothing.
    Bulk,
    /// Asking the system where a file has holes: mostly work of the kernel as well, but not under
    /// the lock that long changes hold.
    Extents,
    /// Computing: more of them at once than there are cores would only take these from the
    /// connections.
    Compute,
}

/// The number of classes.
pub(super) const CLASSES: usize = 4;

/// Identifies a flow; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FlowId(pub(super) u64);

/// Identifies the export that a flow works on: the same for all connections to it.
pub(crate) type GroupId = usize;

/// The class and the expected cost of a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) class: Class,
    /// Expected time, in nanoseconds of a thread.
    pub(crate) estimate: u64,
}

#[derive(Debug)]
pub(super) struct Flow<J> {
    pub(super) group: GroupId,
    pub(super) classes: [ClassOfFlow<J>; CLASSES],
    /// Gone as soon as it is idle.
    pub(super) is_passing: bool,
}

/// A flow's jobs of one class.
#[derive(Debug)]
pub(super) struct ClassOfFlow<J> {
    pub(super) virtual_time: u64,
    pub(super) waiting: VecDeque<(Cost, J)>,
    pub(super) running: usize,
}

impl<J> Default for ClassOfFlow<J> {
    fn default() -> Self {
        Self { virtual_time: 0, waiting: VecDeque::new(), running: 0 }
    }
}

impl<J> ClassOfFlow<J> {
    pub(super) fn is_idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty()
    }
}

impl<J> Flow<J> {
    pub(super) fn is_idle(&self) -> bool {
        self.classes.iter().all(ClassOfFlow::is_idle)
    }

    pub(super) fn running(&self) -> usize {
        self.classes.iter().map(|class| class.running).sum()
    }
}

#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) running: usize,
    /// Those of each class among them.
    pub(super) of_class: [usize; CLASSES],
    /// Flows that have jobs of a class, the one with the least service first.
    pub(super) ready: [BTreeSet<(u64, FlowId)>; CLASSES],
    /// The flow of the group's own jobs, while it has any.
    pub(super) own: Option<FlowId>,
}
