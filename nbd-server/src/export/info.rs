//! The properties of an export, and the errors of its requests.

use std::borrow::Cow;

use nbd_proto::handshake::MinimumBlockSize;
use nbd_proto::wire::{BlockSizes, Errno, MetaContextName, TransmissionFlags};

/// The properties of an export. All sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Size of the disk; at most 2^63-1. Fixed while a client is connected.
    pub size: u64,
    /// The capabilities of the export. The server adds the flags that it supports for every export:
    /// HAS_FLAGS, SEND_DF and BLOCK_STATUS_PAYLOAD.
    pub flags: TransmissionFlags,
    /// The sizes of requests that the export accepts and prefers; enforced by the server.
    pub block_sizes: BlockSizes,
    /// Whether the minimum is enforced; if not, the methods must accept any alignment.
    pub minimum_block_size: MinimumBlockSize,
    /// The metadata contexts that [`Export::block_status`](super::Export::block_status) can answer.
    pub meta_contexts: Vec<MetaContextName>,
}

impl ExportInfo {
    /// Creates the properties of a disk of `size` bytes that accepts requests of any alignment and
    /// has no optional capabilities.
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

/// The error of a request.
///
/// ```
/// use nbd_server::export::{Errno, ExportError};
///
/// fn check(is_full: bool) -> Result<(), ExportError> {
///     match is_full {
///         true => Err(ExportError::new(Errno::ENOSPC, "the pool is full")),
///         false => Ok(()),
///     }
/// }
/// # assert_eq!(check(true).unwrap_err().errno, Errno::ENOSPC);
/// # check(false).unwrap();
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct ExportError {
    /// The error number for the client.
    pub errno: Errno,
    /// A human-readable message. It is sent to the client, so it must not contain paths of this
    /// machine.
    pub message: Cow<'static, str>,
}

impl ExportError {
    /// Creates an error with a human-readable message, which is sent to the client.
    #[must_use]
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, message: message.into() }
    }

    pub(super) fn unsupported() -> Self {
        Self::new(Errno::ENOTSUP, "the export cannot do this")
    }
}
