//! Turns of several connections on one thread.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::order::SHORT_QUANTUM;
use super::*;

/// What a busy task does after each of its turns.
#[derive(Clone, Copy)]
enum Busy {
    /// It has more to do, and says so.
    PassesOn,
    /// It waits for requests, of which there are more at once.
    Rests,
}

/// Works in `turn` and logs it, if it is ready; then others are examined.
async fn work(turn: &mut Turn, busy: Busy, cost: usize, log: impl FnOnce()) {
    match busy {
        Busy::PassesOn => turn.pass().await,
        Busy::Rests => poll_fn(|cx| turn.poll(cx)).await,
    }
    log();
    turn.spend(cost);
    if matches!(busy, Busy::Rests) {
        turn.rest();
        let mut is_woken = false;
        poll_fn(|cx| {
            // Without a look at the sockets.
            cx.waker().wake_by_ref();
            if std::mem::replace(&mut is_woken, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// What happened, in order: a number for a turn of a busy task, `None` for the one that was
/// idle.
fn run(busy: usize, turns: usize, style: Busy, cost: usize) -> Vec<Option<usize>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    let thread = Thread::new(Arc::new(AtomicUsize::new(busy + 1)));
    runtime.block_on(async {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let idle = tokio::spawn({
            let (log, mut turn) = (Arc::clone(&log), Turn::new(thread.clone()));
            async move {
                while far.read_u8().await.is_ok() {
                    poll_fn(|cx| turn.poll(cx)).await;
                    log.lock().unwrap().push(None);
                    turn.spend(2 * REQUEST_COST);
                    turn.rest();
                }
            }
        });
        let tasks: Vec<_> = (0..busy)
            .map(|index| {
                let (log, mut turn) = (Arc::clone(&log), Turn::new(thread.clone()));
                tokio::spawn(async move {
                    for _ in 0..turns {
                        let log = || log.lock().unwrap().push(Some(index));
                        work(&mut turn, style, cost, log).await;
                    }
                })
            })
            .collect();
        while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
            near.write_u8(1).await.unwrap();
            let before = log.lock().unwrap().len();
            while log.lock().unwrap()[before..].iter().all(Option::is_some)
                && !tasks.iter().all(tokio::task::JoinHandle::is_finished)
            {
                tokio::task::yield_now().await;
            }
        }
        drop(near);
        idle.await.unwrap();
    });
    Arc::into_inner(log).unwrap().into_inner().unwrap()
}

#[test]
fn a_client_that_asks_for_little_waits_for_a_few_quanta_and_not_for_all_busy_ones() {
    for (style, cost) in [
        (Busy::PassesOn, QUANTUM),
        (Busy::PassesOn, SHORT_QUANTUM),
        (Busy::Rests, QUANTUM / 2),
        (Busy::Rests, SHORT_QUANTUM),
        (Busy::Rests, SHORT_QUANTUM / 2),
    ] {
        let log = run(50, 20, style, cost);
        // New connections have their first turn before the second of any other.
        let settled = log.iter().position(|turn| *turn == Some(49)).unwrap() + 1;
        let runs = log[settled..].split(Option::is_none);
        let longest = runs.map(<[_]>::len).max().unwrap();
        let most = (4 * SHORT_QUANTUM / cost).max(4);
        assert!(longest <= most, "{longest} turns in a row, each of {cost}");
    }
}

#[test]
fn those_who_are_busy_take_turns() {
    for (style, cost) in [(Busy::PassesOn, QUANTUM), (Busy::Rests, SHORT_QUANTUM)] {
        let log: Vec<usize> = run(5, 100, style, cost).into_iter().flatten().collect();
        assert_eq!(log.len(), 500);
        let mut counts = [0_usize; 5];
        for task in log {
            counts[task] += 1;
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(most - least <= 2, "{counts:?}");
        }
    }
}

#[test]
fn turns_go_by_the_work_that_was_done() {
    let log = Arc::new(Mutex::new([0_usize; 2]));
    let thread = Thread::new(Arc::new(AtomicUsize::new(2)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let tasks = [SHORT_QUANTUM, 4 * SHORT_QUANTUM].map(|cost| {
            let (log, mut turn) = (Arc::clone(&log), Turn::new(thread.clone()));
            let index = usize::from(cost > SHORT_QUANTUM);
            tokio::spawn(async move {
                while log.lock().unwrap()[0] < 1000 {
                    let count = || log.lock().unwrap()[index] += 1;
                    work(&mut turn, Busy::PassesOn, cost, count).await;
                }
            })
        });
        for task in tasks {
            task.await.unwrap();
        }
    });
    let [_, of_greedy] = *log.lock().unwrap();
    assert!((240..=260).contains(&of_greedy), "{of_greedy}");
}

#[tokio::test]
async fn a_client_that_waits_for_each_request_is_known_as_one_until_it_sends_several() {
    let thread = Thread::new(Arc::new(AtomicUsize::new(2)));
    let mut turn = Turn::new(thread);
    let serve = |turn: &mut Turn, cost| {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(turn.poll(&mut cx).is_ready(), "there is no other connection");
        turn.spend(cost);
        if turn.ends_with_round() {
            turn.pass_on(&mut cx);
        }
        turn.rest();
    };
    serve(&mut turn, 4 * REQUEST_COST);
    assert!(!turn.is_light());
    for _ in 0..2 * LIGHT_RUNS {
        serve(&mut turn, 2 * REQUEST_COST);
    }
    assert!(turn.is_light());
    // A part of a long payload is not a small request.
    turn.spend_in_bulk(1);
    turn.rest();
    assert!(!turn.is_light());
}

#[tokio::test]
async fn who_leaves_while_it_is_its_turn_leaves_it_to_the_next() {
    let thread = Thread::new(Arc::new(AtomicUsize::new(3)));
    let mut turns: Vec<_> = (0..3).map(|_| Turn::new(thread.clone())).collect();
    let mut cx = Context::from_waker(Waker::noop());
    for turn in &mut turns {
        turn.pass_on(&mut cx);
    }
    let mut last = turns.pop().unwrap();
    assert!(last.poll(&mut cx).is_pending(), "the first is next");
    drop(turns);
    assert!(last.poll(&mut cx).is_ready());
    assert!(thread.order().waiting.is_empty() && thread.order().chosen.is_none());
}

#[tokio::test]
async fn a_connection_alone_on_its_thread_is_never_over() {
    let connections = Arc::new(AtomicUsize::new(1));
    let mut turn = Turn::new(Thread::new(Arc::clone(&connections)));
    turn.spend(2 * QUANTUM);
    assert!(!turn.is_over());
    connections.store(2, Ordering::Relaxed);
    assert!(turn.is_over());
    turn.pass().await;
    assert!(!turn.is_over());
}
