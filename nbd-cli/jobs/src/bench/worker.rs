//! One connection: makes requests, takes replies.
//!
//! Requests are gathered and written together, and replies are parsed in one large buffer: a
//! request costs little more than the copy of its data by the kernel.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nbd_client::{NegotiatedStream, Reconnector};
use nbd_proto::handshake::Negotiated;
use nbd_proto::transmission::client::Transmission;
use nbd_proto::transmission::{Command, Durability, Fragmentation, Speed, ZeroMode};
use tokio::runtime::Handle;

use super::channel::{Channel, Outgoing, patience};
use super::ledger::Ledger;
use super::options::RequestKind;
use super::recorder::Recorder;
use super::shared::Shared;
use super::slots::Slots;
use super::source::{Next, Source};
use super::targets::Target;
use crate::error::JobError;

/// Interval at which results are handed over.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);

/// Time for which a cancelled load waits for answers.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Bytes that one receive takes.
const INPUT_LEN: usize = 256 * 1024;

/// Number of other offsets that are tried for a write of blocks that are being written.
const CHOICES: usize = 16;

/// The check of data that is read.
#[derive(Debug)]
pub(super) enum Check {
    /// None.
    Discard,
    /// It is compared with the written blocks.
    Ledger(Ledger),
    /// Blocks of this length (in bytes) and this seed are checked on their own.
    Alone { block_len: u32, seed: u64 },
}

/// The reason why a connection ends.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It is lost; the reason.
    Lost(String),
    /// The run has failed.
    Fatal(JobError),
}

/// The next event of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waiting {
    /// It is done.
    ForNothing,
    /// The time at which a request is due. None is in flight.
    UntilDue(Instant),
    /// Replies, or the time at which the next request is due.
    ForReplies(Option<Instant>),
}

/// One connection.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) check: Check,
    pub(super) channel: Channel,
    pub(super) transmission: Transmission,
    pub(super) reconnector: Reconnector,
    pub(super) runtime: Handle,
    pub(super) slots: Slots,
    pub(super) out: Outgoing,
    pub(super) input: Vec<u8>,
    /// Bytes in `input` that are not parsed yet.
    pub(super) unread: std::ops::Range<usize>,
    /// Data that is being received: the request, how far it is, and how much follows.
    pub(super) receiving: Option<(usize, usize, usize)>,
    pub(super) recorder: Recorder,
    /// The flags of writes.
    pub(super) durability: Durability,
    /// Whether the recorder holds requests that count.
    counted: bool,
    published: Instant,
    /// A write that waits for another one of the same block.
    blocked: Option<(Target, Instant)>,
    /// The time at which the load was found to be cancelled.
    cancelled: Option<Instant>,
    /// Counts what was sent, to choose random data.
    sent: u64,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        (channel, negotiated): (Channel, &Negotiated),
        reconnector: Reconnector,
        depth: usize,
        durability: Durability,
    ) -> Self {
        Self {
            out: Outgoing::new(Arc::clone(&shared.pool)),
            shared,
            check: Check::Discard,
            channel,
            transmission: Transmission::new(negotiated),
            reconnector,
            runtime: Handle::current(),
            slots: Slots::new(depth),
            input: vec![0; INPUT_LEN],
            unread: 0..0,
            receiving: None,
            recorder: Recorder::default(),
            durability,
            counted: false,
            published: Instant::now(),
            blocked: None,
            cancelled: None,
            sent: 0,
        }
    }

    /// Makes as many requests of `source` as may be in flight. Says what the connection waits for.
    ///
    /// # Errors
    ///
    /// If the server refuses a request, or the connection is lost for good.
    pub(super) fn prepare(&mut self, source: &mut Source) -> Result<Waiting, JobError> {
        loop {
            let now = Instant::now();
            let next = match self.keep_count(now).and_then(|()| self.issue(source, now)) {
                Ok(next) => next,
                Err(trouble) => {
                    self.recover(trouble)?;
                    continue;
                }
            };
            return Ok(match next {
                _ if self.slots.in_flight() > 0 && !self.has_given_up(now) => {
                    Waiting::ForReplies(next)
                }
                Some(due) if self.slots.in_flight() == 0 => Waiting::UntilDue(due),
                _ => Waiting::ForNothing,
            });
        }
    }

    /// Whether the load was cancelled so long ago that answers are not waited for.
    fn has_given_up(&mut self, now: Instant) -> bool {
        self.shared.is_cancelled()
            && now.duration_since(*self.cancelled.get_or_insert(now)) > DRAIN_LIMIT
    }

    /// Makes the requests of `source` until there are no more and all are answered.
    ///
    /// # Errors
    ///
    /// As for [`Worker::prepare`].
    pub(super) fn drive(&mut self, source: &mut Source) -> Result<(), JobError> {
        loop {
            match self.prepare(source)? {
                Waiting::ForNothing => return Ok(()),
                Waiting::UntilDue(due) => std::thread::sleep(patience(Some(due))),
                Waiting::ForReplies(due) => {
                    let free = self.input.get_mut(self.unread.end..).unwrap_or_default();
                    let came = self.channel.exchange(&mut self.out, free, patience(due));
                    self.received(came)?;
                }
            }
        }
    }

    /// Sends as much as the connection accepts without waiting.
    ///
    /// # Errors
    ///
    /// If the connection is lost for good.
    pub(super) fn send_now(&mut self) -> Result<(), JobError> {
        match self.channel.send(&mut self.out) {
            Ok(()) => Ok(()),
            Err(error) => self.recover(Trouble::Lost(error.to_string())),
        }
    }

    /// Takes the replies that have come, without waiting.
    ///
    /// # Errors
    ///
    /// As for [`Worker::prepare`].
    pub(super) fn receive_now(&mut self) -> Result<(), JobError> {
        let free = self.input.get_mut(self.unread.end..).unwrap_or_default();
        let came = self.channel.receive(free);
        self.received(came)
    }

    /// Takes what was received: this many bytes.
    fn received(&mut self, came: io::Result<usize>) -> Result<(), JobError> {
        let taken = match came {
            Ok(0) => self.check_timeout(),
            Ok(came) => {
                self.unread.end += came;
                self.take_replies(Instant::now())
            }
            Err(error) => Err(Trouble::Lost(error.to_string())),
        };
        taken.or_else(|trouble| self.recover(trouble))
    }

    fn check_timeout(&mut self) -> Result<(), Trouble> {
        let Some(limit) = self.shared.timeout else { return Ok(()) };
        match self.slots.oldest() {
            Some(sent) if sent.elapsed() > limit => Err(Trouble::Lost(format!(
                "a request was not answered within {limit:?}, which --timeout allows"
            ))),
            _ => Ok(()),
        }
    }

    /// Makes as many requests as may be in flight. Returns the due time of the next one, and `None`
    /// if there is none.
    fn issue(&mut self, source: &mut Source, now: Instant) -> Result<Option<Instant>, Trouble> {
        while self.slots.has_room() {
            if self.shared.is_over() {
                self.blocked = None;
                return Ok(None);
            }
            let (mut target, due) = match self.blocked.take() {
                Some(blocked) => blocked,
                None => match source.next(now, self.counted) {
                    Next::Request(target, due) => (target, due),
                    Next::NotBefore(due) => return Ok(Some(due)),
                    Next::End => return Ok(None),
                },
            };
            if !self.begin(source, &mut target) {
                self.blocked = Some((target, due));
                return Ok(None);
            }
            let Some(index) = self.slots.take(target, due) else { break };
            self.send(index, now)?;
        }
        Ok(None)
    }

    /// Finds an offset for a write at which no other one is in flight; returns false if there is
    /// none.
    fn begin(&mut self, source: &mut Source, target: &mut Target) -> bool {
        let (RequestKind::Write, Check::Ledger(ledger)) = (target.kind, &mut self.check) else {
            return true;
        };
        for _ in 0..CHOICES {
            if ledger.begin_write(target.offset, target.length) {
                return true;
            }
            *target = source.instead(*target);
        }
        false
    }

    /// Appends a request to the output.
    pub(super) fn send(&mut self, index: usize, now: Instant) -> Result<(), Trouble> {
        let Some(slot) = self.slots.get(index) else { return Ok(()) };
        let Target { kind, offset, length } = slot.target;
        slot.sent = now;
        if let Check::Ledger(ledger) = &mut self.check {
            slot.epoch = ledger.epoch();
            match kind {
                RequestKind::Read => ledger.expect(offset, length, &mut slot.expected),
                RequestKind::Flush => slot.covered = ledger.begin_flush(),
                _ => {}
            }
        }
        if kind == RequestKind::Read && !matches!(self.check, Check::Discard) {
            slot.data.resize(length as usize, 0);
        }
        let command = match kind {
            RequestKind::Read => Command::Read(Fragmentation::Allowed),
            RequestKind::Write => Command::Write(self.durability),
            RequestKind::Zeroes => {
                Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, self.durability)
            }
            RequestKind::Trim => Command::Trim(self.durability),
            RequestKind::Flush => Command::Flush,
        };
        let transmission = &mut self.transmission;
        let cookie =
            self.out.append(|own| transmission.request(offset, length.into(), &command, own));
        let cookie = cookie.map_err(|error| {
            let uri = &self.shared.uri;
            Trouble::Fatal(JobError::source(format!("cannot {} {uri}: {error}", kind.verb())))
        })?;
        self.slots.name(cookie, index);
        if kind == RequestKind::Write {
            self.append_data(offset, length as usize);
        }
        Ok(())
    }

    fn append_data(&mut self, offset: u64, length: usize) {
        self.sent = self.sent.wrapping_add(1);
        match &self.check {
            Check::Ledger(ledger) => self.out.append(|own| {
                let start = own.len();
                own.resize(start.saturating_add(length), 0);
                ledger.fill(offset, own.get_mut(start..).unwrap_or_default());
            }),
            _ => self.out.append_random((self.sent ^ offset).wrapping_mul(0x9e37_79b9), length),
        }
    }

    /// Starts to count when the warm-up is over, and periodically hands results over and looks for
    /// requests that are not answered.
    fn keep_count(&mut self, now: Instant) -> Result<(), Trouble> {
        let counts = self.shared.counts.load(Ordering::Relaxed);
        if counts != self.counted {
            self.counted = counts;
            self.recorder.clear();
        }
        if now.duration_since(self.published) >= PUBLISH_EVERY {
            self.published = now;
            self.publish();
            self.check_timeout()?;
        }
        Ok(())
    }

    /// Has all connections end: this one has failed.
    pub(super) fn end_all(&self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
    }

    /// Hands results over.
    pub(super) fn publish(&mut self) {
        let mut totals = self.shared.totals();
        totals.interval.add(&self.recorder);
        if self.counted {
            totals.all.add(&self.recorder);
        }
        drop(totals);
        self.recorder.clear();
    }
}

impl Worker {
    /// Continues with a new connection.
    pub(super) fn resume(&mut self, stream: NegotiatedStream) -> Result<(), Trouble> {
        self.transmission = Transmission::new(stream.negotiated());
        self.channel = Channel::new(stream, &self.runtime)
            .map_err(|error| Trouble::Lost(error.to_string()))?;
        self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
        self.out.clear();
        self.unread = 0..0;
        self.receiving = None;
        if let Check::Ledger(ledger) = &mut self.check {
            ledger.lose();
        }
        let now = Instant::now();
        for index in self.slots.unanswered() {
            self.send(index, now)?;
        }
        Ok(())
    }
}
