//! The bytes of a connection, with or without TLS.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;

use crate::sys::set_low_water_mark;

/// Looks at what has come.
const PEEK: RecvFlags = RecvFlags::PEEK.union(RecvFlags::DONTWAIT);

/// Most bytes that are waited for at once. Each wake-up costs more than the copy of some KiB.
const MARK_MAX: usize = 256 << 10;

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(Plain),
    Tls(Box<SslStream<TcpStream>>),
}

/// A connection without TLS.
#[derive(Debug)]
pub(super) struct Plain {
    stream: TcpStream,
    /// So many bytes wake the reader.
    mark: usize,
    /// Whether each byte has to wake it, because they come slowly.
    is_slow: bool,
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self::Plain(Plain { stream, mark: 1, is_slow: false })
    }
}

impl Plain {
    fn set_mark(&mut self, bytes: usize) {
        let bytes = if self.is_slow { 1 } else { bytes.clamp(1, MARK_MAX) };
        let mark = i32::try_from(bytes).unwrap_or(1);
        if bytes != self.mark && set_low_water_mark(&self.stream, mark).is_ok() {
            self.mark = bytes;
        }
    }
}

impl Stream {
    /// Reads some bytes; none at the end of the stream. If there are none yet, the caller is woken
    /// when there are `awaited`, which the server has promised, or a little earlier.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut [u8],
        awaited: usize,
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(buffer);
        let read = match self {
            Self::Plain(plain) => {
                let read = Pin::new(&mut plain.stream).poll_read(context, &mut buffer);
                if read.is_pending() {
                    plain.set_mark(awaited);
                }
                read
            }
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(context, &mut buffer),
        };
        ready!(read)?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Begins with the next reply.
    pub(super) fn begin(&mut self) {
        if let Self::Plain(plain) = self {
            plain.is_slow = false;
        }
    }

    /// Returns whether some bytes have come that did not wake the reader. From now on each does.
    pub(super) fn has_few(&mut self) -> bool {
        let Self::Plain(plain) = self else { return false };
        let is_slow = plain.mark > 1 && recv(&plain.stream, &mut [0; 1][..], PEEK).is_ok();
        plain.is_slow |= is_slow;
        plain.set_mark(plain.mark);
        is_slow
    }

    /// Writes some bytes.
    pub(super) fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(plain) => Pin::new(&mut plain.stream).poll_write(context, data),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(context, data),
        }
    }

    /// Whether neither an end nor bytes have come since the last reply.
    pub(super) fn is_quiet(&mut self) -> bool {
        let socket = match self {
            Self::Plain(plain) => &plain.stream,
            Self::Tls(stream) => stream.get_ref(),
        };
        match (recv(socket, &mut [0; 1][..], PEEK), self) {
            (Err(Errno::AGAIN), _) => true,
            // It may be a ticket for the next session.
            (Ok((1.., _)), Self::Tls(stream)) => {
                let mut context = Context::from_waker(std::task::Waker::noop());
                let mut byte = [0; 1];
                let mut buffer = ReadBuf::new(&mut byte);
                Pin::new(stream.as_mut()).poll_read(&mut context, &mut buffer).is_pending()
            }
            _ => false,
        }
    }
}
