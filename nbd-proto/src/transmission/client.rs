//! The client's side: encodes requests and turns replies into validated events.
//!
//! The server is not trusted. Every chunk is checked against its request: type, offset and
//! coverage. A reply that does not match ends the connection with an error that names the reason.

use std::ops::Deref;

use bytes::{Buf, BufMut};

use super::coverage::Coverage;
pub use super::event::{Event, ServerError};
use super::in_flight::InFlight;
use super::pending::{Kind, Pending};
use super::{Command, Durability, ExtentLimit, Fragmentation, Speed, ZeroMode};
use crate::error::{ApiMisuse, ProtocolError};
use crate::handshake::Negotiated;
use crate::wire::{
    ChunkHeader, CommandFlags, Cookie, Errno, MetaContextId, ReplyFlags, ReplyMode, ReplyType,
    RequestHeader, SimpleReplyHeader, TransmissionFlags, magic,
};

/// Bytes that were received, in one piece.
pub trait Input: Buf + Deref<Target = [u8]> {}

impl<I: Buf + Deref<Target = [u8]>> Input for I {}

/// The requests in flight of one connection and the state of their replies.
#[derive(Debug)]
pub struct Transmission {
    size: u64,
    flags: TransmissionFlags,
    minimum: u32,
    maximum_payload: u32,
    mode: ReplyMode,
    contexts: Vec<MetaContextId>,
    pending: InFlight<Pending>,
    next_cookie: u64,
    /// Delivered with the next call: the end of a request whose data came last.
    finished: Option<Cookie>,
}

impl Transmission {
    /// Begins the transmission phase with the result of the handshake.
    #[must_use]
    pub fn new(negotiated: &Negotiated) -> Self {
        Self {
            size: negotiated.size,
            flags: negotiated.flags,
            minimum: negotiated.block_sizes.minimum(),
            maximum_payload: negotiated.block_sizes.maximum_payload(),
            mode: negotiated.reply_mode,
            contexts: negotiated.meta_contexts.iter().map(|(id, _)| *id).collect(),
            pending: InFlight::default(),
            next_cookie: 1,
            finished: None,
        }
    }

    /// Returns the number of requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Appends a request to `out` and returns its cookie. For a WRITE the payload, exactly `length`
    /// bytes, has to follow on the wire.
    ///
    /// # Errors
    ///
    /// [`ApiMisuse`] if the request was not negotiated, leaves the export or is too long; nothing
    /// was written to `out`.
    pub fn request(
        &mut self,
        offset: u64,
        length: u64,
        command: &Command,
        out: &mut impl BufMut,
    ) -> Result<Cookie, ApiMisuse> {
        self.check(offset, length, command)?;
        // These have no range, and some servers refuse a range.
        let (offset, length) = match command {
            Command::Flush | Command::Disconnect => (0, 0),
            _ => (offset, length),
        };
        let cookie = Cookie(self.next_cookie);
        self.next_cookie = self.next_cookie.wrapping_add(1);
        self.encode(cookie, offset, length, command, out)?;
        if *command != Command::Disconnect {
            let kind = match command {
                Command::Read(_) => Kind::Read(Coverage::default()),
                Command::BlockStatus(limit, wanted) => {
                    let wanted = wanted.as_deref().unwrap_or(&self.contexts).to_vec();
                    Kind::Status(wanted, *limit)
                }
                _ => Kind::Other,
            };
            self.pending.insert(cookie, Pending::new(offset, length, kind));
        }
        Ok(cookie)
    }

    fn encode(
        &self,
        cookie: Cookie,
        offset: u64,
        length: u64,
        command: &Command,
        out: &mut impl BufMut,
    ) -> Result<(), ApiMisuse> {
        let mut header = RequestHeader {
            flags: command_flags(command),
            command: command.command_type(),
            cookie,
            offset,
            length,
        };
        if self.mode != ReplyMode::Extended {
            return header
                .encode_compact(out)
                .map_err(|_| ApiMisuse::TooLong { length, limit: u64::from(u32::MAX) });
        }
        if let Command::Write(_) = command {
            header.flags |= CommandFlags::PAYLOAD_LEN;
        }
        if let Command::BlockStatus(_, Some(wanted)) = command {
            header.flags |= CommandFlags::PAYLOAD_LEN;
            header.length = (wanted.len() as u64).saturating_mul(4).saturating_add(8);
            header.encode_extended(out);
            out.put_u64(length);
            for id in wanted {
                out.put_u32(id.0);
            }
            return Ok(());
        }
        header.encode_extended(out);
        Ok(())
    }

    fn check(&self, offset: u64, length: u64, command: &Command) -> Result<(), ApiMisuse> {
        self.check_negotiated(command)?;
        if matches!(command, Command::Flush | Command::Disconnect) {
            return Ok(());
        }
        if length == 0 {
            return Err(ApiMisuse::Empty);
        }
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(ApiMisuse::OutOfBounds { offset, length, size: self.size });
        }
        if (offset | length) & u64::from(self.minimum).saturating_sub(1) != 0 {
            return Err(ApiMisuse::Unaligned { offset, length, minimum: self.minimum });
        }
        let limit = match command {
            Command::Read(_) | Command::Write(_) => u64::from(self.maximum_payload),
            _ if self.mode == ReplyMode::Extended => u64::MAX,
            _ => u64::from(u32::MAX),
        };
        if length > limit { Err(ApiMisuse::TooLong { length, limit }) } else { Ok(()) }
    }

    fn check_negotiated(&self, command: &Command) -> Result<(), ApiMisuse> {
        let require = |flag: TransmissionFlags, what| {
            if self.flags.contains(flag) { Ok(()) } else { Err(ApiMisuse::NotNegotiated { what }) }
        };
        let writable = || {
            if self.flags.contains(TransmissionFlags::READ_ONLY) {
                Err(ApiMisuse::NotNegotiated { what: "writing" })
            } else {
                Ok(())
            }
        };
        let durable = |durability: &Durability| match durability {
            Durability::Cached => Ok(()),
            Durability::Fua => require(TransmissionFlags::SEND_FUA, "FUA"),
        };
        match command {
            Command::Read(Fragmentation::Allowed) | Command::Disconnect => Ok(()),
            Command::Read(Fragmentation::Forbidden) => require(TransmissionFlags::SEND_DF, "DF"),
            Command::Write(durability) => writable().and_then(|()| durable(durability)),
            Command::Flush => require(TransmissionFlags::SEND_FLUSH, "FLUSH"),
            Command::Trim(durability) => {
                writable()?;
                require(TransmissionFlags::SEND_TRIM, "TRIM")?;
                durable(durability)
            }
            Command::Cache => require(TransmissionFlags::SEND_CACHE, "CACHE"),
            Command::WriteZeroes(_, speed, durability) => {
                writable()?;
                require(TransmissionFlags::SEND_WRITE_ZEROES, "WRITE_ZEROES")?;
                if *speed == Speed::FastOnly {
                    require(TransmissionFlags::SEND_FAST_ZERO, "FAST_ZERO")?;
                }
                durable(durability)
            }
            Command::BlockStatus(_, wanted) => self.check_contexts(wanted.as_deref()),
        }
    }

    fn check_contexts(&self, wanted: Option<&[MetaContextId]>) -> Result<(), ApiMisuse> {
        if self.contexts.is_empty() || self.mode == ReplyMode::Simple {
            return Err(ApiMisuse::NotNegotiated { what: "BLOCK_STATUS" });
        }
        let Some(wanted) = wanted else { return Ok(()) };
        let extended = self.mode == ReplyMode::Extended;
        if !extended || !self.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD) {
            return Err(ApiMisuse::NotNegotiated { what: "BLOCK_STATUS_PAYLOAD" });
        }
        let repeats = |(index, id)| wanted.iter().skip(index + 1).any(|other| other == id);
        if wanted.is_empty() || wanted.iter().enumerate().any(repeats) {
            return Err(ApiMisuse::NotNegotiated { what: "no metadata context, or one twice" });
        }
        if wanted.iter().any(|id| !self.contexts.contains(id)) {
            return Err(ApiMisuse::NotNegotiated { what: "one of the metadata contexts" });
        }
        Ok(())
    }

    /// Returns the next event and removes its bytes from the front of `input`, which is a
    /// `BytesMut` or a `&[u8]` into a buffer of the caller. After [`Event::Data`] the caller
    /// removes the data itself before the next call.
    ///
    /// # Errors
    ///
    /// A [`ProtocolError`] ends the connection: every request in flight has failed.
    pub fn advance(&mut self, input: &mut impl Input) -> Result<Event, ProtocolError> {
        if let Some(cookie) = self.finished.take() {
            return self.finish(cookie);
        }
        loop {
            // An error chunk in the middle of a reply is recorded and reported at its end.
            if let Some(event) = self.next_message(input)? {
                return Ok(event);
            }
        }
    }

    fn next_message(&mut self, input: &mut impl Input) -> Result<Option<Event>, ProtocolError> {
        let Some(front) = input.first_chunk::<4>() else { return Ok(Some(Event::NeedsInput)) };
        match u32::from_be_bytes(*front) {
            magic::SIMPLE_REPLY => self.simple_reply(input).map(Some),
            magic::STRUCTURED_REPLY if self.mode == ReplyMode::Structured => {
                let Some(header) = ChunkHeader::decode_structured(input)? else {
                    return Ok(Some(Event::NeedsInput));
                };
                self.chunk(input, ChunkHeader::STRUCTURED_LEN, header)
            }
            magic::EXTENDED_REPLY if self.mode == ReplyMode::Extended => {
                let Some((header, offset)) = ChunkHeader::decode_extended(input)? else {
                    return Ok(Some(Event::NeedsInput));
                };
                let pending = self.pending_for(header.cookie)?;
                if offset != pending.offset {
                    let why = "the offset is not the request's";
                    return Err(pending.bad_chunk("a chunk", why, offset, header.length));
                }
                self.chunk(input, ChunkHeader::EXTENDED_LEN, header)
            }
            found => Err(ProtocolError::BadMagic { expected: "a reply", found: u64::from(found) }),
        }
    }

    fn pending_for(&self, cookie: Cookie) -> Result<&Pending, ProtocolError> {
        self.pending.get(cookie).ok_or(ProtocolError::UnknownCookie { cookie: cookie.0 })
    }

    fn simple_reply(&mut self, input: &mut impl Input) -> Result<Event, ProtocolError> {
        let Some(header) = SimpleReplyHeader::decode(input) else { return Ok(Event::NeedsInput) };
        let cookie = header.cookie;
        let what = "a simple reply";
        if self.mode == ReplyMode::Extended {
            let why = "extended headers were negotiated";
            return Err(ProtocolError::Unexpected { what, why });
        }
        let mode = self.mode;
        let Some(pending) = self.pending.get_mut(cookie) else {
            return Err(ProtocolError::UnknownCookie { cookie: cookie.0 });
        };
        if mode == ReplyMode::Structured && matches!(pending.kind, Kind::Read(_)) {
            let why = "a READ with structured replies needs chunks";
            return Err(ProtocolError::Unexpected { what, why });
        }
        let failed = header.error != Errno(0);
        if !failed && matches!(&pending.kind, Kind::Status(..)) {
            let why = "it cannot carry a block status";
            return Err(ProtocolError::Unexpected { what, why });
        }
        input.advance(SimpleReplyHeader::LEN);
        if failed {
            let error = ServerError::new(header.error);
            pending.error = Some(error);
        } else if let Kind::Read(coverage) = &mut pending.kind {
            coverage.add(0, pending.length);
            let length = usize::try_from(pending.length).unwrap_or(usize::MAX);
            self.finished = Some(cookie);
            return Ok(Event::Data { cookie, position: 0, length });
        }
        self.finish(cookie)
    }

    fn chunk(
        &mut self,
        input: &mut impl Input,
        header_len: usize,
        header: ChunkHeader,
    ) -> Result<Option<Event>, ProtocolError> {
        let cookie = header.cookie;
        let mode = self.mode;
        let Some(pending) = self.pending.get_mut(cookie) else {
            return Err(ProtocolError::UnknownCookie { cookie: cookie.0 });
        };
        // A data chunk needs its offset only; all other payloads are small and needed whole.
        let kept = pending.kept_payload(&header, mode)?;
        let whole = header_len.saturating_add(kept);
        let Some(payload) = input.get(header_len..whole) else {
            return Ok(Some(Event::NeedsInput));
        };
        let event = match header.reply {
            ReplyType::NONE => None,
            ReplyType::OFFSET_DATA => Some(pending.data(&header, payload)?),
            ReplyType::OFFSET_HOLE => Some(pending.hole(cookie, payload)?),
            ReplyType::BLOCK_STATUS | ReplyType::BLOCK_STATUS_EXT => {
                Some(pending.status(&header, payload)?)
            }
            reply => {
                pending.error_chunk(reply, payload)?;
                None
            }
        };
        input.advance(whole);
        let done = header.flags.contains(ReplyFlags::DONE);
        match event {
            Some(event) => {
                self.finished = done.then_some(cookie);
                Ok(Some(event))
            }
            None if done => self.finish(cookie).map(Some),
            None if header.reply == ReplyType::NONE => Err(ProtocolError::Malformed {
                what: "chunk without content",
                why: "it has to be the last of its reply",
            }),
            None => Ok(None),
        }
    }

    fn finish(&mut self, cookie: Cookie) -> Result<Event, ProtocolError> {
        let Some(pending) = self.pending.remove(cookie) else {
            return Err(ProtocolError::UnknownCookie { cookie: cookie.0 });
        };
        if let Some(error) = pending.error {
            return Ok(Event::Finished { cookie, result: Err(error) });
        }
        match &pending.kind {
            Kind::Read(coverage) if !coverage.is_complete(pending.length) => {
                let why = "success was reported although some bytes were never sent";
                return Err(pending.bad_chunk("the end of a read", why, pending.offset, 0));
            }
            Kind::Status(missing, _) if !missing.is_empty() => {
                let why = "success was reported although a context was never answered";
                return Err(pending.bad_chunk("the end of a block status", why, pending.offset, 0));
            }
            _ => {}
        }
        Ok(Event::Finished { cookie, result: Ok(()) })
    }
}

fn command_flags(command: &Command) -> CommandFlags {
    let fua = |durability: &Durability| match durability {
        Durability::Cached => CommandFlags::empty(),
        Durability::Fua => CommandFlags::FUA,
    };
    match command {
        Command::Read(Fragmentation::Forbidden) => CommandFlags::DF,
        Command::Write(durability) | Command::Trim(durability) => fua(durability),
        Command::WriteZeroes(mode, speed, durability) => {
            let mut flags = fua(durability);
            if *mode == ZeroMode::KeepAllocated {
                flags |= CommandFlags::NO_HOLE;
            }
            if *speed == Speed::FastOnly {
                flags |= CommandFlags::FAST_ZERO;
            }
            flags
        }
        Command::BlockStatus(ExtentLimit::One, _) => CommandFlags::REQ_ONE,
        _ => CommandFlags::empty(),
    }
}
