//! The unencrypted stream of one client.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::unix_socket::UnixSocket;
use crate::client::ClientAddress;
use crate::sys;

/// Send buffer of a unix socket, in bytes: large enough for several large replies, so that the
/// client can read one while the next is written. The system may grant less.
const UNIX_SEND_BUFFER_LEN: usize = 2 << 20;

/// A connected socket, which may or may not be attached to a runtime.
#[derive(Debug)]
pub(crate) enum PlainSocket {
    /// Fresh from the listener, not attached.
    StdTcp(std::net::TcpStream),
    /// As above.
    StdUnix(std::os::unix::net::UnixStream),
    Tcp(TcpStream),
    Unix(UnixSocket),
}

/// The encryption of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    /// Unencrypted.
    Clear,
    /// Encrypted.
    #[cfg(feature = "tls")]
    Tls,
}

/// Whether more bytes follow at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum More {
    Follows,
    No,
}

/// The bytes in transit below the plaintext. If bytes have moved between two moments, the values
/// differ (the reverse need not hold).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Traffic {
    /// Bytes that the client has not taken from the system.
    pub(super) untaken: Option<u64>,
    /// Ciphertext that was received, in bytes modulo 2^64.
    pub(super) received: u64,
    /// Ciphertext that the system has not taken, in bytes.
    pub(super) unsent: usize,
}

impl PlainSocket {
    /// Attaches the socket to the runtime on which this is called.
    pub(super) fn attach(self) -> io::Result<Self> {
        match self {
            Self::StdTcp(stream) => TcpStream::from_std(stream).map(Self::Tcp),
            Self::StdUnix(stream) => {
                // A failure is harmless: a smaller buffer is only slower.
                let _ = sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER_LEN);
                UnixSocket::attach(stream).map(Self::Unix)
            }
            attached => Ok(attached),
        }
    }

    /// Takes the socket out of its runtime.
    pub(super) fn into_descriptor(self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::StdTcp(stream) => stream.into(),
            Self::StdUnix(stream) => stream.into(),
            Self::Tcp(stream) => stream.into_std()?.into(),
            Self::Unix(socket) => socket.into_descriptor(),
        })
    }

    /// Reads into `buffer`; 0 means that the client will send nothing more.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => {
                let mut buffer = ReadBuf::new(buffer);
                // After a short read, tokio knows that the socket is drained, and saves a call.
                ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
                Poll::Ready(Ok(buffer.filled().len()))
            }
            Self::Unix(socket) => socket.poll_read(cx, buffer),
            Self::StdTcp(_) | Self::StdUnix(_) => Poll::Ready(Err(detached())),
        }
    }

    /// Reads the available bytes without waiting; 0 if there are none, also at the end of the
    /// stream.
    pub(super) fn read_now(&mut self, buffer: &mut [u8]) -> usize {
        let Some(socket) = self.descriptor() else { return 0 };
        // An error shows again at the next regular read, which reports it.
        rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT).map_or(0, |(read, _)| read)
    }

    /// The socket, if it is attached to a runtime.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tcp(stream) => Some(stream.as_fd()),
            Self::Unix(socket) => Some(socket.as_fd()),
            Self::StdTcp(_) | Self::StdUnix(_) => None,
        }
    }

    /// Writes some of `slices`.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
        more: More,
    ) -> Poll<io::Result<usize>> {
        let mut flags = SendFlags::NOSIGNAL;
        if more == More::Follows {
            flags |= SendFlags::MORE;
        }
        self.poll_write_with(cx, |socket| {
            let mut ancillary = SendAncillaryBuffer::default();
            Ok(rustix::net::sendmsg(socket, slices, &mut ancillary, flags)?)
        })
    }

    /// Whether the client has closed the connection, so that nothing can be sent to it. False if it
    /// has only finished sending. Costs a system call.
    pub(super) fn has_hung_up(&self) -> bool {
        self.state(PollFlags::empty()).intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Whether there is something to read. Costs a system call.
    pub(super) fn has_input(&self) -> bool {
        self.state(PollFlags::IN).intersects(PollFlags::IN)
    }

    fn state(&self, asked: PollFlags) -> PollFlags {
        let Some(socket) = self.descriptor() else { return PollFlags::empty() };
        let mut asked = [PollFd::from_borrowed_fd(socket, asked)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = poll(&mut asked, Some(&now));
        polled.map_or(PollFlags::empty(), |_| asked[0].revents())
    }

    /// The bytes in transit. Costs a system call.
    pub(super) fn traffic(&self) -> Traffic {
        Traffic { untaken: self.descriptor().and_then(sys::untaken_len), ..Traffic::default() }
    }

    /// The address of the client.
    pub(super) fn client_address(&self) -> ClientAddress {
        let known = match self {
            Self::Tcp(stream) => stream.peer_addr().ok().map(ClientAddress::Tcp),
            Self::Unix(socket) => sys::peer_credentials(socket.as_fd()).map(|credentials| {
                let sys::PeerCredentials { process, user, group } = credentials;
                let groups = sys::peer_groups(socket.as_fd());
                ClientAddress::Unix { process, user, group, groups }
            }),
            _ => None,
        };
        known.unwrap_or(ClientAddress::Unknown)
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
        self.poll_write_with(cx, |socket| {
            let mut at = offset;
            Ok(rustix::fs::sendfile(socket, file, Some(&mut at), length)?)
        })
    }

    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let stream = match self {
            Self::Tcp(stream) => stream,
            Self::Unix(socket) => return socket.poll_write_with(cx, write),
            Self::StdTcp(_) | Self::StdUnix(_) => return Poll::Ready(Err(detached())),
        };
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match stream.try_io(Interest::WRITABLE, || write(stream.as_fd())) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

fn detached() -> io::Error {
    io::Error::other("the socket cannot do this; it may not be attached to a runtime")
}
