//! Receives what a client sends: requests, payloads, and payloads of refused requests.

use std::task::{Context, Poll};

use nbd_proto::transmission::Request;
use nbd_proto::transmission::server::{Parsed, Rejection, Transmission};

use super::super::error::ConnectionError;
use super::super::handshake::Established;
use super::super::read_strategy::{Idle, ReadStrategy};
use super::super::receive::ReceiveBuffer;
use super::super::room::Room;
use super::super::socket::Socket;
use super::super::turn::Turn;
use crate::budget::Permit;

/// A payload up to this size, in bytes, is received in the receive buffer; a longer one is read
/// directly into a separate buffer.
const INLINE_PAYLOAD_LEN: usize = 64 * 1024;
/// The least that is read at a time, in bytes, even if the turn allows less: system calls for less
/// would cost more than the bytes.
const PART_LEN: usize = 64 * 1024;
/// Payload buffers up to this size are kept for the next payload. In bytes.
const KEPT_PAYLOAD_LEN: usize = 1 << 20;

/// The meaning of the next received bytes.
enum Receiving {
    /// A request.
    Header,
    /// The rest of a long payload.
    Payload { request: Request, buffer: Vec<u8>, filled: usize, permit: Permit },
    /// The payload of a refused request, and the request if it is not answered.
    Discarded { rejection: Option<Rejection>, remaining: u64 },
    /// Nothing: the client has sent DISC, or the server ends.
    Nothing,
}

/// Something that has arrived.
pub(super) enum Arrival {
    /// A request, whose header has this many bytes and is [still in the buffer](Incoming::consume).
    Request(Request, usize),
    /// A request that will be refused. Its header is [still in the buffer](Incoming::consume), and
    /// its payload is to be [discarded](Incoming::discard_payload).
    Refused { rejection: Rejection, header_len: usize, payload_len: u64 },
    /// A refused request whose payload was discarded.
    Discarded(Rejection),
    /// A WRITE with its [expected](Incoming::expect) long payload.
    Payload(Request, Vec<u8>, Permit),
}

/// The place of the payload of a WRITE.
pub(super) enum Payload {
    /// Complete in the buffer, after the header.
    Received,
    /// It will be in the buffer.
    Expected,
    /// It is too long for the buffer, and needs [its own](Incoming::expect).
    Long,
}

/// The receiving half of a connection.
pub(super) struct Incoming {
    transmission: Transmission,
    buffer: ReceiveBuffer,
    receiving: Receiving,
    spare_payload: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(established: &Established) -> Self {
        Self {
            transmission: Transmission::new(&established.negotiated),
            buffer: ReceiveBuffer::new(&established.received),
            receiving: match established.discard {
                0 => Receiving::Header,
                remaining => Receiving::Discarded { rejection: None, remaining },
            },
            spare_payload: Vec::new(),
        }
    }

    /// Takes the next arrival from the buffer; `None` if nothing is complete.
    pub(super) fn next(&mut self) -> Result<Option<Arrival>, ConnectionError> {
        match &self.receiving {
            Receiving::Header => match self.transmission.parse(self.buffer.filled())? {
                Parsed::NeedsInput(_) => Ok(None),
                Parsed::Request { request, consumed } => {
                    Ok(Some(Arrival::Request(request, consumed)))
                }
                Parsed::Rejected { rejection, consumed, discard } => {
                    let (header_len, payload_len) = (consumed, discard);
                    Ok(Some(Arrival::Refused { rejection, header_len, payload_len }))
                }
            },
            Receiving::Payload { .. } => Ok(self.fill_payload()),
            Receiving::Discarded { .. } => match self.discard() {
                Some(rejection) => Ok(Some(Arrival::Discarded(rejection))),
                // It was answered before.
                None if matches!(self.receiving, Receiving::Header) => self.next(),
                None => Ok(None),
            },
            Receiving::Nothing => Ok(None),
        }
    }

    /// Drops `count` bytes from the front of the buffer.
    pub(super) fn consume(&mut self, count: usize) {
        self.buffer.consume(count);
    }

    /// Takes a [refused request](Arrival::Refused) from the buffer, and its payload as it arrives.
    pub(super) fn discard_payload(
        &mut self,
        rejection: Rejection,
        header_len: usize,
        payload_len: u64,
    ) {
        self.buffer.consume(header_len);
        let rejection = Some(rejection);
        self.receiving = Receiving::Discarded { rejection, remaining: payload_len };
    }

    /// The place of a payload of `length` bytes after a header of `header_len` bytes.
    pub(super) fn payload(&self, header_len: usize, length: usize) -> Payload {
        if self.buffer.filled().len() >= header_len.saturating_add(length) {
            Payload::Received
        } else if length <= INLINE_PAYLOAD_LEN {
            Payload::Expected
        } else {
            Payload::Long
        }
    }

    /// A payload that is [received](Payload::Received).
    pub(super) fn received(&self, header_len: usize, length: usize) -> &[u8] {
        self.buffer.filled().get(header_len..header_len + length).unwrap_or_default()
    }

    /// Sets the length of the last payload, in bytes, so that reads can be limited to suit the
    /// next.
    pub(super) fn expect_payloads_like(&mut self, length: usize) {
        self.buffer.expect_payloads_like(length);
    }

    /// Starts to receive the long payload of a WRITE into a separate buffer.
    pub(super) fn expect(&mut self, request: Request, permit: Permit) {
        let mut buffer = std::mem::take(&mut self.spare_payload);
        buffer.resize(request.data_len(), 0);
        self.receiving = Receiving::Payload { request, buffer, filled: 0, permit };
    }

    /// Keeps the buffer of a finished payload for the next.
    pub(super) fn keep(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() <= KEPT_PAYLOAD_LEN {
            self.spare_payload = buffer;
        }
    }

    /// Takes the unanswered refused request whose payload is being discarded. The caller answers
    /// it; its payload may arrive later.
    pub(super) fn take_rejection(&mut self) -> Option<Rejection> {
        match &mut self.receiving {
            Receiving::Discarded { rejection, .. } => rejection.take(),
            _ => None,
        }
    }

    /// Returns the received bytes of requests that have not begun, and the number of bytes at their
    /// start to discard. `waiting` is a WRITE whose header was consumed, but not its payload.
    pub(super) fn save(&self, waiting: Option<&Request>) -> (Vec<u8>, u64) {
        let mut saved = Vec::new();
        let mut discard = 0;
        match (&self.receiving, waiting) {
            (Receiving::Payload { request, buffer, filled, .. }, _) => {
                self.transmission.encode_write(request, &mut saved);
                saved.extend_from_slice(&buffer[..*filled]);
            }
            (Receiving::Discarded { remaining, .. }, _) => discard = *remaining,
            (_, Some(request)) => self.transmission.encode_write(request, &mut saved),
            (Receiving::Header | Receiving::Nothing, None) => {}
        }
        saved.extend_from_slice(self.buffer.filled());
        (saved, discard)
    }

    /// Stops receiving.
    pub(super) fn close(&mut self) {
        self.receiving = Receiving::Nothing;
    }

    /// Whether nothing more will arrive.
    pub(super) const fn is_closed(&self) -> bool {
        matches!(self.receiving, Receiving::Nothing)
    }

    /// Whether a part of something has arrived.
    pub(super) fn is_partial(&self) -> bool {
        match self.receiving {
            Receiving::Header => !self.buffer.filled().is_empty(),
            Receiving::Payload { .. } | Receiving::Discarded { .. } => true,
            Receiving::Nothing => false,
        }
    }

    /// The progress: bytes that went through the buffer, and those of the long payload.
    pub(super) const fn progress(&self) -> (u64, usize) {
        let payload = match &self.receiving {
            Receiving::Payload { filled, .. } => *filled,
            _ => 0,
        };
        (self.buffer.total(), payload)
    }

    /// Makes the buffer small again, if it is empty.
    pub(super) fn shrink(&mut self) {
        self.buffer.shrink();
    }

    /// Reads from the socket, in a way that suits the client, about as many bytes as the turn
    /// allows. They are charged to it.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket,
        room: &mut Room,
        turn: &mut Turn,
        (strategy, idle): (&mut ReadStrategy, Idle),
    ) -> Poll<std::io::Result<Received>> {
        let part_len = turn.left().max(PART_LEN);
        let read = match &mut self.receiving {
            // The buffer is empty while a payload is incomplete: the payload bypasses it.
            Receiving::Payload { buffer, filled, .. } => {
                let end = buffer.len().min(filled.saturating_add(part_len));
                let read = socket.poll_read(cx, &mut buffer[*filled..end]);
                if let Poll::Ready(Ok(count)) = read {
                    *filled += count;
                    turn.spend_in_bulk(count);
                }
                read
            }
            Receiving::Discarded { .. } => {
                let space = self.buffer.space();
                let end = space.len().min(part_len);
                let read = socket.poll_read(cx, &mut space[..end]);
                if let Poll::Ready(Ok(count)) = read {
                    self.buffer.received(count);
                    turn.spend_in_bulk(count);
                }
                read
            }
            Receiving::Header | Receiving::Nothing => {
                if self.buffer.wants_room() && room.ask() {
                    self.buffer.grow();
                }
                if strategy.read(socket, idle, &mut self.buffer) {
                    return Poll::Ready(Ok(Received::Bytes));
                }
                let space = self.buffer.space();
                let end = space.len().min(part_len);
                let read = socket.poll_read(cx, &mut space[..end]);
                if let Poll::Ready(Ok(count)) = read {
                    self.buffer.received(count);
                    turn.spend(count);
                }
                read
            }
        };
        read.map_ok(|count| if count == 0 { Received::End } else { Received::Bytes })
    }

    /// Copies the received part of a long payload; returns the WRITE if it is complete.
    fn fill_payload(&mut self) -> Option<Arrival> {
        let Receiving::Payload { buffer, filled, .. } = &mut self.receiving else { return None };
        let received = self.buffer.filled();
        let count = received.len().min(buffer.len() - *filled);
        buffer[*filled..*filled + count].copy_from_slice(&received[..count]);
        self.buffer.consume(count);
        *filled += count;
        if *filled < buffer.len() {
            return None;
        }
        match std::mem::replace(&mut self.receiving, Receiving::Header) {
            Receiving::Payload { request, buffer, permit, .. } => {
                Some(Arrival::Payload(request, buffer, permit))
            }
            _ => None,
        }
    }

    /// Discards the payload of a refused request; returns the request if all of it was discarded.
    fn discard(&mut self) -> Option<Rejection> {
        let Receiving::Discarded { rejection, remaining } = &mut self.receiving else {
            return None;
        };
        let received = self.buffer.filled().len();
        let count = usize::try_from(*remaining).unwrap_or(usize::MAX).min(received);
        self.buffer.consume(count);
        *remaining -= count as u64;
        if *remaining > 0 {
            return None;
        }
        let rejection = rejection.take();
        self.receiving = Receiving::Header;
        rejection
    }
}

/// The result of a read from the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Something.
    Bytes,
    /// The client will send nothing more.
    End,
}
