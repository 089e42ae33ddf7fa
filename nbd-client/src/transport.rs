//! Byte streams to a server: TCP, unix sockets, or a stream of the caller.

use std::io;
use std::net::{self, SocketAddr};
use std::os::unix;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use nbd_proto::host_lookup;
use nbd_proto::system_words::system_words;
use nbd_proto::uri::Transport;
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};

/// What a unix socket takes before its peer receives it. By default Linux has room for less than a
/// request of 256 KiB, which then is sent in parts, each of which wakes both processes. TCP grows
/// its own.
const UNIX_BUFFER_BYTES: usize = 512 << 10;

/// Any other byte stream.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// A socket without TLS, which blocks.
#[derive(Debug)]
pub enum PlainSocket {
    /// TCP.
    Tcp(net::TcpStream),
    /// A unix socket.
    Unix(unix::net::UnixStream),
}

/// A byte stream of the system or the caller.
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
    /// Connects to a server. If a host has several addresses, the first that answers is used.
    pub(crate) async fn connect(transport: &Transport) -> io::Result<Self> {
        match transport {
            Transport::Unix { path } => Self::connect_unix(path).await,
            Transport::Tcp { host, port } => {
                let mut last = None;
                let found = lookup_host((host.as_str(), *port)).await.map_err(|error| {
                    io::Error::new(error.kind(), host_lookup::explain(host, &system_words(&error)))
                })?;
                for address in found {
                    match connect_tcp(address).await {
                        Ok(stream) => return Ok(Self::Tcp(stream)),
                        Err(error) => last = Some(error),
                    }
                }
                let nothing =
                    || io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
                Err(last.unwrap_or_else(nothing))
            }
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this program does not support the transport that the URI names",
            )),
        }
    }

    /// Takes a connected socket of the caller.
    pub(crate) fn from_plain(socket: PlainSocket) -> io::Result<Self> {
        Ok(match socket {
            PlainSocket::Tcp(socket) => {
                socket.set_nonblocking(true)?;
                Self::Tcp(TcpStream::from_std(socket)?)
            }
            PlainSocket::Unix(socket) => {
                socket.set_nonblocking(true)?;
                Self::Unix(UnixStream::from_std(socket)?)
            }
        })
    }

    async fn connect_unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path).await?;
        // The system may allow less.
        let _ = set_socket_send_buffer_size(&stream, UNIX_BUFFER_BYTES);
        Ok(Self::Unix(stream))
    }
}

async fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Detects a peer that vanished without closing the connection.
    socket.set_keepalive(true)?;
    let stream = socket.connect(address).await?;
    // Requests are combined before they are written: a delay would only cost time.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Implements reading and writing for an enum by handing every call to the stream in its variant.
macro_rules! forward_io {
    ($kind:ident: $($variant:ident),+) => {
        impl ::tokio::io::AsyncRead for $kind {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ::tokio::io::ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() { $(Self::$variant(it) => Pin::new(it).poll_read(cx, buf)),+ }
            }
        }

        impl ::tokio::io::AsyncWrite for $kind {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $(Self::$variant(it) => Pin::new(it).poll_write(cx, bytes)),+
                }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                parts: &[::std::io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    $(Self::$variant(it) => Pin::new(it).poll_write_vectored(cx, parts)),+
                }
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $(Self::$variant(it) => Pin::new(it).poll_flush(cx)),+ }
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $(Self::$variant(it) => Pin::new(it).poll_shutdown(cx)),+ }
            }
        }
    };
}
pub(crate) use forward_io;

forward_io!(Socket: Tcp, Unix, Other);

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::socket_send_buffer_size;

    use super::*;

    #[tokio::test]
    async fn a_unix_socket_takes_more_than_by_default_before_the_server_receives_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let Ok(Socket::Unix(ours)) = Socket::connect(&Transport::Unix { path: path.clone() }).await
        else {
            panic!("a unix socket");
        };
        let plain = UnixStream::connect(&path).await.unwrap();
        let size = |socket| socket_send_buffer_size(socket).unwrap();
        assert!(size(&ours) > size(&plain), "{} and {}", size(&ours), size(&plain));
    }
}
