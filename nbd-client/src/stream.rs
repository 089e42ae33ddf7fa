//! The byte stream of one connection: a socket, or TLS over one.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::tls::TlsStream;
use crate::transport::{Socket, forward_io};

/// The stream of one connection.
pub(crate) enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream>),
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain(socket) => socket.fmt(f),
            Self::Tls(_) => f.write_str("Stream::Tls"),
        }
    }
}

impl Stream {
    /// Returns the inner stream, to put TLS around it.
    pub(crate) fn take_out(&mut self) -> Socket {
        let nothing = Self::Plain(Socket::Other(Box::new(tokio::io::empty())));
        match std::mem::replace(self, nothing) {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => Socket::Other(stream),
        }
    }

    /// Returns true if accepted bytes need a flush to reach the socket. Only TLS buffers.
    pub(crate) fn has_unsent(&self) -> bool {
        match self {
            Self::Tls(stream) => stream.has_unsent(),
            Self::Plain(_) => false,
        }
    }
}

forward_io!(Stream: Plain, Tls);
