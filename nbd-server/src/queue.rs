//! Fair queuing: selects the next waiting job.
//!
//! Start-time fair queuing. Each connection is a *flow* with a virtual time for each class of jobs:
//! the service it has received, in nanoseconds of a thread. The next job is that of the flow with
//! the least service. A job is charged with an estimate when it starts, so that a flow cannot start
//! many at once for nothing, and with its actual time when it ends. An idle flow accumulates no
//! credit: it continues a little before the current service, so that a client with few requests is
//! served before those with permanent load.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

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

/// How far behind the others a flow that was idle may be, in nanoseconds.
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
    /// Of [`Class::Compute`], and of [`Class::Bulk`] for one export. At least 1.
    pub(crate) computing: usize,
    /// Of [`Class::Bulk`], for all exports. At least 1.
    pub(crate) bulk: usize,
}

/// How many classes there are.
const CLASSES: usize = 3;

/// Names a flow. None is ever given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FlowId(u64);

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
struct Flow<J> {
    group: GroupId,
    classes: [ClassOfFlow<J>; CLASSES],
    /// Gone as soon as it is idle.
    is_passing: bool,
}

/// A flow's jobs of one class.
#[derive(Debug)]
struct ClassOfFlow<J> {
    virtual_time: u64,
    waiting: VecDeque<(Cost, J)>,
    running: usize,
}

impl<J> Default for ClassOfFlow<J> {
    fn default() -> Self {
        Self { virtual_time: 0, waiting: VecDeque::new(), running: 0 }
    }
}

impl<J> ClassOfFlow<J> {
    fn is_idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty()
    }
}

impl<J> Flow<J> {
    fn is_idle(&self) -> bool {
        self.classes.iter().all(ClassOfFlow::is_idle)
    }

    fn running(&self) -> usize {
        self.classes.iter().map(|class| class.running).sum()
    }
}

#[derive(Debug, Default)]
struct Group {
    running: usize,
    /// Those of [`Class::Bulk`] among them.
    bulk: usize,
    /// Flows that have jobs of a class, the one with the least service first.
    ready: [BTreeSet<(u64, FlowId)>; CLASSES],
    /// The flow of the group's own jobs, while it has any.
    own: Option<FlowId>,
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

    /// Queues a job behind the others of its flow and class. The job comes back if the flow was
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

    /// The next job that may be started now.
    pub(crate) fn pop(&mut self) -> Option<Popped<J>> {
        let free = self.limits.running.saturating_sub(self.running);
        if free == 0 {
            return None;
        }
        // Few jobs of the first two classes run at a time, so they never take all threads from the third.
        let classes = [Class::Compute, Class::Bulk, Class::Wait];
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
        group_entry.bulk += usize::from(class == Class::Bulk);
        Some(Popped { job, started: Started { flow, group, cost } })
    }

    /// How many jobs of a class may run.
    const fn limit(&self, class: Class) -> usize {
        match class {
            Class::Wait => self.limits.running,
            Class::Bulk => self.limits.bulk,
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
            let is_served = class == Class::Bulk && group.bulk >= self.limits.computing;
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
            group.bulk -= usize::from(cost.class == Class::Bulk);
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

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Cost = Cost { class: Class::Wait, estimate: 100 };
    const BULK: Cost = Cost { class: Class::Bulk, estimate: 100 };
    const COMPUTE: Cost = Cost { class: Class::Compute, estimate: 100 };

    fn queue(running: usize, computing: usize) -> FairQueue<&'static str> {
        FairQueue::new(Limits { running, computing, bulk: (running / 4).max(1) })
    }

    /// Carries out one job after the other, each of which takes `elapsed`; their names.
    fn run(queue: &mut FairQueue<&'static str>, elapsed: u64) -> Vec<&'static str> {
        std::iter::from_fn(|| {
            let Popped { job, started } = queue.pop()?;
            queue.finish(started, elapsed, None);
            Some(job)
        })
        .collect()
    }

    #[test]
    fn flows_take_turns_however_much_one_has_queued() {
        let mut queue = queue(1, 1);
        let (greedy, modest) = (queue.open(1), queue.open(1));
        for _ in 0..4 {
            queue.push(greedy, WAIT, "greedy").unwrap();
        }
        queue.push(modest, WAIT, "modest").unwrap();
        queue.push(modest, WAIT, "modest").unwrap();
        let order = ["greedy", "modest", "greedy", "modest", "greedy", "greedy"];
        assert_eq!(run(&mut queue, 100), order);
    }

    #[test]
    fn a_newcomer_is_next_and_makes_up_for_a_part_of_its_absence_only() {
        const TURN: u64 = HEAD_START / 2;
        let cost = Cost { class: Class::Wait, estimate: TURN };
        let mut queue = queue(1, 1);
        let (old, new) = (queue.open(1), queue.open(1));
        for _ in 0..20 {
            queue.push(old, cost, "old").unwrap();
        }
        for _ in 0..10 {
            let Popped { started, .. } = queue.pop().unwrap();
            queue.finish(started, TURN, None);
        }
        for _ in 0..10 {
            queue.push(new, cost, "new").unwrap();
        }
        let order = run(&mut queue, TURN);
        assert_eq!(order[..7], ["new", "new", "new", "old", "new", "old", "new"]);
    }

    #[test]
    fn what_a_job_has_really_taken_counts() {
        let mut queue = queue(1, 1);
        let (slow, fast) = (queue.open(1), queue.open(1));
        for _ in 0..2 {
            queue.push(slow, WAIT, "slow").unwrap();
        }
        let Popped { started, .. } = queue.pop().unwrap();
        for _ in 0..4 {
            queue.push(fast, WAIT, "fast").unwrap();
        }
        queue.finish(started, 350, None);
        assert_eq!(run(&mut queue, 100), ["fast", "fast", "fast", "fast", "slow"]);
    }

    #[test]
    fn the_abandoned_jobs_of_a_closed_flow_are_gone() {
        let mut queue = queue(4, 4);
        let (gone, stays) = (queue.open(1), queue.open(1));
        for job in ["first", "second", "third"] {
            queue.push(gone, WAIT, job).unwrap();
        }
        let Popped { job, started } = queue.pop().unwrap();
        assert_eq!(job, "first");
        assert_eq!(queue.close(gone, |job| *job != "third"), ["second"]);
        queue.push(stays, WAIT, "stays").unwrap();
        queue.finish(started, 100, None);
        assert_eq!(run(&mut queue, 100), ["stays", "third"], "what was not abandoned is done");
        assert_eq!(queue.push(gone, WAIT, "late"), Err("late"));
        assert!(queue.groups.is_empty() && queue.flows.len() == 1);
    }

    #[test]
    fn a_job_of_several_steps_lets_others_in_between() {
        let mut queue = queue(1, 1);
        let (long, short) = (queue.open(1), queue.open(1));
        queue.push(long, COMPUTE, "long").unwrap();
        queue.push(long, COMPUTE, "behind it").unwrap();
        queue.push(short, COMPUTE, "short").unwrap();
        let Popped { started, .. } = queue.pop().unwrap();
        queue.finish(started, 100, Some((COMPUTE, "its rest")));
        assert_eq!(run(&mut queue, 100), ["short", "its rest", "behind it"]);
    }

    #[test]
    fn computing_jobs_are_few_at_a_time_and_hold_up_nobody_who_waits() {
        let mut queue = queue(8, 1);
        let (walker, reader) = (queue.open(1), queue.open(1));
        for _ in 0..3 {
            queue.push(walker, COMPUTE, "walk").unwrap();
        }
        queue.push(walker, WAIT, "its read").unwrap();
        queue.push(reader, WAIT, "read").unwrap();
        let mut started: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        started.sort_by_key(|popped| popped.job);
        let jobs: Vec<_> = started.iter().map(|popped| popped.job).collect();
        assert_eq!(jobs, ["its read", "read", "walk"]);
    }

    #[test]
    fn bulk_work_is_done_a_few_jobs_at_a_time_on_each_disk_and_leaves_threads_to_all_else() {
        let mut queue = queue(16, 2);
        let flows: Vec<_> = (0..8).map(|index| queue.open(index % 4)).collect();
        for flow in &flows {
            for _ in 0..10 {
                queue.push(*flow, BULK, "bulk").unwrap();
            }
        }
        let bulk: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        let of_first = bulk.iter().filter(|popped| popped.started.group == 0).count();
        assert_eq!((bulk.len(), of_first), (4, 1), "the groups are served alike");
        queue.push(flows[0], WAIT, "read").unwrap();
        let read = queue.pop().expect("it does not wait for those");
        assert_eq!(read.job, "read");
        // As soon as one has ended, it is the turn of another flow.
        let Popped { started, .. } = bulk.into_iter().next().unwrap();
        queue.finish(started, 100, Some((BULK, "its rest")));
        assert_ne!(queue.pop().unwrap().started.flow, started.flow);
        assert!(queue.pop().is_none());
    }

    #[test]
    fn service_of_one_class_is_not_held_against_a_client_in_the_other() {
        let mut queue = queue(8, 1);
        let (walker, reader) = (queue.open(1), queue.open(1));
        for _ in 0..10 {
            queue.push(walker, COMPUTE, "walk").unwrap();
        }
        let Popped { started: walking, .. } = queue.pop().unwrap();
        for _ in 0..10 {
            queue.push(reader, WAIT, "read").unwrap();
            let Popped { job, started } = queue.pop().unwrap();
            assert_eq!(job, "read");
            queue.finish(started, 10 * HEAD_START, None);
        }
        queue.push(reader, COMPUTE, "its walk").unwrap();
        queue.finish(walking, 2 * HEAD_START, None);
        assert_eq!(queue.pop().unwrap().job, "its walk");
    }

    #[test]
    fn an_export_that_hangs_leaves_threads_to_the_others() {
        let mut queue = queue(16, 16);
        for group in [1, 2] {
            let flow = queue.open(group);
            for _ in 0..100 {
                queue.push(flow, WAIT, "hangs").unwrap();
            }
            while queue.pop().is_some() {}
        }
        let good = queue.open(3);
        queue.push(good, WAIT, "good").unwrap();
        assert_eq!(queue.pop().unwrap().job, "good");
        assert!(queue.running >= 12, "but they get most of them: {}", queue.running);
    }

    #[test]
    fn a_client_whose_requests_hang_leaves_threads_to_the_others_of_its_disk() {
        let mut queue = queue(16, 16);
        let (bad, good) = (queue.open(1), queue.open(1));
        for _ in 0..100 {
            queue.push(bad, WAIT, "hangs").unwrap();
        }
        let hanging = std::iter::from_fn(|| queue.pop()).count();
        assert!((8..16).contains(&hanging), "{hanging}");
        queue.push(good, WAIT, "good").unwrap();
        assert_eq!(queue.pop().unwrap().job, "good");
    }

    #[test]
    fn the_jobs_of_an_export_itself_wait_in_turn_and_leave_nothing_behind() {
        let mut queue = queue(1, 1);
        let flow = queue.open(1);
        queue.push(flow, WAIT, "one").unwrap();
        queue.push(flow, WAIT, "two").unwrap();
        queue.push_own(1, WAIT, "own");
        assert_eq!(run(&mut queue, 100), ["one", "own", "two"]);
        assert_eq!(queue.flows.len(), 1);
        assert!(
            queue.close(flow, |_| true).is_empty()
                && queue.groups.is_empty()
                && queue.flows.is_empty()
        );
    }
}
