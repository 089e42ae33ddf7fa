//! Requests that may block, on their way through the thread pool.

use std::sync::Arc;
use std::task::{Context, Poll};

use nbd_proto::transmission::{Command, ReplyEncoder, Request, RequestTag};
use nbd_proto::wire::{CommandType, Errno, MetaContextId, MetaContextName};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::dispatch;
use super::witness::Witness;
use crate::budget::Permit;
use crate::export::Export;

/// A request that is complete but for its execution.
pub(super) struct Work {
    pub(super) export: Arc<dyn Export>,
    pub(super) contexts: Arc<[(MetaContextId, MetaContextName)]>,
    pub(super) encoder: ReplyEncoder,
    pub(super) request: Request,
    pub(super) witness: Arc<Witness>,
    /// The payload of a WRITE, otherwise empty.
    pub(super) payload: Vec<u8>,
}

/// A reply that came back.
pub(super) struct Reply {
    /// The whole reply.
    pub(super) bytes: Vec<u8>,
    /// The part of the budget it holds.
    pub(super) permit: Permit,
    weight: usize,
}

/// One connection's use of the pool.
pub(super) struct Pool {
    handle: Handle,
    sender: mpsc::UnboundedSender<Reply>,
    replies: mpsc::UnboundedReceiver<Reply>,
    requests: usize,
    bytes: usize,
}

impl Pool {
    pub(super) fn new(handle: Handle) -> Self {
        let (sender, replies) = mpsc::unbounded_channel();
        Self { handle, sender, replies, requests: 0, bytes: 0 }
    }

    /// Requests that have not come back.
    pub(super) const fn requests(&self) -> usize {
        self.requests
    }

    /// Bytes of their payloads and replies.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of memory a request needs while it is in the pool.
    pub(super) fn weight(request: &Request) -> usize {
        match request.command {
            Command::Read(_) | Command::Write(_) => {
                usize::try_from(request.length).unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }

    /// Has `work` carried out on another thread.
    pub(super) fn submit(&mut self, work: Work, permit: Permit) {
        let weight = Self::weight(&work.request);
        self.requests += 1;
        self.bytes = self.bytes.saturating_add(weight);
        let answer = Answer {
            sender: self.sender.clone(),
            tag: work.request.tag(),
            encoder: work.encoder,
            parts: Some((permit, weight)),
        };
        self.handle.spawn_blocking(move || {
            let bytes = dispatch::perform(&work);
            // Memory of a WRITE is free before the reply says so.
            drop(work);
            answer.send(bytes);
        });
    }

    /// The next reply that is ready.
    pub(super) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Reply> {
        if self.requests == 0 {
            return Poll::Pending;
        }
        // The channel is never closed: this connection holds a sender.
        let Poll::Ready(Some(reply)) = self.replies.poll_recv(cx) else { return Poll::Pending };
        self.requests -= 1;
        self.bytes = self.bytes.saturating_sub(reply.weight);
        Poll::Ready(reply)
    }
}

/// Makes sure that every request is answered, even if carrying it out panicked.
struct Answer {
    sender: mpsc::UnboundedSender<Reply>,
    tag: RequestTag,
    encoder: ReplyEncoder,
    parts: Option<(Permit, usize)>,
}

impl Answer {
    fn send(mut self, bytes: Vec<u8>) {
        self.deliver(bytes);
    }

    fn deliver(&mut self, bytes: Vec<u8>) {
        if let Some((permit, weight)) = self.parts.take() {
            // The connection may be gone.
            let _ = self.sender.send(Reply { bytes, permit, weight });
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.parts.is_none() {
            return;
        }
        let command: CommandType = self.tag.command;
        tracing::error!(%command, "carrying out a request panicked");
        let mut bytes = Vec::new();
        self.encoder.error(self.tag, Errno::EIO, "the server failed", &mut bytes);
        self.deliver(bytes);
    }
}
