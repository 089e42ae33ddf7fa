//! Blocking sockets with a time limit for a whole exchange, however the other side divides it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The end of a time limit. Zero stands for no limit where it begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// The limit begins now.
    pub(crate) fn after(limit: Duration) -> Self {
        // A limit beyond what the clock can represent is none.
        Self((!limit.is_zero()).then(|| Instant::now().checked_add(limit)).flatten())
    }

    /// Returns the time left, `None` without a limit.
    ///
    /// # Errors
    ///
    /// `TimedOut` if none is left.
    pub(crate) fn left(self) -> io::Result<Option<Duration>> {
        let Some(end) = self.0 else { return Ok(None) };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// A socket whose calls can have a time limit each.
pub(crate) trait Socket: Read + Write {
    /// Sets the limit of every call from now on.
    fn set_limit(&self, limit: Option<Duration>) -> io::Result<()>;
}

impl Socket for UnixStream {
    fn set_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

impl Socket for TcpStream {
    fn set_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

/// A socket that fails with `TimedOut` once the deadline has passed.
#[derive(Debug)]
pub(crate) struct Limited<'a, S> {
    socket: &'a mut S,
    deadline: Deadline,
}

impl<'a, S: Socket> Limited<'a, S> {
    pub(crate) const fn new(socket: &'a mut S, deadline: Deadline) -> Self {
        Self { socket, deadline }
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut S) -> io::Result<T>) -> io::Result<T> {
        self.socket.set_limit(self.deadline.left()?)?;
        call(self.socket).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }
}

impl<S: Socket> Read for Limited<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.call(|socket| socket.read(buffer))
    }
}

impl<S: Socket> Write for Limited<'_, S> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.call(|socket| socket.write(data))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call(Write::flush)
    }
}

/// Connects to a unix socket. A server whose backlog is full, because it accepts no client, is
/// waited for until the deadline.
///
/// # Errors
///
/// `TimedOut` after the deadline; those of the system.
pub(crate) fn connect_unix(path: &Path, deadline: Deadline) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    loop {
        set_socket_timeout(&socket, Timeout::Send, deadline.left()?)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::net::listen;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    #[test]
    fn a_server_that_accepts_no_client_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("full");
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, 0).unwrap();
        let mut waiting = Vec::new();
        let error = loop {
            match connect_unix(&path, Deadline::after(LIMIT)) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100, "the backlog is never full");
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn bytes_that_come_slowly_do_not_prolong_the_limit() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let drips = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(LIMIT / 20);
            }
        });
        let mut received = Vec::new();
        let limited = &mut Limited::new(&mut ours, Deadline::after(LIMIT));
        let error = limited.read_to_end(&mut received).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(ours);
        drips.join().unwrap();
    }

    #[test]
    fn zero_is_no_limit() {
        assert!(Deadline::after(Duration::ZERO).left().unwrap().is_none());
        assert!(Deadline::after(Duration::MAX).left().unwrap().is_none());
    }
}
