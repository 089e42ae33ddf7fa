//! One request in flight, and the validation of its chunks.

use super::ExtentLimit;
use super::coverage::Coverage;
use super::event::{Event, ServerError};
use crate::codec::Reader;
use crate::error::ProtocolError;
use crate::limits::{
    MAX_CHUNKS_PER_READ, MAX_DESCRIPTORS_RECEIVED, MAX_ERROR_CHUNKS, MAX_ERROR_CHUNKS_LEN,
    MAX_GAPS_PER_READ, MAX_UNKNOWN_CHUNK_LEN,
};
use crate::wire::{
    BlockDescriptor, ChunkHeader, Cookie, Errno, MetaContextId, ReplyMode, ReplyType,
};

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) kind: Kind,
    pub(super) error: Option<ServerError>,
    /// Number of error chunks received, and their bytes.
    error_chunks: (u32, u64),
}

#[derive(Debug)]
pub(super) enum Kind {
    Read(Coverage),
    /// The contexts without an answer so far.
    Status(Vec<MetaContextId>, ExtentLimit),
    Other,
}

impl Pending {
    pub(super) const fn new(offset: u64, length: u64, kind: Kind) -> Self {
        Self { offset, length, kind, error: None, error_chunks: (0, 0) }
    }

    pub(super) fn bad_chunk(
        &self,
        what: &'static str,
        why: &'static str,
        offset: u64,
        length: u64,
    ) -> ProtocolError {
        ProtocolError::BadChunk {
            what,
            why,
            request_offset: self.offset,
            request_length: self.length,
            offset,
            length,
        }
    }

    /// Checks the announced payload length against the kind of chunk before anything is buffered,
    /// and returns the number of payload bytes needed to process the chunk.
    pub(super) fn kept_payload(
        &self,
        header: &ChunkHeader,
        mode: ReplyMode,
    ) -> Result<usize, ProtocolError> {
        let length = header.length;
        let bad = |what, why| Err(self.bad_chunk(what, why, self.offset, length));
        let statuses = MAX_DESCRIPTORS_RECEIVED as u64;
        match (header.reply, &self.kind) {
            (ReplyType::NONE, _) if length == 0 => Ok(0),
            (ReplyType::NONE, _) => bad("an empty chunk", "it has a payload"),
            (ReplyType::OFFSET_DATA, Kind::Read(_)) if length < 9 => {
                bad("a data chunk", "it is too short to hold any data")
            }
            (ReplyType::OFFSET_DATA, Kind::Read(_)) if length - 8 > self.length => {
                bad("a data chunk", "it is longer than the request")
            }
            (ReplyType::OFFSET_DATA, Kind::Read(_)) => Ok(8),
            (ReplyType::OFFSET_HOLE, Kind::Read(_)) if length == 12 => Ok(12),
            (ReplyType::OFFSET_HOLE, Kind::Read(_)) => bad("a hole chunk", "it is not 12 bytes"),
            (ReplyType::BLOCK_STATUS, Kind::Status(..)) if mode == ReplyMode::Structured => {
                if length < 12 || !(length - 4).is_multiple_of(8) || (length - 4) / 8 > statuses {
                    return bad("a block status chunk", "its length is impossible");
                }
                Ok(length as usize)
            }
            (ReplyType::BLOCK_STATUS_EXT, Kind::Status(..)) if mode == ReplyMode::Extended => {
                if length < 24 || !(length - 8).is_multiple_of(16) || (length - 8) / 16 > statuses {
                    return bad("a block status chunk", "its length is impossible");
                }
                Ok(length as usize)
            }
            (reply, _) if reply.is_error() => {
                if length < 6 || length > u64::from(MAX_UNKNOWN_CHUNK_LEN) {
                    return bad("an error chunk", "its length is impossible");
                }
                Ok(length as usize)
            }
            _ => bad("a chunk", "its kind does not answer this request"),
        }
    }

    /// Checks that `length` bytes at `offset` belong to the request and have no answer yet, and
    /// returns their distance from its start.
    fn take(&mut self, what: &'static str, offset: u64, length: u64) -> Result<u64, ProtocolError> {
        let Some(start) = offset.checked_sub(self.offset) else {
            return Err(self.bad_chunk(what, "it begins before the request", offset, length));
        };
        let end = match start.checked_add(length) {
            Some(end) if end <= self.length => end,
            _ => return Err(self.bad_chunk(what, "it ends after the request", offset, length)),
        };
        if length == 0 {
            return Err(self.bad_chunk(what, "it is empty", offset, length));
        }
        let Kind::Read(coverage) = &mut self.kind else {
            return Err(self.bad_chunk(what, "the request is not a READ", offset, length));
        };
        let fresh = coverage.add(start, end);
        let too_many =
            coverage.chunks() > MAX_CHUNKS_PER_READ || coverage.ranges() > MAX_GAPS_PER_READ;
        if !fresh {
            return Err(self.bad_chunk(what, "these bytes were answered before", offset, length));
        }
        if too_many {
            return Err(self.bad_chunk(what, "the answer has too many chunks", offset, length));
        }
        Ok(start)
    }

    pub(super) fn data(
        &mut self,
        header: &ChunkHeader,
        payload: &[u8],
    ) -> Result<Event, ProtocolError> {
        let offset = Reader::new(payload).u64().unwrap_or(u64::MAX);
        let length = header.length.saturating_sub(8);
        let position = self.take("a data chunk", offset, length)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        Ok(Event::Data { cookie: header.cookie, position, length })
    }

    pub(super) fn hole(&mut self, cookie: Cookie, payload: &[u8]) -> Result<Event, ProtocolError> {
        let mut reader = Reader::new(payload);
        let offset = reader.u64().unwrap_or(u64::MAX);
        let length = reader.u32().unwrap_or(0);
        let position = self.take("a hole chunk", offset, u64::from(length))?;
        Ok(Event::Hole { cookie, position, length: length as usize })
    }

    pub(super) fn status(
        &mut self,
        header: &ChunkHeader,
        payload: &[u8],
    ) -> Result<Event, ProtocolError> {
        const WHAT: &str = "a block status chunk";
        let extended = header.reply == ReplyType::BLOCK_STATUS_EXT;
        let mut reader = Reader::new(payload);
        let context = MetaContextId(reader.u32().unwrap_or(u32::MAX));
        let bad =
            |pending: &Self, why| Err(pending.bad_chunk(WHAT, why, pending.offset, header.length));
        let announced = if extended { reader.u32() } else { None };
        let descriptors = read_descriptors(reader, extended);
        if announced.is_some_and(|count| count as usize != descriptors.len()) {
            return bad(self, "its descriptor count does not fit its length");
        }
        let Kind::Status(missing, _) = &mut self.kind else {
            return bad(self, "the request is not a BLOCK_STATUS");
        };
        let Some(index) = missing.iter().position(|id| *id == context) else {
            return bad(self, "its context was not requested, or was answered before");
        };
        missing.swap_remove(index);
        let descriptors = self.clip(descriptors, header.length)?;
        Ok(Event::BlockStatus { cookie: header.cookie, context, descriptors })
    }

    /// Only the last descriptor may exceed the request; it is truncated there.
    fn clip(
        &self,
        mut descriptors: Vec<BlockDescriptor>,
        length: u64,
    ) -> Result<Vec<BlockDescriptor>, ProtocolError> {
        let bad = |why| Err(self.bad_chunk("a block status chunk", why, self.offset, length));
        if let Kind::Status(_, ExtentLimit::One) = &self.kind
            && descriptors.len() != 1
        {
            return bad("one extent was requested");
        }
        let mut left = self.length;
        for descriptor in &mut descriptors {
            if descriptor.length == 0 {
                return bad("an extent is empty");
            }
            if left == 0 {
                return bad("extents follow after the end of the request");
            }
            descriptor.length = descriptor.length.min(left);
            left = left.saturating_sub(descriptor.length);
        }
        Ok(descriptors)
    }

    /// Checks an error chunk. The first one determines the result; the number of later ones is
    /// limited.
    pub(super) fn error_chunk(
        &mut self,
        reply: ReplyType,
        payload: &[u8],
    ) -> Result<(), ProtocolError> {
        let (count, length) = &mut self.error_chunks;
        *count += 1;
        *length += payload.len() as u64;
        if *count > MAX_ERROR_CHUNKS || *length > MAX_ERROR_CHUNKS_LEN {
            let why = "too many others came before it for the same request";
            return Err(self.bad_chunk("an error chunk", why, self.offset, 0));
        }
        let error = self.read_error(reply, payload)?;
        self.error.get_or_insert(error);
        Ok(())
    }

    fn read_error(&self, reply: ReplyType, payload: &[u8]) -> Result<ServerError, ProtocolError> {
        let bad = |why| Err(self.bad_chunk("an error chunk", why, self.offset, 0));
        let mut reader = Reader::new(payload);
        let (Some(errno), Some(message_len)) = (reader.u32(), reader.u16()) else {
            return bad("it is too short");
        };
        if errno == 0 {
            return bad("its error is zero");
        }
        let Some(message) = reader.bytes(usize::from(message_len)) else {
            return bad("its message is longer than the chunk");
        };
        let offset = match reply {
            ReplyType::ERROR_OFFSET => {
                let Some(offset) = reader.u64() else { return bad("it has no offset") };
                let inside = offset.checked_sub(self.offset).is_some_and(|at| at < self.length);
                if !inside {
                    return bad("its offset is outside the request");
                }
                Some(offset)
            }
            _ => None,
        };
        if !reader.is_empty() && matches!(reply, ReplyType::ERROR | ReplyType::ERROR_OFFSET) {
            return bad("its length does not fit its message");
        }
        let message = String::from_utf8_lossy(message).into_owned();
        Ok(ServerError { errno: Errno(errno), message, offset })
    }
}

fn read_descriptors(mut reader: Reader<'_>, extended: bool) -> Vec<BlockDescriptor> {
    let size = if extended { BlockDescriptor::EXTENDED_LEN } else { BlockDescriptor::COMPACT_LEN };
    let mut descriptors = Vec::with_capacity(reader.rest().len() / size);
    loop {
        let fields = if extended {
            (reader.u64(), reader.u64())
        } else {
            (reader.u32().map(u64::from), reader.u32().map(u64::from))
        };
        let (Some(length), Some(flags)) = fields else { return descriptors };
        descriptors.push(BlockDescriptor { length, flags });
    }
}
