//! Replies of the transmission phase (sections "Simple reply message", "Structured reply chunk
//! message", "Extended reply chunk message").

use bytes::BufMut;

use super::{Cookie, Errno, ReplyFlags, magic};
use crate::codec::Reader;
use crate::error::ProtocolError;

/// The negotiated form of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum ReplyMode {
    /// Compact requests, simple replies only.
    #[default]
    Simple,
    /// Compact requests, structured reply chunks (STRUCTURED_REPLY).
    Structured,
    /// Extended requests, extended reply chunks (EXTENDED_HEADERS).
    Extended,
}

open_enum! {
    /// The kind of a structured or extended reply chunk. Errors have bit 15 set.
    ReplyType(u16) {
        /// No content.
        NONE = 0;
        /// Data at an offset.
        OFFSET_DATA = 1;
        /// Zeroes at an offset.
        OFFSET_HOLE = 2;
        /// Descriptors of one context, 32-bit.
        BLOCK_STATUS = 5;
        /// Descriptors of one context, 64-bit.
        BLOCK_STATUS_EXT = 6;
        /// An error.
        ERROR = 0x8001;
        /// An error at an offset.
        ERROR_OFFSET = 0x8002;
    }
}

impl ReplyType {
    /// Returns true for the chunk types that report an error (bit 15), known or not.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

/// A simple reply; the data of a successful READ follows it.
///
/// ```text
/// 0      4       8        16
/// | magic | error | cookie | data ...
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReplyHeader {
    /// Zero or an error.
    pub error: Errno,
    /// The cookie of the request that this answers.
    pub cookie: Cookie,
}

impl SimpleReplyHeader {
    /// Size on the wire, in bytes.
    pub const LEN: usize = 16;

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u32(magic::SIMPLE_REPLY);
        out.put_u32(self.error.0);
        out.put_u64(self.cookie.0);
    }

    /// Decodes the fields after the magic number, which the caller has checked; returns `None` if
    /// more bytes are needed. `bytes` starts at the magic number.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (_magic, error, cookie) = (reader.u32()?, reader.u32()?, reader.u64()?);
        Some(Self { error: Errno(error), cookie: Cookie(cookie) })
    }
}

/// The fixed part of a structured or extended reply chunk.
///
/// ```text
/// structured  0      4       6      8        16       20
///             | magic | flags | type | cookie | length | payload ...
/// extended    0      4       6      8        16       24       32
///             | magic | flags | type | cookie | offset | length | payload ...
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Flags of the chunk.
    pub flags: ReplyFlags,
    /// Kind of the chunk.
    pub reply: ReplyType,
    /// The cookie of the request that this answers.
    pub cookie: Cookie,
    /// Length of the payload, in bytes.
    pub length: u64,
}

impl ChunkHeader {
    /// Size of the structured form, in bytes.
    pub const STRUCTURED_LEN: usize = 20;
    /// Size of the extended form, in bytes.
    pub const EXTENDED_LEN: usize = 32;

    /// Appends the structured form to `out`. `length` is cut to 32 bits, which no chunk exceeds.
    pub fn encode_structured(&self, out: &mut impl BufMut) {
        debug_assert!(u32::try_from(self.length).is_ok(), "a structured chunk is below 4 GiB");
        self.encode_front(magic::STRUCTURED_REPLY, out);
        out.put_u32(self.length as u32);
    }

    /// Appends the extended form to `out`. `request_offset` repeats the request's offset, in bytes.
    pub fn encode_extended(&self, request_offset: u64, out: &mut impl BufMut) {
        self.encode_front(magic::EXTENDED_REPLY, out);
        out.put_u64(request_offset);
        out.put_u64(self.length);
    }

    fn encode_front(&self, magic: u32, out: &mut impl BufMut) {
        out.put_u32(magic);
        out.put_u16(self.flags.bits());
        out.put_u16(self.reply.0);
        out.put_u64(self.cookie.0);
    }

    /// Decodes a structured chunk; returns `None` if `bytes` does not hold a complete header yet.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`].
    pub fn decode_structured(bytes: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let mut reader = Reader::new(bytes);
        let front = Self::decode_front(magic::STRUCTURED_REPLY, "a structured reply", &mut reader)?;
        let (Some(mut header), Some(length)) = (front, reader.u32()) else { return Ok(None) };
        header.length = u64::from(length);
        Ok(Some(header))
    }

    /// Decodes an extended chunk and the request offset that it repeats (in bytes); returns `None`
    /// if `bytes` does not hold a complete header yet.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`].
    pub fn decode_extended(bytes: &[u8]) -> Result<Option<(Self, u64)>, ProtocolError> {
        let mut reader = Reader::new(bytes);
        let front = Self::decode_front(magic::EXTENDED_REPLY, "an extended reply", &mut reader)?;
        let (Some(mut header), Some(offset), Some(length)) = (front, reader.u64(), reader.u64())
        else {
            return Ok(None);
        };
        header.length = length;
        Ok(Some((header, offset)))
    }

    fn decode_front(
        magic: u32,
        expected: &'static str,
        reader: &mut Reader<'_>,
    ) -> Result<Option<Self>, ProtocolError> {
        let Some(found) = reader.u32() else { return Ok(None) };
        if found != magic {
            return Err(ProtocolError::BadMagic { expected, found: u64::from(found) });
        }
        let (Some(flags), Some(reply), Some(cookie)) = (reader.u16(), reader.u16(), reader.u64())
        else {
            return Ok(None);
        };
        Ok(Some(Self {
            flags: ReplyFlags::from_bits_retain(flags),
            reply: ReplyType(reply),
            cookie: Cookie(cookie),
            length: 0,
        }))
    }
}
