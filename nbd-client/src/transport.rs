//! Byte streams to a server: TCP, unix sockets, or anything the caller brings.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use nbd_proto::uri::Transport;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};

/// Any other byte stream.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// A byte stream as it comes from the system or the caller.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Other(Box<dyn ByteStream>),
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp(_) => "Socket::Tcp",
            Self::Unix(_) => "Socket::Unix",
            Self::Other(_) => "Socket::Other",
        })
    }
}

impl Socket {
    /// Connects to a server. Of several addresses of a host the first that answers is taken.
    pub(crate) async fn connect(transport: &Transport) -> io::Result<Self> {
        match transport {
            Transport::Unix { path } => Self::connect_unix(path).await,
            Transport::Tcp { host, port } => {
                let mut last = None;
                for address in lookup_host((host.as_str(), *port)).await? {
                    match connect_tcp(address).await {
                        Ok(stream) => return Ok(Self::Tcp(stream)),
                        Err(error) => last = Some(error),
                    }
                }
                let nothing =
                    || io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
                Err(last.unwrap_or_else(nothing))
            }
        }
    }

    async fn connect_unix(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).await.map(Self::Unix)
    }
}

async fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Finds out about a peer that vanished without a word.
    socket.set_keepalive(true)?;
    let stream = socket.connect(address).await?;
    // Requests are gathered before they are written: waiting for more only costs time.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Makes one call of the socket, of whichever kind it is.
macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
            Socket::Other($stream) => $call,
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => Pin::new(stream).poll_write_vectored(cx, parts))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
