//! Encodes replies in the negotiated mode.

use bytes::BufMut;

use super::RequestTag;
use crate::codec::truncate_text;
use crate::limits::{MAX_DESCRIPTORS_SENT, MAX_ERROR_MESSAGE_LEN};
use crate::wire::{
    BlockDescriptor, ChunkHeader, CommandType, Errno, MetaContextId, ReplyFlags, ReplyMode,
    ReplyType, SimpleReplyHeader,
};

/// The position of a chunk in its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// More chunks follow.
    More,
    /// The last chunk: it completes the reply.
    Last,
}

impl Position {
    const fn flags(self) -> ReplyFlags {
        match self {
            Self::More => ReplyFlags::empty(),
            Self::Last => ReplyFlags::DONE,
        }
    }
}

/// Encodes the replies of one connection. Its only state is the negotiated form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyEncoder {
    mode: ReplyMode,
}

impl ReplyEncoder {
    /// Longest header this encoder writes before read data, and longest hole, in bytes.
    pub const MAX_READ_HEADER_LEN: usize = ChunkHeader::EXTENDED_LEN + 12;

    /// Creates an encoder of replies in the form `mode`.
    #[must_use]
    pub const fn new(mode: ReplyMode) -> Self {
        Self { mode }
    }

    /// Returns the form of the replies.
    #[must_use]
    pub const fn mode(&self) -> ReplyMode {
        self.mode
    }

    /// Appends a successful reply without content.
    pub fn success(&self, tag: RequestTag, out: &mut impl BufMut) {
        match self.mode {
            // A READ must not get a simple reply once structured replies are negotiated; every
            // other command may, and a simple reply is shorter.
            ReplyMode::Structured if tag.command == CommandType::READ => {
                self.chunk(tag, ReplyType::NONE, 0, Position::Last, out);
            }
            ReplyMode::Simple | ReplyMode::Structured => {
                SimpleReplyHeader { error: Errno(0), cookie: tag.cookie }.encode(out);
            }
            ReplyMode::Extended => self.chunk(tag, ReplyType::NONE, 0, Position::Last, out),
        }
    }

    /// Writes the header before `length` bytes of read data at `offset` (both in bytes).
    ///
    /// In simple mode the data has to be the whole request and known to be good, because no error
    /// can follow it. `length` must not be zero (use [`ReplyEncoder::success`]).
    pub fn data_header(
        &self,
        tag: RequestTag,
        offset: u64,
        length: u32,
        position: Position,
        out: &mut impl BufMut,
    ) {
        debug_assert!(length > 0, "a data chunk is not empty");
        if self.mode == ReplyMode::Simple {
            SimpleReplyHeader { error: Errno(0), cookie: tag.cookie }.encode(out);
        } else {
            let payload = u64::from(length).saturating_add(8);
            self.chunk(tag, ReplyType::OFFSET_DATA, payload, position, out);
            out.put_u64(offset);
        }
    }

    /// Appends a hole: `length` zero bytes at `offset` (both in bytes). Not available in simple
    /// mode.
    pub fn hole(
        &self,
        tag: RequestTag,
        offset: u64,
        length: u32,
        position: Position,
        out: &mut impl BufMut,
    ) {
        debug_assert!(length > 0 && self.mode != ReplyMode::Simple, "holes need chunks");
        self.chunk(tag, ReplyType::OFFSET_HOLE, 12, position, out);
        out.put_u64(offset);
        out.put_u32(length);
    }

    /// Appends a failure. `message` is for display; it is truncated to
    /// [`MAX_ERROR_MESSAGE_LEN`] bytes.
    pub fn error(&self, tag: RequestTag, error: Errno, message: &str, out: &mut impl BufMut) {
        if self.mode == ReplyMode::Simple {
            SimpleReplyHeader { error, cookie: tag.cookie }.encode(out);
            return;
        }
        let text = truncate_text(message, MAX_ERROR_MESSAGE_LEN);
        let payload = (text.len() as u64).saturating_add(6);
        self.chunk(tag, ReplyType::ERROR, payload, Position::Last, out);
        Self::error_body(error, text, out);
    }

    /// Appends a failure at `offset` (in bytes, inside the request). Not available in simple mode.
    pub fn error_at(
        &self,
        tag: RequestTag,
        error: Errno,
        offset: u64,
        message: &str,
        position: Position,
        out: &mut impl BufMut,
    ) {
        debug_assert!(self.mode != ReplyMode::Simple, "an error offset needs a chunk");
        let text = truncate_text(message, MAX_ERROR_MESSAGE_LEN);
        let payload = (text.len() as u64).saturating_add(14);
        self.chunk(tag, ReplyType::ERROR_OFFSET, payload, position, out);
        Self::error_body(error, text, out);
        out.put_u64(offset);
    }

    /// Appends the status of one context. At most [`MAX_DESCRIPTORS_SENT`] descriptors are sent;
    /// clients have to accept an answer that is shorter than their request. Not available in simple
    /// mode.
    ///
    /// In structured mode a descriptor longer than 32 bits is cut to a multiple of 64 KiB and ends
    /// the answer, as does one whose flags do not fit.
    pub fn block_status(
        &self,
        tag: RequestTag,
        context: MetaContextId,
        descriptors: &[BlockDescriptor],
        position: Position,
        out: &mut impl BufMut,
    ) {
        debug_assert!(self.mode != ReplyMode::Simple, "block status needs chunks");
        debug_assert!(!descriptors.is_empty(), "a status chunk has at least one descriptor");
        let count = descriptors.len().min(MAX_DESCRIPTORS_SENT);
        let descriptors = descriptors.get(..count).unwrap_or(descriptors);
        if self.mode == ReplyMode::Extended {
            let payload = 8 + descriptors.len() * BlockDescriptor::EXTENDED_LEN;
            self.chunk(tag, ReplyType::BLOCK_STATUS_EXT, payload as u64, position, out);
            out.put_u32(context.0);
            out.put_u32(descriptors.len() as u32);
            for descriptor in descriptors {
                out.put_u64(descriptor.length);
                out.put_u64(descriptor.flags);
            }
            return;
        }
        let compact = compact_descriptors(descriptors);
        let payload = 4 + compact.len() * BlockDescriptor::COMPACT_LEN;
        self.chunk(tag, ReplyType::BLOCK_STATUS, payload as u64, position, out);
        out.put_u32(context.0);
        for (length, flags) in compact {
            out.put_u32(length);
            out.put_u32(flags);
        }
    }

    fn error_body(error: Errno, text: &str, out: &mut impl BufMut) {
        out.put_u32(error.0);
        out.put_u16(text.len() as u16);
        out.put_slice(text.as_bytes());
    }

    fn chunk(
        &self,
        tag: RequestTag,
        reply: ReplyType,
        length: u64,
        position: Position,
        out: &mut impl BufMut,
    ) {
        let header = ChunkHeader { flags: position.flags(), reply, cookie: tag.cookie, length };
        match self.mode {
            ReplyMode::Extended => header.encode_extended(tag.offset, out),
            _ => header.encode_structured(out),
        }
    }
}

/// Returns the leading descriptors that 32-bit fields can express.
fn compact_descriptors(descriptors: &[BlockDescriptor]) -> Vec<(u32, u32)> {
    /// Keeps the extent after a cut one aligned to any minimum block size.
    const LONGEST: u32 = u32::MAX - 0xffff;
    let mut compact = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        // The flags of every context this program serves fit, except an allocation depth over
        // 2^32, which cannot exist; saturate rather than drop bits.
        let flags = u32::try_from(descriptor.flags).unwrap_or(u32::MAX);
        match u32::try_from(descriptor.length) {
            Ok(length) if length <= LONGEST => compact.push((length, flags)),
            _ => {
                compact.push((LONGEST, flags));
                break;
            }
        }
    }
    compact
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Cookie;

    fn tag(command: CommandType) -> RequestTag {
        RequestTag { cookie: Cookie(9), offset: 1 << 40, command }
    }

    #[test]
    fn a_structured_read_never_gets_a_simple_reply() {
        let mut out = Vec::new();
        ReplyEncoder::new(ReplyMode::Structured).success(tag(CommandType::READ), &mut out);
        assert_eq!(out.len(), ChunkHeader::STRUCTURED_LEN);
        out.clear();
        ReplyEncoder::new(ReplyMode::Structured).success(tag(CommandType::FLUSH), &mut out);
        assert_eq!(out.len(), SimpleReplyHeader::LEN);
    }

    #[test]
    fn a_long_extent_is_cut_and_ends_a_compact_answer() {
        let long = BlockDescriptor { length: 5 << 30, flags: 3 };
        let short = BlockDescriptor { length: 512, flags: 0 };
        assert_eq!(compact_descriptors(&[short, long, short]), [(512, 0), (0xffff_0000, 3)]);
    }

    #[test]
    fn a_message_of_any_length_makes_a_well_formed_error() {
        let mut out = Vec::new();
        let encoder = ReplyEncoder::new(ReplyMode::Structured);
        encoder.error(tag(CommandType::READ), Errno::EIO, &"ü".repeat(4096), &mut out);
        assert_eq!(out.len(), ChunkHeader::STRUCTURED_LEN + 6 + MAX_ERROR_MESSAGE_LEN);
    }
}
