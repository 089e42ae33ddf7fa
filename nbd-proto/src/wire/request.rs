//! Requests of the transmission phase (section "Request message").

use bytes::BufMut;

use super::{CommandFlags, Cookie, magic};
use crate::codec::Reader;
use crate::error::ProtocolError;

open_enum! {
    /// The command of a request.
    CommandType(u16) {
        /// Read data.
        READ = 0;
        /// Write data.
        WRITE = 1;
        /// Disconnect.
        DISC = 2;
        /// Make completed writes durable.
        FLUSH = 3;
        /// Discard the range.
        TRIM = 4;
        /// Prefetch the range.
        CACHE = 5;
        /// Make the range read as zeroes.
        WRITE_ZEROES = 6;
        /// Report the status of the range in the selected metadata contexts.
        BLOCK_STATUS = 7;
        /// Change the size (a draft extension, not supported).
        RESIZE = 8;
    }
}

/// The fixed part of a request, in its compact or extended form.
///
/// ```text
/// compact    0      4       6      8         16       24       28
///            | magic | flags | type | cookie  | offset | length | payload of WRITE ...
/// extended   0      4       6      8         16       24                 32
///            | magic | flags | type | cookie  | offset | length           | payload ...
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: CommandFlags,
    /// Command.
    pub command: CommandType,
    /// The cookie chosen by the client.
    pub cookie: Cookie,
    /// Offset in the export, in bytes.
    pub offset: u64,
    /// Length of the range or, with PAYLOAD_LEN, of the payload; in bytes.
    pub length: u64,
}

impl RequestHeader {
    /// Size of the compact form, in bytes.
    pub const COMPACT_LEN: usize = 28;
    /// Size of the extended form, in bytes.
    pub const EXTENDED_LEN: usize = 32;

    /// Appends the compact form to `out`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::TooLong`] if the length does not fit 32 bits.
    pub fn encode_compact(&self, out: &mut impl BufMut) -> Result<(), ProtocolError> {
        let length = u32::try_from(self.length).map_err(|_| ProtocolError::TooLong {
            what: "compact request",
            length: self.length,
            limit: u64::from(u32::MAX),
        })?;
        self.encode_front(magic::REQUEST, out);
        out.put_u32(length);
        Ok(())
    }

    /// Appends the extended form to `out`.
    pub fn encode_extended(&self, out: &mut impl BufMut) {
        self.encode_front(magic::EXTENDED_REQUEST, out);
        out.put_u64(self.length);
    }

    fn encode_front(&self, magic: u32, out: &mut impl BufMut) {
        out.put_u32(magic);
        out.put_u16(self.flags.bits());
        out.put_u16(self.command.0);
        out.put_u64(self.cookie.0);
        out.put_u64(self.offset);
    }

    /// Decodes the compact form; returns `None` if `bytes` does not hold a complete header yet.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`].
    pub fn decode_compact(bytes: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let Some(bytes) = bytes.first_chunk::<{ Self::COMPACT_LEN }>() else {
            return Ok(None);
        };
        let mut reader = Reader::new(bytes);
        let Some(mut header) = Self::decode_front(magic::REQUEST, "a request", &mut reader)? else {
            return Ok(None);
        };
        let Some(length) = reader.u32() else { return Ok(None) };
        header.length = u64::from(length);
        Ok(Some(header))
    }

    /// Decodes the extended form; returns `None` if `bytes` does not hold a complete header yet.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`].
    pub fn decode_extended(bytes: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let Some(bytes) = bytes.first_chunk::<{ Self::EXTENDED_LEN }>() else {
            return Ok(None);
        };
        let mut reader = Reader::new(bytes);
        let expected = "an extended request";
        let Some(mut header) = Self::decode_front(magic::EXTENDED_REQUEST, expected, &mut reader)?
        else {
            return Ok(None);
        };
        let Some(length) = reader.u64() else { return Ok(None) };
        header.length = length;
        Ok(Some(header))
    }

    fn decode_front(
        magic: u32,
        expected: &'static str,
        reader: &mut Reader<'_>,
    ) -> Result<Option<Self>, ProtocolError> {
        let (Some(found), Some(flags), Some(command), Some(cookie), Some(offset)) =
            (reader.u32(), reader.u16(), reader.u16(), reader.u64(), reader.u64())
        else {
            return Ok(None);
        };
        if found != magic {
            return Err(ProtocolError::BadMagic { expected, found: u64::from(found) });
        }
        Ok(Some(Self {
            flags: CommandFlags::from_bits_retain(flags),
            command: CommandType(command),
            cookie: Cookie(cookie),
            offset,
            length: 0,
        }))
    }
}
