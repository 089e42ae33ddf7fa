//! The replies of a connection, from their encoding to the socket.

use std::task::{Context, Poll};

use nbd_proto::transmission::server::Rejection;
use nbd_proto::transmission::{Position, ReplyEncoder, Request};

use super::super::error::ConnectionError;
use super::super::room::Room;
use super::super::send::SendQueue;
use super::super::socket::Socket;
use super::super::turn::Turn;
use crate::budget::Permit;
use crate::export::{ExportError, FileSpan, TryRead};
use crate::reply_bytes::ReplyBytes;

/// No further request is carried out in place while this many bytes wait to be sent.
const HIGH_WATER: usize = 1 << 20;
/// The same without [memory](super::super::room) for large buffers.
const SMALL_HIGH_WATER: usize = 64 * 1024;
/// Longest reply without content, in bytes: an error chunk with its message.
const SHORT_REPLY_LEN: usize = 1024;

/// Replies that wait to be sent.
pub(super) struct Replies {
    encoder: ReplyEncoder,
    queue: SendQueue,
}

impl Replies {
    pub(super) fn new(encoder: ReplyEncoder) -> Self {
        Self { encoder, queue: SendQueue::default() }
    }

    /// The total of sent bytes, modulo 2^64.
    pub(super) const fn total_sent(&self) -> u64 {
        self.queue.total_sent()
    }

    /// Whether everything was written to the socket.
    pub(super) fn are_sent(&self, socket: &Socket) -> bool {
        self.queue.is_empty() && !socket.has_unsent()
    }

    /// Whether as many bytes wait to be sent as may.
    pub(super) const fn are_many(&self, room: &Room) -> bool {
        let high_water = if room.is_lent() { HIGH_WATER } else { SMALL_HIGH_WATER };
        self.queue.queued() >= high_water
    }

    /// Requests memory for large buffers if many replies are about to wait.
    pub(super) fn ask_for_room(&self, room: &mut Room) {
        if self.queue.queued() >= SMALL_HIGH_WATER {
            room.ask();
        }
    }

    /// Frees the memory that is kept for further replies.
    pub(super) fn shrink(&mut self) {
        self.queue.shrink();
    }

    /// Sends until nothing is left, the socket takes no more, or the turn is over.
    pub(super) fn flush(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket,
        turn: &mut Turn,
    ) -> Result<(), ConnectionError> {
        match self.queue.poll_flush(cx, socket, turn) {
            Poll::Ready(result) => result,
            Poll::Pending => Ok(()),
        }
    }

    /// Adds a reply of the pool, or a part of one. Returns the number of copied bytes, and the
    /// memory that is free again.
    pub(super) fn push(&mut self, bytes: ReplyBytes, permit: Permit) -> (usize, Vec<u8>) {
        self.queue.push(bytes, Some(permit))
    }

    /// Adds a reply without content.
    pub(super) fn answer(&mut self, request: &Request, result: Result<(), ExportError>) {
        let (encoder, tag) = (self.encoder, request.tag());
        self.queue.encode(SHORT_REPLY_LEN, |out| match result {
            Ok(()) => encoder.success(tag, out),
            Err(error) => encoder.error(tag, error.errno, &error.message, out),
        });
    }

    /// Adds the reply to a refused request.
    pub(super) fn refuse(&mut self, Rejection { tag, error, reason, .. }: Rejection) {
        let encoder = self.encoder;
        self.queue.encode(SHORT_REPLY_LEN, |out| encoder.error(tag, error, reason, out));
    }

    /// Adds a chunk of data of `length` bytes, if `fill` fills it; returns the result of `fill`.
    pub(super) fn data(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
        fill: impl FnOnce(&mut [u8]) -> TryRead,
    ) -> TryRead {
        let space = self.queue.space(ReplyEncoder::MAX_READ_HEADER_LEN + length);
        let mut header = &mut space[..ReplyEncoder::MAX_READ_HEADER_LEN];
        self.encoder.data_header(request.tag(), offset, length as u32, position, &mut header);
        let header_len = ReplyEncoder::MAX_READ_HEADER_LEN - header.len();
        let filled = fill(&mut space[header_len..header_len + length]);
        self.queue.commit(if filled == TryRead::Complete { header_len + length } else { 0 });
        filled
    }

    /// Adds a chunk for a range that reads as zeroes.
    pub(super) fn hole(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
    ) {
        let (encoder, tag) = (self.encoder, request.tag());
        self.queue.encode(ReplyEncoder::MAX_READ_HEADER_LEN, |out| {
            encoder.hole(tag, offset, length as u32, position, out);
        });
    }

    /// Adds a chunk of data from a file, which is not copied.
    pub(super) fn file(
        &mut self,
        request: &Request,
        (offset, length): (u64, usize),
        position: Position,
        span: &FileSpan,
    ) {
        let (encoder, tag) = (self.encoder, request.tag());
        self.queue.encode(ReplyEncoder::MAX_READ_HEADER_LEN, |out| {
            encoder.data_header(tag, offset, length as u32, position, out);
        });
        self.queue.push_file(span.clone(), length);
    }
}
