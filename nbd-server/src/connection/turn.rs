//! Turns of the connections that share a worker thread.
//!
//! A connection works as long as its client keeps it busy, but after a *quantum* others get their
//! turn. A connection with more work than that has to wait for its next turn, of which there is one
//! at a time on each thread. So a client with little work waits for a quantum at most, however much
//! work the others have, and those others take turns.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a connection may do before others get their turn, in bytes moved: some 200 to 400
/// microseconds.
const QUANTUM: usize = 1024 * 1024;
/// Rounds of one connection before other tasks of its thread are looked at, in any case.
const ROUNDS_BEFORE_YIELD: u32 = 8;
/// What a request or an option takes beside the bytes it moves.
pub(super) const REQUEST_COST: usize = 4096;
/// What a byte costs that was received under TLS and brings nothing, in bytes moved.
pub(super) const BARREN_COST: usize = 64;

/// What the connections of one worker thread share.
#[derive(Debug, Clone)]
pub(crate) struct Thread {
    /// How many there are.
    pub(crate) connections: Arc<AtomicUsize>,
    turn: Arc<Semaphore>,
}

impl Thread {
    pub(crate) fn new(connections: Arc<AtomicUsize>) -> Self {
        Self { connections, turn: Arc::new(Semaphore::new(1)) }
    }
}

type Waiting = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

enum State {
    /// It has done little since it was idle, and needs no turn.
    Light,
    Waits(Waiting),
    /// It is its turn. The permit is given back when it is dropped.
    Has {
        _permit: Option<OwnedSemaphorePermit>,
    },
}

/// One connection's place among the others of its thread.
pub(super) struct Turn {
    thread: Thread,
    state: State,
    spent: usize,
    rounds: u32,
}

impl Turn {
    pub(super) const fn new(thread: Thread) -> Self {
        Self { thread, state: State::Light, spent: 0, rounds: 0 }
    }

    /// Takes note of work that was done, in bytes moved.
    pub(super) const fn spend(&mut self, cost: usize) {
        self.spent = self.spent.saturating_add(cost);
    }

    /// Has the connection done as much as it may at a time? Never while it is alone on its thread.
    pub(super) fn is_over(&self) -> bool {
        self.spent >= QUANTUM && !self.is_alone()
    }

    /// One round of the connection's work is done. Are other tasks of the thread to be looked at?
    pub(super) fn ends_with_round(&mut self) -> bool {
        self.rounds = self.rounds.wrapping_add(1);
        self.is_over() || self.rounds.is_multiple_of(ROUNDS_BEFORE_YIELD)
    }

    fn is_alone(&self) -> bool {
        self.thread.connections.load(Ordering::Relaxed) <= 1
    }

    /// The connection has nothing to do any more.
    pub(super) fn rest(&mut self) {
        self.state = State::Light;
        self.spent = 0;
    }

    /// Lets others work, although there is more to do: the task is woken when it is to go on. Look
    /// with [`Turn::poll`] whether it is.
    pub(super) fn pass_on(&mut self, cx: &mut Context<'_>) {
        self.rest();
        if self.is_alone() {
            return cx.waker().wake_by_ref();
        }
        let turn = Arc::clone(&self.thread.turn);
        // The semaphore is never closed.
        self.state = State::Waits(Box::pin(async move { turn.acquire_owned().await.ok() }));
        // Pending in either case.
        let _ = self.poll(cx);
    }

    /// Ready when the connection may work.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let State::Waits(waiting) = &mut self.state else { return Poll::Ready(()) };
        let permit = ready!(waiting.as_mut().poll(cx));
        self.state = State::Has { _permit: permit };
        // Those whose sockets have become ready in the meantime come first: the runtime looks for
        // them before it wakes who yields.
        let _ = pin!(tokio::task::yield_now()).poll(cx);
        Poll::Pending
    }

    /// [Passes the turn on](Self::pass_on) and waits for the next.
    pub(super) async fn pass(&mut self) {
        self.rest();
        let mut is_passed = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut is_passed, true) {
                return self.poll(cx);
            }
            self.pass_on(cx);
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::*;

    /// What happened, in order: a number for a quantum of a busy task, `None` for the one that was
    /// idle.
    fn run(busy: usize, quanta: usize) -> Vec<Option<usize>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let thread = Thread::new(Arc::new(AtomicUsize::new(busy + 1)));
        runtime.block_on(async {
            let (mut near, mut far) = UnixStream::pair().unwrap();
            let idle = tokio::spawn({
                let log = Arc::clone(&log);
                async move {
                    while far.read_u8().await.is_ok() {
                        log.lock().unwrap().push(None);
                    }
                }
            });
            let tasks: Vec<_> = (0..busy)
                .map(|index| {
                    let (log, mut turn) = (Arc::clone(&log), Turn::new(thread.clone()));
                    tokio::spawn(async move {
                        for _ in 0..quanta {
                            turn.pass().await;
                            log.lock().unwrap().push(Some(index));
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
    fn whoever_asks_for_little_waits_for_a_few_quanta_and_not_for_all_who_are_busy() {
        let log = run(50, 20);
        let longest = log.split(Option::is_none).map(<[_]>::len).max().unwrap();
        assert!(longest <= 4, "{longest} quanta in a row");
    }

    #[test]
    fn those_who_are_busy_take_turns() {
        let log: Vec<usize> = run(5, 100).into_iter().flatten().collect();
        assert_eq!(log.len(), 500);
        for round in log.chunks(5) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3, 4]);
        }
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
}
