//! The transmission phase of one connection: receive, execute, send.
//!
//! One task does all of it. It takes as many requests as the receive buffer holds, answers at once
//! what can be answered without waiting (from the page cache, from memory), hands the rest to the
//! pool, and sends the replies gathered together. Replies leave in the order in which they are
//! ready.

mod read;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nbd_proto::transmission::server::{Parsed, Rejection, Transmission};
use nbd_proto::transmission::{Command, ReplyEncoder, Request};
use nbd_proto::wire::{MetaContextId, MetaContextName};

use super::dispatch::Work;
use super::handshake::Established;
use super::hangup::Hangup;
use super::polling::Polling;
use super::pool::{Pool, Unfinished};
use super::read_steps;
use super::read_strategy::{Idle, ReadStrategy};
use super::receive::ReceiveBuffer;
use super::room::Room;
use super::send::SendQueue;
use super::stall::{Awaiting, Movement, Stall};
use super::turn::{BARREN_COST, REQUEST_COST, Thread, Turn};
use super::writeback_errors::WritebackErrors;
use super::{ConnectionError, Shared, Socket, dispatch};
use crate::budget::{BudgetQueue, Permit};
use crate::export::{Export, ExportError, MayBlock, Operation, ReadMap};
use crate::shutdown::{Phase, Shutdown};

/// A payload up to this size is waited for in the receive buffer; a longer one is read straight
/// into a buffer of its own. In bytes.
const INLINE_PAYLOAD_LEN: usize = 64 * 1024;
/// No further request is carried out in place while this many bytes wait to be sent. In bytes.
const SEND_HIGH_WATER: usize = 1 << 20;
/// The same where there is no [room](super::room) for so much.
const SMALL_SEND_HIGH_WATER: usize = 64 * 1024;
/// Rounds of one connection before other tasks of its thread are looked at, in any case.
const ROUNDS_BEFORE_YIELD: u32 = 8;
/// No further long READ is handed to the pool while it works on so much for this connection. In bytes.
const LONG_READS_LEN: usize = 4 * read_steps::STEP_LEN;
/// Longest reply without content, in bytes: an error chunk with its message.
const SHORT_REPLY_LEN: usize = 1024;
/// Payload buffers up to this size are kept for the next payload. In bytes.
const KEPT_PAYLOAD_LEN: usize = 1 << 20;

/// What the next received bytes are.
enum Receiving {
    /// A request.
    Header,
    /// The rest of a long payload.
    Payload { request: Request, buffer: Vec<u8>, filled: usize, permit: Permit },
    /// The payload of a refused request.
    Discarded { rejection: Rejection, remaining: u64 },
    /// Nothing: the client has said goodbye, or the server ends.
    Nothing,
}

/// A request that has been taken off the buffer and waits for its part of the budget.
enum Waiting {
    /// A command with its payload, to be handed to the pool; of a READ so many bytes are answered.
    Pool(Request, Vec<u8>, usize),
    /// A WRITE whose payload is to be received.
    Payload(Request),
}

/// One connection after its handshake.
pub(super) struct Session {
    socket: Socket,
    export: Arc<dyn Export>,
    writeback: Arc<WritebackErrors>,
    contexts: Arc<[(MetaContextId, MetaContextName)]>,
    transmission: Transmission,
    encoder: ReplyEncoder,
    input: ReceiveBuffer,
    receiving: Receiving,
    waiting: Option<Waiting>,
    /// READs of which a part is answered, and which go on as soon as there is room for replies.
    unfinished: VecDeque<Unfinished>,
    spare_payload: Vec<u8>,
    /// Memory for the map of the READ that is being answered.
    map: ReadMap,
    output: SendQueue,
    pool: Pool,
    budget: BudgetQueue,
    max_bytes: usize,
    room: Room,
    read_strategy: ReadStrategy,
    stall: Stall,
    hangup: Hangup,
    turn: Turn,
    rounds: u32,
}

impl Session {
    pub(super) fn new(established: Established, shared: &Shared, thread: Thread) -> Self {
        let negotiated = &established.negotiated;
        let polling = Polling::new(shared.slots.clone(), shared.config.busy_poll);
        let (answers, max_requests) = (shared.answers.clone(), shared.config.max_requests);
        let pool = Pool::new(&shared.scheduler, established.entry.clone(), answers, max_requests);
        Self {
            socket: established.socket,
            export: Arc::clone(established.entry.export()),
            writeback: Arc::new(WritebackErrors::new(established.entry.failures().clone())),
            contexts: negotiated.meta_contexts.clone().into(),
            transmission: Transmission::new(negotiated),
            encoder: ReplyEncoder::new(negotiated.reply_mode),
            input: ReceiveBuffer::new(&established.received),
            receiving: Receiving::Header,
            waiting: None,
            unfinished: VecDeque::new(),
            spare_payload: Vec::new(),
            map: ReadMap::new(),
            output: SendQueue::default(),
            pool,
            budget: BudgetQueue::new(shared.budget.clone()),
            max_bytes: shared.config.connection_memory_limit,
            room: Room::new(shared.room.clone()),
            read_strategy: ReadStrategy::new(polling, Arc::clone(&thread.connections)),
            stall: Stall::new(shared.config.stall_timeout),
            hangup: Hangup::default(),
            turn: Turn::new(thread),
            rounds: 0,
        }
    }

    /// Serves until the client leaves or the server ends, and every reply is sent.
    pub(super) async fn run(mut self, mut shutdown: Shutdown) -> Result<(), ConnectionError> {
        tokio::select! {
            biased;
            result = poll_fn(|cx| self.poll(cx)) => {
                result?;
                self.say_goodbye().await;
                return Ok(());
            }
            () = shutdown.reached(Phase::Draining) => {}
        }
        // What has arrived whole was in flight when the server was told to stop; it is finished.
        // A payload of which a part is missing is not waited for.
        poll_fn(|cx| self.poll_drain(cx)).await?;
        self.say_goodbye().await;
        Ok(())
    }

    /// Sends what ends an encrypted stream, if the client takes it at once. It may be gone.
    async fn say_goodbye(&mut self) {
        self.socket.begin_shutdown();
        poll_fn(|cx| Poll::Ready(self.socket.poll_flush(cx).is_ready())).await;
    }

    /// One round after another, until nothing moves any more or others are to have their turn.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        ready!(self.turn.poll(cx));
        loop {
            let mut progress = self.collect(cx);
            progress |= self.execute(cx)?;
            let made_room = self.flush(cx)?;
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            // What was received comes first: the buffer may have no room for more, and the end of
            // the stream must not overtake the requests in front of it.
            progress |= made_room || self.turn.is_over() || self.receive(cx)?;
            if !progress {
                self.turn.rest();
                self.give_room_back();
                if self.poll_hangup(cx).is_ready() {
                    return Poll::Ready(self.hung_up());
                }
                return self.poll_stall(cx);
            }
            self.rounds = self.rounds.wrapping_add(1);
            if self.turn.is_over() || self.rounds.is_multiple_of(ROUNDS_BEFORE_YIELD) {
                // Others of this thread, and the end of the server, get their turn.
                self.turn.pass_on(cx);
                return Poll::Pending;
            }
        }
    }

    /// As `poll`, without receiving.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            self.turn.rest();
            let mut progress = self.collect(cx);
            progress |= self.execute(cx)?;
            progress |= self.flush(cx)?;
            if !progress {
                let idle = self.waiting.is_none() && self.unfinished.is_empty() && !self.is_busy();
                if idle && self.pool.requests() == 0 && self.is_all_sent() {
                    return Poll::Ready(Ok(()));
                }
                return Poll::Pending;
            }
        }
    }

    /// Nothing moves. A connection in which nothing is under way needs no large buffers.
    fn give_room_back(&mut self) {
        if self.is_all_sent() && self.pool.requests() == 0 && self.room.offer() {
            self.output.shrink();
            self.input.shrink();
        }
    }

    /// Nothing moves. Ready if the client has gone and requests are still carried out for it.
    fn poll_hangup(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.pool.requests() {
            0 => Poll::Pending,
            _ => self.hangup.poll(cx, || self.socket.has_hung_up()),
        }
    }

    /// How a connection ends whose client has gone.
    fn hung_up(&self) -> Result<(), ConnectionError> {
        // Who says goodbye may go at once. What it has written is still carried out.
        if self.pool.has_farewell() { Ok(()) } else { Err(ConnectionError::HungUp) }
    }

    /// Nothing moves. An error if the client is to blame, and that for too long.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        let Some(awaiting) = self.awaiting() else {
            self.stall.settled();
            return Poll::Pending;
        };
        let movement = || Movement {
            received: self.input.total(),
            payload: match &self.receiving {
                Receiving::Payload { filled, .. } => *filled,
                _ => 0,
            },
            sent: self.output.total_sent(),
            traffic: self.socket.traffic(),
        };
        self.stall.poll(cx, awaiting, movement).map(Err)
    }

    /// What the client has to do next, if this connection holds something until it does.
    fn awaiting(&self) -> Option<Awaiting> {
        if !self.is_all_sent() {
            return Some(Awaiting::TakeReplies);
        }
        let is_waited_for = self.waiting.is_none() && !self.is_busy();
        let is_partial = match self.receiving {
            Receiving::Header => !self.input.filled().is_empty(),
            Receiving::Payload { .. } | Receiving::Discarded { .. } => true,
            Receiving::Nothing => false,
        };
        (is_waited_for && is_partial).then_some(Awaiting::SendRest)
    }

    fn is_over(&self) -> bool {
        matches!(self.receiving, Receiving::Nothing)
            && self.waiting.is_none()
            && self.unfinished.is_empty()
            && self.pool.requests() == 0
            && self.is_all_sent()
    }

    fn is_all_sent(&self) -> bool {
        self.output.is_empty() && !self.socket.has_unsent()
    }

    /// Has this connection as much in hand as it may?
    fn is_busy(&self) -> bool {
        self.has_much_to_send()
            || self.pool.is_full()
            || (self.pool.requests() > 0 && self.pool.bytes() >= self.max_bytes)
    }

    /// Are there as many replies as may wait to be sent?
    fn has_much_to_send(&self) -> bool {
        let is_lent = self.room.is_lent();
        let high_water = if is_lent { SEND_HIGH_WATER } else { SMALL_SEND_HIGH_WATER };
        self.output.queued() >= high_water
    }

    /// Takes replies from the pool.
    fn collect(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready(reply) = self.pool.poll_reply(cx) {
            self.turn.spend(reply.bytes.len());
            self.output.push(reply.bytes, Some(reply.permit));
            self.unfinished.extend(reply.rest);
            progress = true;
        }
        progress
    }

    /// Sends; true if that made room for further requests.
    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let was_busy = self.is_busy();
        if let Poll::Ready(result) = self.output.poll_flush(cx, &mut self.socket) {
            result?;
        }
        Ok(was_busy && !self.is_busy())
    }

    /// Carries out what has been received, as far as it may.
    fn execute(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut progress = false;
        loop {
            if self.waiting.is_some() {
                if !self.admit(cx) {
                    return Ok(progress);
                }
                progress = true;
            }
            if self.output.queued() >= SMALL_SEND_HIGH_WATER {
                self.room.ask();
            }
            if !self.has_much_to_send()
                && !self.turn.is_over()
                && let Some(Unfinished { request, done }) = self.unfinished.pop_front()
            {
                self.read_on(request, done);
                progress = true;
                continue;
            }
            if self.is_busy() {
                return Ok(progress);
            }
            if self.turn.is_over() {
                return Ok(true);
            }
            let moved = match &mut self.receiving {
                Receiving::Header => self.next_request()?,
                Receiving::Payload { .. } => self.fill_payload(),
                Receiving::Discarded { .. } => self.discard(),
                Receiving::Nothing => false,
            };
            if !moved {
                return Ok(progress);
            }
            progress = true;
        }
    }

    /// Gives the waiting request its part of the budget, if there is one.
    fn admit(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(waiting) = &self.waiting else { return true };
        let weight = match waiting {
            Waiting::Pool(request, _, done) => {
                let is_long = Self::is_long_read(request);
                if is_long && self.pool.requests() > 0 && self.pool.bytes() >= LONG_READS_LEN {
                    return false;
                }
                Pool::memory_len(self.encoder, request, *done)
            }
            Waiting::Payload(request) => Pool::weight(request),
        };
        let Poll::Ready(permit) = self.budget.poll_take(cx, weight) else {
            return false;
        };
        match self.waiting.take() {
            Some(Waiting::Pool(request, payload, done)) => {
                self.submit(request, payload, done, permit);
            }
            Some(Waiting::Payload(request)) => {
                let length = Pool::weight(&request);
                let mut buffer = std::mem::take(&mut self.spare_payload);
                buffer.resize(length, 0);
                self.receiving = Receiving::Payload { request, buffer, filled: 0, permit };
            }
            None => {}
        }
        true
    }

    fn submit(&mut self, request: Request, payload: Vec<u8>, done: usize, permit: Permit) {
        let work = Work {
            export: Arc::clone(&self.export),
            contexts: Arc::clone(&self.contexts),
            encoder: self.encoder,
            request,
            writeback: Arc::clone(&self.writeback),
            payload,
            max_descriptors: 1,
            done,
        };
        self.pool.submit(work, permit);
    }

    /// Takes one request off the buffer; false if there is no whole one.
    fn next_request(&mut self) -> Result<bool, ConnectionError> {
        match self.transmission.parse(self.input.filled())? {
            Parsed::NeedsInput(_) => Ok(false),
            Parsed::Rejected { rejection, consumed, discard } => {
                self.input.consume(consumed);
                self.turn.spend(REQUEST_COST);
                self.receiving = Receiving::Discarded { rejection, remaining: discard };
                Ok(true)
            }
            Parsed::Request { request, consumed } => {
                let Request { offset, length, .. } = request;
                tracing::debug!(command = ?request.command, offset, length, "request");
                let length = Pool::weight(&request);
                self.read_strategy.count(length);
                // A long READ is paid for as it goes on.
                let at_once = if Self::is_long_read(&request) { 0 } else { length };
                self.turn.spend(REQUEST_COST.saturating_add(at_once));
                Ok(self.begin(request, consumed))
            }
        }
    }

    /// Carries out a request or prepares to; false if its payload is waited for.
    fn begin(&mut self, request: Request, consumed: usize) -> bool {
        match request.command {
            Command::Disconnect => {
                self.receiving = Receiving::Nothing;
                self.pool.say_farewell();
            }
            Command::Write(_) => return self.begin_write(request, consumed),
            Command::Read(_) => {
                self.input.consume(consumed);
                self.read(request);
            }
            _ => {
                self.input.consume(consumed);
                self.command(request);
            }
        }
        true
    }

    /// A WRITE of which the header is there; false if its payload is waited for.
    fn begin_write(&mut self, request: Request, header_len: usize) -> bool {
        let length = Pool::weight(&request);
        let whole = header_len.saturating_add(length);
        if let Some(payload) = self.input.filled().get(header_len..whole) {
            if let Some(result) = self.write_now(&request, payload) {
                self.input.consume(whole);
                self.reply(&request, result);
            } else {
                let payload = payload.to_vec();
                self.input.consume(whole);
                self.waiting = Some(Waiting::Pool(request, payload, 0));
            }
            self.input.expect_payloads_like(length);
            return true;
        }
        if length <= INLINE_PAYLOAD_LEN {
            return false;
        }
        self.input.consume(header_len);
        self.input.expect_payloads_like(length);
        self.waiting = Some(Waiting::Payload(request));
        true
    }

    /// Carries out a WRITE where the connection stands; `None` if it may have to wait.
    fn write_now(&self, request: &Request, payload: &[u8]) -> Option<Result<(), ExportError>> {
        if self.is_prompt(request) {
            return Some(dispatch::execute_in_place(
                &*self.export,
                &self.writeback,
                request,
                payload,
            ));
        }
        dispatch::write_in_place(&*self.export, request, payload).then_some(Ok(()))
    }

    /// Moves what has been received of a long payload; true if the payload is complete.
    fn fill_payload(&mut self) -> bool {
        let Receiving::Payload { buffer, filled, .. } = &mut self.receiving else { return false };
        let received = self.input.filled();
        let count = received.len().min(buffer.len() - *filled);
        buffer[*filled..*filled + count].copy_from_slice(&received[..count]);
        self.input.consume(count);
        *filled += count;
        if *filled < buffer.len() {
            return false;
        }
        let Receiving::Payload { request, buffer, permit, .. } =
            std::mem::replace(&mut self.receiving, Receiving::Header)
        else {
            return false;
        };
        if let Some(result) = self.write_now(&request, &buffer) {
            self.reply(&request, result);
            if buffer.capacity() <= KEPT_PAYLOAD_LEN {
                self.spare_payload = buffer;
            }
        } else {
            self.submit(request, buffer, 0, permit);
        }
        true
    }

    /// Throws away the payload of a refused request; true if all of it is gone.
    fn discard(&mut self) -> bool {
        let Receiving::Discarded { rejection, remaining } = &mut self.receiving else {
            return false;
        };
        let received = self.input.filled().len();
        let count = usize::try_from(*remaining).unwrap_or(usize::MAX).min(received);
        self.input.consume(count);
        *remaining -= count as u64;
        if *remaining > 0 {
            return false;
        }
        let Rejection { tag, error, reason } = *rejection;
        let encoder = self.encoder;
        self.output.encode(SHORT_REPLY_LEN, |out| encoder.error(tag, error, reason, out));
        self.receiving = Receiving::Header;
        true
    }

    /// A request that is neither READ nor WRITE.
    fn command(&mut self, request: Request) {
        if self.is_prompt(&request) {
            let result = dispatch::execute_in_place(&*self.export, &self.writeback, &request, &[]);
            self.reply(&request, result);
        } else {
            self.waiting = Some(Waiting::Pool(request, Vec::new(), 0));
        }
    }

    fn is_prompt(&self, request: &Request) -> bool {
        let operation = match &request.command {
            Command::Write(durability) => Operation::Write(Pool::weight(request), *durability),
            Command::Flush => Operation::Flush,
            Command::Trim(_) => Operation::Trim,
            Command::Cache => Operation::Cache,
            Command::WriteZeroes(..) => Operation::WriteZeroes,
            Command::Read(_) | Command::BlockStatus(..) | Command::Disconnect => return false,
        };
        self.export.may_block(operation) == MayBlock::No
    }

    fn reply(&mut self, request: &Request, result: Result<(), ExportError>) {
        let (encoder, tag) = (self.encoder, request.tag());
        self.output.encode(SHORT_REPLY_LEN, |out| match result {
            Ok(()) => encoder.success(tag, out),
            Err(error) => encoder.error(tag, error.errno, &error.message, out),
        });
    }

    /// Reads from the socket, if anything can be done with what comes.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        if self.waiting.is_some() || self.is_busy() || matches!(self.receiving, Receiving::Nothing)
        {
            return Ok(false);
        }
        let read = match &mut self.receiving {
            // The buffer is empty while a payload is incomplete: its bytes skip it.
            Receiving::Payload { buffer, filled, .. } => {
                let read = self.socket.poll_read(cx, &mut buffer[*filled..]);
                if let Poll::Ready(Ok(count)) = read {
                    *filled += count;
                }
                read
            }
            _ => {
                if self.input.wants_room() && self.room.ask() {
                    self.input.grow();
                }
                let is_idle = self.is_all_sent() && self.pool.requests() == 0;
                let idle = if is_idle { Idle::Yes } else { Idle::No };
                if self.read_strategy.read(&mut self.socket, idle, &mut self.input) {
                    return Ok(true);
                }
                let read = self.socket.poll_read(cx, self.input.space());
                if let Poll::Ready(Ok(count)) = read {
                    self.input.received(count);
                }
                read
            }
        };
        match read {
            Poll::Pending => {
                // Messages of TLS cost time as well.
                let barren = self.socket.take_barren();
                self.turn.spend(barren.saturating_mul(BARREN_COST));
                Ok(barren > 0)
            }
            Poll::Ready(Ok(0)) => {
                // The client is gone, or has said all it wants to say: replies may still be taken.
                self.receiving = Receiving::Nothing;
                Ok(true)
            }
            Poll::Ready(Ok(_)) => Ok(true),
            Poll::Ready(Err(error)) => Err(error.into()),
        }
    }
}
