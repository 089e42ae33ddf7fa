//! The socket of the monitor, and the limits of its connections.

use std::fmt;
use std::io;
use std::net::{TcpListener as StdTcpListener, ToSocketAddrs as _};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nbd_proto::host_lookup;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::address::MetricsAddress;
use super::error::{MonitorError, in_words};
use super::http::Site;
use crate::tasks;
use crate::unix_socket::{SocketFile, listen_privately};

/// Most connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 32;
/// Longest head of a request, in bytes.
const MAX_HEAD_LEN: usize = 16 << 10;
/// Time limits for the head of a request, which is also how long a connection may be idle, and for
/// a whole connection. Browsers and scrapers connect again.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for the last reply of a connection whose time is over.
const LAST_REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// A pause after the system had no descriptor for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that listens.
pub(super) struct MonitorListener {
    kind: Kind,
    host: Option<String>,
}

enum Kind {
    Tcp(StdTcpListener),
    Unix(StdUnixListener, SocketFile),
}

/// The socket in the runtime.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection of either kind: the code that answers HTTP is large, and once in the program.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl Listener {
    async fn next(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

impl MonitorListener {
    pub(super) fn open(address: &MetricsAddress) -> Result<Self, MonitorError> {
        let (opened, text) = match address {
            MetricsAddress::Tcp { host, port } => (open_tcp(host, *port), format!("{host}:{port}")),
            MetricsAddress::Unix(path) => (open_unix(path), path.display().to_string()),
        };
        let kind = opened.map_err(|error| MonitorError::Address { address: text, error })?;
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
        let _file;
        let listener = match self.kind {
            Kind::Tcp(listener) => TcpListener::from_std(listener).map(Listener::Tcp),
            Kind::Unix(listener, file) => {
                _file = file;
                UnixListener::from_std(listener).map(Listener::Unix)
            }
        };
        match listener {
            Ok(listener) => accept(&listener, &site).await,
            Err(error) => {
                tracing::error!(error = in_words(&error), "the status page cannot be served");
            }
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
            Kind::Unix(_, file) => write!(f, "unix:{}", file.path().display()),
        }
    }
}

fn open_tcp(host: &str, port: u16) -> io::Result<Kind> {
    let addresses = (host, port).to_socket_addrs().map_err(|error| {
        io::Error::new(error.kind(), host_lookup::explain(host, &in_words(&error)))
    })?;
    let addresses: Vec<_> = addresses.collect();
    let listener = StdTcpListener::bind(&addresses[..])?;
    listener.set_nonblocking(true)?;
    Ok(Kind::Tcp(listener))
}

/// Only programs of the same user may connect, as to the control socket.
fn open_unix(path: &Path) -> io::Result<Kind> {
    remove_stale(path)?;
    let (listener, file) = listen_privately(path, BACKLOG)?;
    Ok(Kind::Unix(listener, file))
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

async fn accept(listener: &Listener, site: &Arc<Site>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.next().await {
            Ok(stream) => {
                connections.spawn(tasks::boxed(converse(stream, Arc::clone(site), slot)));
            }
            Err(error) => {
                tracing::warn!(error = in_words(&error), "cannot accept a reader of metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn converse(stream: Box<dyn Stream>, site: Arc<Site>, _slot: OwnedSemaphorePermit) {
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
