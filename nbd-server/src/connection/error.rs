//! Why a connection ends that should not.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use crate::access::Refusal;
use crate::error::system_words;
#[cfg(feature = "tls")]
use crate::tls::TlsError;

/// Why a connection ended that should not have.
#[derive(Debug, Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Protocol(#[from] nbd_proto::ProtocolError),
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Tls(#[from] TlsFailure),
    #[error("{}", system_words(.0))]
    Io(#[from] std::io::Error),
    #[error("long options of other clients hold all the memory there is for them")]
    LongOptions,
    #[error("answering an option panicked")]
    Panicked,
    #[error("the client did not finish its handshake in time")]
    HandshakeTimeout,
    #[error("the client {awaiting}, and nothing has moved for {} s", .limit.as_secs_f32())]
    Stalled { awaiting: Awaiting, limit: Duration },
    #[error("the client closed the connection without waiting for its replies")]
    HungUp,
    #[error("the client was refused: {0}")]
    Refused(Refusal),
    #[error("the export does not keep what the client was promised: {0}")]
    NotResumed(String),
    #[error("a file ended while it was being sent: another program has made it shorter")]
    FileTruncated,
}

/// Why there is no TLS with a client.
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

/// What a client is waited for to do.
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
