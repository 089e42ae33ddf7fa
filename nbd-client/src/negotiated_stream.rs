//! A connection after the handshake, for callers that carry out the transmission phase themselves.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, BytesMut};
use nbd_proto::handshake::Negotiated;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::dial::{Established, establish_at};
use crate::error::{Error, LostConnection, Result};
use crate::info::{Details, ExportInfo};
use crate::reconnect::same_export;
use crate::settings::Settings;
use crate::stream::Stream;
pub use crate::transport::PlainSocket;
use crate::transport::Socket;

/// A connection after the handshake, and the negotiated values; created by
/// [`Connector::connect_stream`](crate::Connector::connect_stream).
///
/// Reading and writing transfer the bytes of the transmission phase, through TLS if that was
/// negotiated. `nbd_proto::transmission::client` encodes the requests and decodes the replies.
/// Nothing else sends or receives here. Dropping this closes the connection without a DISC.
#[derive(Debug)]
pub struct NegotiatedStream {
    stream: Stream,
    /// Bytes received together with the end of the handshake.
    input: BytesMut,
    negotiated: Negotiated,
    details: Details,
    settings: Settings,
}

/// Makes connections like a first one: to the same export with at least the same capabilities, and
/// always with TLS if the first had it.
#[derive(Debug, Clone)]
pub struct Reconnector {
    settings: Settings,
    first: Negotiated,
}

impl Reconnector {
    /// Makes a connection.
    ///
    /// # Errors
    ///
    /// Those of [`Connector::connect_stream`](crate::Connector::connect_stream), and
    /// [`Error::Lost`] if the export has changed.
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future closes the connection.
    pub async fn connect(&self) -> Result<NegotiatedStream> {
        let established = establish_at(&self.settings).await?;
        same_export(&self.first, &established.negotiated).map_err(|why| Error::Lost {
            target: self.settings.target(),
            reason: LostConnection::ExportChanged(why),
        })?;
        Ok(NegotiatedStream::new(established, self.settings.clone()))
    }
}

impl NegotiatedStream {
    pub(crate) fn new(established: Established, settings: Settings) -> Self {
        let Established { stream, input, negotiated, details } = established;
        Self { stream, input, negotiated, details, settings }
    }

    /// Returns the result of the handshake.
    #[must_use]
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Returns the properties of the export.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        ExportInfo::new(&self.negotiated, self.details.clone())
    }

    /// Returns true if the connection is protected by TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }

    /// Returns the process that opened the listening unix socket, without TLS and if the system
    /// knows it. If a service manager opened the socket, that is not the server.
    #[must_use]
    pub fn server_process(&self) -> Option<u32> {
        let Stream::Plain(Socket::Unix(socket)) = &self.stream else { return None };
        let pid = socket.peer_cred().ok()?.pid()?;
        u32::try_from(pid).ok().filter(|pid| *pid > 0)
    }

    /// Returns a value that makes further connections like this one, also after this one is lost.
    #[must_use]
    pub fn reconnector(&self) -> Reconnector {
        let settings =
            if self.is_encrypted() { self.settings.requiring_tls() } else { self.settings.clone() };
        Reconnector { settings, first: self.negotiated.clone() }
    }

    /// Returns the socket itself, in blocking mode, if the connection has no TLS.
    ///
    /// # Errors
    ///
    /// The inner result is `Err(self)`, for use as a stream, if there is TLS, or if the server sent
    /// bytes before the first request. The outer error is the system's.
    pub fn into_socket(self) -> io::Result<std::result::Result<PlainSocket, Self>> {
        if !self.input.is_empty() {
            return Ok(Err(self));
        }
        Ok(Ok(match self.stream {
            Stream::Plain(Socket::Unix(socket)) => {
                let socket = socket.into_std()?;
                socket.set_nonblocking(false)?;
                PlainSocket::Unix(socket)
            }
            Stream::Plain(Socket::Tcp(socket)) => {
                let socket = socket.into_std()?;
                socket.set_nonblocking(false)?;
                PlainSocket::Tcp(socket)
            }
            stream => return Ok(Err(Self { stream, ..self })),
        }))
    }
}

impl AsyncRead for NegotiatedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.input.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let length = this.input.len().min(buf.remaining());
        buf.put_slice(this.input.get(..length).unwrap_or_default());
        this.input.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for NegotiatedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
