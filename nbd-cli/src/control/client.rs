//! Asking a server through its control socket.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::protocol::{Failure, Request};
use crate::error::CommandError;
use crate::output::printable;

/// Longest reply, in bytes: a list of very many exports and clients.
const MAX_REPLY_LEN: u64 = 64 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Result(Value),
    Error(Failure),
}

/// Makes a single request and waits for its result. Blocks.
///
/// # Errors
///
/// If nobody listens, or what the server says about the request.
pub(crate) fn call(socket: &Path, request: &Request) -> Result<Value, CommandError> {
    Conversation::begin(socket)?.call(request)
}

/// A connection to a control socket.
#[derive(Debug)]
pub(crate) struct Conversation {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Conversation {
    /// Connects. Blocks.
    ///
    /// # Errors
    ///
    /// If nobody listens.
    pub(crate) fn begin(socket: &Path) -> Result<Self, CommandError> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "; is a server running with --control?"
                }
                io::ErrorKind::PermissionDenied => "; only the server's own user may use it",
                _ => "",
            };
            CommandError::new(format!(
                "cannot reach the control socket '{}': {error}{advice}",
                socket.display()
            ))
        })?;
        Ok(Self { path: socket.to_path_buf(), stream: BufReader::new(stream) })
    }

    /// Makes a request and waits for its result. Blocks.
    ///
    /// # Errors
    ///
    /// If the server is gone, or what it says about the request.
    pub(crate) fn call(&mut self, request: &Request) -> Result<Value, CommandError> {
        let line = self.exchange(request).map_err(|error| {
            let path = self.path.display();
            CommandError::new(format!("the control socket '{path}' failed: {error}"))
        })?;
        match serde_json::from_slice(&line) {
            Ok(Reply::Result(result)) => Ok(result),
            Ok(Reply::Error(failure)) => Err(CommandError::new(printable(&failure.message))),
            Err(error) => Err(CommandError::new(format!(
                "'{}' is not the control socket of a server: its reply cannot be understood \
                 ({error})",
                self.path.display()
            ))),
        }
    }

    fn exchange(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut reply = Vec::new();
        self.stream.by_ref().take(MAX_REPLY_LEN).read_until(b'\n', &mut reply)?;
        if reply.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it"));
        }
        Ok(reply)
    }
}
