//! The events of a client's requests.

use crate::codec::PeerText;
use crate::wire::{BlockDescriptor, Cookie, Errno, MetaContextId};

/// The server refused a request, or failed to carry it out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("server answered {errno} ({}){}{}", errno.description(), at(*offset), said(message))]
pub struct ServerError {
    /// The error number, as the server sent it.
    pub errno: Errno,
    /// The server's message; may be empty. The text comes from the peer: `Display` escapes its
    /// control characters.
    pub message: String,
    /// Offset of the failure in the export, in bytes, if the server sent one.
    pub offset: Option<u64>,
}

impl ServerError {
    /// Creates an error without a message and an offset.
    #[must_use]
    pub const fn new(errno: Errno) -> Self {
        Self { errno, message: String::new(), offset: None }
    }

    /// Adds a message.
    #[must_use]
    pub fn with_message(mut self, message: impl Into<String>) -> Self {
        self.message = message.into();
        self
    }

    /// Adds the offset of the failure in the export, in bytes.
    #[must_use]
    pub const fn with_offset(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// Returns whether the server is shutting down ([`Errno::ESHUTDOWN`]): all further requests on
    /// this connection fail, but the request may succeed on a new one.
    #[must_use]
    pub fn is_shutdown(&self) -> bool {
        self.errno == Errno::ESHUTDOWN
    }
}

fn at(offset: Option<u64>) -> String {
    offset.map_or_else(String::new, |offset| format!(" at offset {offset}"))
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {}", PeerText(message)) }
}

/// The meaning of the bytes at the front of the input.
///
/// New variants will occur only in replies to new kinds of requests, so a driver may treat an
/// unknown event as an error.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// More bytes are needed.
    NeedsInput,
    /// The next `length` bytes of the stream are data of a READ, at `position` bytes from the start
    /// of its range. The driver removes exactly these bytes before it requests the next event.
    Data {
        /// The request.
        cookie: Cookie,
        /// Distance from the request's offset, in bytes.
        position: u64,
        /// Number of bytes that follow.
        length: usize,
    },
    /// `length` bytes of a READ, at `position` bytes from the start of its range, are zero.
    Hole {
        /// The request.
        cookie: Cookie,
        /// Distance from the request's offset, in bytes.
        position: u64,
        /// Number of zero bytes.
        length: usize,
    },
    /// The status of the start of the requested range in one context. The descriptors do not exceed
    /// the request; they may cover less of it than requested.
    BlockStatus {
        /// The request.
        cookie: Cookie,
        /// The context.
        context: MetaContextId,
        /// At least one descriptor.
        descriptors: Vec<BlockDescriptor>,
    },
    /// The request is complete. No further event names its cookie.
    Finished {
        /// The request.
        cookie: Cookie,
        /// Success, or the server's error.
        result: Result<(), ServerError>,
    },
}
