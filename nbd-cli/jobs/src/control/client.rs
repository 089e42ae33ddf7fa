//! Requests to a server through its control socket.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::protocol::{Failure, Request};
use crate::text::printable;
use crate::{JobError, JobErrorKind};

/// Longest reply, in bytes: enough for a list of very many exports and clients.
const MAX_REPLY_LEN: u64 = 64 << 20;

/// Longest message of an error, in characters; the rest is not shown.
const MAX_MESSAGE_LEN: usize = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Result(Value),
    Error(Failure),
}

/// Sends a single request and waits for its result. Blocks.
///
/// # Errors
///
/// If no server listens, or the server's error for the request.
pub fn call(socket: &Path, request: &Request) -> Result<Value, JobError> {
    Conversation::begin(socket)?.call(request)
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct Conversation {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Conversation {
    /// Connects. Blocks.
    ///
    /// # Errors
    ///
    /// If no server listens.
    pub fn begin(socket: &Path) -> Result<Self, JobError> {
        let stream = UnixStream::connect(socket).map_err(|error| {
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
        Ok(Self { path: socket.to_path_buf(), stream: BufReader::new(stream) })
    }

    /// Sends a request and waits for its result. Blocks.
    ///
    /// # Errors
    ///
    /// If the server is gone, or the server's error for the request.
    pub fn call(&mut self, request: &Request) -> Result<Value, JobError> {
        let line = self.exchange(request).map_err(|error| {
            let path = self.path.display();
            JobError::new(
                JobErrorKind::ControlSocket,
                format!("the control socket '{path}' failed: {error}"),
            )
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

    /// As [`call`](Self::call), for a reply that is followed by descriptors: nothing after it is
    /// read.
    #[cfg(feature = "server")]
    pub(crate) fn call_before_descriptors(&mut self, request: &Request) -> Result<Value, JobError> {
        let path = self.path.clone();
        // A buffer would take bytes, and lose their descriptors.
        let stream = self.stream.get_ref().try_clone().map_err(|error| {
            let message = format!("the control socket '{}' failed: {error}", path.display());
            JobError::new(JobErrorKind::ControlSocket, message)
        })?;
        let mut unbuffered = Self { path, stream: BufReader::with_capacity(1, stream) };
        unbuffered.call(request)
    }

    #[cfg(feature = "server")]
    pub(crate) fn stream(&self) -> &UnixStream {
        self.stream.get_ref()
    }

    /// Returns the connection itself.
    #[cfg(feature = "server")]
    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream.into_inner()
    }

    fn exchange(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // A server of another protocol may close the connection before it has read this.
        let sent = self.stream.get_mut().write_all(&line);
        let mut reply = Vec::new();
        let read = self.stream.by_ref().take(MAX_REPLY_LEN).read_until(b'\n', &mut reply);
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
