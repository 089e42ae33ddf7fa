//! The control socket and its lines. All input is untrusted.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::controller::Controller;
use super::places::{Keeps, Place, Places};
use crate::commands::serve::disks::ConversationId;
use crate::error::CommandError;
use nbd_jobs::control::{ErrorKind, Failure, Lifetime, MAX_LINE_LEN, Request, decode, encode};

/// Backlog of the listening socket: a burst of clients is not refused.
const BACKLOG: i32 = 1024;

/// Number and interval of the attempts while another server listens on the socket.
const WAITS_FOR_SOCKET: u32 = 20;
const WAIT_FOR_SOCKET: Duration = Duration::from_millis(50);

/// Number and interval of the attempts to get a place while all clients are busy.
const WAITS_FOR_PLACE: u32 = 200;
const WAIT_FOR_PLACE: Duration = Duration::from_millis(10);

/// A listening control socket. Its file is removed on drop.
pub(in crate::commands::serve) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode number of the socket's file: another file in its place is left alone.
    identity: (u64, u64),
}

impl ControlSocket {
    /// Listens on a new socket that only this user can use. It replaces an unused socket, and waits
    /// for another server that still uses the socket, for example one that is ending.
    pub(in crate::commands::serve) async fn open(path: &Path) -> Result<Self, CommandError> {
        let failed = |error: io::Error| {
            CommandError::new(format!(
                "cannot listen on the control socket '{}': {error}",
                path.display()
            ))
        };
        for _ in 0..WAITS_FOR_SOCKET {
            match remove_stale(path) {
                Err(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                    tokio::time::sleep(WAIT_FOR_SOCKET).await;
                }
                result => {
                    result?;
                    break;
                }
            }
        }
        remove_stale(path)?;
        let open = || -> io::Result<Self> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Before there is a file: it has these permissions from the start.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            listen(&socket, BACKLOG)?;
            let listener = std::os::unix::net::UnixListener::from(socket);
            let metadata = std::fs::symlink_metadata(path)?;
            Ok(Self {
                listener: UnixListener::from_std(listener)?,
                path: std::path::absolute(path)?,
                identity: (metadata.dev(), metadata.ino()),
            })
        };
        open().map_err(failed)
    }

    /// Serves clients for ever.
    pub(in crate::commands::serve) async fn serve(self, controller: Arc<Controller>) {
        let places = Places::default();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client of the control socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some(place) = place_among(&places).await else {
                tracing::warn!("too many busy clients of the control socket; closed a new one");
                continue;
            };
            let controller = Arc::clone(&controller);
            tokio::spawn(async move {
                if let Err(error) = converse(stream, &controller, &place).await {
                    tracing::info!(%error, "a client of the control socket is gone");
                }
            });
        }
    }
}

/// Returns a place for a new client; waits briefly if all are busy.
async fn place_among(places: &Places) -> Option<Place> {
    for _ in 0..WAITS_FOR_PLACE {
        match places.take() {
            None => tokio::time::sleep(WAIT_FOR_PLACE).await,
            place => return place,
        }
    }
    places.take()
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            // There is no remedy for a directory that does not allow it any more.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), CommandError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(CommandError::new(format!(
            "'{}' exists and is not a socket; give another path for --control",
            path.display()
        )));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // If it cannot be removed, binding reports the reason.
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        // It has just ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(CommandError::new(format!(
            "another server listens on the control socket '{}'",
            path.display()
        ))),
    }
}

/// Serves one client until it leaves, and ends the checkpoints bound to its connection.
async fn converse(stream: UnixStream, controller: &Controller, place: &Place) -> io::Result<()> {
    let id = controller.new_conversation();
    // No client is evicted while a request is in progress: requests are never cut off.
    let result = tokio::select! {
        result = answer(stream, controller, id, place) => result,
        () = place.left() => {
            Err(io::Error::other("it was idle for longest and made room for another"))
        }
    };
    controller.end_conversation(id).await;
    result
}

async fn answer(
    mut stream: UnixStream,
    controller: &Controller,
    id: ConversationId,
    place: &Place,
) -> io::Result<()> {
    let mut lines = Lines::default();
    let mut keeps = Keeps::Nothing;
    loop {
        let (reply, go_on) = match lines.next(&mut stream).await? {
            Line::End => return Ok(()),
            Line::Request(line) => match decode(&line) {
                Ok(request) => {
                    if !place.set(Keeps::Place) {
                        return Ok(());
                    }
                    if lasts_as_long_as_its_client(&request) {
                        keeps = Keeps::Place;
                    }
                    let reply = controller.carry_out(request, id).await;
                    place.set(keeps);
                    (reply, true)
                }
                Err(failure) => (Err(failure), true),
            },
            Line::TooLong => {
                let message = format!("a request has at most {MAX_LINE_LEN} bytes");
                (Err(Failure::new(ErrorKind::InvalidRequest, message)), false)
            }
        };
        stream.write_all(&encode(reply)).await?;
        if !go_on {
            return Ok(());
        }
    }
}

/// A checkpoint may end with the connection on which it was started.
fn lasts_as_long_as_its_client(request: &Request) -> bool {
    matches!(request, Request::CheckpointStart { lifetime: Lifetime::Connection, .. })
}

enum Line {
    Request(Vec<u8>),
    /// The start of the next line is unknown.
    TooLong,
    End,
}

/// The lines of a stream, of bounded length.
#[derive(Default)]
struct Lines {
    received: Vec<u8>,
}

impl Lines {
    /// Returns the next line that is not empty. Bytes after the last line feed are not a line.
    async fn next(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Line> {
        let mut looked_at = 0;
        loop {
            let end = self.received[looked_at..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end.map(|end| end + looked_at) {
                let mut line: Vec<u8> = self.received.drain(..=end).collect();
                line.pop();
                looked_at = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(if line.len() > MAX_LINE_LEN {
                    Line::TooLong
                } else {
                    Line::Request(line)
                });
            }
            if self.received.len() > MAX_LINE_LEN {
                return Ok(Line::TooLong);
            }
            looked_at = self.received.len();
            let mut part = [0; 4096];
            let count = stream.read(&mut part).await?;
            if count == 0 {
                return Ok(Line::End);
            }
            self.received.extend_from_slice(&part[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &[u8]) -> Vec<Vec<u8>> {
        let mut input = input;
        let mut found = Vec::new();
        let mut lines = Lines::default();
        loop {
            match lines.next(&mut input).await.unwrap() {
                Line::Request(line) => found.push(line),
                Line::TooLong => found.push(b"too long".to_vec()),
                Line::End => return found,
            }
            if found.last().is_some_and(|line| line == b"too long") {
                return found;
            }
        }
    }

    #[tokio::test]
    async fn lines_end_with_their_end_and_are_bounded() {
        assert_eq!(lines(b"a\n\n  \r\nb\nc").await, [b"a", b"b"]);
        let long = vec![b'x'; MAX_LINE_LEN];
        assert_eq!(lines(&[&long[..], b"x\n"].concat()).await, [b"too long"]);
        assert_eq!(lines(&[&long[..], b"\n"].concat()).await, [long]);
        assert_eq!(lines(&vec![b'x'; 10 << 20]).await, [b"too long"]);
    }
}
