//! Replies that return to a connection from the pool or the ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_proto::transmission::{ReplyEncoder, Request, RequestTag};
use nbd_proto::wire::{CommandType, Errno};
use tokio::sync::mpsc;

use crate::budget::Permit;
use crate::export::ExportError;
use crate::reply_bytes::ReplyBytes;
use crate::statistics::{Outcome, Ticket};

/// A partly answered READ.
#[derive(Debug)]
pub(super) struct Unfinished {
    pub(super) request: Request,
    /// The number of answered bytes.
    pub(super) done: usize,
    pub(super) ticket: Ticket,
}

/// A returned reply.
pub(super) struct Reply {
    /// The complete reply, or a part of it.
    pub(super) bytes: ReplyBytes,
    /// The part of the budget it holds.
    pub(super) permit: Permit,
    /// The rest of the request, if this is a part.
    pub(super) rest: Option<Unfinished>,
    /// For the counters: the request, and whether it succeeded, if it is complete.
    pub(super) answered: (Ticket, Outcome),
    pub(super) held: Held,
}

/// The counted size of a request in the pool.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// Bytes of its payload or reply.
    pub(super) bytes: usize,
    /// Its share of the connection's request limit.
    pub(super) slots: usize,
}

/// Whether the client of a connection has sent DISC.
#[derive(Debug, Clone, Default)]
pub(super) struct Farewell(Arc<AtomicBool>);

impl Farewell {
    /// Records that it has.
    pub(super) fn say(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub(super) fn is_said(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Makes sure that every request is answered, even if its execution panics.
pub(super) struct Answer {
    pub(super) sender: mpsc::UnboundedSender<Reply>,
    pub(super) tag: RequestTag,
    pub(super) encoder: ReplyEncoder,
    pub(super) ticket: Ticket,
    pub(super) parts: Option<(Permit, Held)>,
    /// For changes, which are still carried out after a connection has ended with DISC.
    pub(super) farewell: Option<Farewell>,
}

impl Answer {
    /// Whether the connection has ended.
    fn is_gone(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether the request need not be carried out any more.
    pub(super) fn is_abandoned(&self) -> bool {
        let outlives = self.farewell.as_ref().is_some_and(Farewell::is_said);
        self.is_gone() && !outlives
    }

    /// Sends a reply without content.
    pub(super) fn send_short(self, result: Result<(), ExportError>) {
        let (mut bytes, outcome) = (Vec::new(), Outcome::of(&result));
        match result {
            Ok(()) => self.encoder.success(self.tag, &mut bytes),
            Err(error) => self.encoder.error(self.tag, error.errno, &error.message, &mut bytes),
        }
        self.send(bytes.into(), outcome);
    }

    /// Sends the reply, or the rest of it.
    pub(super) fn send(mut self, bytes: ReplyBytes, outcome: Outcome) {
        self.deliver(bytes, outcome, None);
    }

    /// Sends a part of the reply; `done` bytes of the range are answered.
    pub(super) fn send_part(mut self, bytes: Vec<u8>, request: Request, done: usize) {
        let ticket = self.ticket;
        self.deliver(bytes.into(), Outcome::Success, Some(Unfinished { request, done, ticket }));
    }

    fn deliver(&mut self, bytes: ReplyBytes, outcome: Outcome, rest: Option<Unfinished>) {
        if let Some((mut permit, held)) = self.parts.take() {
            permit.shrink(bytes.len());
            let answered = (self.ticket, outcome);
            // The connection may have ended.
            let _ = self.sender.send(Reply { bytes, permit, rest, answered, held });
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.parts.is_none() || self.is_gone() {
            return;
        }
        let command: CommandType = self.tag.command;
        tracing::error!(%command, "carrying out a request panicked");
        let mut bytes = Vec::new();
        self.encoder.error(self.tag, Errno::EIO, "the server failed", &mut bytes);
        self.deliver(bytes.into(), Outcome::Failure, None);
    }
}
