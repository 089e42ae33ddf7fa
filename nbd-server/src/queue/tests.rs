//! The order in which jobs are started.

use super::*;

const WAIT: Cost = Cost { class: Class::Wait, estimate: 100 };
const BULK: Cost = Cost { class: Class::Bulk, estimate: 100 };
const EXTENTS: Cost = Cost { class: Class::Extents, estimate: 100 };
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
fn looking_for_holes_waits_for_no_long_change_of_the_same_disk() {
    let mut queue = queue(16, 1);
    let (writer, reader) = (queue.open(1), queue.open(1));
    for _ in 0..3 {
        queue.push(writer, BULK, "write").unwrap();
        queue.push(reader, EXTENTS, "look").unwrap();
    }
    let mut jobs: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|popped| popped.job).collect();
    jobs.sort_unstable();
    assert_eq!(jobs, ["look", "write"], "one of each at a time");
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
        queue.close(flow, |_| true).is_empty() && queue.groups.is_empty() && queue.flows.is_empty()
    );
}
