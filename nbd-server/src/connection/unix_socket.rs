//! A unix socket of the runtime.
//!
//! Whenever the other end takes bytes, the kernel reports that there is space for more, also if
//! nobody waits for it, and a thread that asks for this report is woken for nothing. So only
//! readable bytes are reported at first, and space for a while after the socket was full. This
//! takes a second descriptor; a client that has replies to receive is not given up without one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Sleep, sleep};

use crate::sys::watch;

/// Time after which a full socket is tried again if space in it cannot be reported.
const RETRY: Duration = Duration::from_millis(20);

/// A unix socket that does not block, attached to a runtime.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    stream: AsyncFd<OwnedFd>,
    /// What wakes a writer, while the socket takes no more bytes.
    full: Option<Space>,
}

/// What tells of space in a full socket.
#[derive(Debug)]
enum Space {
    /// The socket again, whose reports are of space.
    Reported(AsyncFd<OwnedFd>),
    /// A timer: the process has as many descriptors as it may.
    Tried(Pin<Box<Sleep>>),
}

impl Space {
    /// `again` makes a second descriptor of the socket.
    fn new(again: impl FnOnce() -> io::Result<OwnedFd>) -> Self {
        match again().and_then(|again| watch(again, Interest::WRITABLE)) {
            Ok(again) => Self::Reported(again),
            Err(_) => Self::Tried(Box::pin(sleep(RETRY))),
        }
    }
}

impl UnixSocket {
    /// Attaches the socket to the runtime on which this is called.
    pub(super) fn attach(stream: UnixStream) -> io::Result<Self> {
        Ok(Self { stream: watch(stream.into(), Interest::READABLE)?, full: None })
    }

    /// Takes the socket out of its runtime.
    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.stream.into_inner()
    }

    /// Reads into `buffer`; 0 means that the client will send nothing more.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.stream.poll_read_ready(cx))?;
            match rustix::net::recv(&self.stream, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((read, _)) => {
                    // A short read has drained the socket: the next one needs no call to learn it.
                    if read > 0 && read < buffer.len() {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(read));
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Writes by `write`, which is called until it has written something or the socket is full.
    pub(super) fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        self.poll_write_or_wait(cx, &mut write, |socket| socket.try_clone_to_owned())
    }

    fn poll_write_or_wait(
        &mut self,
        cx: &mut Context<'_>,
        write: &mut dyn FnMut(BorrowedFd<'_>) -> io::Result<usize>,
        again: fn(BorrowedFd<'_>) -> io::Result<OwnedFd>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let space = match &mut self.full {
                Some(Space::Reported(full)) => Some(ready!(full.poll_write_ready(cx))?),
                Some(Space::Tried(timer)) => {
                    ready!(timer.as_mut().poll(cx));
                    None
                }
                None => None,
            };
            match (write(self.stream.as_fd()), space) {
                (Err(error), Some(mut space)) if error.kind() == io::ErrorKind::WouldBlock => {
                    space.clear_ready();
                }
                (Err(error), None) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.full = Some(Space::new(|| again(self.stream.as_fd())));
                }
                (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
                (result, _) => {
                    self.full = None;
                    return Poll::Ready(result);
                }
            }
        }
    }
}

impl AsFd for UnixSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsRawFd as _;
    use std::pin::pin;
    use std::task::Waker;

    use rustix::event::epoll::EventFlags;

    use super::*;

    /// The reports that the runtime has asked the kernel for.
    fn asked_for(socket: BorrowedFd<'_>) -> EventFlags {
        let number = socket.as_raw_fd().to_string();
        let mut flags = EventFlags::empty();
        for descriptor in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
            // Other tests may have closed it.
            let text = std::fs::read_to_string(descriptor.unwrap().path()).unwrap_or_default();
            for line in text.lines() {
                let words: Vec<_> = line.split_whitespace().collect();
                if let ["tfd:", watched, "events:", events, ..] = words[..]
                    && watched == number
                {
                    flags |= EventFlags::from_bits_retain(u32::from_str_radix(events, 16).unwrap());
                }
            }
        }
        flags
    }

    fn pair() -> (UnixSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (UnixSocket::attach(ours).unwrap(), theirs)
    }

    fn send(
        socket: &mut UnixSocket,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        socket.poll_write_with(cx, |socket| Ok(rustix::io::write(socket, bytes)?))
    }

    #[tokio::test]
    async fn reports_of_space_are_asked_for_only_while_the_socket_is_full() {
        let (mut socket, mut client) = pair();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(send(&mut socket, &mut cx, b"reply"), Poll::Ready(Ok(5))));
        let asked = asked_for(socket.as_fd());
        assert!(asked.contains(EventFlags::IN) && !asked.contains(EventFlags::OUT), "{asked:?}");
        while send(&mut socket, &mut cx, &[7; 4096]).is_ready() {}
        let Some(Space::Reported(full)) = &socket.full else { panic!("it is full") };
        let full = full.as_fd();
        assert!(asked_for(full).contains(EventFlags::OUT));
        assert!(!asked_for(socket.as_fd()).contains(EventFlags::OUT));
        client.set_nonblocking(true).unwrap();
        while client.read(&mut [0; 65536]).is_ok() {}
        poll_fn(|cx| send(&mut socket, cx, b"more")).await.unwrap();
        assert!(socket.full.is_none());
    }

    #[tokio::test]
    async fn bytes_and_the_end_of_a_client_are_received() {
        let (socket, mut client) = pair();
        let mut buffer = [0; 10];
        let mut cx = Context::from_waker(Waker::noop());
        assert!(socket.poll_read(&mut cx, &mut buffer).is_pending());
        client.write_all(b"request").unwrap();
        let read = poll_fn(|cx| socket.poll_read(cx, &mut buffer)).await.unwrap();
        assert_eq!(&buffer[..read], b"request");
        drop(client);
        assert_eq!(poll_fn(|cx| socket.poll_read(cx, &mut buffer)).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_writer_to_a_full_socket_is_woken_when_there_is_space() {
        let (mut socket, mut client) = pair();
        for _ in 0..3 {
            let mut written = 0;
            let mut cx = Context::from_waker(Waker::noop());
            while let Poll::Ready(sent) = send(&mut socket, &mut cx, &[7; 4096]) {
                written += sent.unwrap();
            }
            let reader = std::thread::spawn(move || {
                client.read_exact(&mut vec![0; written]).unwrap();
                client
            });
            let sent = poll_fn(|cx| send(&mut socket, cx, b"x"));
            assert_eq!(pin!(sent).await.unwrap(), 1);
            client = reader.join().unwrap();
            client.read_exact(&mut [0]).unwrap();
            assert!(socket.full.is_none());
        }
    }

    #[tokio::test]
    async fn a_writer_to_a_full_socket_needs_no_further_descriptor() {
        let (mut socket, mut client) = pair();
        let mut send = |cx: &mut Context<'_>| {
            let mut write = |socket: BorrowedFd<'_>| Ok(rustix::io::write(socket, &[7; 4096])?);
            socket.poll_write_or_wait(cx, &mut write, |_| Err(rustix::io::Errno::MFILE.into()))
        };
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(sent) = send(&mut cx) {
            sent.unwrap();
        }
        client.set_nonblocking(true).unwrap();
        while client.read(&mut [0; 65536]).is_ok() {}
        assert_eq!(poll_fn(send).await.unwrap(), 4096);
        assert!(socket.full.is_none());
    }

    #[tokio::test]
    async fn a_writer_to_a_full_socket_is_woken_when_the_client_leaves() {
        let (mut socket, client) = pair();
        let mut cx = Context::from_waker(Waker::noop());
        while send(&mut socket, &mut cx, &[7; 4096]).is_ready() {}
        drop(client);
        let sent = poll_fn(|cx| {
            socket.poll_write_with(cx, |socket| {
                Ok(rustix::net::send(socket, b"x", rustix::net::SendFlags::NOSIGNAL)?)
            })
        });
        assert_eq!(sent.await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
