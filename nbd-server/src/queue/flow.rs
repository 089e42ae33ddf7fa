//! What is known of the connections and exports whose jobs are queued.

use std::collections::{BTreeSet, VecDeque};

/// What a job spends its time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Waiting: for a disk, a network, another thread. Many at a time keep a disk busy.
    Wait,
    /// Changing or moving much of one disk: work for the system's cores, and under a lock that
    /// others want. More than a few at a time on one disk achieve nothing.
    Bulk,
    /// Computing: more at a time than there are cores only take them away from the connections.
    Compute,
}

/// How many classes there are.
pub(super) const CLASSES: usize = 3;

/// Names a flow. None is ever given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FlowId(pub(super) u64);

/// Names what a flow works on: all connections to one export have the same.
pub(crate) type GroupId = usize;

/// What a job is and may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) class: Class,
    /// How long it is expected to take, in nanoseconds of a thread.
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
    /// Those of [`Class::Bulk`] among them.
    pub(super) bulk: usize,
    /// Flows that have jobs of a class, the one with the least service first.
    pub(super) ready: [BTreeSet<(u64, FlowId)>; CLASSES],
    /// The flow of the group's own jobs, while it has any.
    pub(super) own: Option<FlowId>,
}
