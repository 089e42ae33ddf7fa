//! Where to connect, and how.

use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Duration;

use nbd_proto::NbdUri;
use nbd_proto::wire::{MetaContextName, ReplyMode};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::client::Client;
use crate::dial::{establish, establish_at, load_tls};
use crate::error::{Error, Result};
use crate::handshake::Wire;
use crate::settings::Settings;
use crate::stream::Stream;
use crate::tls::{LocalFiles, TlsOptions};
use crate::transport::Socket;

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
    pub(crate) settings: Settings,
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
        Self { settings: Settings::new(uri) }
    }

    /// Uses another export than the URI names; empty for the server's default export.
    #[must_use]
    pub fn export_name(mut self, name: impl Into<String>) -> Self {
        self.settings = self.settings.with_export(&name.into());
        self
    }

    /// Selects metadata contexts for block status. Those the server does not have are left out:
    /// [`Client::meta_contexts`] tells which it has.
    #[must_use]
    pub fn meta_contexts(mut self, contexts: impl IntoIterator<Item = MetaContextName>) -> Self {
        self.settings.wanted.meta_contexts = contexts.into_iter().collect();
        self
    }

    /// The best form of replies to ask for; servers that cannot do it get the next one down.
    #[must_use]
    pub fn reply_mode(mut self, highest: ReplyMode) -> Self {
        self.settings.wanted.reply_mode = highest;
        self
    }

    /// Number of connections to open if the server allows several (CAN_MULTI_CONN); otherwise one
    /// is opened. A server that admits fewer is used with what it admits.
    #[must_use]
    pub fn connections(mut self, connections: NonZeroUsize) -> Self {
        self.settings.connections = connections;
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
        self.settings.reconnect = Some(patience);
        self
    }

    /// Time a server has for connecting and the whole handshake. [`Connector::inspect`] and the
    /// lists give it that time for each question.
    #[must_use]
    pub fn handshake_timeout(mut self, limit: Duration) -> Self {
        self.settings.handshake_timeout = limit;
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
        self.settings.limits.request_timeout = Some(limit);
        self
    }

    /// Most requests in flight on one connection (128 by default); further ones wait.
    #[must_use]
    pub fn max_in_flight(mut self, requests: NonZeroUsize) -> Self {
        self.settings.limits.requests = requests;
        self
    }

    /// Most bytes of data in flight on one connection (64 MiB by default). A single request of
    /// more than that is sent alone.
    #[must_use]
    pub fn max_bytes_in_flight(mut self, bytes: NonZeroUsize) -> Self {
        self.settings.limits.bytes = bytes;
        self
    }

    /// Uses TLS as `options` say; they go before what the URI says. Without this call a URI with
    /// `nbds` requires TLS, and any other does without.
    #[must_use]
    pub fn tls(mut self, options: TlsOptions) -> Self {
        self.settings.tls = Some(options);
        self
    }

    /// Whether the URI may name files of this machine (`tls-certificates`, `tls-psk-file`). It may
    /// not, unless allowed: a URI that came from somebody else must not choose which files are read.
    #[must_use]
    pub fn local_files(mut self, files: LocalFiles) -> Self {
        self.settings.local_files = files;
        self
    }

    /// The URI.
    #[must_use]
    pub const fn uri(&self) -> &NbdUri {
        &self.settings.uri
    }

    /// Connects. The connections are driven by tasks on the current tokio runtime, which needs I/O
    /// and time enabled, until the last clone of the [`Client`] is dropped. Without a runtime:
    /// [`blocking::Client::connect`](crate::blocking::Client::connect).
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
        let first = establish_at(&self.settings).await?;
        Client::start(&self.settings, first).await
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
        let stream = Stream::Plain(Socket::Other(Box::new(stream)));
        let settings = &self.settings;
        let tls = load_tls(settings).await?;
        let wire = Wire::new(stream, settings.target(), settings.handshake_timeout, tls);
        let first = establish(wire, &settings.wanted).await?;
        let alone =
            Settings { connections: NonZeroUsize::MIN, reconnect: None, ..settings.clone() };
        Client::start(&alone, first).await
    }
}
