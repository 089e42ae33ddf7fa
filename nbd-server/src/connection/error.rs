//! The reasons for which a connection ends abnormally.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use crate::access::Refusal;
use crate::error::system_words;
#[cfg(feature = "tls")]
use crate::tls::TlsError;

/// The reason for which a connection ended abnormally.
#[derive(Debug, Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Protocol(#[from] nbd_proto::ProtocolError),
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Tls(#[from] TlsFailure),
    #[error("{}", system_words(.0))]
    Io(#[from] std::io::Error),
    #[error("the long options of other clients use all the memory for long options")]
    LongOptions,
    #[error("answering an option panicked")]
    Panicked,
    #[error("the client did not finish its handshake in time")]
    HandshakeTimeout,
    #[error("the client {awaiting}, and nothing was transferred for {} s", .limit.as_secs_f32())]
    Stalled { awaiting: Awaiting, limit: Duration },
    #[error("the client closed the connection without waiting for its replies")]
    HungUp,
    #[error("the client was refused: {0}")]
    Refused(Refusal),
    #[error("the export does not keep what the client was promised: {0}")]
    NotResumed(String),
    #[error("a file ended while it was being sent: another program has truncated it")]
    FileTruncated,
}

/// The reason for which there is no TLS with a client.
#[cfg(feature = "tls")]
#[derive(Debug, Error)]
pub(crate) enum TlsFailure {
    #[error("{}", system_words(.0))]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Credentials(#[from] TlsError),
    #[error("the client closed the connection in the middle of the TLS handshake")]
    Closed,
    #[error("TLS handshake: {0}")]
    Handshake(String),
}

/// The action of a client that the server waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Awaiting {
    /// To send the rest of a request or of a payload.
    SendRest,
    /// To take its replies.
    TakeReplies,
}

impl fmt::Display for Awaiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SendRest => "has not sent the rest of a request",
            Self::TakeReplies => "has not taken its replies",
        })
    }
}
