//! The stream of one client, under TLS or not.

use std::io::{self, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::task::{Context, Poll};

use rustix::net::{AddressFamily, sockopt};

use super::plain::{Channel, More, PlainSocket, Traffic};
#[cfg(feature = "tls")]
use super::tls::TlsSocket;
use crate::client::ClientAddress;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Plain(PlainSocket),
    /// A socket after a TLS handshake.
    #[cfg(feature = "tls")]
    Tls(Box<TlsSocket>),
}

impl Socket {
    pub(crate) const fn from_std_tcp(stream: std::net::TcpStream) -> Self {
        Self::Plain(PlainSocket::StdTcp(stream))
    }

    pub(crate) const fn from_std_unix(stream: std::os::unix::net::UnixStream) -> Self {
        Self::Plain(PlainSocket::StdUnix(stream))
    }

    /// A connected socket of any family.
    pub(crate) fn from_descriptor(socket: OwnedFd) -> io::Result<Self> {
        let family = sockopt::socket_domain(&socket)?;
        if family == AddressFamily::UNIX {
            let stream = std::os::unix::net::UnixStream::from(socket);
            stream.set_nonblocking(true)?;
            return Ok(Self::from_std_unix(stream));
        }
        let stream = std::net::TcpStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(Self::from_std_tcp(stream))
    }

    /// The address of a TCP client, or the path of the unix socket that the client has connected
    /// to.
    pub(crate) fn peer_name(&self) -> String {
        let known = match self {
            Self::Plain(PlainSocket::StdTcp(stream)) => {
                stream.peer_addr().ok().map(|address| address.to_string())
            }
            Self::Plain(PlainSocket::StdUnix(stream)) => {
                let address = stream.local_addr().ok();
                address.and_then(|at| at.as_pathname().map(|path| path.display().to_string()))
            }
            _ => None,
        };
        known.unwrap_or_else(|| "unix socket".to_owned())
    }

    /// Takes the socket out of its runtime. Fails under TLS.
    pub(super) fn into_descriptor(self) -> io::Result<OwnedFd> {
        match self {
            Self::Plain(socket) => socket.into_descriptor(),
            #[cfg(feature = "tls")]
            Self::Tls(_) => Err(io::Error::other("a socket under TLS cannot be taken out")),
        }
    }

    /// Attaches the socket to the runtime on which this is called.
    pub(crate) fn attach(self) -> io::Result<Self> {
        match self {
            Self::Plain(socket) => socket.attach().map(Self::Plain),
            #[cfg(feature = "tls")]
            attached @ Self::Tls(_) => Ok(attached),
        }
    }

    /// Reads into `buffer`; 0 means that the client will send nothing more.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket) => socket.poll_read(cx, buffer),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.poll_read(cx, buffer),
        }
    }

    /// Bytes received since the last call that contain no NBD data: messages of TLS.
    pub(super) fn take_barren(&mut self) -> usize {
        match self {
            Self::Plain(_) => 0,
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.take_barren(),
        }
    }

    /// Reads the available bytes without waiting; 0 if there are none, also at the end of the
    /// stream.
    pub(super) fn read_now(&mut self, buffer: &mut [u8]) -> usize {
        match self {
            Self::Plain(socket) => socket.read_now(buffer),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.read_now(buffer),
        }
    }

    /// Writes some of `slices`. Under TLS they may be written to memory only: then
    /// [`Socket::has_unsent`] is true, and [`Socket::poll_flush`] sends them.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
        more: More,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket) => socket.poll_send(cx, slices, more),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.poll_send(cx, slices),
        }
    }

    /// Sends what [`Socket::poll_send`] has left in memory, which happens only under TLS.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => {
                let _ = cx;
                Poll::Ready(Ok(()))
            }
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.poll_flush(cx),
        }
    }

    /// Whether [`Socket::poll_flush`] has something to send.
    pub(super) fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.has_unsent(),
        }
    }

    /// Whether the client has closed the connection, so that nothing can be sent to it. False if it
    /// has only finished sending. Costs a system call.
    pub(super) fn has_hung_up(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.has_hung_up(),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.has_hung_up(),
        }
    }

    /// Whether there is something to read. Costs a system call.
    pub(super) fn has_input(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.has_input(),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.has_input(),
        }
    }

    /// The bytes in transit. Costs a system call.
    pub(super) fn traffic(&self) -> Traffic {
        match self {
            Self::Plain(socket) => socket.traffic(),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.traffic(),
        }
    }

    /// The address of the client; unknown if first requested under TLS.
    pub(super) fn client_address(&self) -> ClientAddress {
        match self {
            Self::Plain(socket) => socket.client_address(),
            #[cfg(feature = "tls")]
            Self::Tls(_) => ClientAddress::Unknown,
        }
    }

    /// Whether the stream is encrypted.
    pub(super) const fn channel(&self) -> Channel {
        match self {
            Self::Plain(_) => Channel::Clear,
            #[cfg(feature = "tls")]
            Self::Tls(_) => Channel::Tls,
        }
    }

    /// Prepares the end of the stream after the last reply, if TLS needs it.
    pub(super) fn begin_shutdown(&mut self) {
        match self {
            Self::Plain(_) => {}
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.begin_shutdown(),
        }
    }

    /// Moves some bytes of `file` from the page cache into the socket; 0 means that the file ends
    /// at `offset` (in bytes).
    pub(super) fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket) => socket.poll_send_file(cx, file, offset, length),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.poll_send_file(cx, file, offset, length),
        }
    }
}
