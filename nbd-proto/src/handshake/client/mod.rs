//! The client's side of the handshake.
//!
//! [`ClientHandshake`] reads the greeting. A newstyle server then answers options, one at a time:
//! each method of [`OptionPhase`] writes one option and returns an [`Awaiting`], which reads the
//! reply and returns the phase.
//!
//! ```
//! use bytes::BytesMut;
//! use nbd_proto::handshake::client::{AwaitStep, ClientHandshake, ClientStep, InfoRequest};
//!
//! let mut input = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
//! let mut out = BytesMut::new();
//! let ClientStep::Newstyle(phase) = ClientHandshake::new().advance(&mut input, &mut out)? else {
//!     unreachable!("the greeting is whole and newstyle");
//! };
//! let awaiting = phase.go("disk", InfoRequest::default(), &mut out).expect("a legal name");
//! // The option is in `out` for the server to read, and its answer is to come:
//! assert!(matches!(awaiting.advance(&mut input)?, AwaitStep::NeedsInput(_)));
//! # Ok::<(), nbd_proto::ProtocolError>(())
//! ```

mod answer;
mod awaiting;
mod options;
mod phase;

use bytes::{Buf, BufMut, BytesMut};

pub use answer::{
    Abort, Answer, BeforeTls, ExportInfo, ExtendedHeaders, Go, Info, List, ListMetaContext,
    SetMetaContext, StartTls, StructuredReply,
};
pub use awaiting::{AwaitStep, Awaiting, AwaitingExport, ExportStep};
pub use options::InfoRequest;
pub use phase::OptionPhase;

use super::Negotiated;
use crate::codec::Reader;
use crate::error::{GREETING, ProtocolError};
use crate::limits::{EXPORT_NAME_PADDING_LEN, MAX_EXPORT_SIZE};
use crate::wire::{BlockSizes, ClientFlags, HandshakeFlags, ReplyMode, TransmissionFlags, magic};

/// A handshake that expects the server's greeting.
#[derive(Debug, Default)]
pub struct ClientHandshake {
    _private: (),
}

/// The contents of the greeting.
#[derive(Debug)]
#[must_use]
pub enum ClientStep {
    /// More bytes of the server are needed.
    NeedsInput(ClientHandshake),
    /// An oldstyle server with one unnamed export: the transmission phase has begun, with simple
    /// replies. TLS is not possible.
    Oldstyle(Box<Negotiated>),
    /// A newstyle server: options can be sent. The client's flags are in the output buffer.
    Newstyle(OptionPhase),
}

/// Length of an oldstyle greeting: two magic numbers, size, flags, reserved bytes.
const OLDSTYLE_LEN: usize = 8 + 8 + 8 + 4 + EXPORT_NAME_PADDING_LEN;

impl ClientHandshake {
    /// Creates the machine. The client sends nothing before the greeting has arrived.
    #[must_use]
    pub const fn new() -> Self {
        Self { _private: () }
    }

    /// Reads the greeting from the front of `input` (sections "Oldstyle negotiation" and "Newstyle
    /// negotiation") and appends the client flags to `out`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadMagic`] if the peer is not an NBD server,
    /// [`ProtocolError::ExportTooLarge`] from an oldstyle server.
    pub fn advance(
        self,
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<ClientStep, ProtocolError> {
        let mut reader = Reader::new(input);
        let Some(found) = reader.u64() else { return Ok(ClientStep::NeedsInput(self)) };
        if found != magic::INIT {
            return Err(ProtocolError::BadMagic { expected: GREETING, found });
        }
        let Some(found) = reader.u64() else { return Ok(ClientStep::NeedsInput(self)) };
        match found {
            magic::OPTION => {
                let Some(bits) = reader.u16() else { return Ok(ClientStep::NeedsInput(self)) };
                input.advance(18);
                let flags = agreed_flags(HandshakeFlags::from_bits_retain(bits));
                out.put_u32(flags.bits());
                Ok(ClientStep::Newstyle(OptionPhase::new(flags)))
            }
            magic::OLDSTYLE => {
                let (Some(size), Some(flags)) = (reader.u64(), reader.u32()) else {
                    return Ok(ClientStep::NeedsInput(self));
                };
                if input.len() < OLDSTYLE_LEN {
                    return Ok(ClientStep::NeedsInput(self));
                }
                input.advance(OLDSTYLE_LEN);
                // The upper half holds handshake flags, which oldstyle does not have.
                let flags = flags as u16;
                Ok(ClientStep::Oldstyle(Box::new(Negotiated {
                    export_name: String::new(),
                    size: checked_size(size)?,
                    flags: known_flags(flags, ReplyMode::Simple),
                    block_sizes: BlockSizes::default(),
                    reply_mode: ReplyMode::Simple,
                    meta_contexts: Vec::new(),
                })))
            }
            _ => Err(ProtocolError::BadMagic {
                expected: "a newstyle or oldstyle magic number",
                found,
            }),
        }
    }
}

/// Answers each known flag with its counterpart and ignores the others.
fn agreed_flags(server: HandshakeFlags) -> ClientFlags {
    let mut flags = ClientFlags::empty();
    flags.set(ClientFlags::FIXED_NEWSTYLE, server.contains(HandshakeFlags::FIXED_NEWSTYLE));
    flags.set(ClientFlags::NO_ZEROES, server.contains(HandshakeFlags::NO_ZEROES));
    flags
}

/// Refuses sizes of 2^63 and more, which kernels treat as negative offsets.
const fn checked_size(size: u64) -> Result<u64, ProtocolError> {
    if size > MAX_EXPORT_SIZE { Err(ProtocolError::ExportTooLarge { size }) } else { Ok(size) }
}

/// The usable flags: known bits, only with HAS_FLAGS, and only those that the reply mode can carry.
fn known_flags(bits: u16, mode: ReplyMode) -> TransmissionFlags {
    let mut flags = TransmissionFlags::from_bits_truncate(bits);
    if !flags.contains(TransmissionFlags::HAS_FLAGS) {
        return TransmissionFlags::empty();
    }
    if mode == ReplyMode::Simple {
        flags.remove(TransmissionFlags::SEND_DF);
    }
    if mode != ReplyMode::Extended {
        flags.remove(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    }
    flags
}
