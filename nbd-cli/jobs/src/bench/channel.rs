//! The byte stream of a connection: a blocking socket, or a TLS stream.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use nbd_client::{NegotiatedStream, PlainSocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, send, sendmsg};
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};
use tokio::runtime::Handle;

/// Longest wait of a receive. A worker checks after it whether it has to stop.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

/// Parts that one system call sends.
const MAX_PARTS: usize = 64;

/// Payloads of at least this length are sent without a copy.
const MIN_SHARED_LEN: usize = 32 * 1024;

/// Sent bytes are removed from `own` when there are this many, and more than unsent ones.
const MIN_FORGOTTEN_LEN: usize = 64 * 1024;

/// Bytes to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    own: Vec<u8>,
    /// Number of bytes at the start of `own` that were sent.
    own_sent: usize,
    /// The unsent parts.
    parts: VecDeque<QueuedBytes>,
    /// Random bytes: the data of writes that are not verified.
    pool: Arc<[u8]>,
}

#[derive(Clone, Debug)]
enum QueuedBytes {
    /// This number of bytes of `own`, after those of the parts before.
    Own(usize),
    Pool(Range<usize>),
}

impl Outgoing {
    pub(super) fn new(pool: Arc<[u8]>) -> Self {
        Self { own: Vec::new(), own_sent: 0, parts: VecDeque::new(), pool }
    }

    /// Returns whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Discards the unsent parts: the connection is lost.
    pub(super) fn clear(&mut self) {
        self.own.clear();
        self.own_sent = 0;
        self.parts.clear();
    }

    /// Appends bytes.
    pub(super) fn append<R>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        let start = self.own.len();
        let result = write(&mut self.own);
        let added = self.own.len() - start;
        match self.parts.back_mut() {
            Some(QueuedBytes::Own(length)) => *length += added,
            _ if added == 0 => {}
            _ => self.parts.push_back(QueuedBytes::Own(added)),
        }
        result
    }

    /// Appends `length` random bytes; `at` chooses which.
    pub(super) fn append_random(&mut self, at: u64, length: usize) {
        let choices = self.pool.len().saturating_sub(length).max(1);
        let start = (at % choices as u64) as usize;
        let range = start..start.saturating_add(length).min(self.pool.len());
        if length >= MIN_SHARED_LEN {
            self.parts.push_back(QueuedBytes::Pool(range));
        } else {
            let pool = Arc::clone(&self.pool);
            self.append(|own| own.extend_from_slice(pool.get(range).unwrap_or_default()));
        }
    }

    fn slices(&self) -> impl Iterator<Item = IoSlice<'_>> {
        let mut own = self.own.get(self.own_sent..).unwrap_or_default();
        self.parts.iter().take(MAX_PARTS).map(move |part| {
            IoSlice::new(match part {
                QueuedBytes::Own(length) => own.split_off(..*length).unwrap_or_default(),
                QueuedBytes::Pool(range) => self.pool.get(range.clone()).unwrap_or_default(),
            })
        })
    }

    fn sent(&mut self, mut length: usize) {
        while let Some(part) = self.parts.front_mut() {
            let left = match part {
                QueuedBytes::Own(left) => *left,
                QueuedBytes::Pool(range) => range.len(),
            };
            let taken = left.min(length);
            match part {
                QueuedBytes::Own(left) => {
                    *left -= taken;
                    self.own_sent += taken;
                }
                QueuedBytes::Pool(range) => range.start += taken,
            }
            if taken < left {
                break;
            }
            length -= taken;
            self.parts.pop_front();
        }
        if self.parts.is_empty() {
            self.clear();
        } else if self.own_sent >= MIN_FORGOTTEN_LEN && self.own_sent > self.own.len() / 2 {
            self.own.drain(..self.own_sent);
            self.own_sent = 0;
        }
    }
}

/// A connection after the handshake.
pub(super) enum Channel {
    Socket(OwnedFd),
    Stream { stream: Box<NegotiatedStream>, runtime: Handle },
}

impl Channel {
    /// Takes the socket out, if there is no TLS on it.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub(super) fn new(stream: NegotiatedStream, runtime: &Handle) -> io::Result<Self> {
        let socket = match stream.into_socket()? {
            Ok(PlainSocket::Unix(socket)) => OwnedFd::from(socket),
            Ok(PlainSocket::Tcp(socket)) => socket.into(),
            Err(stream) => {
                return Ok(Self::Stream { stream: Box::new(stream), runtime: runtime.clone() });
            }
        };
        Ok(Self::Socket(socket))
    }

    /// The socket, if there is no TLS on it.
    pub(super) const fn socket(&self) -> Option<&OwnedFd> {
        match self {
            Self::Socket(socket) => Some(socket),
            Self::Stream { .. } => None,
        }
    }

    /// Sends as much as the connection accepts, and waits for bytes for this time.
    /// Returns the number of received bytes.
    ///
    /// # Errors
    ///
    /// If the connection is lost.
    pub(super) fn exchange(
        &mut self,
        out: &mut Outgoing,
        buffer: &mut [u8],
        wait: Duration,
    ) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => {
                send_some(socket, out)?;
                wait_for(&mut [interest(socket, out)], wait)?;
                self.receive(buffer)
            }
            Self::Stream { stream, runtime } => runtime.block_on(async {
                let exchanged = exchange_stream(stream, out, buffer);
                tokio::time::timeout(wait, exchanged).await.unwrap_or(Ok(0))
            }),
        }
    }

    /// Sends as much as a socket accepts without waiting.
    ///
    /// # Errors
    ///
    /// If the connection is lost.
    pub(super) fn send(&mut self, out: &mut Outgoing) -> io::Result<()> {
        self.socket().map_or(Ok(()), |socket| send_some(socket, out))
    }

    /// Receives what a socket has, without waiting. Returns the number of bytes.
    ///
    /// # Errors
    ///
    /// If the connection is lost.
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(socket) = self.socket() else { return Ok(0) };
        match recv(socket, buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(closed()),
            Ok((_, length)) => Ok(length),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

/// The time until `due`, at most [`PATIENCE`].
pub(super) fn patience(due: Option<Instant>) -> Duration {
    due.map_or(PATIENCE, |due| due.saturating_duration_since(Instant::now()).min(PATIENCE))
}

/// What to wait for on a socket: replies, and room for what is not sent.
pub(super) fn interest<'a>(socket: &'a OwnedFd, out: &Outgoing) -> PollFd<'a> {
    let room = if out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
    PollFd::new(socket, PollFlags::IN | room)
}

/// Waits for one of the sockets.
///
/// Not in `recv`: on a unix socket, that is woken too when the server takes a request from it.
pub(super) fn wait_for(sockets: &mut [PollFd<'_>], wait: Duration) -> io::Result<()> {
    let wait = Timespec { tv_sec: 0, tv_nsec: wait.as_nanos().min(999_999_999) as _ };
    match poll(sockets, Some(&wait)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Sends as much as the socket accepts without waiting.
fn send_some(socket: &OwnedFd, out: &mut Outgoing) -> io::Result<()> {
    const FLAGS: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
    while !out.is_empty() {
        let sent = if out.parts.len() == 1 {
            let front = out.slices().next();
            send(socket, front.as_deref().unwrap_or_default(), FLAGS)
        } else {
            let slices: Vec<_> = out.slices().collect();
            sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), FLAGS)
        };
        match sent {
            Ok(length) => out.sent(length),
            Err(rustix::io::Errno::AGAIN) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

async fn exchange_stream(
    stream: &mut NegotiatedStream,
    out: &mut Outgoing,
    buffer: &mut [u8],
) -> io::Result<usize> {
    poll_fn(|cx| {
        while !out.is_empty() {
            let slices: Vec<_> = out.slices().collect();
            match Pin::new(&mut *stream).poll_write_vectored(cx, &slices)? {
                Poll::Ready(length) => out.sent(length),
                Poll::Pending => break,
            }
        }
        if out.is_empty() {
            // Pending: the stream goes on when it is polled again.
            let _ = Pin::new(&mut *stream).poll_flush(cx)?;
        }
        let mut room = ReadBuf::new(buffer);
        match Pin::new(&mut *stream).poll_read(cx, &mut room)? {
            Poll::Ready(()) if room.filled().is_empty() => Poll::Ready(Err(closed())),
            Poll::Ready(()) => Poll::Ready(Ok(room.filled().len())),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(out: &Outgoing) -> Vec<u8> {
        out.slices().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn parts_leave_in_order_however_they_are_cut() {
        let pool: Arc<[u8]> = (0..=255).cycle().take(MIN_SHARED_LEN + 100).collect();
        for step in [997, 4096, usize::MAX] {
            let mut out = Outgoing::new(Arc::clone(&pool));
            out.append(|own| own.extend([1, 2, 3]));
            out.append_random(7, MIN_SHARED_LEN);
            out.append(|own| own.extend([4, 5]));
            out.append_random(5, 10);
            let whole = [&[1, 2, 3], &pool[7..][..MIN_SHARED_LEN], &[4, 5], &pool[5..15]].concat();
            assert_eq!(taken(&out), whole);
            let mut sent = 0;
            while !out.is_empty() {
                let length = step.min(whole.len() - sent);
                out.sent(length);
                sent += length;
                assert_eq!(taken(&out), &whole[sent..]);
            }
            assert_eq!(sent, whole.len());
        }
    }

    #[test]
    fn memory_of_what_is_sent_is_used_again_while_there_is_always_more_to_send() {
        let mut out = Outgoing::new((0..=255).cycle().take(MIN_SHARED_LEN).collect());
        out.append(|own| own.extend([0; 1000]));
        for number in 1..20_000_u32 {
            out.append(|own| own.extend([number as u8; 1000]));
            out.append_random(u64::from(number), MIN_SHARED_LEN);
            out.sent(1000 + MIN_SHARED_LEN);
            assert!(!out.is_empty());
        }
        let kept = out.own.capacity() + out.parts.len() * size_of::<QueuedBytes>();
        assert!(kept < 1 << 20, "{kept} bytes");
    }
}
