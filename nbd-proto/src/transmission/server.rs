//! The server's side: parses bytes into validated requests.
//!
//! Requests are validated here only. A request from [`Transmission::parse`] is inside the export,
//! is allowed on it and uses negotiated features only.

use super::{
    Command, Durability, ExtentLimit, Fragmentation, Request, RequestTag, Speed, ZeroMode,
};
use crate::codec::Reader;
use crate::error::ProtocolError;
use crate::handshake::Negotiated;
use crate::limits::{MAX_DISCARDED_PAYLOAD, MAX_META_CONTEXTS};
use crate::wire::{
    BlockSizes, CommandFlags, CommandType, Errno, MetaContextId, ReplyMode, RequestHeader,
    TransmissionFlags,
};

/// The meaning of the bytes at the front of the receive buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// More bytes are needed: the buffer has to hold at least this many in total.
    NeedsInput(usize),
    /// A valid request. Drop `consumed` bytes; for a WRITE the request's `length` bytes of payload
    /// follow.
    Request {
        /// The request.
        request: Request,
        /// Length of the header in the buffer, in bytes.
        consumed: usize,
    },
    /// A request to be answered with an error. Drop `consumed` bytes from the buffer, then discard
    /// `discard` further bytes of the stream, which are its payload.
    Rejected {
        /// The error reply.
        rejection: Rejection,
        /// Length of the header in the buffer, in bytes.
        consumed: usize,
        /// Length of the payload to discard, in bytes.
        discard: u64,
    },
}

/// An invalid request and the reason for its refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rejection {
    /// The fields that the reply repeats.
    pub tag: RequestTag,
    /// The error to report.
    pub error: Errno,
    /// The reason, for display.
    pub reason: &'static str,
}

/// Validates the requests of one connection. It buffers no bytes.
#[derive(Debug, Clone)]
pub struct Transmission {
    size: u64,
    flags: TransmissionFlags,
    block_sizes: BlockSizes,
    mode: ReplyMode,
    contexts: Vec<MetaContextId>,
}

impl Transmission {
    /// Begins the transmission phase with the result of the handshake.
    #[must_use]
    pub fn new(negotiated: &Negotiated) -> Self {
        Self {
            size: negotiated.size,
            flags: negotiated.flags,
            block_sizes: negotiated.block_sizes,
            mode: negotiated.reply_mode,
            contexts: negotiated.meta_contexts.iter().map(|(id, _)| *id).collect(),
        }
    }

    /// Parses the front of `input`, the bytes received and not yet consumed.
    ///
    /// # Errors
    ///
    /// A [`ProtocolError`] ends the connection: the stream is out of sync, or the client announced
    /// a payload beyond [`MAX_DISCARDED_PAYLOAD`].
    pub fn parse(&self, input: &[u8]) -> Result<Parsed, ProtocolError> {
        let (header, header_len) = if self.mode == ReplyMode::Extended {
            (RequestHeader::decode_extended(input)?, RequestHeader::EXTENDED_LEN)
        } else {
            (RequestHeader::decode_compact(input)?, RequestHeader::COMPACT_LEN)
        };
        let Some(header) = header else { return Ok(Parsed::NeedsInput(header_len)) };
        let payload = self.payload_len(&header);
        if header.command == CommandType::BLOCK_STATUS && payload > 0 {
            return self.parse_status_payload(&header, header_len, payload, input);
        }
        match self.check(&header, payload) {
            Ok(command) => {
                let Range { offset, length } = Range::of(&header, &command);
                let request = Request { cookie: header.cookie, offset, length, command };
                Ok(Parsed::Request { request, consumed: header_len })
            }
            Err(reason) => Self::reject(&header, header_len, payload, reason),
        }
    }

    /// Appends the header of a parsed WRITE, as a client sends it: it parses to the same request.
    pub fn encode_write(&self, request: &Request, out: &mut Vec<u8>) {
        let mut flags = match request.command {
            Command::Write(Durability::Fua) => CommandFlags::FUA,
            _ => CommandFlags::empty(),
        };
        let &Request { cookie, offset, length, .. } = request;
        let command = CommandType::WRITE;
        if self.mode == ReplyMode::Extended {
            flags |= CommandFlags::PAYLOAD_LEN;
            RequestHeader { flags, command, cookie, offset, length }.encode_extended(out);
        } else {
            // A parsed length fits: it came from such a header.
            let header = RequestHeader { flags, command, cookie, offset, length };
            debug_assert!(u32::try_from(length).is_ok(), "the request was parsed");
            let _ = header.encode_compact(out);
        }
    }

    fn reject(
        header: &RequestHeader,
        consumed: usize,
        payload: u64,
        (error, reason): (Errno, &'static str),
    ) -> Result<Parsed, ProtocolError> {
        if payload > MAX_DISCARDED_PAYLOAD {
            return Err(ProtocolError::TooLong {
                what: "request payload",
                length: payload,
                limit: MAX_DISCARDED_PAYLOAD,
            });
        }
        let tag =
            RequestTag { cookie: header.cookie, offset: header.offset, command: header.command };
        let rejection = Rejection { tag, error, reason };
        Ok(Parsed::Rejected { rejection, consumed, discard: payload })
    }

    /// The number of payload bytes after the header. A WRITE has a payload in every mode, even if a
    /// client with extended headers omitted the flag.
    fn payload_len(&self, header: &RequestHeader) -> u64 {
        let flagged =
            self.mode == ReplyMode::Extended && header.flags.contains(CommandFlags::PAYLOAD_LEN);
        if flagged || header.command == CommandType::WRITE { header.length } else { 0 }
    }

    fn check(
        &self,
        header: &RequestHeader,
        payload: u64,
    ) -> Result<Command, (Errno, &'static str)> {
        let flags = self.check_flags(header)?;
        if header.command == CommandType::DISC {
            return Ok(Command::Disconnect);
        }
        if payload > 0 && header.command != CommandType::WRITE {
            return Err((Errno::EINVAL, "this command takes no payload"));
        }
        let durability =
            if flags.contains(CommandFlags::FUA) { Durability::Fua } else { Durability::Cached };
        match header.command {
            CommandType::READ => {
                self.check_range(header, Errno::EINVAL)?;
                self.check_payload_limit(header)?;
                Ok(Command::Read(if flags.contains(CommandFlags::DF) {
                    Fragmentation::Forbidden
                } else {
                    Fragmentation::Allowed
                }))
            }
            CommandType::WRITE => {
                self.check_writable(header)?;
                self.check_payload_limit(header)?;
                Ok(Command::Write(durability))
            }
            CommandType::FLUSH => {
                self.require(TransmissionFlags::SEND_FLUSH)?;
                Ok(Command::Flush)
            }
            CommandType::TRIM => {
                self.require_on_writable(TransmissionFlags::SEND_TRIM)?;
                self.check_trim(header)?;
                Ok(Command::Trim(durability))
            }
            CommandType::CACHE => {
                self.require(TransmissionFlags::SEND_CACHE)?;
                self.check_range(header, Errno::EINVAL)?;
                Ok(Command::Cache)
            }
            CommandType::WRITE_ZEROES => self.check_write_zeroes(header, flags, durability),
            CommandType::BLOCK_STATUS => {
                self.check_block_status(header.offset, header.length)?;
                Ok(Command::BlockStatus(extent_limit(flags), None))
            }
            _ => Err((Errno::EINVAL, "unknown command")),
        }
    }

    fn check_write_zeroes(
        &self,
        header: &RequestHeader,
        flags: CommandFlags,
        durability: Durability,
    ) -> Result<Command, (Errno, &'static str)> {
        self.require_on_writable(TransmissionFlags::SEND_WRITE_ZEROES)?;
        let speed = if flags.contains(CommandFlags::FAST_ZERO) {
            self.require(TransmissionFlags::SEND_FAST_ZERO)?;
            Speed::FastOnly
        } else {
            Speed::Any
        };
        self.check_writable(header)?;
        let mode = if flags.contains(CommandFlags::NO_HOLE) {
            ZeroMode::KeepAllocated
        } else {
            ZeroMode::MayUnmap
        };
        Ok(Command::WriteZeroes(mode, speed, durability))
    }

    /// Accepts only negotiated flags that are defined for the command. FUA is always legal, and has
    /// no effect on commands that do not write.
    fn check_flags(&self, header: &RequestHeader) -> Result<CommandFlags, (Errno, &'static str)> {
        let mut legal = CommandFlags::FUA;
        match header.command {
            CommandType::READ if self.mode != ReplyMode::Simple => legal |= CommandFlags::DF,
            CommandType::WRITE_ZEROES => legal |= CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            CommandType::BLOCK_STATUS => legal |= CommandFlags::REQ_ONE,
            // The flags of a DISC do not delay the client that disconnects.
            CommandType::DISC => return Ok(CommandFlags::empty()),
            _ => {}
        }
        if self.mode == ReplyMode::Extended {
            legal |= CommandFlags::PAYLOAD_LEN;
        }
        if !legal.contains(header.flags) {
            return Err((Errno::EINVAL, "a flag is unknown or not legal for this command"));
        }
        let writes = matches!(
            header.command,
            CommandType::WRITE | CommandType::TRIM | CommandType::WRITE_ZEROES
        );
        if writes && header.flags.contains(CommandFlags::FUA) {
            self.require_on_writable(TransmissionFlags::SEND_FUA)?;
        }
        Ok(header.flags)
    }

    const fn require(&self, flag: TransmissionFlags) -> Result<(), (Errno, &'static str)> {
        if self.flags.contains(flag) {
            Ok(())
        } else {
            Err((Errno::EINVAL, "the export does not offer this command or flag"))
        }
    }

    /// Like `require`, but reports "read-only" where that is the reason.
    const fn require_on_writable(
        &self,
        flag: TransmissionFlags,
    ) -> Result<(), (Errno, &'static str)> {
        if self.flags.contains(TransmissionFlags::READ_ONLY) { Ok(()) } else { self.require(flag) }
    }

    fn check_writable(&self, header: &RequestHeader) -> Result<(), (Errno, &'static str)> {
        self.check_not_read_only()?;
        self.check_range(header, Errno::ENOSPC)
    }

    fn check_trim(&self, header: &RequestHeader) -> Result<(), (Errno, &'static str)> {
        self.check_not_read_only()?;
        self.check_range(header, Errno::EINVAL)
    }

    const fn check_not_read_only(&self) -> Result<(), (Errno, &'static str)> {
        if self.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err((Errno::EPERM, "the export is read-only"));
        }
        Ok(())
    }

    fn check_range(
        &self,
        header: &RequestHeader,
        past_end: Errno,
    ) -> Result<(), (Errno, &'static str)> {
        self.check_bounds(header.offset, header.length, past_end)
    }

    fn check_bounds(
        &self,
        offset: u64,
        length: u64,
        past_end: Errno,
    ) -> Result<(), (Errno, &'static str)> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => {}
            Some(_) => return Err((past_end, "the range goes past the end of the export")),
            None => return Err((Errno::EINVAL, "offset and length overflow")),
        }
        let mask = u64::from(self.block_sizes.minimum()).saturating_sub(1);
        if (offset | length) & mask != 0 {
            return Err((Errno::EINVAL, "the range is not aligned to the minimum block size"));
        }
        Ok(())
    }

    fn check_payload_limit(&self, header: &RequestHeader) -> Result<(), (Errno, &'static str)> {
        if header.length > u64::from(self.block_sizes.maximum_payload()) {
            return Err((Errno::EINVAL, "the payload is over the maximum block size"));
        }
        Ok(())
    }

    fn check_block_status(&self, offset: u64, length: u64) -> Result<(), (Errno, &'static str)> {
        if self.mode == ReplyMode::Simple || self.contexts.is_empty() {
            return Err((Errno::EINVAL, "no metadata context was negotiated for this export"));
        }
        if length == 0 {
            return Err((Errno::EINVAL, "block status needs a length"));
        }
        self.check_bounds(offset, length, Errno::EINVAL)
    }

    /// BLOCK_STATUS with a payload: a 64-bit effect length and the requested contexts.
    fn parse_status_payload(
        &self,
        header: &RequestHeader,
        header_len: usize,
        payload: u64,
        input: &[u8],
    ) -> Result<Parsed, ProtocolError> {
        let refuse = |why| Self::reject(header, header_len, payload, (Errno::EINVAL, why));
        if !self.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD) {
            return refuse("a block status payload was not offered");
        }
        let ids = payload.wrapping_sub(8);
        if payload < 12 || !ids.is_multiple_of(4) || ids / 4 > MAX_META_CONTEXTS as u64 {
            return refuse("the block status payload has an impossible size");
        }
        let whole = header_len.saturating_add(payload as usize);
        let Some(body) = input.get(header_len..whole) else {
            return Ok(Parsed::NeedsInput(whole));
        };
        let mut reader = Reader::new(body);
        let length = reader.u64().unwrap_or(0);
        let mut wanted = Vec::new();
        while let Some(id) = reader.u32() {
            let id = MetaContextId(id);
            if !self.contexts.contains(&id) || wanted.contains(&id) {
                return refuse("a context id is unknown or repeated");
            }
            wanted.push(id);
        }
        let checked = self
            .check_flags(header)
            .and_then(|flags| self.check_block_status(header.offset, length).map(|()| flags));
        match checked {
            Err((error, why)) => Self::reject(header, header_len, payload, (error, why)),
            Ok(flags) => {
                let command = Command::BlockStatus(extent_limit(flags), Some(wanted.into()));
                let request =
                    Request { cookie: header.cookie, offset: header.offset, length, command };
                Ok(Parsed::Request { request, consumed: whole })
            }
        }
    }
}

struct Range {
    offset: u64,
    length: u64,
}

impl Range {
    /// FLUSH and DISC have no range, regardless of their header.
    const fn of(header: &RequestHeader, command: &Command) -> Self {
        match command {
            Command::Flush | Command::Disconnect => Self { offset: header.offset, length: 0 },
            _ => Self { offset: header.offset, length: header.length },
        }
    }
}

const fn extent_limit(flags: CommandFlags) -> ExtentLimit {
    if flags.contains(CommandFlags::REQ_ONE) { ExtentLimit::One } else { ExtentLimit::Many }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Cookie;

    #[test]
    fn a_write_is_encoded_as_it_was_parsed() {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FUA;
        for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
            let transmission = Transmission::new(&Negotiated::new("", 1 << 20, flags, mode));
            for durability in [Durability::Cached, Durability::Fua] {
                let command = Command::Write(durability);
                let request = Request { cookie: Cookie(7), offset: 4096, length: 512, command };
                let mut bytes = Vec::new();
                transmission.encode_write(&request, &mut bytes);
                let consumed = bytes.len();
                let parsed = transmission.parse(&bytes).unwrap();
                assert_eq!(parsed, Parsed::Request { request, consumed }, "{mode:?}");
            }
        }
    }
}
