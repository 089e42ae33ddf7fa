//! The answers to INFO and GO.

use bytes::BytesMut;

use super::sealed::Sealed;
use super::{Answer, check_count, unexpected};
use crate::codec::{Reader, protocol_string};
use crate::error::ProtocolError;
use crate::handshake::Negotiated;
use crate::handshake::client::phase::OptionPhase;
use crate::handshake::client::{checked_size, known_flags};
use crate::handshake::meta_context::contexts_for;
use crate::limits::MAX_INFO_ITEMS;
use crate::wire::{BlockSizes, InfoType, OptionReplyType, ReplyMode, TransmissionFlags};

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

impl Sealed for Info {}

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
            why: "it is not 12 bytes long",
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
            why: "it is not 14 bytes long",
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
    pub(in crate::handshake::client) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), info: Info::default() }
    }
}

impl Sealed for Go {}

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
