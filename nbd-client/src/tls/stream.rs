//! A TLS session over a socket.
//!
//! One task reads and writes, and polls both: neither waits for the other, and the session needs no
//! lock.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use super::session::{RECORD_LEN, Session, Step};
use super::{Context, TlsError};
use crate::transport::Socket;

/// Amount of data encrypted before it is offered to the socket, in bytes: few system calls, and the
/// records are still in the processor's cache.
const BATCH_LEN: usize = 8 * RECORD_LEN;

/// Most bytes waiting for the socket. Data is accepted only when nothing waits, so only answers
/// that the server provokes accumulate here.
const MAX_UNSENT_LEN: usize = 4 * BATCH_LEN;

/// A socket with an established TLS session.
pub(crate) struct TlsStream {
    session: Session,
    socket: Socket,
    /// Small writes are collected here into a full record.
    record: Box<[u8]>,
    /// An error that occurred after data.
    failure: Option<io::Error>,
    has_received: bool,
    says_goodbye: bool,
}

impl Context {
    /// Performs the TLS handshake. The caller sets the deadline.
    pub(crate) async fn connect(&self, mut socket: Socket) -> Result<TlsStream, HandshakeFailure> {
        let mut session = self.session().map_err(HandshakeFailure::Tls)?;
        loop {
            let step = session.handshake();
            let written = socket.write_all(session.output()).await;
            session.sent(session.output().len());
            match step {
                // The server has closed, and may have sent the reason before.
                Ok(_) if written.is_err() => {}
                Ok(Step::Done(())) => break,
                Ok(Step::NeedsInput) => {}
                Err(error) => return Err(HandshakeFailure::Tls(error)),
            }
            match (socket.read(session.input()).await, written) {
                (Ok(length), Ok(())) => session.received(length),
                (Ok(length @ 1..), Err(_)) => session.received(length),
                (Err(error), _) | (Ok(_), Err(error)) => {
                    return Err(lost(&session, error));
                }
            }
        }
        let record = vec![0; RECORD_LEN].into();
        Ok(TlsStream {
            session,
            socket,
            record,
            failure: None,
            has_received: false,
            says_goodbye: false,
        })
    }
}

/// The reason for the failure of TLS.
pub(crate) enum HandshakeFailure {
    Tls(TlsError),
    Io(io::Error),
}

fn lost(session: &Session, error: io::Error) -> HandshakeFailure {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            HandshakeFailure::Tls(session.closed("during the TLS handshake"))
        }
        _ => HandshakeFailure::Io(error),
    }
}

impl TlsStream {
    /// Returns true if accepted data has not reached the socket: a flush sends it.
    pub(crate) fn has_unsent(&self) -> bool {
        self.session.has_output()
    }

    /// In TLS 1.3 a server checks the client's certificate after the client's handshake is
    /// complete, and some servers then close the connection without an alert. Describes the
    /// possible cause.
    pub(crate) fn why_closed(&self) -> Option<TlsError> {
        (!self.has_received).then(|| self.session.closed("right after the TLS handshake"))
    }

    /// Writes records to the socket until none are left.
    fn poll_send(&mut self, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        while self.session.has_output() {
            let socket = Pin::new(&mut self.socket);
            match ready!(socket.poll_write(cx, self.session.output()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                length => self.session.sent(length),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes as much as the socket accepts now; a flush sends the rest.
    fn try_send(&mut self, cx: &mut TaskContext<'_>) -> io::Result<()> {
        match self.poll_send(cx) {
            Poll::Ready(result) => result,
            Poll::Pending if self.session.output().len() > MAX_UNSENT_LEN => {
                let why = "the server keeps requesting new keys and does not read the answers";
                Err(io::Error::new(io::ErrorKind::InvalidData, why))
            }
            Poll::Pending => Ok(()),
        }
    }

    /// Reads all available records from the socket.
    fn poll_receive(&mut self, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        let mut room = ReadBuf::new(self.session.input());
        ready!(Pin::new(&mut self.socket).poll_read(cx, &mut room))?;
        let length = room.filled().len();
        self.session.received(length);
        Poll::Ready(Ok(()))
    }

    /// Decrypts the received records until the buffer is full or more records are needed.
    fn decrypt(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<Step<()>> {
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            let room = buf.initialize_unfilled_to(buf.remaining().min(RECORD_LEN));
            let has_data = |buf: &ReadBuf<'_>| buf.filled().len() > before;
            match self.session.read(room) {
                Ok(Step::Done(0)) => break,
                Ok(Step::Done(length)) => {
                    buf.advance(length);
                    self.has_received = true;
                }
                Ok(Step::NeedsInput) if has_data(buf) => break,
                Ok(Step::NeedsInput) => return Ok(Step::NeedsInput),
                Err(error) if has_data(buf) => {
                    self.failure = Some(error);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Step::Done(()))
    }

    /// Encrypts the start of the data, in full records where possible.
    fn encrypt(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        let mut gathered = 0;
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() && taken < BATCH_LEN {
                if gathered == 0 && rest.len() >= RECORD_LEN {
                    let written = self.session.write(rest)?;
                    rest = rest.get(written..).unwrap_or_default();
                    taken += written;
                    continue;
                }
                let room = self.record.get_mut(gathered..).unwrap_or_default();
                let length = io::Write::write(&mut { room }, rest)?;
                rest = rest.get(length..).unwrap_or_default();
                gathered += length;
                taken += length;
                if gathered == self.record.len() {
                    self.encrypt_gathered(gathered)?;
                    gathered = 0;
                }
            }
        }
        self.encrypt_gathered(gathered)?;
        Ok(taken)
    }

    fn encrypt_gathered(&mut self, length: usize) -> io::Result<()> {
        let mut rest = self.record.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let written = self.session.write(rest)?;
            rest = rest.get(written..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(error) = this.failure.take() {
            return Poll::Ready(Err(error));
        }
        while let Step::NeedsInput = this.decrypt(buf)? {
            ready!(this.poll_receive(cx))?;
        }
        // The server may have requested new keys; the session has to answer.
        if this.session.has_output() {
            this.try_send(cx)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Accepts data once all earlier data has reached the socket.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        let taken = this.encrypt(parts)?;
        this.try_send(cx)?;
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.says_goodbye {
            this.says_goodbye = true;
            this.session.shut_down();
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}
