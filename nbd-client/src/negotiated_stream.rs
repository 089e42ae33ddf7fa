//! A connection after the handshake, for callers that speak the transmission phase themselves.

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

/// A connection after the handshake, and what was agreed upon:
/// [`Connector::connect_stream`](crate::Connector::connect_stream) makes it.
///
/// Reading and writing move the bytes of the transmission phase, through TLS if that was agreed
/// upon. `nbd_proto::transmission::client` makes the requests and understands the replies; nothing
/// else sends or receives here, and dropping this closes the connection without a DISC.
#[derive(Debug)]
pub struct NegotiatedStream {
    stream: Stream,
    /// What was received together with the end of the handshake.
    input: BytesMut,
    negotiated: Negotiated,
    details: Details,
    settings: Settings,
}

/// Makes connections like a first one: to the same export, which can do no less, and never without
/// TLS if the first had it.
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
    /// Dropping the future closes what was opened.
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

    /// What both sides agreed upon.
    #[must_use]
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// What is known about the export.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        ExportInfo::new(&self.negotiated, self.details.clone())
    }

    /// True if the connection is protected by TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }

    /// The process that listens at the other end of a unix socket without TLS, if the system knows
    /// it: the one that has opened the socket, which is not the server's if a service manager did.
    #[must_use]
    pub fn server_process(&self) -> Option<u32> {
        let Stream::Plain(Socket::Unix(socket)) = &self.stream else { return None };
        let pid = socket.peer_cred().ok()?.pid()?;
        u32::try_from(pid).ok().filter(|pid| *pid > 0)
    }

    /// Makes further connections like this one, also after it is lost.
    #[must_use]
    pub fn reconnector(&self) -> Reconnector {
        let settings =
            if self.is_encrypted() { self.settings.requiring_tls() } else { self.settings.clone() };
        Reconnector { settings, first: self.negotiated.clone() }
    }

    /// Gives the socket itself, in blocking mode, if there is no TLS on it.
    ///
    /// # Errors
    ///
    /// `Err(self)`, for reading and writing as a stream, if there is TLS, or if the server sent
    /// bytes before it was asked anything. The inner error is one of the system.
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
