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

mod pending;
mod reply;
mod session;

use bytes::{Buf, BufMut, BytesMut};

pub use pending::{
    BeforeTls, GoAnswer, MetaContextAction, PendingExportName, PendingGo, PendingInfo, PendingList,
    PendingMetaContext, PendingTls,
};

use crate::ProtocolError;
use crate::wire::{
    ClientFlags, HandshakeFlags, OptionHeader, OptionReplyType, OptionType, ReplyMode, magic,
};
use session::{Handled, Session};

/// Whether clients may or have to use TLS (section "TLS versions" names the three modes NOTLS,
/// SELECTIVETLS and FORCEDTLS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// STARTTLS is accepted; the owner of the exports decides what is served without it.
    Allow,
    /// Nothing but STARTTLS and ABORT is accepted in the clear.
    Require,
}

/// How a server negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerConfig {
    /// Whether clients may or have to use TLS.
    pub tls: TlsPolicy,
    /// The best form of replies that is granted; what is above it is answered ERR_UNSUP.
    /// [`ReplyMode::Extended`] unless the behaviour of an older server is wanted.
    pub best_reply_mode: ReplyMode,
}

impl Default for ServerConfig {
    /// No TLS, every form of replies.
    fn default() -> Self {
        Self { tls: TlsPolicy::Off, best_reply_mode: ReplyMode::Extended }
    }
}

#[derive(Debug)]
enum Phase {
    /// The greeting is out, the client's flags are not in.
    AwaitsClientFlags,
    /// Between two options.
    AwaitsOption,
    /// The rest of a payload that nobody looks at, and the answer to give behind it.
    Discards { option: OptionType, remaining: usize, reply: OptionReplyType },
}

/// A handshake that waits for bytes of the client.
#[derive(Debug)]
pub struct Handshake {
    session: Session,
    phase: Phase,
}

/// What a handshake needs next.
#[derive(Debug)]
#[must_use]
pub enum HandshakeStep {
    /// More bytes of the client. Send what is in the output buffer first.
    NeedsInput(Handshake),
    /// An answer to GO.
    Go(PendingGo),
    /// An answer to INFO.
    Info(PendingInfo),
    /// An answer to EXPORT_NAME.
    ExportName(PendingExportName),
    /// An answer to LIST.
    List(PendingList),
    /// An answer to LIST_META_CONTEXT or SET_META_CONTEXT.
    MetaContext(PendingMetaContext),
    /// An answer to STARTTLS, given in time and without reading more of the socket.
    StartTls(PendingTls),
    /// The client ended the handshake and was told that this was seen: send what is in the output
    /// buffer and close.
    Aborted,
}

impl Handshake {
    /// Begins: writes the greeting (section "Newstyle negotiation").
    #[must_use]
    pub fn start(config: ServerConfig, out: &mut BytesMut) -> Self {
        out.put_u64(magic::INIT);
        out.put_u64(magic::OPTION);
        out.put_u16((HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES).bits());
        let session = Session::new(config);
        Self { session, phase: Phase::AwaitsClientFlags }
    }

    const fn go_on(session: Session) -> Self {
        Self { session, phase: Phase::AwaitsOption }
    }

    /// True once TLS is established.
    #[must_use]
    pub const fn is_tls_established(&self) -> bool {
        self.session.tls_established
    }

    /// Goes on as far as the bytes in `input` allow. Whole messages are consumed from its front;
    /// it never has to hold more than [`crate::limits::MAX_OPTION_KEPT_LEN`] bytes and a header. Answers are
    /// appended to `out`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] when the client has to be dropped: what is in `out` can still be sent.
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
                    // Checked against MAX_OPTION_KEPT_LEN just now, so this cannot overflow.
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

/// Takes the client flags; a client that sets unknown ones is dropped (section "Client flags").
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
