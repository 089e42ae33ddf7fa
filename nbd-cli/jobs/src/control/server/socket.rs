//! The control socket and its clients. All input is untrusted.

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nbd_server::{ListenerOrigin, PausedListener};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};

use super::controller::Controller;
use super::disks::ConnectionId;
use super::event::ControlEvent;
use super::lines::{Line, Lines};
use super::slots::{Activity, ClientSlot, ClientSlots};
use crate::control::{ErrorKind, Failure, Lifetime, MAX_LINE_LEN, Request, decode, encode};
use crate::tasks;
use crate::unix_socket::{SocketFile, listen_privately};

/// Backlog of the listening socket: a burst of clients is not refused.
const BACKLOG: i32 = 1024;

/// Number and interval of the attempts while another server listens on the socket.
const WAITS_FOR_SOCKET: u32 = 20;
const WAIT_FOR_SOCKET: Duration = Duration::from_millis(50);

/// Number and interval of the attempts to get a slot while all clients are busy.
const WAITS_FOR_SLOT: u32 = 200;
const WAIT_FOR_SLOT: Duration = Duration::from_millis(10);

/// A listening control socket. Its file is removed on drop, unless it is
/// [adopted](ControlSocket::adopt) and not [owned](ControlSocket::own).
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

impl ControlSocket {
    /// Listens on a new socket that only this user can use. It replaces an unused socket, and waits
    /// for another server that still uses the socket, for example one that is ending.
    ///
    /// # Errors
    ///
    /// [`ControlSocketError`].
    ///
    /// # Cancel safety
    ///
    /// Safe: no socket is left.
    pub async fn open(path: &Path) -> Result<Self, ControlSocketError> {
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
            let (listener, file) = listen_privately(path, BACKLOG)?;
            Ok(Self { listener: UnixListener::from_std(listener)?, file })
        };
        open().map_err(|error| ControlSocketError::Unusable { path: path.to_path_buf(), error })
    }

    /// Releases the socket with its file, for another server: clients that connect meanwhile wait
    /// for that.
    ///
    /// # Errors
    ///
    /// Those of the system. The file is removed.
    pub fn pause(self) -> io::Result<PausedListener> {
        let Self { listener, file } = self;
        let socket = listener.into_std()?.into();
        let (path, identity) = file.disown();
        Ok(PausedListener { socket, origin: ListenerOrigin::UnixFile { path, identity } })
    }

    /// The socket of a paused server. Its file is not owned yet, so that the server can go on.
    ///
    /// # Errors
    ///
    /// If it is not a unix socket with a file, and those of the system.
    pub fn adopt(PausedListener { socket, origin }: PausedListener) -> io::Result<Self> {
        let ListenerOrigin::UnixFile { path, identity } = origin else {
            return Err(io::Error::other("the control socket of the other server has no file"));
        };
        let family = rustix::net::sockopt::socket_domain(socket.as_fd())?;
        if family != rustix::net::AddressFamily::UNIX {
            return Err(io::Error::other("the control socket of the other server is none"));
        }
        let listener = std::os::unix::net::UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(Self { listener, file: SocketFile::adopted(path, identity) })
    }

    /// Removes the file on drop from now on: no other server goes on with it.
    pub const fn own(&mut self) {
        self.file.own();
    }

    /// Returns whether clients that connect to `path` reach this socket.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        self.file.is_at(path)
    }

    /// Serves clients.
    ///
    /// # Cancel safety
    ///
    /// Safe: no further clients are served until it is called again. Requests that have been
    /// received are still carried out.
    pub async fn serve(&self, controller: Arc<Controller>) {
        let slots = ClientSlots::default();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    controller.observe(&ControlEvent::ClientNotAccepted { error: &error });
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some(slot) = slot_among(&slots).await else {
                controller.observe(&ControlEvent::TooManyClients);
                continue;
            };
            let controller = Arc::clone(&controller);
            tasks::spawn(async move {
                if let Err(error) = converse(stream, &controller, &slot).await {
                    controller.observe(&ControlEvent::ClientLost { error: &error });
                }
            });
        }
    }
}

/// Returns a slot for a new client; waits briefly if all are busy.
async fn slot_among(slots: &ClientSlots) -> Option<ClientSlot> {
    for _ in 0..WAITS_FOR_SLOT {
        match slots.take() {
            None => tokio::time::sleep(WAIT_FOR_SLOT).await,
            slot => return slot,
        }
    }
    slots.take()
}

/// The reason why a control socket cannot be opened.
#[derive(Debug)]
#[non_exhaustive]
pub enum ControlSocketError {
    /// There is a file that is not a socket.
    NotASocket {
        /// Path of the socket.
        path: PathBuf,
    },
    /// Another server listens on the socket.
    InUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The system refuses.
    Unusable {
        /// Path of the socket.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
}

impl fmt::Display for ControlSocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotASocket { path } => write!(
                f,
                "'{}' exists and is not a socket; give another path for --control",
                path.display()
            ),
            Self::InUse { path } => {
                write!(f, "another server listens on the control socket '{}'", path.display())
            }
            Self::Unusable { path, error } => {
                write!(f, "cannot listen on the control socket '{}': {error}", path.display())
            }
        }
    }
}

impl std::error::Error for ControlSocketError {}

fn remove_stale(path: &Path) -> Result<(), ControlSocketError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(ControlSocketError::NotASocket { path: path.to_path_buf() });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // If it cannot be removed, binding reports the reason.
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        // It has just ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(ControlSocketError::InUse { path: path.to_path_buf() }),
    }
}

/// Serves one client until it leaves, and ends the checkpoints bound to its connection.
async fn converse(
    stream: UnixStream,
    controller: &Controller,
    slot: &ClientSlot,
) -> io::Result<()> {
    let id = controller.new_connection();
    // No client is evicted while a request is in progress: requests are never cut off.
    let result = tokio::select! {
        result = answer(stream, controller, id, slot) => result,
        () = slot.evicted() => {
            Err(io::Error::other("it was idle for longest and made room for another"))
        }
    };
    controller.end_connection(id).await;
    result
}

async fn answer(
    mut stream: UnixStream,
    controller: &Controller,
    id: ConnectionId,
    slot: &ClientSlot,
) -> io::Result<()> {
    let mut lines = Lines::default();
    let mut between_requests = Activity::Idle;
    loop {
        let (reply, go_on) = match lines.next(&mut stream).await? {
            Line::End => return Ok(()),
            Line::Request(line) => match decode(&line) {
                Ok(Request::Takeover {}) => {
                    if !slot.set(Activity::Busy) {
                        return Ok(());
                    }
                    match controller.suspend().await {
                        Ok(()) => return hand_over(stream, controller).await,
                        refused @ Err(_) => {
                            slot.set(between_requests);
                            (refused.map(|()| json!({})), true)
                        }
                    }
                }
                Ok(request) => {
                    if !slot.set(Activity::Busy) {
                        return Ok(());
                    }
                    if lasts_as_long_as_its_client(&request) {
                        between_requests = Activity::Busy;
                    }
                    let reply = controller.execute(request, id).await;
                    slot.set(between_requests);
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

/// Lets a client take over from a server that is suspended. If it has left, the server goes on.
async fn hand_over(mut stream: UnixStream, controller: &Controller) -> io::Result<()> {
    let handed_over = match stream.write_all(&encode(Ok(json!({})))).await {
        Ok(()) => stream.into_std(),
        Err(error) => Err(error),
    };
    match handed_over {
        Ok(stream) => controller.hand_over_to(stream),
        Err(error) => {
            controller.resume().await;
            return Err(error);
        }
    }
    Ok(())
}

/// A checkpoint may end with the connection on which it was started.
fn lasts_as_long_as_its_client(request: &Request) -> bool {
    matches!(
        request,
        Request::CheckpointStart { lifetime: Lifetime::Connection, .. }
            | Request::CheckpointStartTogether { lifetime: Lifetime::Connection, .. }
    )
}
