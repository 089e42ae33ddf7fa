//! One connection in the transmission phase.
//!
//! The driver owns the socket. It combines all queued requests into one write, takes as many
//! replies as possible from one read, and reads large data directly into its destination. It never
//! waits for a particular event: each poll makes all possible progress.

mod receive;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use nbd_proto::transmission::Command;
use nbd_proto::transmission::client::{ServerError, Transmission};
use nbd_proto::wire::{Cookie, MetaContextId};
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::dial::Established;
use crate::error::LostConnection;
use crate::inflight::Submission;
use crate::outbound::Outbound;
use crate::queue::Queue;
use crate::request_timer::RequestTimer;
use crate::settings::Limits;
use crate::stream::Stream;

/// Size of the buffer for replies, in bytes.
const INPUT_LEN: usize = 256 * 1024;

/// With READs of at least this many bytes in flight, the driver reads little more than headers at a
/// time, so that their data is read directly into its destination.
const LARGE_READ: usize = 64 * 1024;

/// Time limit for requests in flight when the client disconnects.
const LINGER: Duration = Duration::from_secs(5);

/// The data of a READ that is being received.
#[derive(Debug)]
struct Receiving {
    cookie: Cookie,
    position: u64,
    left: usize,
}

/// A socket and its requests in flight.
#[derive(Debug)]
pub(crate) struct Driver {
    stream: Stream,
    transmission: Transmission,
    /// The server's number of each context, in the order of the client's list.
    contexts: Vec<MetaContextId>,
    input: BytesMut,
    outbound: Outbound,
    in_flight: HashMap<Cookie, Submission, BuildHasherDefault<CookieHasher>>,
    receiving: Option<Receiving>,
    data_in_flight: usize,
    large_reads: usize,
    limits: Limits,
    timer: Option<RequestTimer>,
    answered: bool,
    /// Whether the data of a large READ is complete, and its caller has not run since.
    has_fresh_data: bool,
    /// The time for which a request may be sent again because the server was shutting down; `None`
    /// if the connection is not replaced.
    shutdown_patience: Option<Duration>,
    /// Set if the server is shutting down: its first answer with that error. No more requests are
    /// sent.
    shutdown: Option<ServerError>,
    refused: Vec<(Cookie, Submission)>,
    linger: Option<Pin<Box<Sleep>>>,
    said_goodbye: bool,
}

impl Driver {
    /// Creates a driver for a connection. `contexts` holds the server's number of each of the
    /// client's contexts.
    pub(crate) fn new(
        established: Established,
        contexts: Vec<MetaContextId>,
        limits: Limits,
    ) -> Self {
        let mut input = BytesMut::with_capacity(INPUT_LEN);
        input.extend_from_slice(&established.input);
        Self {
            stream: established.stream,
            transmission: Transmission::new(&established.negotiated),
            contexts,
            input,
            outbound: Outbound::default(),
            in_flight: HashMap::default(),
            receiving: None,
            data_in_flight: 0,
            large_reads: 0,
            limits,
            timer: limits.request_timeout.map(RequestTimer::new),
            answered: false,
            has_fresh_data: false,
            shutdown_patience: None,
            shutdown: None,
            refused: Vec::new(),
            linger: None,
            said_goodbye: false,
        }
    }

    /// Treats the connection as lost when the server reports that it is shutting down, and the
    /// refused requests as unanswered, each for up to `patience`.
    #[must_use]
    pub(crate) const fn replaced_for(mut self, patience: Duration) -> Self {
        self.shutdown_patience = Some(patience);
        self
    }

    /// Returns true once a request was answered on this connection.
    pub(crate) const fn has_answered(&self) -> bool {
        self.answered
    }

    /// Ends the connection and returns the unanswered requests, oldest first, in the state before
    /// they were sent.
    pub(crate) fn into_unanswered(self) -> Vec<Submission> {
        let mut left: Vec<_> = self.in_flight.into_iter().chain(self.refused).collect();
        left.sort_unstable_by_key(|(cookie, _)| *cookie);
        left.into_iter()
            .map(|(_, mut submission)| {
                submission.collect.reset();
                submission
            })
            .collect()
    }

    /// Sends requests and receives replies until the connection ends: `Ok` after a disconnect.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        queue: &mut Queue,
    ) -> Poll<Result<(), LostConnection>> {
        loop {
            let taken = self.take_requests(cx, queue);
            let sent = self.send(cx)?;
            let received = match self.receive(cx) {
                Ok(received) => received,
                // After a DISC the server may close first.
                Err(_) if self.said_goodbye => return Poll::Ready(Ok(())),
                Err(lost) => return Poll::Ready(Err(lost)),
            };
            if let Some(lost) = self.shut_down() {
                return Poll::Ready(Err(lost));
            }
            if std::mem::take(&mut self.has_fresh_data) {
                // Let the caller use it while it is in the cache, so that its memory can be reused
                // for the next data.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if taken || sent || received {
                continue;
            }
            if let Some(lost) = self.late_request(cx) {
                return Poll::Ready(Err(lost));
            }
            if !queue.is_finished() {
                return Poll::Pending;
            }
            match self.poll_goodbye(cx) {
                Poll::Ready(Some(result)) => return Poll::Ready(result),
                Poll::Ready(None) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn take_requests(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> bool {
        let mut taken = false;
        while self.shutdown.is_none() && self.in_flight.len() < self.limits.requests.get() {
            let Some(submission) = queue.take(cx) else { break };
            let data = self.data_in_flight.saturating_add(submission.data_len());
            if data > self.limits.bytes.get() && !self.in_flight.is_empty() {
                queue.put_back(submission);
                break;
            }
            self.start(submission);
            taken = true;
        }
        taken
    }

    fn start(&mut self, mut submission: Submission) {
        if let (Command::BlockStatus(_, wanted), Some(context)) =
            (&mut submission.command, submission.context)
            && let Some(id) = self.contexts.get(context)
        {
            *wanted = Some(Box::new([*id]));
        }
        let Submission { offset, length, command, .. } = &submission;
        let out = self.outbound.headers();
        match self.transmission.request(*offset, *length, command, out) {
            Err(misuse) => submission.fail(misuse.into()),
            Ok(cookie) => {
                self.outbound.payload(&submission.payload);
                self.data_in_flight = self.data_in_flight.saturating_add(submission.data_len());
                self.large_reads += usize::from(is_large_read(&submission));
                if let Some(timer) = &mut self.timer {
                    let now = Instant::now();
                    submission.sent.get_or_insert(now);
                    timer.note(cookie, now, |cookie| self.in_flight.contains_key(&cookie));
                }
                self.in_flight.insert(cookie, submission);
            }
        }
    }

    /// Ends the connection if a request was not answered in time; otherwise wakes `cx` when one
    /// times out.
    fn late_request(&mut self, cx: &mut Context<'_>) -> Option<LostConnection> {
        let timer = self.timer.as_mut()?;
        let is_open = |cookie| self.in_flight.contains_key(&cookie);
        let Poll::Ready(cookie) = timer.poll(cx, is_open) else { return None };
        let late = self.in_flight.get(&cookie)?;
        Some(LostConnection::RequestTimeout {
            command: late.command.command_type(),
            offset: late.offset,
            length: late.length,
            limit: timer.limit(),
            waited: late.sent.map(|sent| sent.elapsed()).unwrap_or_default(),
        })
    }

    /// Writes as much as the socket accepts.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, LostConnection> {
        let mut sent = false;
        while !self.outbound.is_empty() {
            match self.outbound.poll_write(&mut self.stream, cx)? {
                Poll::Ready(_) => sent = true,
                Poll::Pending => break,
            }
        }
        // Data that TLS has accepted and the socket has not.
        if self.stream.has_unsent() && Pin::new(&mut self.stream).poll_flush(cx)?.is_ready() {
            sent = true;
        }
        Ok(sent)
    }

    fn finish(&mut self, cookie: Cookie, result: Result<(), ServerError>) {
        let Some(mut submission) = self.in_flight.remove(&cookie) else { return };
        self.data_in_flight = self.data_in_flight.saturating_sub(submission.data_len());
        let is_large = is_large_read(&submission);
        self.large_reads -= usize::from(is_large);
        match result {
            Err(error) if error.is_shutdown() && self.may_be_sent_again(&mut submission) => {
                self.shutdown.get_or_insert(error);
                self.refused.push((cookie, submission));
            }
            result => {
                self.answered = true;
                self.has_fresh_data |= is_large;
                submission.complete(result);
            }
        }
    }

    /// Returns whether a request that a server refused because of its shutdown is sent on another
    /// connection. If servers refuse it for longer than the caller's patience, it fails.
    fn may_be_sent_again(&self, submission: &mut Submission) -> bool {
        let now = Instant::now();
        let since = *submission.refused_since.get_or_insert(now);
        self.shutdown_patience.is_some_and(|patience| now.duration_since(since) <= patience)
    }

    /// Ends the connection once a server that is shutting down has answered everything that was
    /// sent: a write that it still executes must not meet later ones on the next connection.
    fn shut_down(&mut self) -> Option<LostConnection> {
        if !self.in_flight.is_empty() {
            return None;
        }
        self.shutdown.take().map(LostConnection::ShuttingDown)
    }

    /// After the last request, sends DISC once all requests are answered. `Ready(None)` means that
    /// another round is needed.
    fn poll_goodbye(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<(), LostConnection>>> {
        let linger =
            self.linger.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + LINGER)));
        if linger.as_mut().poll(cx).is_ready() {
            let expired = LostConnection::LingerExpired(self.in_flight.len());
            let result = if self.in_flight.is_empty() { Ok(()) } else { Err(expired) };
            return Poll::Ready(Some(result));
        }
        if !self.in_flight.is_empty() {
            return Poll::Pending;
        }
        if !self.said_goodbye {
            self.said_goodbye = true;
            let out = self.outbound.headers();
            // DISC is always legal, and closing has the same effect.
            drop(self.transmission.request(0, 0, &Command::Disconnect, out));
            return Poll::Ready(None);
        }
        if !self.outbound.is_empty() {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_shutdown(cx).map(|_| Some(Ok(())))
    }
}

fn is_large_read(submission: &Submission) -> bool {
    matches!(submission.command, Command::Read(_)) && submission.data_len() >= LARGE_READ
}

/// Cookies are consecutive numbers chosen here: they need to be distributed, not protected.
#[derive(Debug, Default)]
struct CookieHasher(u64);

impl Hasher for CookieHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // The hash table uses the highest and the lowest bits.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}
