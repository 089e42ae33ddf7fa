//! Requests to a server through its control socket.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::protocol::{Failure, Request};
use crate::error::{JobError, JobErrorKind};
use crate::limited::{Deadline, Limited, connect_unix};
use crate::text::printable;

/// Longest reply, in bytes: enough for a list of very many exports and clients.
const MAX_REPLY_LEN: u64 = 64 << 20;

/// Bytes that are read of a reply at a time.
const REPLY_BUFFER_LEN: usize = 64 << 10;

/// Longest message of an error, in characters; the rest is not shown.
const MAX_MESSAGE_LEN: usize = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Result(Value),
    Error(Failure),
}

/// Sends a single request and waits for its result. Blocks, at most for twice `limit`, or without
/// an end if that is zero.
///
/// # Errors
///
/// If no server listens or answers in time, or the server's error for the request.
pub fn call(socket: &Path, request: &Request, limit: Duration) -> Result<Value, JobError> {
    Conversation::begin(socket, limit)?.call(request)
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct Conversation {
    path: PathBuf,
    stream: UnixStream,
    /// Time limit of each request. Zero for none.
    limit: Duration,
}

impl Conversation {
    /// Connects. Blocks. `limit` is the longest time for this, and for each request; zero for no
    /// limit.
    ///
    /// # Errors
    ///
    /// If no server listens, or it accepts no connection in time.
    pub fn begin(socket: &Path, limit: Duration) -> Result<Self, JobError> {
        let stream = connect_unix(socket, Deadline::after(limit)).map_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                return JobError::new(
                    JobErrorKind::ControlSocket,
                    format!(
                        "the server at the control socket '{}' has not accepted a connection for {} s: \
                         it hangs or is overloaded",
                        socket.display(),
                        limit.as_secs_f64()
                    ),
                );
            }
            let advice = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "; is a server running with --control?"
                }
                io::ErrorKind::PermissionDenied => "; only the server's own user may use it",
                _ => "",
            };
            JobError::new(
                JobErrorKind::ControlSocket,
                format!("cannot reach the control socket '{}': {error}{advice}", socket.display()),
            )
        })?;
        Ok(Self { path: socket.to_path_buf(), stream, limit })
    }

    /// Sets the time limit of each request from now on; zero for none.
    pub const fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Sends a request and waits for its result. Blocks.
    ///
    /// # Errors
    ///
    /// If the server is gone or does not answer in time, or the server's error for the request.
    /// After the first two the connection is closed, as no later reply could be told from this
    /// one's.
    pub fn call(&mut self, request: &Request) -> Result<Value, JobError> {
        // A reply is the last that the server sends before the next request.
        self.call_with_buffer(request, REPLY_BUFFER_LEN)
    }

    /// As [`call`](Self::call), for a reply that is followed by descriptors: nothing after it is
    /// read.
    #[cfg(feature = "server")]
    pub(crate) fn call_before_descriptors(&mut self, request: &Request) -> Result<Value, JobError> {
        // A larger buffer would take bytes, and lose their descriptors.
        self.call_with_buffer(request, 1)
    }

    #[cfg(feature = "server")]
    pub(crate) const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Returns the connection itself, whose calls have no time limit.
    ///
    /// # Errors
    ///
    /// Those of the system.
    #[cfg(feature = "server")]
    pub(crate) fn into_stream(self) -> io::Result<UnixStream> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;
        Ok(self.stream)
    }

    fn call_with_buffer(&mut self, request: &Request, length: usize) -> Result<Value, JobError> {
        let line = self.exchange(request, length).map_err(|error| {
            // If it is closed already, nothing is left to do.
            let _ = self.stream.shutdown(Shutdown::Both);
            let path = self.path.display();
            let message = match error.kind() {
                io::ErrorKind::TimedOut => format!(
                    "the server at the control socket '{path}' has not answered for {} s; it may hang, \
                     and it may still carry out the request",
                    self.limit.as_secs_f64()
                ),
                _ => format!("the control socket '{path}' failed: {error}"),
            };
            JobError::new(JobErrorKind::ControlSocket, message)
        })?;
        match serde_json::from_slice(&line) {
            Ok(Reply::Result(result)) => Ok(result),
            Ok(Reply::Error(failure)) => {
                let message: String = failure.message.chars().take(MAX_MESSAGE_LEN).collect();
                Err(JobError::new(JobErrorKind::ControlSocket, printable(&message)))
            }
            Err(_) => Err(JobError::new(
                JobErrorKind::ControlSocket,
                format!(
                    "'{}' is not the control socket of a server: its reply cannot be understood",
                    self.path.display()
                ),
            )),
        }
    }

    fn exchange(&mut self, request: &Request, length: usize) -> io::Result<Vec<u8>> {
        let deadline = Deadline::after(self.limit);
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // A server of another protocol may close the connection before it has read this.
        let sent = Limited::new(&mut self.stream, deadline).write_all(&line);
        let mut reply = Vec::new();
        let stream = Limited::new(&mut self.stream, deadline);
        let mut stream = BufReader::with_capacity(length, stream).take(MAX_REPLY_LEN);
        let read = stream.read_until(b'\n', &mut reply);
        if reply.starts_with(b"NBDMAGIC") {
            return Err(io::Error::other(
                "it is a socket for NBD clients; give the path of the server's --control",
            ));
        }
        sent.and(read)?;
        if reply.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it"));
        }
        Ok(reply)
    }
}
