//! One client's stream under TLS: the ciphertext of many records is transferred at a time.
//!
//! The TLS library never accesses the socket. It reads ciphertext from one buffer in memory and
//! writes it to another, so that neither direction waits for the other, and a system call transfers
//! all available bytes.

use std::future::poll_fn;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll, ready};

use openssl::ssl::{ErrorCode, ShutdownState, SslStream};

use super::error::TlsFailure;
use super::plain::{More, PlainSocket, Traffic};
use super::receive::ReceiveBuffer;
use crate::queue::GroupId;
use crate::scheduler::Scheduler;
use crate::tls::{Notes, PeerIdentity, TlsCredentials, TlsError, explain_handshake};

/// Payload of a full record, in bytes.
const RECORD_LEN: usize = 16 * 1024;
/// Ciphertext that is read in search of plaintext before others get their turn, in bytes: any
/// record fits.
const QUOTA: usize = RECORD_LEN + 1024;
/// Bytes of a file read at a time.
const SCRATCH_LEN: usize = 4 * RECORD_LEN;
/// Amount of ciphertext that is collected before it is sent, in bytes.
const GATHERED_LEN: usize = 256 * 1024;
/// Maximum of unsent ciphertext, in bytes: reading makes the library write little (alerts, answers
/// to new keys), and a peer that causes more is treated as hostile.
const MAX_UNSENT_LEN: usize = 2 * GATHERED_LEN;
/// The handshakes of all clients share one place in the scheduler's queue. No export has this name.
const HANDSHAKES: GroupId = 0;
/// The expected time of a step of a handshake, in nanoseconds.
const HANDSHAKE_TIME: u64 = 1_000_000;

/// A socket under TLS.
#[derive(Debug)]
pub(crate) struct TlsSocket {
    socket: PlainSocket,
    session: SslStream<Wire>,
    /// A buffer for bytes between a file and the library.
    scratch: Vec<u8>,
    /// Received bytes without plaintext: messages of TLS itself, which cost the client little.
    barren: usize,
}

/// Ciphertext, between the socket and the library.
#[derive(Debug)]
struct Wire {
    received: ReceiveBuffer,
    unsent: Vec<u8>,
    /// Bytes at the front of `unsent` that have been sent.
    sent: usize,
    has_ended: bool,
    /// The number of bytes that the library may read before others get their turn.
    quota: usize,
}

impl Wire {
    fn unsent(&self) -> &[u8] {
        &self.unsent[self.sent..]
    }

    fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.unsent.len() {
            self.unsent.clear();
            self.sent = 0;
        }
    }

    /// Receives ciphertext. At the end of the stream `has_ended` is set.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut PlainSocket,
    ) -> Poll<io::Result<()>> {
        let received = ready!(socket.poll_read(cx, self.received.space()))?;
        self.received.received(received);
        self.has_ended |= received == 0;
        Poll::Ready(Ok(()))
    }

    /// Sends all ciphertext.
    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut PlainSocket,
    ) -> Poll<io::Result<()>> {
        while !self.unsent().is_empty() {
            let slices = [IoSlice::new(self.unsent())];
            let sent = ready!(socket.poll_send(cx, &slices, More::No))?;
            self.sent(sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let filled = self.received.filled();
        if self.quota == 0 || filled.is_empty() && !self.has_ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = filled.len().min(buffer.len()).min(self.quota);
        self.quota -= count;
        buffer[..count].copy_from_slice(&filled[..count]);
        self.received.consume(count);
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.unsent().len() + buffer.len() > MAX_UNSENT_LEN {
            return Err(io::Error::other("the client does not receive the messages of TLS"));
        }
        self.unsent.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Carries out the TLS handshake on a socket on which STARTTLS was just acknowledged. The
/// computations take a millisecond or more, so the scheduler does them, for one client after the
/// other.
pub(super) async fn accept(
    mut socket: PlainSocket,
    credentials: &TlsCredentials,
    scheduler: &Scheduler,
) -> Result<(TlsSocket, PeerIdentity), TlsFailure> {
    let received = ReceiveBuffer::new(&[]);
    let wire = Wire { received, unsent: Vec::new(), sent: 0, has_ended: false, quota: usize::MAX };
    let mut session =
        SslStream::new(credentials.new_session()?, wire).map_err(TlsError::Library)?;
    loop {
        poll_fn(|cx| session.get_mut().poll_receive(cx, &mut socket)).await?;
        let step = move || {
            let result = session.accept();
            (session, result)
        };
        let done = scheduler.compute(HANDSHAKES, HANDSHAKE_TIME, step).await;
        let Some((back, result)) = done else {
            return Err(TlsFailure::Handshake("the server failed".to_owned()));
        };
        session = back;
        let flushed = poll_fn(|cx| session.get_mut().poll_flush(cx, &mut socket)).await;
        match result {
            Ok(()) => {
                flushed?;
                let identity =
                    Notes::of(session.ssl()).map_or(PeerIdentity::Anonymous, Notes::identity);
                return Ok((
                    TlsSocket { socket, session, scratch: Vec::new(), barren: 0 },
                    identity,
                ));
            }
            Err(error) if error.code() == ErrorCode::WANT_READ => flushed?,
            Err(_) if session.get_ref().has_ended => return Err(TlsFailure::Closed),
            // The alert was sent, if the client received it.
            Err(error) => {
                let notes = Notes::of(session.ssl());
                return Err(TlsFailure::Handshake(explain_handshake(&error, notes)));
            }
        }
    }
}

impl TlsSocket {
    /// Version and cipher, for the log.
    pub(super) fn describe(&self) -> String {
        let ssl = self.session.ssl();
        let cipher = ssl.current_cipher().map_or("no cipher", |cipher| cipher.name());
        format!("{} {cipher}", ssl.version_str())
    }

    /// Reads plaintext; as [`PlainSocket::poll_read`]. It is also pending if much was read without
    /// plaintext: the task is then woken to continue, and can query [how much it
    /// was](Self::take_barren).
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.session.get_mut().quota = QUOTA;
        loop {
            let read = self.decrypt(buffer)?;
            if read == 0 && self.session.get_ref().quota == 0 {
                self.barren += QUOTA;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if read > 0 || self.session.get_ref().has_ended || self.is_shut() {
                return Poll::Ready(Ok(read));
            }
            ready!(self.session.get_mut().poll_receive(cx, &mut self.socket))?;
        }
    }

    /// Bytes without plaintext that were received since the last call.
    pub(super) const fn take_barren(&mut self) -> usize {
        std::mem::replace(&mut self.barren, 0)
    }

    /// Reads the available bytes; as [`PlainSocket::read_now`].
    pub(super) fn read_now(&mut self, buffer: &mut [u8]) -> usize {
        let wire = self.session.get_mut();
        let received = self.socket.read_now(wire.received.space());
        wire.received.received(received);
        wire.quota = QUOTA;
        // An error shows again at the next regular read, which reports it.
        self.decrypt(buffer).unwrap_or(0)
    }

    /// Encrypts some of `slices`; as with [`PlainSocket::poll_send`], accepted bytes count as sent.
    /// [`TlsSocket::poll_flush`] sends them.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.session.get_ref().unsent().len() >= GATHERED_LEN {
            ready!(self.poll_flush(cx))?;
        }
        let mut taken = 0;
        for chunk in slices.iter().flat_map(|slice| slice.chunks(RECORD_LEN)) {
            taken += self.session.ssl_write(chunk).map_err(into_io)?;
            if self.session.get_ref().unsent().len() >= GATHERED_LEN {
                break;
            }
        }
        Poll::Ready(Ok(taken))
    }

    /// Encrypts some bytes of a file from the page cache, in pieces that fit into the processor's
    /// cache; as [`PlainSocket::poll_send_file`].
    pub(super) fn poll_send_file(
        &mut self,
        cx: &mut Context<'_>,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        if self.session.get_ref().unsent().len() >= GATHERED_LEN {
            ready!(self.poll_flush(cx))?;
        }
        self.scratch.resize(SCRATCH_LEN, 0);
        let mut taken = 0;
        while taken < length && self.session.get_ref().unsent().len() < GATHERED_LEN {
            let space = &mut self.scratch[..SCRATCH_LEN.min(length - taken)];
            let read = match rustix::io::pread(file, space, offset + taken as u64) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            if read == 0 {
                break;
            }
            for chunk in self.scratch[..read].chunks(RECORD_LEN) {
                taken += self.session.ssl_write(chunk).map_err(into_io)?;
            }
        }
        Poll::Ready(Ok(taken))
    }

    /// Sends all ciphertext.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session.get_mut().poll_flush(cx, &mut self.socket)
    }

    /// Whether there is unsent ciphertext.
    pub(super) fn has_unsent(&self) -> bool {
        !self.session.get_ref().unsent().is_empty()
    }

    /// As [`PlainSocket::has_hung_up`].
    pub(super) fn has_hung_up(&self) -> bool {
        self.socket.has_hung_up()
    }

    /// As [`PlainSocket::has_input`].
    pub(super) fn has_input(&self) -> bool {
        self.socket.has_input()
    }

    /// The bytes in transit below the plaintext; as [`PlainSocket::traffic`].
    pub(super) fn traffic(&self) -> Traffic {
        let wire = self.session.get_ref();
        let (received, unsent) = (wire.received.total(), wire.unsent().len());
        Traffic { received, unsent, ..self.socket.traffic() }
    }

    /// Prepares the closing alert, which distinguishes the end of the stream from a cut connection.
    pub(super) fn begin_shutdown(&mut self) {
        // A client that has left does not need it.
        let _ = self.session.shutdown();
    }

    fn is_shut(&mut self) -> bool {
        self.session.get_shutdown().contains(ShutdownState::RECEIVED)
    }

    /// Decrypts received bytes, as far as `buffer` has space.
    fn decrypt(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.session.ssl_read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => {
                    filled += count;
                    self.session.get_mut().quota = QUOTA;
                }
                Err(error) => match error.code() {
                    ErrorCode::WANT_READ | ErrorCode::ZERO_RETURN => break,
                    _ if self.session.get_ref().has_ended => break,
                    // The bytes before it are valid; the error shows again.
                    _ if filled > 0 => break,
                    _ => return Err(into_io(error)),
                },
            }
        }
        Ok(filled)
    }
}

fn into_io(error: openssl::ssl::Error) -> io::Error {
    error.into_io_error().unwrap_or_else(|error| io::Error::other(format!("TLS: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_gets_no_more_than_its_quota_at_a_time() {
        let received = ReceiveBuffer::new(&[7; 100]);
        let mut wire = Wire { received, unsent: Vec::new(), sent: 0, has_ended: true, quota: 60 };
        let mut buffer = [0; 50];
        assert_eq!(wire.read(&mut buffer).unwrap(), 50);
        assert_eq!(wire.read(&mut buffer).unwrap(), 10);
        let error = wire.read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        wire.quota = 60;
        assert_eq!(wire.read(&mut buffer).unwrap(), 40);
        assert_eq!(wire.read(&mut buffer).unwrap(), 0, "the end");
    }
}
