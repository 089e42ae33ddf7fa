//! Export information that a server sends, and refusals of options.

use std::fmt;

use crate::codec::PeerText;
use crate::wire::{BlockSizes, MetaContextName, OptionReplyType, ReplyMode, TransmissionFlags};

/// Whether the server enforces the minimum block size of an export.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum MinimumBlockSize {
    /// A client has to request block sizes if the minimum exceeds 1, and requests that violate it
    /// fail.
    #[default]
    Enforced,
    /// The minimum is advice, as from QEMU's server: a client that does not request block sizes
    /// gets a minimum of 1, and requests of any alignment succeed.
    Advised,
}

/// The information that INFO, GO and EXPORT_NAME report about one export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportDescription {
    /// The canonical name, sent to clients that request it. It may differ from the requested name,
    /// as for the default export.
    pub name: String,
    /// A human-readable description; at most 4096 bytes of it are sent.
    pub description: Option<String>,
    /// Size, in bytes; at most 2^63-1.
    pub size: u64,
    /// Transmission flags of the export. A connection advertises those that it can use.
    pub flags: TransmissionFlags,
    /// Block size constraints that are sent to clients.
    pub block_sizes: BlockSizes,
    /// Whether the server enforces the minimum.
    pub minimum_block_size: MinimumBlockSize,
    /// Every metadata context of the export, in its own order.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportDescription {
    /// Creates the description of an export of `size` bytes, without text and contexts, with the
    /// default block sizes, and only with HAS_FLAGS. Complete it field by field.
    #[must_use]
    pub fn new(name: impl Into<String>, size: u64) -> Self {
        Self {
            name: name.into(),
            description: None,
            size,
            flags: TransmissionFlags::HAS_FLAGS,
            block_sizes: BlockSizes::default(),
            minimum_block_size: MinimumBlockSize::Enforced,
            meta_contexts: Vec::new(),
        }
    }

    /// The block sizes without a minimum where that is only advice.
    pub(crate) fn enforced_block_sizes(&self) -> BlockSizes {
        match self.minimum_block_size {
            MinimumBlockSize::Enforced => self.block_sizes,
            MinimumBlockSize::Advised => self.block_sizes.without_minimum(),
        }
    }

    /// Returns the transmission flags that a connection in `mode` advertises: HAS_FLAGS always,
    /// SEND_DF only with structured or extended replies, BLOCK_STATUS_PAYLOAD only with extended
    /// headers and an export that has contexts, SEND_RESIZE (a draft) never.
    pub(crate) fn flags_in(&self, mode: ReplyMode) -> TransmissionFlags {
        let mut flags =
            (self.flags | TransmissionFlags::HAS_FLAGS) - TransmissionFlags::SEND_RESIZE;
        if mode == ReplyMode::Simple {
            flags.remove(TransmissionFlags::SEND_DF);
        }
        if mode != ReplyMode::Extended || self.meta_contexts.is_empty() {
            flags.remove(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        }
        flags
    }
}

/// One export in the answer to LIST.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ListedExport {
    /// Name of the export.
    pub name: String,
    /// A human-readable description; empty if there is none.
    pub description: String,
}

impl ListedExport {
    /// Creates an entry with this name and description.
    #[must_use]
    pub fn new(name: impl Into<String>, description: impl Into<String>) -> Self {
        Self { name: name.into(), description: description.into() }
    }
}

/// A refusal that does not depend on the exports: the reply and its text.
pub(super) type Answer = (OptionReplyType, &'static str);

/// The reasons for which a server refuses an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusalReason {
    /// There is no such export.
    UnknownExport,
    /// The server's policy forbids it.
    Policy,
    /// The option is not valid for this export or at this moment.
    Invalid,
    /// This platform or build does not support it.
    Platform,
    /// The export is served over TLS only.
    TlsRequired,
    /// The server is shutting down.
    Shutdown,
    /// The request or its answer is too big.
    TooBig,
}

impl RefusalReason {
    /// Returns the reply type on the wire.
    pub(crate) const fn reply_type(self) -> OptionReplyType {
        match self {
            Self::UnknownExport => OptionReplyType::ERR_UNKNOWN,
            Self::Policy => OptionReplyType::ERR_POLICY,
            Self::Invalid => OptionReplyType::ERR_INVALID,
            Self::Platform => OptionReplyType::ERR_PLATFORM,
            Self::TlsRequired => OptionReplyType::ERR_TLS_REQD,
            Self::Shutdown => OptionReplyType::ERR_SHUTDOWN,
            Self::TooBig => OptionReplyType::ERR_TOO_BIG,
        }
    }
}

/// A server's refusal, as the client received it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OptionError {
    /// The kind of refusal.
    pub reply: OptionReplyType,
    /// The server's message; may be empty. The text comes from the peer: `Display` escapes its
    /// control characters, so it is safe to print on a terminal.
    pub message: String,
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "server answered {}", self.reply)?;
        if !self.message.is_empty() {
            write!(f, ": {}", PeerText(&self.message))?;
        }
        Ok(())
    }
}

impl std::error::Error for OptionError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_peer_cannot_drive_a_terminal() {
        let error =
            OptionError { reply: OptionReplyType::ERR_POLICY, message: "no\u{1b}[2J\n".into() };
        assert_eq!(error.to_string(), "server answered ERR_POLICY: no\\u{1b}[2J\\n");
    }

    #[test]
    fn flags_that_the_reply_mode_cannot_carry_are_not_advertised() {
        let mut export = ExportDescription::new("", 0);
        export.flags = TransmissionFlags::all();
        export.meta_contexts.push(MetaContextName::base_allocation());
        let has = |export: &ExportDescription, mode, flag| export.flags_in(mode).contains(flag);
        let (df, payload) = (TransmissionFlags::SEND_DF, TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        assert!(!has(&export, ReplyMode::Simple, df));
        assert!(has(&export, ReplyMode::Structured, df));
        assert!(!has(&export, ReplyMode::Structured, payload));
        assert!(has(&export, ReplyMode::Extended, payload));
        assert!(!has(&export, ReplyMode::Extended, TransmissionFlags::SEND_RESIZE));
        export.meta_contexts.clear();
        assert!(!has(&export, ReplyMode::Extended, payload));
        export.flags = TransmissionFlags::empty();
        assert!(has(&export, ReplyMode::Simple, TransmissionFlags::HAS_FLAGS));
    }
}
