//! The server's side of the handshake.
//!
//! ```
//! use bytes::BytesMut;
//! use nbd_proto::handshake::server::{Handshake, HandshakeStep, ServerConfig};
//!
//! let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
//! let handshake = Handshake::start(ServerConfig::default(), &mut out);
//! assert!(out.starts_with(b"NBDMAGICIHAVEOPT"));
//! // Nothing has come from the client yet:
//! let step = handshake.advance(&mut input, &mut out)?;
//! assert!(matches!(step, HandshakeStep::NeedsInput(_)));
//! # Ok::<(), nbd_proto::ProtocolError>(())
//! ```

mod config;
mod machine;
mod options;
mod pending;
mod reply;
mod session;
mod step;

use bytes::{Buf, BytesMut};

pub use config::{ServerConfig, TlsPolicy};
pub use machine::Handshake;
pub use pending::{
    BeforeTls, GoAnswer, MetaContextAction, PendingExportName, PendingGo, PendingInfo, PendingList,
    PendingMetaContext, PendingTls,
};
pub use step::HandshakeStep;

use crate::error::ProtocolError;
use crate::wire::{ClientFlags, OptionHeader, OptionType};
use machine::Phase;
use options::Handled;

impl Handshake {
    /// Processes the bytes in `input`. Complete messages are removed from its front; the buffer
    /// never needs to hold more than [`crate::limits::MAX_OPTION_KEPT_LEN`] bytes and a header.
    /// Answers are appended to `out`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] if the connection has to be closed; the contents of `out` can still be
    /// sent.
    pub fn advance(
        mut self,
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<HandshakeStep, ProtocolError> {
        loop {
            match self.phase {
                Phase::AwaitsClientFlags => {
                    let Some(flags) = client_flags(input)? else {
                        return Ok(HandshakeStep::NeedsInput(self));
                    };
                    self.session.client_flags = flags;
                    self.phase = Phase::AwaitsOption;
                }
                Phase::Discards { option, remaining, reply } => {
                    let taken = remaining.min(input.len());
                    input.advance(taken);
                    if taken < remaining {
                        let remaining = remaining - taken;
                        self.phase = Phase::Discards { option, remaining, reply };
                        return Ok(HandshakeStep::NeedsInput(self));
                    }
                    if option == OptionType::ABORT {
                        reply::put_ack(out, option);
                        return Ok(HandshakeStep::Aborted);
                    }
                    let message = "the payload of this option is too big";
                    reply::put_error(out, option, reply, message);
                    self.phase = Phase::AwaitsOption;
                }
                Phase::AwaitsOption => {
                    let Some(header) = OptionHeader::decode(input)? else {
                        return Ok(HandshakeStep::NeedsInput(self));
                    };
                    if let Some(reply) = self.session.unread_answer(header)? {
                        input.advance(OptionHeader::LEN);
                        self.session.count_option()?;
                        if header.option == OptionType::SET_META_CONTEXT {
                            self.session.selection = None;
                        }
                        let (option, remaining) = (header.option, header.length as usize);
                        self.phase = Phase::Discards { option, remaining, reply };
                        continue;
                    }
                    // Checked against MAX_OPTION_KEPT_LEN above, so this cannot overflow.
                    let whole = OptionHeader::LEN + header.length as usize;
                    if input.len() < whole {
                        return Ok(HandshakeStep::NeedsInput(self));
                    }
                    input.advance(OptionHeader::LEN);
                    self.session.count_option()?;
                    let payload = input.split_to(header.length as usize).freeze();
                    match self.session.handle(header.option, payload, out)? {
                        Handled::Answered(session) => self = Self::go_on(session),
                        Handled::Step(step) => return Ok(step),
                    }
                }
            }
        }
    }
}

/// Reads the client flags; a client that sets unknown ones is disconnected (section "Client
/// flags").
fn client_flags(input: &mut BytesMut) -> Result<Option<ClientFlags>, ProtocolError> {
    let Some(bits) = input.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)) else {
        return Ok(None);
    };
    let flags = ClientFlags::from_bits_retain(bits);
    let unknown = flags.difference(ClientFlags::all());
    if !unknown.is_empty() {
        return Err(ProtocolError::UnknownFlags { which: "client", bits: unknown.bits() });
    }
    input.advance(4);
    Ok(Some(flags))
}
