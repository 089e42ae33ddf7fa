//! Fair queuing: selects the next waiting job.
//!
//! Start-time fair queuing. Each connection is a *flow* with a virtual time for each class of jobs:
//! the service it has received, in nanoseconds of a thread. The next job is that of the flow with
//! the least service. A job is charged with an estimate when it starts, so that a flow cannot start
//! many at once for nothing, and with its actual time when it ends. An idle flow accumulates no
//! credit: it continues a little before the current service, so that a client with few requests is
//! served before those with permanent load.

mod flow;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use flow::{CLASSES, Flow, Group};
pub(crate) use flow::{Class, Cost, FlowId, GroupId};

/// How far before the present service an idle flow may continue, in nanoseconds.
const HEAD_START: u64 = 2_000_000;

/// A job may start while its flow, and its export, have fewer running than so many times the
/// threads that are free. A client whose requests hang cannot take all threads from the others of
/// the same disk that way, nor a disk that hangs those of other disks; neither can two or three.
const FLOW_SHARE_OF_FREE: usize = 2;
const GROUP_SHARE_OF_FREE: usize = 3;

/// Jobs at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Of all classes. At least 1.
    pub(crate) running: usize,
    /// Of [`Class::Compute`], and of [`Class::Bulk`] and [`Class::Extents`] each for one export. At
    /// least 1.
    pub(crate) computing: usize,
    /// Of [`Class::Bulk`] and of [`Class::Extents`], for all exports. At least 1.
    pub(crate) bulk: usize,
}

/// A job to be carried out, and what has to be told about it afterwards.
#[derive(Debug)]
pub(crate) struct Popped<J> {
    pub(crate) job: J,
    pub(crate) started: Started,
}

/// A job that is being carried out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Started {
    flow: FlowId,
    group: GroupId,
    cost: Cost,
}

impl Started {
    pub(crate) const fn class(&self) -> Class {
        self.cost.class
    }
}

/// The jobs of all connections that wait.
#[derive(Debug)]
pub(crate) struct FairQueue<J> {
    limits: Limits,
    flows: HashMap<FlowId, Flow<J>>,
    groups: BTreeMap<GroupId, Group>,
    /// For each class, how far the service is: the latest virtual time at which a job was started.
    clocks: [u64; CLASSES],
    next: u64,
    running: usize,
    /// Running jobs of each class.
    of_class: [usize; CLASSES],
}

impl<J> FairQueue<J> {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            flows: HashMap::new(),
            groups: BTreeMap::new(),
            clocks: [HEAD_START; CLASSES],
            next: 0,
            running: 0,
            of_class: [0; CLASSES],
        }
    }

    /// A new flow, until it is [closed](Self::close).
    pub(crate) fn open(&mut self, group: GroupId) -> FlowId {
        self.insert(group, false)
    }

    fn insert(&mut self, group: GroupId, is_passing: bool) -> FlowId {
        let id = FlowId(self.next);
        self.next += 1;
        let flow = Flow { group, classes: Default::default(), is_passing };
        self.flows.insert(id, flow);
        id
    }

    /// Ends a flow; the jobs that waited and are abandoned are returned. The others, and those that
    /// run, are left to themselves.
    pub(crate) fn close(&mut self, flow: FlowId, is_abandoned: impl Fn(&J) -> bool) -> Vec<J> {
        self.unready(flow);
        let Some(closed) = self.flows.get_mut(&flow) else { return Vec::new() };
        closed.is_passing = true;
        let group = closed.group;
        let mut abandoned = Vec::new();
        for class in &mut closed.classes {
            for (cost, job) in std::mem::take(&mut class.waiting) {
                if is_abandoned(&job) {
                    abandoned.push(job);
                } else {
                    class.waiting.push_back((cost, job));
                }
            }
        }
        self.ready(flow);
        self.pass(flow);
        self.forget(group);
        abandoned
    }

    /// Forgets a flow that was closed and is idle.
    fn pass(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(&id) else { return };
        if flow.is_passing && flow.is_idle() {
            let group = flow.group;
            self.flows.remove(&id);
            if let Some(group) = self.groups.get_mut(&group) {
                group.own.take_if(|own| *own == id);
            }
        }
    }

    /// Queues a job after the others of its flow and class. The job is returned if the flow was
    /// closed.
    pub(crate) fn push(&mut self, flow: FlowId, cost: Cost, job: J) -> Result<(), J> {
        self.unready(flow);
        let now = self.clocks[cost.class as usize].saturating_sub(HEAD_START);
        let Some(entry) = self.flows.get_mut(&flow) else { return Err(job) };
        let class = &mut entry.classes[cost.class as usize];
        if class.is_idle() {
            class.virtual_time = class.virtual_time.max(now);
        }
        class.waiting.push_back((cost, job));
        self.ready(flow);
        Ok(())
    }

    /// Queues a job that belongs to all connections of a group, in a flow of its own.
    pub(crate) fn push_own(&mut self, group: GroupId, cost: Cost, job: J) {
        let own = self.groups.get(&group).and_then(|group| group.own);
        let flow = own.unwrap_or_else(|| self.insert(group, true));
        self.groups.entry(group).or_default().own = Some(flow);
        // It is there: it was found or made above.
        let _ = self.push(flow, cost, job);
    }

    /// How many jobs run.
    pub(crate) const fn running(&self) -> usize {
        self.running
    }

    /// How many jobs wait. Looks at every flow.
    pub(crate) fn waiting(&self) -> usize {
        let classes = self.flows.values().flat_map(|flow| &flow.classes);
        classes.map(|class| class.waiting.len()).sum()
    }

    /// The next job that may be started now.
    pub(crate) fn pop(&mut self) -> Option<Popped<J>> {
        let free = self.limits.running.saturating_sub(self.running);
        if free == 0 {
            return None;
        }
        // Few jobs of the other classes run at a time, so they never take all threads from the
        // last.
        let classes = [Class::Compute, Class::Extents, Class::Bulk, Class::Wait];
        let (class, flow) = classes
            .into_iter()
            .filter(|class| self.of_class[*class as usize] < self.limit(*class))
            .find_map(|class| Some((class, self.first(class, free)?)))?;
        self.unready(flow);
        let entry = self.flows.get_mut(&flow)?;
        let of_class = &mut entry.classes[class as usize];
        let (cost, job) = of_class.waiting.pop_front()?;
        let clock = &mut self.clocks[class as usize];
        *clock = (*clock).max(of_class.virtual_time);
        of_class.virtual_time = of_class.virtual_time.saturating_add(cost.estimate);
        of_class.running += 1;
        let group = entry.group;
        self.ready(flow);
        self.running += 1;
        self.of_class[class as usize] += 1;
        let group_entry = self.groups.entry(group).or_default();
        group_entry.running += 1;
        group_entry.of_class[class as usize] += 1;
        Some(Popped { job, started: Started { flow, group, cost } })
    }

    /// How many jobs of a class may run.
    const fn limit(&self, class: Class) -> usize {
        match class {
            Class::Wait => self.limits.running,
            Class::Bulk | Class::Extents => self.limits.bulk,
            Class::Compute => self.limits.computing,
        }
    }

    /// The flow with the least service of those that may start a job of a class.
    fn first(&self, class: Class, free: usize) -> Option<FlowId> {
        let may_start = |flow: &FlowId| {
            self.flows.get(flow).is_some_and(|flow| flow.running() < FLOW_SHARE_OF_FREE * free)
        };
        let groups = self.groups.values();
        let groups = groups.filter(|group| {
            let is_served = matches!(class, Class::Bulk | Class::Extents)
                && group.of_class[class as usize] >= self.limits.computing;
            group.running < GROUP_SHARE_OF_FREE * free && !is_served
        });
        // Few have so many running that they are passed over.
        let firsts = groups.filter_map(|group| {
            group.ready[class as usize].iter().find(|(_, flow)| may_start(flow))
        });
        firsts.min().map(|(_, flow)| *flow)
    }

    /// A job has ended, or a step of it, after `elapsed` nanoseconds. `rest` is what remains to be
    /// done; it comes before the other jobs of its flow and class.
    pub(crate) fn finish(&mut self, started: Started, elapsed: u64, rest: Option<(Cost, J)>) {
        let Started { flow, group, cost } = started;
        self.running -= 1;
        self.of_class[cost.class as usize] -= 1;
        if let Some(group) = self.groups.get_mut(&group) {
            group.running -= 1;
            group.of_class[cost.class as usize] -= 1;
        }
        self.unready(flow);
        // A flow is there as long as any of its jobs.
        let Some(entry) = self.flows.get_mut(&flow) else { return };
        let class = &mut entry.classes[cost.class as usize];
        class.running -= 1;
        class.virtual_time =
            class.virtual_time.saturating_add(elapsed).saturating_sub(cost.estimate);
        if let Some((cost, job)) = rest {
            let now = self.clocks[cost.class as usize].saturating_sub(HEAD_START);
            let class = &mut entry.classes[cost.class as usize];
            if class.is_idle() {
                class.virtual_time = class.virtual_time.max(now);
            }
            class.waiting.push_front((cost, job));
        }
        self.ready(flow);
        self.pass(flow);
        self.forget(group);
    }

    /// Enters a flow where it is looked for.
    fn ready(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(&id) else { return };
        let group = self.groups.entry(flow.group).or_default();
        for (class, ready) in flow.classes.iter().zip(&mut group.ready) {
            if !class.waiting.is_empty() {
                ready.insert((class.virtual_time, id));
            }
        }
    }

    /// Takes it out again, before its virtual time or its jobs change.
    fn unready(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(&id) else { return };
        let Some(group) = self.groups.get_mut(&flow.group) else { return };
        for (class, ready) in flow.classes.iter().zip(&mut group.ready) {
            ready.remove(&(class.virtual_time, id));
        }
    }

    /// Forgets a group in which nothing happens: only those that have jobs are searched.
    fn forget(&mut self, id: GroupId) {
        let is_idle = self.groups.get(&id).is_some_and(|group| {
            group.running == 0 && group.own.is_none() && group.ready.iter().all(BTreeSet::is_empty)
        });
        if is_idle {
            self.groups.remove(&id);
        }
    }
}
