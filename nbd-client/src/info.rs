//! Information about servers and exports.

use nbd_proto::handshake::{Negotiated, client};
use nbd_proto::wire::{BlockSizes, MetaContextName, ReplyMode, TransmissionFlags};

/// The kind of handshake a server uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// One unnamed export, no options.
    Oldstyle,
    /// Named exports, but no reply that refuses an option.
    Newstyle,
    /// Fixed newstyle: the current protocol.
    NewstyleFixed,
}

impl Protocol {
    /// Returns the name as the tools print it: `oldstyle`, `newstyle` or `newstyle-fixed`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Oldstyle => "oldstyle",
            Self::Newstyle => "newstyle",
            Self::NewstyleFixed => "newstyle-fixed",
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The exports that a query covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Scope {
    /// The export that the connector names.
    #[default]
    ThisExport,
    /// Every export that the server lists.
    AllExports,
}

/// The properties of a server and its exports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerInfo {
    /// The kind of handshake the server uses.
    pub protocol: Protocol,
    /// True if the connection is encrypted.
    pub tls: bool,
    /// The best form of replies that the server accepted.
    pub reply_mode: ReplyMode,
    /// The queried exports, in the server's order.
    pub exports: Vec<ExportInfo>,
    /// With [`Scope::AllExports`], the exports that the server lists but does not describe.
    pub refused: Vec<RefusedExport>,
}

/// An export that the server lists, but whose description it refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedExport {
    /// Name in the list.
    pub name: String,
    /// The reason for the refusal, as a sentence for display.
    pub reason: String,
}

/// The properties of one export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Name, as requested or listed.
    pub name: String,
    /// The canonical name, if the server sent one.
    pub canonical_name: Option<String>,
    /// A human-readable description, if the server sent one.
    pub description: Option<String>,
    /// Size, in bytes; at most 2^63-1.
    pub size: u64,
    /// The capabilities of the export in the negotiated reply mode.
    pub flags: TransmissionFlags,
    /// Block size constraints; `None` if the server sent none.
    pub block_sizes: Option<BlockSizes>,
    /// From [`Connector::inspect`](crate::Connector::inspect), all contexts of the export; from
    /// [`Client::info`](crate::Client::info), the selected ones.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportInfo {
    /// Returns the number of bytes of which offset and length of each request have to be multiples:
    /// a power of two, and 1 if the server has not sent block sizes.
    #[must_use]
    pub fn minimum_block_size(&self) -> u32 {
        self.block_sizes.unwrap_or_default().minimum()
    }

    pub(crate) fn new(negotiated: &Negotiated, details: Details) -> Self {
        Self {
            name: negotiated.export_name.clone(),
            canonical_name: details.canonical_name,
            description: details.description,
            size: negotiated.size,
            flags: negotiated.flags,
            block_sizes: details.block_sizes,
            meta_contexts: negotiated.meta_contexts.iter().map(|(_, name)| name.clone()).collect(),
        }
    }
}

/// The properties of one export beyond [`Negotiated`].
#[derive(Debug, Clone)]
pub(crate) struct Details {
    pub(crate) protocol: Protocol,
    pub(crate) block_sizes: Option<BlockSizes>,
    pub(crate) canonical_name: Option<String>,
    pub(crate) description: Option<String>,
}

impl Details {
    pub(crate) const fn unknown(protocol: Protocol) -> Self {
        Self { protocol, block_sizes: None, canonical_name: None, description: None }
    }

    pub(crate) fn told(info: client::ExportInfo) -> Self {
        Self {
            protocol: Protocol::NewstyleFixed,
            block_sizes: info.block_sizes,
            canonical_name: info.canonical_name,
            description: info.description,
        }
    }
}
