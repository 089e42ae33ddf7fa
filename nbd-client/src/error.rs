//! Errors of the client, by the side at fault.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::handshake::OptionError;
use nbd_proto::system_words::system_words;
use nbd_proto::transmission::client::ServerError;
use nbd_proto::uri::UriError;
use nbd_proto::wire::{CommandType, Errno, OptionReplyType};
use nbd_proto::{ApiMisuse, ProtocolError};

use crate::tls::TlsError;

/// Result of a client operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The reason for which a client operation failed.
///
/// Errors can be cloned: when a connection is lost, every request on it fails with the same error.
///
/// ```
/// use nbd_client::{CommandType, Connector, Errno, Error, LostConnection};
///
/// fn advice(error: &Error) -> &'static str {
///     match error {
///         Error::Uri(_) | Error::Misuse(_) => "correct the program",
///         Error::Request { command: CommandType::WRITE, source, .. }
///             if source.errno == Errno::ENOSPC =>
///         {
///             "give the server more room"
///         }
///         Error::Lost { reason: LostConnection::ExportChanged(_), .. } => "look for the disk",
///         _ => "try again later",
///     }
/// }
///
/// let error = "http://host/disk".parse::<Connector>().unwrap_err();
/// assert_eq!(advice(&error), "correct the program");
/// ```
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not an NBD URI.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The server could not be reached.
    #[error("cannot connect to {target}: {}", system_words(source))]
    Connect {
        /// The server's URI.
        target: Arc<str>,
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// The server did not finish the handshake in time.
    #[error(
        "{target} did not finish the handshake within {} s: it may be overloaded or not an NBD server",
        limit.as_secs_f64()
    )]
    HandshakeTimeout {
        /// The server's URI.
        target: Arc<str>,
        /// The time limit of the handshake.
        limit: Duration,
    },
    /// The connection broke during the handshake.
    #[error("the connection to {target} broke {during}: {}", system_words(source))]
    HandshakeLost {
        /// The server's URI.
        target: Arc<str>,
        /// The phase of the handshake.
        during: &'static str,
        /// The system's error; [`io::ErrorKind::UnexpectedEof`] if the server closed the
        /// connection.
        source: Arc<io::Error>,
    },
    /// The server violated the protocol during the handshake.
    #[error("the handshake with {target} failed: {source}")]
    Handshake {
        /// The server's URI.
        target: Arc<str>,
        /// The violation.
        source: ProtocolError,
    },
    /// The server refused a handshake option.
    #[error("{target} refused {what}: {source}")]
    Refused {
        /// The server's URI.
        target: Arc<str>,
        /// The request that was refused.
        what: String,
        /// The server's reason.
        source: OptionError,
    },
    /// TLS failed, or only one side requires it.
    #[error("{target}: {source}")]
    Tls {
        /// The server's URI.
        target: Arc<str>,
        /// The failure and its remedy.
        source: TlsError,
    },
    /// The server does not support a requested feature.
    #[error("{target} cannot do {what}: {why}")]
    Unsupported {
        /// The server's URI.
        target: Arc<str>,
        /// The requested feature.
        what: &'static str,
        /// The missing capability.
        why: &'static str,
    },
    /// The server refused a request or failed to carry it out. The connection remains usable.
    #[error("{command} of {length} bytes at offset {offset} failed: {source}")]
    Request {
        /// The command.
        command: CommandType,
        /// Offset of the request, in bytes.
        offset: u64,
        /// Length of the request, in bytes.
        length: u64,
        /// The server's error.
        source: ServerError,
    },
    /// The request needs a feature that was not negotiated, exceeds the export, is not aligned or
    /// cannot be expressed. Nothing was sent.
    #[error(transparent)]
    Misuse(#[from] ApiMisuse),
    /// The connection was lost; whether the request was carried out is unknown.
    #[error("the connection to {target} was lost: {reason}")]
    Lost {
        /// The server's URI.
        target: Arc<str>,
        /// The cause of the loss.
        reason: LostConnection,
    },
    /// An [`Interrupter`](crate::blocking::Interrupter) cancelled the call; whether the request was
    /// carried out is unknown.
    #[error("{reason}")]
    Interrupted {
        /// The reason passed to the interrupter.
        reason: Arc<str>,
    },
    /// The system could not start a thread for a client of [`blocking`](crate::blocking).
    #[error("cannot start the thread that drives the connections: {}", system_words(.0))]
    NoThread(Arc<io::Error>),
    /// The client was disconnected, or the runtime that drives its connections has ended.
    #[error("the client is disconnected: connect again")]
    Closed,
}

impl Error {
    /// Returns the error number of a failed request.
    #[must_use]
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Request { source, .. } => Some(source.errno),
            _ => None,
        }
    }

    /// Returns the reply with which the server refused a handshake option, such as ERR_UNKNOWN for
    /// an export that does not exist.
    #[must_use]
    pub const fn option_reply(&self) -> Option<OptionReplyType> {
        match self {
            Self::Refused { source, .. } => Some(source.reply),
            _ => None,
        }
    }
}

/// The cause of the loss of an established connection.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LostConnection {
    /// The system reported an error.
    #[error("{}", system_words(.0))]
    Io(Arc<io::Error>),
    /// The server closed the connection unexpectedly.
    #[error("the server closed it {0}")]
    ClosedByServer(String),
    /// The server violated the protocol; the client closed the connection.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// Reconnecting did not succeed within the time limit.
    #[error("{first}; no new connection within {} s: {last}", patience.as_secs_f64())]
    ReconnectFailed {
        /// The original cause of the loss.
        first: String,
        /// The time limit for reconnecting.
        patience: Duration,
        /// The failure of the last attempt.
        last: String,
    },
    /// After reconnecting, the export of the same name had other properties.
    #[error("after reconnecting, the export is not the same: {0}")]
    ExportChanged(String),
    /// The server did not answer a request within the time limit of
    /// [`Connector::request_timeout`](crate::Connector::request_timeout); the client closed the
    /// connection.
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
        /// The time limit.
        limit: Duration,
        /// The time since the request was first sent, on any connection.
        waited: Duration,
    },
    /// The server answered that it is shutting down ([`Errno::ESHUTDOWN`]). Only with
    /// [`Connector::reconnect`](crate::Connector::reconnect), which treats it as a loss of the
    /// connection; otherwise the request fails with [`Error::Request`].
    #[error("{0}")]
    ShuttingDown(ServerError),
    /// The server did not answer the last requests before the client disconnected.
    #[error("the server did not answer {0} requests in time for the disconnect")]
    LingerExpired(usize),
}

impl LostConnection {
    /// Returns true if a new connection can help: the transport failed or the server restarts, and
    /// the protocol was kept.
    pub(crate) const fn is_transient(&self) -> bool {
        match self {
            Self::Io(_)
            | Self::ClosedByServer(_)
            | Self::RequestTimeout { .. }
            | Self::ShuttingDown(_) => true,
            Self::Protocol(_)
            | Self::ReconnectFailed { .. }
            | Self::ExportChanged(_)
            | Self::LingerExpired(_) => false,
        }
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
