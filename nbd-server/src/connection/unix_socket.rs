//! A unix socket of the runtime.
//!
//! Whenever the other end takes bytes, the kernel reports that there is space for more, also if
//! nobody waits for it, and a thread that asks for this report is woken for nothing. So only
//! readable bytes are reported at first, and space for a while after the socket was full.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::task::{Context, Poll, ready};

use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys::watch;

/// A unix socket that does not block, attached to a runtime.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    stream: AsyncFd<OwnedFd>,
    /// The socket again, while it takes no more bytes.
    full: Option<AsyncFd<OwnedFd>>,
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
        loop {
            let space = match &self.full {
                Some(full) => Some(ready!(full.poll_write_ready(cx))?),
                None => None,
            };
            match (write(self.stream.as_fd()), space) {
                (Err(error), Some(mut space)) if error.kind() == io::ErrorKind::WouldBlock => {
                    space.clear_ready();
                }
                (Err(error), None) if error.kind() == io::ErrorKind::WouldBlock => {
                    let again = self.stream.get_ref().as_fd().try_clone_to_owned()?;
                    self.full = Some(watch(again, Interest::WRITABLE)?);
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
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::*;

    struct Wakeups(AtomicUsize);

    impl Wake for Wakeups {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
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

    /// Lets the runtime take what the kernel reports.
    async fn reports() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_reader_is_not_woken_when_the_client_takes_replies() {
        let (mut socket, mut client) = pair();
        let wakeups = Arc::new(Wakeups(AtomicUsize::new(0)));
        let waker = Waker::from(wakeups.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(socket.poll_read(&mut cx, &mut [0; 10]).is_pending());
        assert!(matches!(send(&mut socket, &mut cx, b"reply"), Poll::Ready(Ok(5))));
        client.read_exact(&mut [0; 5]).unwrap();
        reports().await;
        assert_eq!(wakeups.0.load(Ordering::Relaxed), 0);
        client.write_all(b"request").unwrap();
        let mut buffer = [0; 10];
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
