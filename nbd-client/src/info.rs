//! What is known about servers and exports.

use nbd_proto::handshake::{Negotiated, client};
use nbd_proto::wire::{BlockSizes, MetaContextName, ReplyMode, TransmissionFlags};

/// The handshake a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// One nameless export, no options.
    Oldstyle,
    /// Exports with names, but no way to refuse an option.
    Newstyle,
    /// Fixed newstyle: everything of today's protocol.
    NewstyleFixed,
}

impl Protocol {
    /// The name as the tools print it: `oldstyle`, `newstyle` or `newstyle-fixed`.
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

/// Which exports a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scope {
    /// The export that the connector names.
    #[default]
    ThisExport,
    /// Every export that the server lists.
    AllExports,
}

/// A server and its exports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerInfo {
    /// The handshake it speaks.
    pub protocol: Protocol,
    /// True if the connection is encrypted.
    pub tls: bool,
    /// The best form of replies it agreed to.
    pub reply_mode: ReplyMode,
    /// The exports asked about, in the server's order.
    pub exports: Vec<ExportInfo>,
    /// With [`Scope::AllExports`] those that the server lists and does not describe.
    pub refused: Vec<RefusedExport>,
}

/// An export that is listed, and refused when it is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedExport {
    /// Name, as it was listed.
    pub name: String,
    /// Why it is refused: a sentence for people.
    pub reason: String,
}

/// What is known about one export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Name, as it was asked for or listed.
    pub name: String,
    /// The canonical name, if the server told it.
    pub canonical_name: Option<String>,
    /// A text for people, if the server told one.
    pub description: Option<String>,
    /// Size, in bytes; at most 2^63-1.
    pub size: u64,
    /// What the export can do in the agreed reply mode.
    pub flags: TransmissionFlags,
    /// Block size constraints; `None` if the server told none.
    pub block_sizes: Option<BlockSizes>,
    /// From [`Connector::inspect`](crate::Connector::inspect) the contexts the export has; from
    /// [`Client::info`](crate::Client::info) those that were selected.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportInfo {
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

/// What is known about an export beyond [`Negotiated`].
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
