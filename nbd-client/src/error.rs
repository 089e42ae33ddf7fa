//! What can go wrong, and whose fault it was.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::handshake::OptionError;
use nbd_proto::transmission::client::ServerError;
use nbd_proto::uri::UriError;
use nbd_proto::wire::{CommandType, Errno, OptionReplyType};
use nbd_proto::{ApiMisuse, ProtocolError};

use crate::system_words::system_words;
use crate::tls::TlsError;

/// Result of a client operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation of the client failed.
///
/// Errors can be cloned: when a connection is lost, every request on it fails with the same one.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is no NBD URI.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The server could not be reached.
    #[error("cannot connect to {target}: {}", system_words(source))]
    Connect {
        /// The server's URI.
        target: Arc<str>,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The server did not finish the handshake in time.
    #[error(
        "{target} did not finish the handshake within {} s: it may be overloaded or no NBD server",
        limit.as_secs_f64()
    )]
    HandshakeTimeout {
        /// The server's URI.
        target: Arc<str>,
        /// The time it had.
        limit: Duration,
    },
    /// The connection broke during the handshake.
    #[error("the connection to {target} broke {during}: {}", system_words(source))]
    HandshakeLost {
        /// The server's URI.
        target: Arc<str>,
        /// The part of the handshake.
        during: &'static str,
        /// What the system said; [`io::ErrorKind::UnexpectedEof`] if the server closed it.
        source: Arc<io::Error>,
    },
    /// The server broke the protocol during the handshake.
    #[error("the handshake with {target} failed: {source}")]
    Handshake {
        /// The server's URI.
        target: Arc<str>,
        /// What the server did.
        source: ProtocolError,
    },
    /// The server refused a handshake option.
    #[error("{target} refused {what}: {source}")]
    Refused {
        /// The server's URI.
        target: Arc<str>,
        /// What was asked of it.
        what: String,
        /// The server's reason.
        source: OptionError,
    },
    /// TLS failed, or is wanted by one side only.
    #[error("{target}: {source}")]
    Tls {
        /// The server's URI.
        target: Arc<str>,
        /// What failed, and what to do.
        source: TlsError,
    },
    /// The server is too old for what was asked.
    #[error("{target} cannot do {what}: {why}")]
    Unsupported {
        /// The server's URI.
        target: Arc<str>,
        /// What was asked.
        what: &'static str,
        /// What is missing.
        why: &'static str,
    },
    /// The server refused a request or failed at it. The connection is unharmed.
    #[error("{command} of {length} bytes at offset {offset} failed: {source}")]
    Request {
        /// The command.
        command: CommandType,
        /// Offset of the request, in bytes.
        offset: u64,
        /// Length of the request, in bytes.
        length: u64,
        /// What the server reported.
        source: ServerError,
    },
    /// The request was not negotiated, leaves the export, is not aligned or cannot be expressed.
    /// Nothing was sent.
    #[error(transparent)]
    Misuse(#[from] ApiMisuse),
    /// The connection was lost; whether the request was carried out is unknown.
    #[error("the connection to {target} was lost: {reason}")]
    Lost {
        /// The server's URI.
        target: Arc<str>,
        /// How it was lost.
        reason: LostConnection,
    },
    /// An [`Interrupter`](crate::blocking::Interrupter) has ended the waiting; whether the request was
    /// carried out is unknown.
    #[error("{reason}")]
    Interrupted {
        /// What the interrupter was given.
        reason: Arc<str>,
    },
    /// The system gave no thread to a client of [`blocking`](crate::blocking).
    #[error("cannot start the thread that drives the connections: {}", system_words(.0))]
    NoThread(Arc<io::Error>),
    /// The client was disconnected, or the runtime that drives its connections has ended.
    #[error("the client is disconnected: connect again")]
    Closed,
}

impl Error {
    /// The error number of a failed request.
    #[must_use]
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Request { source, .. } => Some(source.errno),
            _ => None,
        }
    }

    /// The reply with which the server refused a handshake option, such as ERR_UNKNOWN for an
    /// export that does not exist.
    #[must_use]
    pub const fn option_reply(&self) -> Option<OptionReplyType> {
        match self {
            Self::Refused { source, .. } => Some(source.reply),
            _ => None,
        }
    }
}

/// How an established connection was lost.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LostConnection {
    /// The system reported an error.
    #[error("{}", system_words(.0))]
    Io(Arc<io::Error>),
    /// The server closed the connection without being asked to.
    #[error("the server closed it {0}")]
    ClosedByServer(String),
    /// The server broke the protocol; the connection was closed.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// Reconnecting did not succeed within the time the caller set.
    #[error("{first}; no new connection within {} s: {last}", patience.as_secs_f64())]
    ReconnectFailed {
        /// How the connection was lost in the first place.
        first: String,
        /// The time reconnecting had.
        patience: Duration,
        /// Why the last attempt failed.
        last: String,
    },
    /// After reconnecting, the server offered something else under the same name.
    #[error("after reconnecting, the export is not the same: {0}")]
    ExportChanged(String),
    /// The server did not answer a request within the time that
    /// [`Connector::request_timeout`](crate::Connector::request_timeout) sets; the connection was
    /// given up.
    #[error(
        "the server did not answer {command} of {length} bytes at offset {offset} within {} s: it \
         may hang or be overloaded; try again later, or with more time",
        limit.as_secs_f64()
    )]
    RequestTimeout {
        /// The command.
        command: CommandType,
        /// Offset of the request, in bytes.
        offset: u64,
        /// Length of the request, in bytes.
        length: u64,
        /// The time it had.
        limit: Duration,
        /// The time since it was sent first, on whichever connection.
        waited: Duration,
    },
    /// The server did not answer the last requests while the client was disconnecting.
    #[error("the server did not answer {0} requests in time for the disconnect")]
    LingerExpired(usize),
}

impl LostConnection {
    /// True if a new connection can help: the transport broke, not the protocol.
    pub(crate) const fn is_transient(&self) -> bool {
        matches!(self, Self::Io(_) | Self::ClosedByServer(_) | Self::RequestTimeout { .. })
    }
}

impl From<io::Error> for LostConnection {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_are_words_without_a_number() {
        let refused = || Arc::new(io::Error::from_raw_os_error(111));
        let target: Arc<str> = "nbd://host".into();
        let connect = Error::Connect { target: target.clone(), source: refused() };
        assert_eq!(connect.to_string(), "cannot connect to nbd://host: Connection refused");
        let lost = Error::Lost { target, reason: LostConnection::Io(refused()) };
        assert!(lost.to_string().ends_with("was lost: Connection refused"), "{lost}");
    }
}
