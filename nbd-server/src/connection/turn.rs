//! Turns of the connections that share a worker thread.
//!
//! A connection works as long as its client keeps it busy, but after a *quantum* others get their
//! turn. Each connection has a virtual time, which is the work it has had, in bytes moved. Where
//! several have work at a time, the one with the least goes first, and after a quantum of work the
//! runtime looks at the sockets before any of them goes on. One that was idle continues a little
//! before the present time. So a client with little work waits for a quantum or two, however many
//! others have more, and those others share the thread alike.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::ring::RingHandle;

/// What may be done before others get their turn, in bytes moved: some 200 to 400 microseconds.
const QUANTUM: usize = 1024 * 1024;
/// The same while there are clients with little work: some 30 microseconds.
const SHORT_QUANTUM: usize = 128 * 1024;
/// What a connection with little work does between two times at which it is idle, in bytes moved: one
/// small request.
const LIGHT_LEN: usize = 2 * REQUEST_COST;
/// How often in a row that has to be. A client with a few requests in flight sends two at a time
/// sooner or later, and is served best with such batches.
const LIGHT_RUNS: u8 = 16;
/// Such work is charged at a part of its cost, one of so many: a client that waits for each of its
/// requests is next after every quantum, also where that is more than an even share.
const LIGHT_DISCOUNT: usize = 8;
/// How long such a connection is remembered, in bytes moved by its thread: for the length of turns,
/// and for work that may be held up by the system.
const LIGHT_MEMORY: u64 = 64 << 20;
const LONG_LIGHT_MEMORY: u64 = 256 << 20;
/// For how long it is assumed that a new connection is one, for the latter, in bytes moved.
const BENEFIT_OF_DOUBT: u64 = 64 << 20;
/// How far behind the others a connection that was idle may be, in bytes moved.
const HEAD_START: u64 = 2 * SHORT_QUANTUM as u64;
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
    /// Reads what is not in memory.
    pub(crate) ring: RingHandle,
    /// Never waited for: only this thread locks it.
    order: Arc<Mutex<Order>>,
}

/// The order of the connections of one thread.
#[derive(Debug)]
struct Order {
    next_id: u64,
    /// The virtual time at which the latest turn began.
    clock: u64,
    /// Connections with work, the one with the least virtual time first.
    waiting: BTreeMap<(u64, u64), Waker>,
    /// The one that was woken for its turn.
    chosen: Option<u64>,
    /// The one that waits until the runtime has looked at the sockets.
    looker: Option<(u64, Arc<Look>)>,
    /// Work since the sockets were looked at, and since a connection with little work was about.
    since_look: usize,
    since_light: u64,
}

impl Thread {
    pub(crate) fn new(connections: Arc<AtomicUsize>) -> Self {
        let order = Order {
            next_id: 0,
            clock: HEAD_START,
            waiting: BTreeMap::new(),
            chosen: None,
            looker: None,
            since_look: 0,
            since_light: u64::MAX,
        };
        let order = Arc::new(Mutex::new(order));
        Self { connections, ring: RingHandle::default(), order }
    }

    pub(crate) fn with_ring(self, ring: RingHandle) -> Self {
        Self { ring, ..self }
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Order {
    /// What a connection may do at a time.
    const fn quantum(&self) -> usize {
        if self.since_light < LIGHT_MEMORY { SHORT_QUANTUM } else { QUANTUM }
    }

    /// Are the sockets to be looked at before anything else is done?
    const fn wants_look(&self) -> bool {
        self.since_look >= self.quantum()
    }

    /// Does the order matter?
    fn is_contended(&self) -> bool {
        self.wants_look() || self.chosen.is_some() || !self.waiting.is_empty()
    }

    /// Takes note of work.
    fn spend(&mut self, spent: usize) {
        self.since_look = self.since_look.saturating_add(spent);
        self.since_light = self.since_light.saturating_add(spent as u64);
    }

    /// Queues a connection, and wakes the one whose turn it is.
    fn wait(&mut self, key: (u64, u64), cx: &mut Context<'_>) {
        self.waiting.insert(key, cx.waker().clone());
        if !self.wants_look() {
            self.wake_next();
        } else if self.looker.is_none() {
            let task = cx.waker().clone();
            let look = Arc::new(Look { is_over: AtomicBool::new(false), task });
            self.looker = Some((key.1, Arc::clone(&look)));
            // The runtime looks for sockets that have become ready before it wakes who yields, and
            // their tasks come first.
            let look = Waker::from(look);
            let _ = pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&look));
        }
    }

    fn wake_next(&mut self) {
        if self.chosen.is_some() || self.looker.is_some() {
            return;
        }
        if let Some(((_, id), waker)) = self.waiting.pop_first() {
            self.chosen = Some(id);
            waker.wake();
        }
    }

    /// Forgets a connection that waits.
    fn withdraw(&mut self, key: (u64, u64)) {
        self.waiting.remove(&key);
        self.chosen.take_if(|chosen| *chosen == key.1);
        self.looker.take_if(|(looker, _)| *looker == key.1);
    }
}

/// A look of the runtime at the sockets. The task that waits for it may be woken before by others.
#[derive(Debug)]
struct Look {
    is_over: AtomicBool,
    task: Waker,
}

impl Wake for Look {
    fn wake(self: Arc<Self>) {
        self.is_over.store(true, Ordering::Relaxed);
        self.task.wake_by_ref();
    }
}

/// What a connection is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Waits,
    Works,
}

/// One connection's place among the others of its thread.
pub(super) struct Turn {
    thread: Thread,
    id: u64,
    /// Its virtual time: when its turn began, or will.
    time: u64,
    state: State,
    /// What it may do in this turn, and has done.
    quantum: usize,
    spent: usize,
    /// How often in a row it did little, at most [`LIGHT_RUNS`].
    light_runs: u8,
    rounds: u32,
}

impl Turn {
    pub(super) fn new(thread: Thread) -> Self {
        let mut order = thread.order();
        let id = order.next_id;
        order.next_id += 1;
        order.since_light = order.since_light.min(LONG_LIGHT_MEMORY - BENEFIT_OF_DOUBT);
        drop(order);
        Self {
            thread,
            id,
            time: 0,
            state: State::Idle,
            quantum: QUANTUM,
            spent: 0,
            light_runs: LIGHT_RUNS,
            rounds: 0,
        }
    }

    /// Takes note of work that was done, in bytes moved.
    pub(super) const fn spend(&mut self, cost: usize) {
        self.spent = self.spent.saturating_add(cost);
    }

    /// Has the connection done as much as it may at a time? Never while it is alone on its thread.
    pub(super) fn is_over(&self) -> bool {
        self.spent >= self.quantum && !self.is_alone()
    }

    /// How much the connection may still do, in bytes moved.
    pub(super) fn left(&self) -> usize {
        if self.is_alone() { usize::MAX } else { self.quantum.saturating_sub(self.spent) }
    }

    /// One round of the connection's work is done. Are other tasks of the thread to be looked at?
    pub(super) fn ends_with_round(&mut self) -> bool {
        self.rounds = self.rounds.wrapping_add(1);
        self.is_over() || self.rounds.is_multiple_of(ROUNDS_BEFORE_YIELD)
    }

    /// Are there others on the thread that wait for little, so that a call which the system may hold
    /// up is better made elsewhere?
    pub(super) fn has_light_company(&self) -> bool {
        !self.is_alone() && self.thread.order().since_light < LONG_LIGHT_MEMORY
    }

    fn is_alone(&self) -> bool {
        self.thread.connections.load(Ordering::Relaxed) <= 1
    }

    const fn is_light(&self) -> bool {
        self.light_runs == LIGHT_RUNS
    }

    const fn key(&self) -> (u64, u64) {
        (self.time, self.id)
    }

    /// The connection has nothing to do any more.
    pub(super) fn rest(&mut self) {
        match self.state {
            State::Idle => self.end(),
            State::Works => {
                if self.spent > LIGHT_LEN {
                    self.light_runs = 0;
                } else if self.spent > 0 {
                    self.light_runs = LIGHT_RUNS.min(self.light_runs + 1);
                }
                self.end();
                self.thread.order().wake_next();
            }
            State::Waits => {
                self.end();
                let mut order = self.thread.order();
                order.withdraw(self.key());
                order.wake_next();
            }
        }
    }

    /// Charges what was done.
    fn end(&mut self) {
        if self.spent == 0 {
            self.state = State::Idle;
            return;
        }
        let spent = std::mem::take(&mut self.spent);
        self.thread.order().spend(spent);
        if self.state == State::Works {
            let charged = if self.is_light() { spent / LIGHT_DISCOUNT } else { spent };
            self.time = self.time.saturating_add(charged as u64);
        }
        self.state = State::Idle;
    }

    /// Lets others work, although there is more to do: the task is woken when it is to go on. Look
    /// with [`Turn::poll`] whether it is.
    pub(super) fn pass_on(&mut self, cx: &mut Context<'_>) {
        // Connections with little work pass on as well, after a number of rounds.
        if self.spent > LIGHT_LEN {
            self.light_runs = 0;
        }
        self.end();
        if self.is_alone() {
            return cx.waker().wake_by_ref();
        }
        self.state = State::Waits;
        self.thread.order().wait(self.key(), cx);
    }

    /// Ready when the connection may work.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_alone = self.is_alone();
        let mut order = self.thread.order();
        let is_chosen = order.chosen == Some(self.id);
        if self.state == State::Waits {
            match &order.looker {
                Some((id, look)) if *id == self.id => {
                    if !look.is_over.load(Ordering::Relaxed) {
                        return Poll::Pending;
                    }
                    order.since_look = 0;
                }
                _ => {}
            }
            order.withdraw((self.time, self.id));
        } else {
            self.time = self.time.max(order.clock.saturating_sub(HEAD_START));
        }
        let is_contended = !is_alone && order.is_contended();
        let is_light = self.is_light();
        if is_light && is_contended {
            order.since_light = 0;
        }
        let key = (self.time, self.id);
        let is_first = order.waiting.first_key_value().is_none_or(|(first, _)| key < *first);
        let is_due = is_chosen || (is_first && (order.chosen.is_none() || is_light));
        if is_contended && (order.wants_look() || !is_due) {
            self.state = State::Waits;
            order.wait(key, cx);
            return Poll::Pending;
        }
        order.clock = order.clock.max(self.time);
        self.quantum = order.quantum();
        self.state = State::Works;
        Poll::Ready(())
    }

    /// [Passes the turn on](Self::pass_on) and waits for the next.
    pub(super) async fn pass(&mut self) {
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

impl Drop for Turn {
    fn drop(&mut self) {
        self.rest();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::*;

    /// What a busy task does after each of its turns.
    #[derive(Clone, Copy)]
    enum Busy {
        /// It has more to do, and says so.
        PassesOn,
        /// It waits for requests, of which there are more at once.
        Rests,
    }

    /// Works in `turn` and logs it, if it is ready; then others are looked at.
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
    fn whoever_asks_for_little_waits_for_a_few_quanta_and_not_for_all_who_are_busy() {
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
}
