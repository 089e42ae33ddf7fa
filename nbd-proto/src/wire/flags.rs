//! Flag words, one type per table of the specification. Unknown bits are kept.

use bitflags::bitflags;

bitflags! {
    /// Handshake flags, sent by a newstyle server after its magic numbers.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct HandshakeFlags: u16 {
        /// The server speaks fixed newstyle: it answers options it does not know.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The server can omit the 124 zero bytes after EXPORT_NAME.
        const NO_ZEROES = 1 << 1;
    }

    /// Client flags, the client's answer to [`HandshakeFlags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ClientFlags: u32 {
        /// The client speaks fixed newstyle.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The client does not want the 124 zero bytes after EXPORT_NAME.
        const NO_ZEROES = 1 << 1;
    }

    /// Transmission flags: the capabilities of an export (section "Transmission flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct TransmissionFlags: u16 {
        /// The other bits are valid. Always set by a server.
        const HAS_FLAGS = 1 << 0;
        /// The export cannot be written.
        const READ_ONLY = 1 << 1;
        /// FLUSH is supported.
        const SEND_FLUSH = 1 << 2;
        /// The FUA command flag is supported.
        const SEND_FUA = 1 << 3;
        /// The medium behaves like a rotating disk.
        const ROTATIONAL = 1 << 4;
        /// TRIM is supported.
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES is supported.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The DF command flag is supported.
        const SEND_DF = 1 << 7;
        /// All connections see the same data: a FLUSH on one covers completed writes on the others.
        const CAN_MULTI_CONN = 1 << 8;
        /// RESIZE is supported (a draft extension, never set by this server).
        const SEND_RESIZE = 1 << 9;
        /// CACHE is supported.
        const SEND_CACHE = 1 << 10;
        /// The FAST_ZERO command flag is supported.
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS takes a payload that selects contexts (extended headers only).
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// Command flags of a request.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct CommandFlags: u16 {
        /// Force unit access: durable before the reply.
        const FUA = 1 << 0;
        /// WRITE_ZEROES: the range stays allocated.
        const NO_HOLE = 1 << 1;
        /// READ: do not fragment, one content chunk.
        const DF = 1 << 2;
        /// BLOCK_STATUS: one extent per context.
        const REQ_ONE = 1 << 3;
        /// WRITE_ZEROES: fail at once unless it is faster than writing.
        const FAST_ZERO = 1 << 4;
        /// The length field counts a payload (extended headers).
        const PAYLOAD_LEN = 1 << 5;
    }

    /// Flags of a structured or extended reply chunk.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ReplyFlags: u16 {
        /// The last chunk of the reply.
        const DONE = 1 << 0;
    }
}
