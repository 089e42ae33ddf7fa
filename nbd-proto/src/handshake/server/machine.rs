//! A handshake between two messages of the client.

use bytes::{BufMut, BytesMut};

use super::config::ServerConfig;
use super::reply;
use super::session::Session;
use crate::handshake::RefusalReason;
use crate::wire::{HandshakeFlags, OptionReplyType, OptionType, magic};

#[derive(Debug)]
pub(super) enum Phase {
    /// The greeting was sent; the client's flags have not arrived.
    AwaitsClientFlags,
    /// Between two options.
    AwaitsOption,
    /// Discarding an ignored payload; the answer is sent after it.
    Discards { option: OptionType, remaining: usize, reply: OptionReplyType },
}

/// A handshake that needs bytes of the client.
#[derive(Debug)]
pub struct Handshake {
    pub(super) session: Session,
    pub(super) phase: Phase,
}

impl Handshake {
    /// Begins the handshake: writes the greeting (section "Newstyle negotiation").
    #[must_use]
    pub fn start(config: ServerConfig, out: &mut BytesMut) -> Self {
        out.put_u64(magic::INIT);
        out.put_u64(magic::OPTION);
        out.put_u16((HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES).bits());
        let session = Session::new(config);
        Self { session, phase: Phase::AwaitsClientFlags }
    }

    pub(super) const fn go_on(session: Session) -> Self {
        Self { session, phase: Phase::AwaitsOption }
    }

    /// Returns true once TLS is established.
    #[must_use]
    pub const fn is_tls_established(&self) -> bool {
        self.session.tls_established
    }

    /// Refuses an option; the handshake continues.
    pub(super) fn refuse(
        session: Session,
        option: OptionType,
        reason: RefusalReason,
        message: &str,
        out: &mut BytesMut,
    ) -> Self {
        reply::put_error(out, option, reason.reply_type(), message);
        Self::go_on(session)
    }
}
