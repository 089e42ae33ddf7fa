//! Carrying out requests: in place, or in the pool.

use std::task::Context;

use nbd_proto::transmission::{Command, Request};

use super::Session;
use super::backlog::Admitted;
use super::incoming::{Arrival, Payload};
use super::portion::Portion;
use super::read::{Answering, PromptReads, Rest};
use crate::connection::answer::Unfinished;
use crate::connection::error::ConnectionError;
use crate::connection::pool::Patience;
use crate::connection::turn::REQUEST_COST;
use crate::export::ExportError;
use crate::statistics::{Outcome, Ticket};

/// The progress of a request that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// It advanced by a step.
    Moved,
    /// It waits for memory.
    Waits,
    /// No request can advance.
    Nothing,
}

impl Session {
    /// Carries out received requests, as far as permitted.
    pub(super) fn execute(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let executed = self.execute_received(cx);
        self.tally.settle(self.backlog.len());
        executed
    }

    fn execute_received(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut progress = false;
        self.portion = Portion::default();
        loop {
            match self.go_on(cx) {
                Begun::Moved => {
                    progress = true;
                    continue;
                }
                Begun::Waits => return Ok(progress),
                Begun::Nothing => {}
            }
            if self.is_busy() {
                return Ok(progress);
            }
            if self.turn.is_over() {
                return Ok(true);
            }
            let Some(arrival) = self.incoming.next()? else { return Ok(progress) };
            if !self.throttle.admits(cx, &arrival) {
                return Ok(progress);
            }
            if self.read_strategy.wants_portions() && self.portion.take() {
                self.flush(cx)?;
            }
            if !self.begin(arrival) {
                return Ok(progress);
            }
            progress = true;
        }
    }

    /// Gives the waiting request its part of the budget. The thread may wait for the disk if the
    /// client has no other request.
    fn admit(&mut self, cx: &mut Context<'_>) -> Admitted {
        let is_single =
            self.backlog.len() == 1 && self.is_all_sent() && !self.incoming.is_partial();
        let may_wait = self.disk_wait.begin(is_single);
        let patience = if may_wait.is_some() { Patience::Waits } else { Patience::Never };
        let admitted = self.backlog.admit(cx, &self.target, patience);
        if let Some(elapsed) = may_wait.map(|may_wait| may_wait.elapsed())
            && self.backlog.take_has_waited()
        {
            self.disk_wait.learn(elapsed, || self.socket.has_input());
        }
        admitted
    }

    /// Continues the requests that have begun, as far as permitted.
    pub(super) fn finish_begun(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while self.go_on(cx) == Begun::Moved {
            progress = true;
        }
        self.tally.settle(self.backlog.len());
        progress
    }

    /// Continues one request that has begun.
    fn go_on(&mut self, cx: &mut Context<'_>) -> Begun {
        if self.backlog.is_waiting() {
            match self.admit(cx) {
                Admitted::No => return Begun::Waits,
                Admitted::ToPool => {}
                Admitted::Payload(request, permit) => self.incoming.expect(request, permit),
            }
            return Begun::Moved;
        }
        self.replies.ask_for_room(&mut self.room);
        if !self.replies.are_many(&self.room)
            && !self.turn.is_over()
            && let Some(unfinished) = self.backlog.next_unfinished()
        {
            self.read_on(unfinished);
            return Begun::Moved;
        }
        Begun::Nothing
    }

    /// Carries out a received request, or prepares it; false if its payload has to arrive first.
    fn begin(&mut self, arrival: Arrival) -> bool {
        match arrival {
            Arrival::Request(request, header_len) => {
                let has_begun = self.begin_request(request, header_len);
                if has_begun {
                    self.throttle.begun();
                }
                return has_begun;
            }
            Arrival::Refused { rejection, header_len, payload_len } => {
                self.incoming.discard_payload(rejection, header_len, payload_len);
                self.throttle.begun();
                self.turn.spend(REQUEST_COST);
            }
            Arrival::Discarded(rejection) => {
                self.tally.answer(rejection.tag.command.into(), 0, Outcome::Failure);
                self.replies.refuse(rejection);
            }
            Arrival::Payload(request, payload, permit) => {
                // The system may block a writer, for the lock of the file or because too many pages
                // are dirty: the pool does the waiting if it would delay other clients.
                let is_elsewhere = self.turn.has_light_company();
                let written =
                    if is_elsewhere { None } else { self.target.write_now(&request, &payload) };
                match written {
                    Some(result) => {
                        self.answer(&request, result);
                        self.incoming.keep(payload);
                    }
                    None => {
                        let ticket = self.ticket(&request);
                        self.backlog.submit(&self.target, (request, ticket), payload, permit);
                    }
                }
            }
        }
        true
    }

    fn begin_request(&mut self, request: Request, header_len: usize) -> bool {
        let offset = request.offset;
        let length = request.data_len();
        let payload = matches!(request.command, Command::Write(_))
            .then(|| self.incoming.payload(header_len, length));
        if matches!(payload, Some(Payload::Expected)) {
            // This runs again with each piece of the payload: do not count before it is complete.
            return false;
        }
        tracing::debug!(command = ?request.command, offset, length = request.length, "request");
        self.read_strategy.count(length);
        // The bytes of a READ or WRITE are charged as they are transferred.
        let at_once = match request.command {
            Command::Read(_) | Command::Write(_) => 0,
            _ => length,
        };
        self.turn.spend(REQUEST_COST.saturating_add(at_once));
        self.tally.begin(request.command.command_type().into(), offset, request.length);
        match request.command {
            Command::Disconnect => {
                self.incoming.close();
                self.backlog.say_farewell();
            }
            Command::Write(_) => {
                let is_received = matches!(payload, Some(Payload::Received));
                self.begin_write(request, header_len, is_received);
            }
            Command::Read(_) => {
                self.incoming.consume(header_len);
                self.read(request);
            }
            _ => {
                self.incoming.consume(header_len);
                match self.target.execute_now(&request) {
                    Some(result) => self.answer(&request, result),
                    None => self.leave_to_pool(request, Vec::new()),
                }
            }
        }
        true
    }

    /// Answers a request at once, without content.
    fn answer(&mut self, request: &Request, result: Result<(), ExportError>) {
        let kind = request.command.command_type().into();
        self.tally.answer(kind, request.length, Outcome::of(&result));
        self.replies.answer(request, result);
    }

    fn leave_to_pool(&mut self, request: Request, payload: Vec<u8>) {
        let ticket = self.ticket(&request);
        self.backlog.leave_to_pool(request, ticket, payload, 0);
    }

    fn ticket(&self, request: &Request) -> Ticket {
        self.tally.ticket(request.command.command_type().into(), request.length)
    }

    /// Begins a WRITE whose payload has been received, or is so long that it gets its own buffer.
    fn begin_write(&mut self, request: Request, header_len: usize, is_received: bool) {
        let length = request.data_len();
        if is_received {
            let payload = self.incoming.received(header_len, length);
            let written = self.target.write_now(&request, payload);
            let payload = if written.is_none() { payload.to_vec() } else { Vec::new() };
            match written {
                Some(result) => self.answer(&request, result),
                None => self.leave_to_pool(request, payload),
            }
            self.incoming.consume(header_len + length);
        } else {
            self.incoming.consume(header_len);
            self.backlog.wait_for_payload(request);
        }
        self.incoming.expect_payloads_like(length);
    }

    /// Answers a READ from the page cache, or has the pool read it.
    fn read(&mut self, request: Request) {
        let (reads, mut answering) = self.answering();
        let read = reads.read(&request, &mut answering);
        let kind = request.command.command_type().into();
        match read {
            Ok(()) => {
                self.tally.answer(kind, request.length, Outcome::Success);
                self.portion.add();
            }
            Err(rest) => {
                let ticket = self.ticket(&request);
                self.leave_rest(request, ticket, rest);
            }
        }
    }

    /// Continues a partly answered READ.
    fn read_on(&mut self, Unfinished { request, done, ticket }: Unfinished) {
        let (reads, mut answering) = self.answering();
        match reads.read_on(&request, done, &mut answering) {
            Ok(()) => self.tally.answer_later(Some((ticket, Outcome::Success))),
            Err(rest) => self.leave_rest(request, ticket, rest),
        }
    }

    fn answering(&mut self) -> (&mut PromptReads, Answering<'_>) {
        let Self { target, replies, turn, reads, .. } = self;
        (reads, Answering { target, replies, turn })
    }

    fn leave_rest(&mut self, request: Request, ticket: Ticket, rest: Rest) {
        match rest {
            Rest::ForPool { done } => {
                self.backlog.leave_to_pool(request, ticket, Vec::new(), done);
            }
            Rest::NextTurn { done } => self.backlog.put_off(Unfinished { request, done, ticket }),
        }
    }
}
