//! Reads that have to wait for a disk, through io_uring: one ring for each worker thread.
//!
//! A connection starts all reads of a turn with one system call, and a task of the same thread takes the
//! results, so no other thread is woken. Reads that a ring cannot carry out completely (errors, ends of
//! files) go back to the pool of threads. Without io_uring, or if the configuration switches it off, the
//! pool does everything.

mod share;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;

use crate::error::system_words;
use crate::export::PlacedRead;
use crate::sys::uring::{Ended, READS_MAX, Ring};
use share::{ReaderId, Shares};

/// How long a worker that ends waits for the reads of clients that have left.
const PATIENCE: Duration = Duration::from_secs(5);

/// A read to be carried out: bytes of one file, between bytes that are known already.
pub(crate) struct RingRead {
    /// Where the bytes are. It is kept until they have arrived.
    pub(crate) placed: Box<dyn PlacedRead>,
    /// The [number](PlacedRead::file) of the file, and the offset and the length of the bytes in it.
    pub(crate) number: usize,
    pub(crate) offset: u64,
    pub(crate) length: usize,
    /// The bytes before and after them.
    pub(crate) head: Vec<u8>,
    pub(crate) tail: Vec<u8>,
}

/// The receiver of a read.
pub(crate) trait Reader: Send {
    /// All bytes: the head, those of the file, and the tail.
    fn filled(self: Box<Self>, bytes: Vec<u8>);

    /// The ring has not read it: the pool has to.
    fn failed(self: Box<Self>);
}

/// The ring of a worker thread, if it has one. Clones refer to the same ring.
#[derive(Clone, Default)]
pub(crate) struct RingHandle(Option<Arc<Mutex<State>>>);

impl std::fmt::Debug for RingHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RingHandle").field(&self.0.is_some()).finish()
    }
}

/// One connection's place among the others of its ring. Reads that wait there go when this is dropped.
#[derive(Debug)]
pub(crate) struct RingLane {
    ring: RingHandle,
    id: ReaderId,
}

struct State {
    ring: Ring,
    /// The waiting reads, and the started reads of each connection.
    shares: Shares<(RingRead, Box<dyn Reader>)>,
    /// The started reads, by their numbers.
    reads: Vec<Option<(Flight, Box<dyn Reader>)>>,
    /// The ring has failed and is not used any more.
    is_broken: bool,
}

/// The receiver, and the bytes; `None` if the pool has to read them.
type Outcome = (Box<dyn Reader>, Option<Vec<u8>>);

/// A started read: its receiver, and what it holds until it has ended.
struct Flight {
    /// The connection, and how many of its bytes the read counts for.
    id: ReaderId,
    length: usize,
    /// The file and the lease are let go when it has ended.
    _placed: Box<dyn PlacedRead>,
    layout: Layout,
}

enum Layout {
    /// They are read directly into their place.
    InPlace { length: usize, tail: Vec<u8> },
    /// Whole blocks are read: the bytes begin at byte `at` of the buffer, after `skipped` others.
    InBlocks { at: usize, skipped: usize, length: usize, head: Vec<u8>, tail: Vec<u8> },
}

impl RingHandle {
    /// A ring for this thread, or the reason why there is none.
    pub(crate) fn new() -> std::io::Result<(Self, RingDriver)> {
        let ring = Ring::new()?;
        let descriptor = ring.watch()?;
        let mut reads = Vec::new();
        reads.resize_with(READS_MAX, || None);
        let shares = Shares::new(READS_MAX);
        let state = Arc::new(Mutex::new(State { ring, shares, reads, is_broken: false }));
        Ok((Self(Some(Arc::clone(&state))), RingDriver { descriptor, state }))
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
        let Some(mut state) = self.ring.lock() else { return reader.failed() };
        let failed = state.read(self.id, read, reader);
        drop(state);
        failed.into_iter().for_each(Reader::failed);
    }

    /// Submits the reads that have begun to the kernel.
    pub(crate) fn submit(&self) {
        let Some(mut state) = self.ring.lock() else { return };
        let failed = state.submit();
        drop(state);
        failed.into_iter().for_each(Reader::failed);
    }
}

impl Drop for RingLane {
    fn drop(&mut self) {
        // Their files and leases are released without the lock.
        let abandoned = self.ring.lock().map(|mut state| state.shares.close(self.id));
        drop(abandoned);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Begins a read, or queues it; the receivers of reads that the ring cannot do come back.
    fn read(
        &mut self,
        id: ReaderId,
        read: RingRead,
        reader: Box<dyn Reader>,
    ) -> Vec<Box<dyn Reader>> {
        if self.is_broken {
            return vec![reader];
        }
        self.shares.push(id, read.length, (read, reader));
        self.start()
    }

    /// Begins those reads whose turn it is; the receivers of reads that the ring cannot do come back.
    fn start(&mut self) -> Vec<Box<dyn Reader>> {
        let mut failed = Vec::new();
        while let Some((id, length, (read, reader))) = self.shares.pop() {
            if let Err(reader) = self.begin((id, length), read, reader) {
                self.shares.finish(id, length);
                failed.push(reader);
            }
        }
        failed
    }

    fn begin(
        &mut self,
        (id, counted): (ReaderId, usize),
        read: RingRead,
        reader: Box<dyn Reader>,
    ) -> Result<(), Box<dyn Reader>> {
        let RingRead { placed, number, offset, length, head, tail } = read;
        let Some(file) = placed.file(number) else { return Err(reader) };
        let (begun, layout) = if file.offset_alignment == 1 && file.memory_alignment == 1 {
            let at = head.len();
            let mut buffer = head;
            buffer.reserve_exact(length + tail.len());
            buffer.resize(at + length, 0);
            let begun = self.ring.read(file.fd, offset, (buffer, at, length));
            (begun, Layout::InPlace { length, tail })
        } else {
            let block = file.offset_alignment;
            let start = offset - offset % block;
            let skipped = (offset - start) as usize;
            let Some(blocks) = (skipped + length).checked_next_multiple_of(block as usize) else {
                return Err(reader);
            };
            // Never resized, so it stays where it is.
            let buffer = vec![0; blocks + file.memory_alignment];
            let at = buffer.as_ptr().addr().wrapping_neg() % file.memory_alignment;
            let begun = self.ring.read(file.fd, start, (buffer, at, blocks));
            (begun, Layout::InBlocks { at, skipped, length, head, tail })
        };
        let Ok(number) = begun else { return Err(reader) };
        let flight = Flight { id, length: counted, _placed: placed, layout };
        self.reads[number] = Some((flight, reader));
        Ok(())
    }

    /// The receivers whose reads will not be done, if the ring has failed.
    fn submit(&mut self) -> Vec<Box<dyn Reader>> {
        if self.is_broken {
            // Reads that were not submitted have no receiver any more, and their files may be closed.
            return Vec::new();
        }
        self.ring.submit().map_or_else(|error| self.give_up(&error), |()| Vec::new())
    }

    /// The receivers of the reads that have ended, with the bytes.
    fn ended(&mut self) -> Vec<Outcome> {
        let ended = match self.ring.ended() {
            Ok(ended) => ended,
            Err(error) => {
                return self.give_up(&error).into_iter().map(|reader| (reader, None)).collect();
            }
        };
        let ended = ended.into_iter().filter_map(|Ended { number, buffer, result }| {
            let (flight, reader) = self.reads.get_mut(number)?.take()?;
            self.shares.finish(flight.id, flight.length);
            Some((reader, result.ok().and_then(|read| flight.layout.finish(buffer, read))))
        });
        let mut outcomes: Vec<Outcome> = ended.collect();
        if !self.is_broken {
            let failed = self.start().into_iter().chain(self.submit());
            outcomes.extend(failed.map(|reader| (reader, None)));
        }
        outcomes
    }

    /// Notes that the ring has failed, and returns all receivers. The kernel still finishes submitted
    /// reads; their buffers stay until then.
    fn give_up(&mut self, error: &std::io::Error) -> Vec<Box<dyn Reader>> {
        if !std::mem::replace(&mut self.is_broken, true) {
            let error = system_words(error);
            tracing::warn!(error, "io_uring has failed; threads read from now on");
        }
        let waiting = self.shares.give_up().into_iter().map(|(_, reader)| reader);
        let under_way = self.reads.iter_mut().filter_map(Option::take).map(|(_, reader)| reader);
        under_way.chain(waiting).collect()
    }
}

impl Layout {
    /// Joins all bytes; `None` if some are missing.
    fn finish(self, mut buffer: Vec<u8>, read: usize) -> Option<Vec<u8>> {
        match self {
            Self::InPlace { length, tail } => {
                buffer.extend_from_slice(&tail);
                (read == length).then_some(buffer)
            }
            Self::InBlocks { at, skipped, length, head, tail } => {
                let found = buffer.get(at..at + read)?.get(skipped..skipped + length)?;
                let mut bytes = head;
                bytes.reserve_exact(found.len() + tail.len());
                bytes.extend_from_slice(found);
                bytes.extend_from_slice(&tail);
                Some(bytes)
            }
        }
    }
}

/// Takes the results of a ring. It has to run as long as the ring is used.
pub(crate) struct RingDriver {
    descriptor: AsyncFd<OwnedFd>,
    state: Arc<Mutex<State>>,
}

impl RingDriver {
    /// Hands results to their receivers; it never returns.
    ///
    /// # Cancel safety
    ///
    /// Safe: no result is lost, because [`end`](Self::end) takes the rest.
    pub(crate) async fn run(&self) {
        // It fails only when the runtime ends.
        while let Ok(mut ready) = self.descriptor.readable().await {
            // Results that come from now on are reported again.
            ready.clear_ready();
            self.deliver();
        }
        std::future::pending::<()>().await;
    }

    fn deliver(&self) {
        let ended = lock(&self.state).ended();
        for (reader, bytes) in ended {
            match bytes {
                Some(bytes) => reader.filled(bytes),
                None => reader.failed(),
            }
        }
    }

    /// Waits for the reads of clients that have left, for a bounded time: a disk may hang.
    pub(crate) async fn end(self) {
        let start = Instant::now();
        while lock(&self.state).ring.in_flight() > 0 && start.elapsed() < PATIENCE {
            let _ = tokio::time::timeout(Duration::from_millis(100), self.descriptor.readable())
                .await
                .map(|ready| ready.map(|mut ready| ready.clear_ready()));
            self.deliver();
        }
    }
}
