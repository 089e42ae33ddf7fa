//! Options and option replies of the newstyle handshake (section "Newstyle negotiation").

use bytes::BufMut;

use super::magic;
use crate::codec::Reader;
use crate::error::ProtocolError;
use crate::limits::MAX_OPTION_LEN;

open_enum! {
    /// An option of the client during the handshake.
    OptionType(u32) {
        /// Select an export and begin transmission; cannot report an error.
        EXPORT_NAME = 1;
        /// End the handshake.
        ABORT = 2;
        /// List the exports.
        LIST = 3;
        /// Withdrawn from the specification.
        PEEK_EXPORT = 4;
        /// Begin TLS.
        STARTTLS = 5;
        /// Request information about an export.
        INFO = 6;
        /// Request information about an export and begin transmission.
        GO = 7;
        /// Use structured replies.
        STRUCTURED_REPLY = 8;
        /// List metadata contexts.
        LIST_META_CONTEXT = 9;
        /// Select metadata contexts.
        SET_META_CONTEXT = 10;
        /// Use extended headers.
        EXTENDED_HEADERS = 11;
    }
}

open_enum! {
    /// A server's reply to an option. Errors have bit 31 set.
    OptionReplyType(u32) {
        /// Accepted; nothing more follows for this option.
        ACK = 1;
        /// One export of a list.
        SERVER = 2;
        /// One information item.
        INFO = 3;
        /// One metadata context.
        META_CONTEXT = 4;
        /// The option is not supported.
        ERR_UNSUP = 0x8000_0001;
        /// The option is refused by the server's policy.
        ERR_POLICY = 0x8000_0002;
        /// The option was malformed or is not valid at this moment.
        ERR_INVALID = 0x8000_0003;
        /// The option is not supported on this platform.
        ERR_PLATFORM = 0x8000_0004;
        /// TLS is required first.
        ERR_TLS_REQD = 0x8000_0005;
        /// There is no such export.
        ERR_UNKNOWN = 0x8000_0006;
        /// The server is shutting down.
        ERR_SHUTDOWN = 0x8000_0007;
        /// The client has to request block sizes first.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008;
        /// The request or its answer is too big.
        ERR_TOO_BIG = 0x8000_0009;
        /// Extended headers are required or already in use.
        ERR_EXT_HEADER_REQD = 0x8000_000a;
    }
}

impl OptionReplyType {
    /// Returns true for the reply types that report an error (bit 31).
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

/// The fixed part of an option.
///
/// ```text
/// 0      8        12        16
/// | magic | option | length  | payload ...
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub option: OptionType,
    /// Length of the payload, in bytes.
    pub length: u32,
}

impl OptionHeader {
    /// Size on the wire, in bytes.
    pub const LEN: usize = 16;

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64(magic::OPTION);
        out.put_u32(self.option.0);
        out.put_u32(self.length);
    }

    /// Decodes a header; returns `None` if `bytes` does not hold a complete one yet.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`] or [`ProtocolError::TooLong`] (over [`MAX_OPTION_LEN`]).
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let mut reader = Reader::new(bytes);
        let (Some(found), Some(option), Some(length)) = (reader.u64(), reader.u32(), reader.u32())
        else {
            return Ok(None);
        };
        if found != magic::OPTION {
            return Err(ProtocolError::BadMagic { expected: "an option (IHAVEOPT)", found });
        }
        check_length("option payload", length)?;
        Ok(Some(Self { option: OptionType(option), length }))
    }
}

/// The fixed part of an option reply.
///
/// ```text
/// 0      8        12      16        20
/// | magic | option | type  | length  | payload ...
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that this answers.
    pub option: OptionType,
    /// The kind of reply.
    pub reply: OptionReplyType,
    /// Length of the payload, in bytes.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Size on the wire, in bytes.
    pub const LEN: usize = 20;

    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64(magic::OPTION_REPLY);
        out.put_u32(self.option.0);
        out.put_u32(self.reply.0);
        out.put_u32(self.length);
    }

    /// Decodes a header; returns `None` if `bytes` does not hold a complete one yet.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`] or [`ProtocolError::TooLong`] (over [`MAX_OPTION_LEN`]).
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let mut reader = Reader::new(bytes);
        let (Some(found), Some(option), Some(reply), Some(length)) =
            (reader.u64(), reader.u32(), reader.u32(), reader.u32())
        else {
            return Ok(None);
        };
        if found != magic::OPTION_REPLY {
            return Err(ProtocolError::BadMagic { expected: "an option reply", found });
        }
        check_length("option reply payload", length)?;
        Ok(Some(Self { option: OptionType(option), reply: OptionReplyType(reply), length }))
    }
}

fn check_length(what: &'static str, length: u32) -> Result<(), ProtocolError> {
    if length as usize > MAX_OPTION_LEN {
        return Err(ProtocolError::TooLong {
            what,
            length: u64::from(length),
            limit: MAX_OPTION_LEN as u64,
        });
    }
    Ok(())
}
