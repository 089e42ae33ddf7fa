//! Reads and writes that have to wait for a disk, through io_uring: one ring for each worker
//! thread.
//!
//! A connection starts several of a turn with one system call, and a task of the same thread takes
//! the results, so no other thread is woken. What a ring cannot carry out completely (errors,
//! ends of files) goes back to the pool of threads. Without io_uring, or if the configuration
//! switches it off, the pool does everything.
//!
//! A write keeps its place until the kernel has reported its end, whatever becomes of the client,
//! the server or the ring: if it could still reach the disk later, it might overwrite what another
//! write has put there meanwhile.

mod counters;
mod layout;
mod polling;
mod share;
mod spare;
mod work;
mod yielding;

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use crate::error::system_words;
use crate::sys::uring::{Ended, Ring, TRANSFERS_MAX};
pub(crate) use counters::RingCounters;
pub use counters::RingStatistics;
use layout::Layout;
pub(crate) use polling::Polling;
use polling::Rhythm;
use share::{LaneId, Shares};
use spare::Spare;
use work::{Flight, Outcome, Work};
pub(crate) use work::{FullWrite, Reader, RingRead, RingWrite, Writer};
use yielding::Yielding;

/// How long a worker that ends waits for the reads of clients that have left.
const PATIENCE: Duration = Duration::from_secs(5);

/// The ring of a worker thread, if it has one. Clones refer to the same ring.
#[derive(Clone, Default)]
pub(crate) struct RingHandle(Option<Arc<Mutex<State>>>);

impl std::fmt::Debug for RingHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RingHandle").field(&self.0.is_some()).finish()
    }
}

/// One connection's place among the others of its ring. What waits there goes when this is dropped,
/// except writes that are wanted all the same.
#[derive(Debug)]
pub(crate) struct RingLane {
    ring: RingHandle,
    id: LaneId,
}

struct State {
    ring: Ring,
    /// What waits, and what each connection has started.
    shares: Shares<Work>,
    /// What has started, by its number: the connection, the bytes that it counts for, and the rest.
    flights: Vec<Option<(LaneId, usize, Flight)>>,
    spare: Spare,
    /// The ring has failed and is not used any more.
    is_broken: bool,
}

impl RingHandle {
    /// A ring for this thread, or the reason why there is none.
    pub(crate) fn new(counters: RingCounters) -> std::io::Result<(Self, RingDriver)> {
        let ring = Ring::new()?;
        let descriptor = ring.watch()?;
        let mut flights = Vec::new();
        flights.resize_with(TRANSFERS_MAX, || None);
        let shares = Shares::new(TRANSFERS_MAX);
        let (spare, is_broken) = (Spare::default(), false);
        let state = Arc::new(Mutex::new(State { ring, shares, flights, spare, is_broken }));
        Ok((Self(Some(Arc::clone(&state))), RingDriver { descriptor, state, counters }))
    }

    /// A place for a connection, if there is a ring.
    pub(crate) fn lane(&self) -> Option<RingLane> {
        let id = lock(self.0.as_ref()?).shares.open();
        Some(RingLane { ring: self.clone(), id })
    }

    fn lock(&self) -> Option<MutexGuard<'_, State>> {
        self.0.as_deref().map(lock)
    }
}

impl RingLane {
    /// Begins a read, or has it wait for its turn.
    pub(crate) fn read(&self, read: RingRead, reader: Box<dyn Reader>) {
        self.begin(Work::Read(read, reader));
    }

    /// Begins a write, or has it wait for its turn.
    pub(crate) fn write(&self, write: RingWrite, writer: Box<dyn Writer>) {
        self.begin(Work::Write(write, writer));
    }

    fn begin(&self, work: Work) {
        let Some(mut state) = self.ring.lock() else { return work.refuse().deliver() };
        let failed = state.push(self.id, work);
        drop(state);
        failed.into_iter().for_each(Outcome::deliver);
    }

    /// Submits the rest of what has begun to the kernel.
    pub(crate) fn submit(&self) {
        let Some(mut state) = self.ring.lock() else { return };
        let failed = state.submit();
        drop(state);
        failed.into_iter().for_each(Outcome::deliver);
    }

    /// Takes the memory of a reply back, for later reads.
    pub(crate) fn give_back(&self, memory: Vec<u8>) {
        // Most replies, as those to writes, are in memory of their own.
        if Spare::takes(&memory)
            && let Some(mut state) = self.ring.lock()
        {
            state.spare.give_back(memory);
        }
    }

    /// Whether nothing waits or is under way, of any connection.
    pub(crate) fn is_idle(&self) -> bool {
        self.ring
            .lock()
            .is_none_or(|state| state.ring.in_flight() == 0 && !state.shares.has_waiting())
    }
}

impl Drop for RingLane {
    fn drop(&mut self) {
        let close = |mut state: MutexGuard<'_, State>| {
            // What others use comes back by itself.
            state.spare.clear();
            state.shares.close(self.id, Work::outlives_connection)
        };
        // Their files and leases are released without the lock.
        let abandoned = self.ring.lock().map(close);
        drop(abandoned);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Begins work, or queues it; what the ring cannot do comes back. The disk gets the first ones
    /// of a batch while the others are not there yet.
    fn push(&mut self, id: LaneId, work: Work) -> Vec<Outcome> {
        if self.is_broken {
            return vec![work.refuse()];
        }
        let together = work.together();
        self.shares.push(id, work.length(), work);
        let mut failed = self.start();
        if self.ring.unsubmitted() >= together {
            failed.extend(self.submit());
        }
        failed
    }

    /// Begins the work whose turn it is; what the ring cannot do comes back.
    fn start(&mut self) -> Vec<Outcome> {
        let mut failed = Vec::new();
        while let Some((id, length, work)) = self.shares.pop() {
            let begun = match work {
                Work::Read(read, reader) => self.begin_read(read, reader),
                Work::Write(write, writer) => self.begin_write(write, writer),
            };
            match begun {
                Ok((number, flight)) => self.flights[number] = Some((id, length, flight)),
                Err(outcome) => {
                    self.shares.finish(id, length);
                    failed.push(outcome);
                }
            }
        }
        failed
    }

    fn begin_read(
        &mut self,
        read: RingRead,
        reader: Box<dyn Reader>,
    ) -> Result<(usize, Flight), Outcome> {
        let RingRead { placed, number, offset, length, head, tail } = read;
        let Some(file) = placed.file(number) else { return Err(Outcome::Unread(reader)) };
        let block = file.offset_alignment;
        let skipped = offset % block;
        let alignments = (block as usize, file.memory_alignment);
        let around = (head, tail);
        let planned = Layout::new(skipped as usize, length, around, alignments, &mut self.spare);
        let Some((buffer, layout)) = planned else { return Err(Outcome::Unread(reader)) };
        let begun = self.ring.read(file.fd, offset - skipped, buffer);
        match begun {
            Ok(number) => Ok((number, Flight::Read { placed, layout, reader })),
            Err(_) => Err(Outcome::Unread(reader)),
        }
    }

    fn begin_write(
        &mut self,
        write: RingWrite,
        writer: Box<dyn Writer>,
    ) -> Result<(usize, Flight), Outcome> {
        let RingWrite { placed, payload, durability } = write;
        let length = payload.len();
        let Some((fd, offset, alignment)) = layout::target(&*placed, length) else {
            drop(placed);
            return Err(Outcome::Unwritten(writer, payload));
        };
        let (buffer, at) = layout::aligned(payload, alignment, &mut self.spare);
        let begun = self.ring.write(fd, offset, (buffer, at, length), durability);
        let flight = Flight::Write { placed, at, length, durability, writer };
        match begun {
            Ok(number) => Ok((number, flight)),
            Err(buffer) => Err(flight.end(buffer, None, &mut self.spare)),
        }
    }

    /// Submits what has begun; what will not be done comes back, if the ring has failed.
    fn submit(&mut self) -> Vec<Outcome> {
        if self.is_broken {
            // What was not submitted has no receiver any more, and its files may be closed.
            return Vec::new();
        }
        self.ring.submit().map_or_else(|error| self.give_up(&error), |()| Vec::new())
    }

    /// What has ended, and how many of it were writes, but for those to stable storage.
    fn ended(&mut self) -> (Vec<Outcome>, usize) {
        let ended = match self.ring.ended() {
            Ok(ended) => ended,
            Err(error) => return (self.give_up(&error), 0),
        };
        let mut writes = 0;
        let ended = ended.into_iter().filter_map(|Ended { number, buffer, result }| {
            let (id, length, flight) = self.flights.get_mut(number)?.take()?;
            self.shares.finish(id, length);
            writes += usize::from(flight.is_cached_write());
            Some(flight.end(buffer, Some(result), &mut self.spare))
        });
        let mut outcomes: Vec<Outcome> = ended.collect();
        if !self.is_broken {
            let failed = self.start().into_iter().chain(self.submit());
            outcomes.extend(failed);
        }
        (outcomes, writes)
    }

    /// Notes that the ring has failed, and returns all work but the writes that the kernel knows
    /// of: these may still reach the disk, and so nothing else may be written there until they have
    /// ended. The buffers of what was submitted stay until then as well.
    fn give_up(&mut self, error: &std::io::Error) -> Vec<Outcome> {
        if !std::mem::replace(&mut self.is_broken, true) {
            let error = system_words(error);
            tracing::warn!(error, "io_uring has failed; threads read and write from now on");
        }
        let mut outcomes: Vec<Outcome> =
            self.shares.give_up().into_iter().map(Work::refuse).collect();
        for (number, place) in self.flights.iter_mut().enumerate() {
            let is_at_large = |(_, _, flight): &mut (LaneId, usize, Flight)| match flight {
                Flight::Read { .. } => true,
                Flight::Write { .. } => self.ring.is_unsubmitted(number),
            };
            if let Some((_, _, flight)) = place.take_if(is_at_large) {
                let buffer = match &flight {
                    // The kernel may still write to it.
                    Flight::Read { .. } => Vec::new(),
                    Flight::Write { .. } => self.ring.buffer(number).to_vec(),
                };
                outcomes.push(flight.end(buffer, None, &mut self.spare));
            }
        }
        outcomes
    }

    /// Whether the kernel has writes.
    fn is_writing(&self) -> bool {
        let flights = self.flights.iter().flatten();
        flights.into_iter().any(|(_, _, flight)| matches!(flight, Flight::Write { .. }))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // The kernel may still carry these writes out: their places are never given away.
        for (_, _, flight) in self.flights.drain(..).flatten() {
            if matches!(flight, Flight::Write { .. }) {
                std::mem::forget(flight);
            }
        }
    }
}

/// Takes the results of a ring. It has to run as long as the ring is used.
pub(crate) struct RingDriver {
    descriptor: AsyncFd<OwnedFd>,
    state: Arc<Mutex<State>>,
    counters: RingCounters,
}

impl RingDriver {
    /// Hands results to their receivers; it never returns.
    ///
    /// # Cancel safety
    ///
    /// Safe: no result is lost, because [`end`](Self::end) takes the rest.
    pub(crate) async fn run(&self, polling: Polling) {
        self.run_by(Instant::now, &polling).await;
    }

    /// As [`run`](Self::run), by this clock.
    async fn run_by(&self, now: impl Fn() -> Instant, polling: &Polling) {
        let mut rhythm = Rhythm::new(now());
        let mut yielding = Yielding::default();
        // It fails only when the runtime ends.
        while let Ok(mut ready) = self.readable(polling, &rhythm).await {
            // Results that come from now on are reported again.
            ready.clear_ready();
            let more = rhythm.is_writing() && lock(&self.state).ring.in_flight() > 1;
            if yielding.before_results(more) {
                self.counters.yielded();
            }
            let ended = self.deliver();
            rhythm.record(now(), ended);
        }
        std::future::pending::<()>().await;
    }

    /// Waits for results, at first by polling.
    async fn readable(
        &self,
        polling: &Polling,
        rhythm: &Rhythm,
    ) -> std::io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        tokio::select! {
            biased;
            ready = self.descriptor.readable() => ready,
            () = polling.poll(rhythm, &self.counters) => self.descriptor.readable().await,
        }
    }

    /// Hands what has ended to its receivers; returns how much it was, and how many of it were
    /// writes, but for those to stable storage.
    fn deliver(&self) -> (usize, usize) {
        let (ended, writes) = lock(&self.state).ended();
        let count = ended.len();
        // Before anybody has a reply.
        let carried_out = |which: fn(&Outcome) -> bool| ended.iter().filter(|it| which(it)).count();
        self.counters.carried_out(
            carried_out(|outcome| matches!(outcome, Outcome::Filled(..))),
            carried_out(|outcome| matches!(outcome, Outcome::Written(..))),
        );
        for outcome in ended {
            // The other results, and this thread's connections, must not end with one that panics.
            if catch_unwind(AssertUnwindSafe(|| outcome.deliver())).is_err() {
                tracing::error!("the end of a read or write panicked");
            }
        }
        (count, writes)
    }

    /// Waits for the writes of clients that have left, and for their reads for a bounded time: a
    /// disk may hang.
    pub(crate) async fn end(self) {
        let start = Instant::now();
        let is_wanted = |state: &State| {
            // What waits now are writes that are wanted.
            state.is_writing()
                || state.shares.has_waiting()
                || state.ring.in_flight() > 0 && start.elapsed() < PATIENCE
        };
        while is_wanted(&lock(&self.state)) {
            let _ = tokio::time::timeout(Duration::from_millis(100), self.descriptor.readable())
                .await
                .map(|ready| ready.map(|mut ready| ready.clear_ready()));
            self.deliver();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::sync::mpsc;

    use nbd_proto::transmission::Durability;

    use super::*;
    use crate::export::{ExportError, PlacedFile, PlacedPart, PlacedRead, PlacedWrite};
    use crate::reply_bytes::ReplyBytes;
    use crate::slots::Slots;

    /// The first bytes of a file.
    struct Start(File);

    impl PlacedRead for Start {
        fn part(&self, _: usize) -> Option<PlacedPart> {
            None
        }

        fn file(&self, _: usize) -> Option<PlacedFile<'_>> {
            Some(PlacedFile::new(self.0.as_fd()))
        }
    }

    impl Reader for mpsc::Sender<Vec<u8>> {
        fn filled(self: Box<Self>, bytes: ReplyBytes) {
            self.send(bytes.to_vec()).unwrap();
        }

        fn failed(self: Box<Self>) {
            panic!("the ring did not read");
        }
    }

    impl PlacedWrite for Start {
        fn file(&self) -> Option<PlacedFile<'_>> {
            Some(PlacedFile::new(self.0.as_fd()))
        }

        fn offset(&self) -> u64 {
            0
        }

        fn is_durable_alone(&self) -> bool {
            false
        }

        fn failed(self: Box<Self>, _: &std::io::Error) {
            panic!("the ring did not write");
        }

        fn written(self: Box<Self>) -> Result<(), ExportError> {
            Ok(())
        }
    }

    impl Writer for tokio::sync::mpsc::UnboundedSender<()> {
        fn is_abandoned(&self) -> bool {
            false
        }

        fn written(self: Box<Self>, result: Result<(), ExportError>) {
            result.unwrap();
            self.send(()).unwrap();
        }

        fn failed(self: Box<Self>, _: Vec<u8>) {
            panic!("the ring did not write");
        }

        fn found_no_space(self: Box<Self>, _: FullWrite) {
            panic!("there is space");
        }
    }

    /// A ring, if this system has io_uring.
    fn ring() -> Option<(RingHandle, RingDriver)> {
        let made = RingHandle::new(RingCounters::new(1));
        if let Err(error) = &made {
            assert!(std::env::var_os("CI").is_none(), "io_uring: {error}");
            eprintln!("skipped: this system has no io_uring: {error}");
        }
        made.ok()
    }

    #[tokio::test]
    async fn a_thread_polls_and_yields_while_writes_end_soon_after_each_other() {
        for may_poll in [false, true] {
            let Some((handle, driver)) = ring() else { return };
            let (lane, file) = (handle.lane().unwrap(), tempfile::tempfile().unwrap());
            let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
            let polling = Polling::new(may_poll.then(|| Slots::new(1)));
            let (start, counters) = (Instant::now(), driver.counters.clone());
            let groups = async {
                // Each is at the disk alone first, then with others.
                for (groups, writes) in [(60, 1), (10, 64)] {
                    for _ in 0..groups {
                        for _ in 0..writes {
                            let placed = Box::new(Start(file.try_clone().unwrap()));
                            let (payload, durability) = (vec![7; 512], Durability::Cached);
                            let write = RingWrite { placed, payload, durability };
                            lane.write(write, Box::new(sender.clone()));
                        }
                        lane.submit();
                        for _ in 0..writes {
                            receiver.recv().await.unwrap();
                        }
                    }
                    if writes == 1 {
                        assert_eq!(counters.statistics().yields, 0, "no more are to come");
                    }
                }
            };
            // By its clock, no time passes.
            tokio::select! {
                () = groups => {}
                () = driver.run_by(|| start, &polling) => {}
            }
            let done = counters.statistics();
            assert_eq!((done.reads, done.writes), (0, 700));
            assert_eq!(done.polls > 0, may_poll, "{done:?}");
            assert!(done.yields > 0, "{done:?}");
        }
    }

    #[tokio::test]
    async fn the_first_reads_of_a_batch_start_before_its_last_one_is_there() {
        let Some((handle, driver)) = ring() else { return };
        let lane = handle.lane().unwrap();
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], 0).unwrap();
        let (sender, receiver) = mpsc::channel();
        let read = |_| {
            let placed = Box::new(Start(file.try_clone().unwrap()));
            let (head, tail) = (Vec::new(), Vec::new());
            let read = RingRead { placed, number: 0, offset: 0, length: 512, head, tail };
            lane.read(read, Box::new(sender.clone()));
        };
        (0..6).for_each(read);
        // Two are not enough for a call by themselves.
        assert_eq!(lock(&driver.state).ring.unsubmitted(), 2);
        lane.submit();
        assert_eq!(lock(&driver.state).ring.unsubmitted(), 0);
        let mut filled = Vec::new();
        while filled.len() < 6 {
            driver.descriptor.readable().await.unwrap().clear_ready();
            driver.deliver();
            filled.extend(receiver.try_iter());
        }
        assert!(filled.iter().all(|bytes| *bytes == [7; 512]));
        assert_eq!(driver.counters.statistics().reads, 6);
    }
}
