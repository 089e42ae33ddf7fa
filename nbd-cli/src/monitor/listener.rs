//! The socket of the monitor: who is let in, and for how long.

use std::fmt;
use std::io;
use std::net::{TcpListener as StdTcpListener, ToSocketAddrs as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::address::MetricsAddress;
use super::http::Site;
use crate::error::CommandError;

/// Most connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 32;
/// Longest head of a request, in bytes.
const MAX_HEAD_LEN: usize = 16 << 10;
/// Time limits for the head of a request, which is also how long a connection may be idle, and for
/// a whole connection. Browsers and scrapers connect again.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connection whose time is over may take to receive its last reply.
const LAST_REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// A pause after the system had no descriptor for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens.
pub(super) struct MonitorListener {
    kind: Kind,
    host: Option<String>,
}

enum Kind {
    Tcp(StdTcpListener),
    Unix(StdUnixListener, SocketFile),
}

/// The file of a unix socket, removed with it.
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            // There is no remedy for a directory that does not allow it any more.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl MonitorListener {
    pub(super) fn open(address: &MetricsAddress) -> Result<Self, CommandError> {
        let (opened, text) = match address {
            MetricsAddress::Tcp { host, port } => (open_tcp(host, *port), format!("{host}:{port}")),
            MetricsAddress::Unix(path) => (open_unix(path), path.display().to_string()),
        };
        let kind = opened.map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::AddrInUse => "another program listens there".to_owned(),
                io::ErrorKind::PermissionDenied => "that is not permitted".to_owned(),
                _ => in_words(&error),
            };
            CommandError::new(format!(
                "the metrics cannot be served at '{text}': {why}; give another address for \
                 --metrics"
            ))
        })?;
        let host = match address {
            MetricsAddress::Tcp { host, .. } => Some(host.clone()),
            MetricsAddress::Unix(_) => None,
        };
        Ok(Self { kind, host })
    }

    /// The host as the user named it; `None` for a unix socket, and where other machines can
    /// connect: they may use any name.
    pub(super) fn host(&self) -> Option<String> {
        self.host.clone().filter(|_| !self.is_public())
    }

    /// Whether other machines can connect.
    pub(super) fn is_public(&self) -> bool {
        match &self.kind {
            Kind::Tcp(listener) => {
                listener.local_addr().is_ok_and(|address| !address.ip().is_loopback())
            }
            Kind::Unix(..) => false,
        }
    }

    /// Answers clients. Dropping the future ends their connections.
    pub(super) async fn serve(self, site: Arc<Site>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let served = match self.kind {
            Kind::Tcp(listener) => match TcpListener::from_std(listener) {
                Ok(listener) => accept(places, site, async || Ok(listener.accept().await?.0)).await,
                Err(error) => Err(error),
            },
            Kind::Unix(listener, _file) => match UnixListener::from_std(listener) {
                Ok(listener) => accept(places, site, async || Ok(listener.accept().await?.0)).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = served {
            tracing::error!(error = in_words(&error), "the status page cannot be served");
        }
    }
}

impl fmt::Display for MonitorListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "http://{address}/"),
                Err(_) => f.write_str("http://?/"),
            },
            Kind::Unix(_, file) => write!(f, "unix:{}", file.path.display()),
        }
    }
}

fn in_words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}

fn open_tcp(host: &str, port: u16) -> io::Result<Kind> {
    let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
    let listener = StdTcpListener::bind(&addresses[..])?;
    listener.set_nonblocking(true)?;
    Ok(Kind::Tcp(listener))
}

/// Only programs of the same user may connect, as to the control socket.
fn open_unix(path: &Path) -> io::Result<Kind> {
    remove_stale(path)?;
    let listener = bind_private(path)?;
    listener.set_nonblocking(true)?;
    let metadata = std::fs::symlink_metadata(path)?;
    let identity = (metadata.dev(), metadata.ino());
    Ok(Kind::Unix(listener, SocketFile { path: path.to_owned(), identity }))
}

fn bind_private(path: &Path) -> io::Result<StdUnixListener> {
    // No other thread makes files while the program starts.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = StdUnixListener::bind(path);
    rustix::process::umask(before);
    listener
}

/// Removes the socket of a program that has ended.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket());
    if is_socket
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

async fn accept<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    places: Arc<Semaphore>,
    site: Arc<Site>,
    next: impl AsyncFn() -> io::Result<S>,
) -> io::Result<()> {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match next().await {
            Ok(stream) => {
                connections.spawn(converse(stream, Arc::clone(&site), place));
            }
            Err(error) => {
                tracing::warn!(error = in_words(&error), "cannot accept a reader of metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    site: Arc<Site>,
    _place: OwnedSemaphorePermit,
) {
    let service = service_fn(move |request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, std::convert::Infallible>(site.answer(&request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_LEN)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = tokio::time::sleep(CONNECTION_TIMEOUT) => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(LAST_REPLY_TIMEOUT, connection).await {
                Ok(ended) => ended,
                Err(_) => return tracing::debug!("closed a reader of metrics that does not read"),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a reader of metrics left");
    }
}
