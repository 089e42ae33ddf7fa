//! Where to connect, and how.

use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::NbdUri;
use nbd_proto::wire::{MetaContextName, ReplyMode};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::handshake::{Established, Tls, Wanted, Wire, establish, open};
use crate::link::Limits;
use crate::tls::{Context, LocalFiles, TlsMode, TlsOptions, setup};
use crate::transport::Stream;

/// How long a server has for connecting and the handshake, unless told otherwise.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Describes a connection to be made; one description makes any number of them.
///
/// ```no_run
/// # async fn example() -> nbd_client::Result<()> {
/// use nbd_client::{Connector, MetaContextName};
///
/// let client = "nbd://localhost/disk"
///     .parse::<Connector>()?
///     .meta_contexts([MetaContextName::base_allocation()])
///     .connect()
///     .await?;
/// println!("{} bytes", client.info().size);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Connector {
    pub(crate) uri: NbdUri,
    pub(crate) wanted: Wanted,
    pub(crate) connections: NonZeroUsize,
    pub(crate) reconnect: Option<Duration>,
    pub(crate) handshake_timeout: Duration,
    pub(crate) limits: Limits,
    pub(crate) tls: Option<TlsOptions>,
    pub(crate) local_files: LocalFiles,
}

impl FromStr for Connector {
    type Err = Error;

    fn from_str(uri: &str) -> Result<Self> {
        Ok(Self::new(uri.parse()?))
    }
}

impl Connector {
    /// Describes a connection to the export that `uri` names: one connection, extended headers if
    /// the server has them, no metadata contexts, no reconnect, 30 s for the handshake.
    #[must_use]
    pub fn new(uri: NbdUri) -> Self {
        let wanted = Wanted {
            export_name: uri.export_name.clone(),
            reply_mode: ReplyMode::Extended,
            meta_contexts: Vec::new(),
        };
        Self {
            uri,
            wanted,
            connections: NonZeroUsize::MIN,
            reconnect: None,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            limits: Limits::default(),
            tls: None,
            local_files: LocalFiles::Refused,
        }
    }

    /// Uses another export than the URI names; empty for the server's default export.
    #[must_use]
    pub fn export_name(mut self, name: impl Into<String>) -> Self {
        self.wanted.export_name = name.into();
        self.uri.export_name.clone_from(&self.wanted.export_name);
        self
    }

    /// Selects metadata contexts for block status. Those the server does not have are left out:
    /// [`Client::meta_contexts`] tells which it has.
    #[must_use]
    pub fn meta_contexts(mut self, contexts: impl IntoIterator<Item = MetaContextName>) -> Self {
        self.wanted.meta_contexts = contexts.into_iter().collect();
        self
    }

    /// The best form of replies to ask for; servers that cannot do it get the next one down.
    #[must_use]
    pub fn reply_mode(mut self, highest: ReplyMode) -> Self {
        self.wanted.reply_mode = highest;
        self
    }

    /// Number of connections to open if the server allows several (CAN_MULTI_CONN); otherwise one
    /// is opened. A server that admits fewer is used with what it admits.
    #[must_use]
    pub fn connections(mut self, connections: NonZeroUsize) -> Self {
        self.connections = connections;
        self
    }

    /// After a lost connection, requests in flight and new ones wait up to `patience` for a new
    /// connection, and those in flight are sent again.
    ///
    /// Every NBD request may be sent twice without harm. Two things are *not* repaired:
    ///
    /// - Data that was acknowledged but not flushed is gone if the server lost it together with its
    ///   process or its machine; a FLUSH that succeeds on the new connection does not bring it
    ///   back. If [`Client::reconnects`] is not the same after a flush as before the writes, write
    ///   again what has to be durable.
    /// - A server that is still busy with the old connection may carry out an old WRITE after the
    ///   new one. This matters only if the same range is written again at once.
    #[must_use]
    pub fn reconnect(mut self, patience: Duration) -> Self {
        self.reconnect = Some(patience);
        self
    }

    /// Time a server has for connecting and the whole handshake. [`Connector::inspect`] and the
    /// lists give it that time for each question.
    #[must_use]
    pub fn handshake_timeout(mut self, limit: Duration) -> Self {
        self.handshake_timeout = limit;
        self
    }

    /// Time a request may take from being sent until its answer is complete, data included. There
    /// is no limit unless this sets one: some disks take very long for a flush.
    ///
    /// When it is over the connection is given up, because a late answer could not be told from
    /// one to another request: all requests on it fail with
    /// [`LostConnection::RequestTimeout`](crate::LostConnection::RequestTimeout), which names the
    /// one that was late. Whether they were carried out is unknown. With
    /// [`reconnect`](Self::reconnect) they are sent again on a new connection instead; a request
    /// that is late again and again fails after the patience that was given there.
    ///
    /// A request that a cancelled future has left behind counts as well.
    #[must_use]
    pub fn request_timeout(mut self, limit: Duration) -> Self {
        self.limits.request_timeout = Some(limit);
        self
    }

    /// Most requests in flight on one connection (128 by default); further ones wait.
    #[must_use]
    pub fn max_in_flight(mut self, requests: NonZeroUsize) -> Self {
        self.limits.requests = requests;
        self
    }

    /// Most bytes of data in flight on one connection (64 MiB by default). A single request of
    /// more than that is sent alone.
    #[must_use]
    pub fn max_bytes_in_flight(mut self, bytes: NonZeroUsize) -> Self {
        self.limits.bytes = bytes;
        self
    }

    /// Uses TLS as `options` say; they go before what the URI says. Without this call a URI with
    /// `nbds` requires TLS, and any other does without.
    #[must_use]
    pub fn tls(mut self, options: TlsOptions) -> Self {
        self.tls = Some(options);
        self
    }

    /// Whether the URI may name files of this machine (`tls-certificates`, `tls-psk-file`). It may
    /// not, unless allowed: a URI that came from somebody else must not choose which files are read.
    #[must_use]
    pub fn local_files(mut self, files: LocalFiles) -> Self {
        self.local_files = files;
        self
    }

    /// The URI.
    #[must_use]
    pub const fn uri(&self) -> &NbdUri {
        &self.uri
    }

    /// Connects. The connections are driven by tasks on the current tokio runtime, which needs I/O
    /// and time enabled, until the last clone of the [`Client`] is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`], [`Error::HandshakeTimeout`], [`Error::Refused`] (ERR_UNKNOWN: there is
    /// no such export), [`Error::Tls`], or another handshake error.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what was opened.
    pub async fn connect(&self) -> Result<Client> {
        let first = self.establish().await?;
        Client::start(self, first).await
    }

    /// Connects over a stream the caller brings: a socket pair, a tunnel, a virtual socket. The
    /// URI then serves for messages only, and reconnecting and further connections are off.
    ///
    /// # Errors
    ///
    /// As for [`Connector::connect`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the stream.
    pub async fn connect_over<S>(&self, stream: S) -> Result<Client>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let stream = Stream::Other(Box::new(stream));
        let tls = self.load_tls().await?;
        let wire = Wire::new(stream, self.target(), self.handshake_timeout, tls);
        let first = establish(wire, &self.wanted).await?;
        let alone = Self { connections: NonZeroUsize::MIN, reconnect: None, ..self.clone() };
        Client::start(&alone, first).await
    }

    pub(crate) fn target(&self) -> Arc<str> {
        self.uri.to_string().into()
    }

    /// Opens a socket to the server.
    pub(crate) async fn open(&self) -> Result<Wire> {
        let tls = self.load_tls().await?;
        let connecting = Stream::connect(&self.uri.transport);
        open(connecting, self.target(), self.handshake_timeout, tls).await
    }

    /// The same, but never without TLS: for what follows a connection that had it.
    pub(crate) fn requiring_tls(&self) -> Self {
        let options = TlsOptions { mode: TlsMode::Require, ..self.tls.clone().unwrap_or_default() };
        Self { tls: Some(options), ..self.clone() }
    }

    /// Reads the credentials, on a thread where that may take its time.
    async fn load_tls(&self) -> Result<Option<Tls>> {
        let failed = |source| Error::Tls { target: self.target(), source };
        let setup = setup(&self.uri, self.tls.as_ref(), self.local_files).map_err(failed)?;
        let Some(setup) = setup else { return Ok(None) };
        let mode = setup.mode;
        let loading = tokio::task::spawn_blocking(move || Context::load(&setup));
        match loading.await {
            Ok(loaded) => Ok(Some(Tls { mode, context: loaded.map_err(failed)? })),
            Err(_) => Err(Error::Closed),
        }
    }

    /// Opens a socket to the server and carries out the handshake.
    pub(crate) async fn establish(&self) -> Result<Established> {
        establish(self.open().await?, &self.wanted).await
    }
}
