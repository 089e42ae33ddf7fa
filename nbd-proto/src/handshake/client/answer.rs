//! The legal replies to each option, and their validation.

use std::collections::HashSet;

use bytes::BytesMut;

use super::phase::OptionPhase;
use super::{checked_size, known_flags};
use crate::ProtocolError;
use crate::codec::{Reader, protocol_string};
use crate::handshake::meta_context::{Selection, contexts_for};
use crate::handshake::{ListedExport, Negotiated};
use crate::limits::{MAX_INFO_ITEMS, MAX_LISTED_EXPORTS, MAX_META_CONTEXTS};
use crate::wire::{
    BlockSizes, InfoType, MetaContextId, MetaContextName, OptionReplyType, ReplyMode,
    TransmissionFlags,
};

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

seal!(
    StartTls,
    ExtendedHeaders,
    StructuredReply,
    Abort,
    List,
    Info,
    Go,
    ListMetaContext,
    SetMetaContext
);

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
        return Err(ProtocolError::TooLong {
            what,
            length: (count as u64).saturating_add(1),
            limit: limit as u64,
        });
    }
    Ok(())
}

/// The server's information about one export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Size, in bytes; at most 2^63-1.
    pub size: u64,
    /// Transmission flags, limited to those that the negotiated reply mode can carry.
    pub flags: TransmissionFlags,
    /// Block size constraints, if the server sent any.
    pub block_sizes: Option<BlockSizes>,
    /// The canonical name, if the server sent one.
    pub canonical_name: Option<String>,
    /// A human-readable description, if the server sent one.
    pub description: Option<String>,
}

/// The answer to INFO: an [`ExportInfo`].
#[derive(Debug, Default)]
pub struct Info {
    items: usize,
    export: Option<(u64, u16)>,
    block_sizes: Option<BlockSizes>,
    canonical_name: Option<String>,
    description: Option<String>,
}

impl Info {
    fn into_export_info(self, mode: ReplyMode) -> Result<ExportInfo, ProtocolError> {
        let Some((size, flags)) = self.export else {
            return Err(ProtocolError::Malformed {
                what: "answer to INFO or GO",
                why: "the server agreed without sending size and flags (INFO_EXPORT)",
            });
        };
        Ok(ExportInfo {
            size,
            flags: known_flags(flags, mode),
            block_sizes: self.block_sizes,
            canonical_name: self.canonical_name,
            description: self.description,
        })
    }
}

impl Answer for Info {
    type Accepted = (ExportInfo, OptionPhase);

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        if reply != OptionReplyType::INFO {
            return Err(unexpected(reply));
        }
        check_count("information items", self.items, MAX_INFO_ITEMS)?;
        self.items += 1;
        let mut reader = Reader::new(payload);
        let info = reader.u16().ok_or(ProtocolError::Malformed {
            what: "information item",
            why: "it is shorter than its type",
        })?;
        match InfoType(info) {
            InfoType::EXPORT => {
                let (size, flags) = export_item(reader)?;
                set_once(&mut self.export, (checked_size(size)?, flags))
            }
            InfoType::BLOCK_SIZE => set_once(&mut self.block_sizes, block_size_item(reader)?),
            InfoType::NAME => {
                let name = protocol_string("canonical export name", reader.rest())?;
                set_once(&mut self.canonical_name, name.to_owned())
            }
            InfoType::DESCRIPTION => {
                let text = protocol_string("export description", reader.rest())?;
                set_once(&mut self.description, text.to_owned())
            }
            // Section "Option types": unknown information is ignored.
            _ => Ok(()),
        }
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        Ok((self.into_export_info(phase.reply_mode)?, phase))
    }
}

fn set_once<T>(place: &mut Option<T>, value: T) -> Result<(), ProtocolError> {
    if place.replace(value).is_some() {
        return Err(ProtocolError::Malformed {
            what: "answer to INFO or GO",
            why: "the server sent the same information twice",
        });
    }
    Ok(())
}

fn export_item(mut reader: Reader<'_>) -> Result<(u64, u16), ProtocolError> {
    match (reader.u64(), reader.u16(), reader.is_empty()) {
        (Some(size), Some(flags), true) => Ok((size, flags)),
        _ => Err(ProtocolError::Malformed {
            what: "information item EXPORT",
            why: "it has to be 12 bytes long",
        }),
    }
}

fn block_size_item(mut reader: Reader<'_>) -> Result<BlockSizes, ProtocolError> {
    match (reader.u32(), reader.u32(), reader.u32(), reader.is_empty()) {
        (Some(minimum), Some(preferred), Some(maximum), true) => {
            BlockSizes::new(minimum, preferred, maximum)
        }
        _ => Err(ProtocolError::Malformed {
            what: "information item BLOCK_SIZE",
            why: "it has to be 14 bytes long",
        }),
    }
}

/// The answer to GO: [`Negotiated`] and the rest of the server's information.
#[derive(Debug)]
pub struct Go {
    name: String,
    info: Info,
}

impl Go {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), info: Info::default() }
    }
}

impl Answer for Go {
    type Accepted = Box<(Negotiated, ExportInfo)>;

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        self.info.add(reply, payload)
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        let info = self.info.into_export_info(phase.reply_mode)?;
        let negotiated = Negotiated {
            size: info.size,
            flags: info.flags,
            block_sizes: info.block_sizes.unwrap_or_default(),
            reply_mode: phase.reply_mode,
            meta_contexts: contexts_for(phase.selection, &self.name),
            export_name: self.name,
        };
        Ok(Box::new((negotiated, info)))
    }
}

/// The answer to LIST_META_CONTEXT: names in the server's order. Names that cannot be selected
/// (such as the abbreviation `base:`) are left out.
#[derive(Debug, Default)]
pub struct ListMetaContext {
    replies: usize,
    names: Vec<MetaContextName>,
}

impl Answer for ListMetaContext {
    type Accepted = (Vec<MetaContextName>, OptionPhase);

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        let (_, text) = meta_context_item(reply, payload)?;
        check_count("listed metadata contexts", self.replies, MAX_META_CONTEXTS)?;
        self.replies += 1;
        if let Ok(name) = MetaContextName::new(text)
            && !self.names.contains(&name)
        {
            self.names.push(name);
        }
        Ok(())
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        Ok((self.names, phase))
    }
}

/// The answer to SET_META_CONTEXT: the selected contexts in the server's order.
#[derive(Debug)]
pub struct SetMetaContext {
    export_name: String,
    asked: HashSet<String>,
    contexts: Vec<(MetaContextId, MetaContextName)>,
}

impl SetMetaContext {
    pub(super) fn new(export_name: &str, asked: &[&str]) -> Self {
        Self {
            export_name: export_name.to_owned(),
            asked: asked.iter().map(|query| (*query).to_owned()).collect(),
            contexts: Vec::new(),
        }
    }
}

impl Answer for SetMetaContext {
    type Accepted = (Vec<(MetaContextId, MetaContextName)>, OptionPhase);

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        let (id, text) = meta_context_item(reply, payload)?;
        // Removed, so that a second answer with this name is refused. That also bounds the number
        // of answers by the number of queries.
        if !self.asked.remove(text) {
            return Err(ProtocolError::Malformed {
                what: "answer to SET_META_CONTEXT",
                why: "it selects a context that was not asked for, or one twice",
            });
        }
        if self.contexts.iter().any(|(other, _)| *other == id) {
            return Err(ProtocolError::Malformed {
                what: "answer to SET_META_CONTEXT",
                why: "it gives two contexts the same identifier",
            });
        }
        self.contexts.push((id, MetaContextName::new(text)?));
        Ok(())
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        let contexts = self.contexts.clone();
        let selection = Selection { export_name: self.export_name, contexts: self.contexts };
        Ok((contexts, OptionPhase { selection: Some(selection), ..phase }))
    }
}

fn meta_context_item(
    reply: OptionReplyType,
    payload: &[u8],
) -> Result<(MetaContextId, &str), ProtocolError> {
    if reply != OptionReplyType::META_CONTEXT {
        return Err(unexpected(reply));
    }
    let mut reader = Reader::new(payload);
    let id = reader.u32().ok_or(ProtocolError::Malformed {
        what: "metadata context reply",
        why: "it is shorter than its identifier",
    })?;
    Ok((MetaContextId(id), protocol_string("metadata context name", reader.rest())?))
}
