//! The legal replies to each option, and their validation.

mod info;
mod meta_context;

use bytes::BytesMut;

pub use self::info::{ExportInfo, Go, Info};
pub use self::meta_context::{ListMetaContext, SetMetaContext};
use super::phase::OptionPhase;
use crate::codec::{Reader, protocol_string};
use crate::error::ProtocolError;
use crate::handshake::ListedExport;
use crate::limits::MAX_LISTED_EXPORTS;
use crate::wire::{OptionReplyType, ReplyMode};

mod sealed {
    /// Seals [`Answer`](super::Answer).
    pub trait Sealed {}
}

/// An option whose answer an [`Awaiting`](super::Awaiting) reads. Only the types of this module
/// implement it; drivers use their [`Answer::Accepted`].
pub trait Answer: Sized + sealed::Sealed {
    /// The result if the server agrees.
    type Accepted;

    /// Processes one reply that is neither ACK nor an error.
    #[doc(hidden)]
    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        let _ = payload;
        Err(unexpected(reply))
    }

    /// Processes the ACK; `input` holds the bytes after it.
    #[doc(hidden)]
    fn accept(self, phase: OptionPhase, input: &BytesMut) -> Result<Self::Accepted, ProtocolError>;
}

macro_rules! seal {
    ($($answer:ty),*) => { $( impl sealed::Sealed for $answer {} )* };
}

seal!(StartTls, ExtendedHeaders, StructuredReply, Abort, List);

const fn unexpected(_reply: OptionReplyType) -> ProtocolError {
    ProtocolError::Unexpected {
        what: "an option reply",
        why: "this reply type does not answer the option that was sent",
    }
}

/// The answer to STARTTLS: [`BeforeTls`].
#[derive(Debug, Default)]
pub struct StartTls(());

impl Answer for StartTls {
    type Accepted = BeforeTls;

    fn accept(self, phase: OptionPhase, input: &BytesMut) -> Result<BeforeTls, ProtocolError> {
        if !input.is_empty() {
            return Err(ProtocolError::Unexpected {
                what: "data in the clear",
                why: "it follows the answer to STARTTLS and could have been injected",
            });
        }
        Ok(BeforeTls { phase })
    }
}

/// The state between the server's agreement to STARTTLS and the end of the TLS handshake. Perform
/// the TLS handshake on the bare socket and continue with a **new, empty** input buffer.
#[derive(Debug)]
pub struct BeforeTls {
    phase: OptionPhase,
}

impl BeforeTls {
    /// Continues after the TLS handshake. Everything negotiated in the clear is forgotten (section
    /// "TLS support").
    #[must_use]
    pub fn resume_after_tls(self) -> OptionPhase {
        OptionPhase { tls_established: true, ..OptionPhase::new(self.phase.client_flags) }
    }
}

/// The answer to EXTENDED_HEADERS: the handshake goes on.
#[derive(Debug, Default)]
pub struct ExtendedHeaders(());

impl Answer for ExtendedHeaders {
    type Accepted = OptionPhase;

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<OptionPhase, ProtocolError> {
        Ok(OptionPhase { reply_mode: ReplyMode::Extended, ..phase })
    }
}

/// The answer to STRUCTURED_REPLY: the handshake goes on.
#[derive(Debug, Default)]
pub struct StructuredReply(());

impl Answer for StructuredReply {
    type Accepted = OptionPhase;

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<OptionPhase, ProtocolError> {
        // A server that agrees although extended headers are in use changes nothing.
        let reply_mode = phase.reply_mode.max(ReplyMode::Structured);
        Ok(OptionPhase { reply_mode, ..phase })
    }
}

/// The answer to ABORT: close the connection.
#[derive(Debug, Default)]
pub struct Abort(());

impl Answer for Abort {
    type Accepted = ();

    fn accept(self, _: OptionPhase, _: &BytesMut) -> Result<(), ProtocolError> {
        Ok(())
    }
}

/// The answer to LIST: the exports in the server's order.
#[derive(Debug, Default)]
pub struct List {
    exports: Vec<ListedExport>,
}

impl Answer for List {
    type Accepted = (Vec<ListedExport>, OptionPhase);

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        if reply != OptionReplyType::SERVER {
            return Err(unexpected(reply));
        }
        check_count("listed exports", self.exports.len(), MAX_LISTED_EXPORTS)?;
        let mut reader = Reader::new(payload);
        let name = reader.u32().and_then(|length| reader.bytes(length as usize)).ok_or(
            ProtocolError::Malformed {
                what: "listed export",
                why: "its name is longer than the reply",
            },
        )?;
        self.exports.push(ListedExport {
            name: protocol_string("listed export name", name)?.to_owned(),
            description: protocol_string("export description", reader.rest())?.to_owned(),
        });
        Ok(())
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        Ok((self.exports, phase))
    }
}

fn check_count(what: &'static str, count: usize, limit: usize) -> Result<(), ProtocolError> {
    if count >= limit {
        return Err(ProtocolError::TooMany {
            what,
            count: (count as u64).saturating_add(1),
            limit: limit as u64,
        });
    }
    Ok(())
}
