//! What an export says of itself, and why a request failed.

use std::borrow::Cow;

use nbd_proto::handshake::MinimumBlockSize;
use nbd_proto::wire::{BlockSizes, Errno, MetaContextName, TransmissionFlags};

/// What a client is told about an export. All sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Size of the disk; at most 2^63-1. Fixed while a client is connected.
    pub size: u64,
    /// What the export can do. The server itself adds what it provides for every export:
    /// HAS_FLAGS, SEND_DF and BLOCK_STATUS_PAYLOAD.
    pub flags: TransmissionFlags,
    /// Which requests the export accepts and likes; enforced by the server.
    pub block_sizes: BlockSizes,
    /// Whether the smallest of them is enforced; if not, the methods take any alignment.
    pub minimum_block_size: MinimumBlockSize,
    /// The metadata contexts [`Export::block_status`](super::Export::block_status) can answer.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportInfo {
    /// A disk of `size` bytes that takes requests of any alignment and can do nothing special.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            flags: TransmissionFlags::HAS_FLAGS,
            block_sizes: BlockSizes::default(),
            minimum_block_size: MinimumBlockSize::Enforced,
            meta_contexts: Vec::new(),
        }
    }
}

/// A request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct ExportError {
    /// The error the client gets.
    pub errno: Errno,
    /// A text for people. It is sent to the client: name no paths of this machine in it.
    pub message: Cow<'static, str>,
}

impl ExportError {
    /// An error with a text for people, which is sent to the client.
    #[must_use]
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, message: message.into() }
    }

    pub(super) fn unsupported() -> Self {
        Self::new(Errno::ENOTSUP, "the export cannot do this")
    }
}
