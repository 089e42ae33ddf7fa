//! The server's address and the settings of connections to it.

use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::NbdUri;
use nbd_proto::wire::{MetaContextName, ReplyMode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;

use crate::client::Client;
use crate::dial::{establish, establish_at, establish_on_its_runtime, load_tls};
use crate::error::{Error, Result};
use crate::handshake::Wire;
use crate::negotiated_stream::{NegotiatedStream, PlainSocket};
use crate::settings::Settings;
use crate::stream::Stream;
use crate::tls::{LocalFiles, TlsOptions};
use crate::transport::Socket;

/// Settings of connections to a server; one value can make any number of connections.
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
    /// Creates settings for the export that `uri` names. Defaults: one connection, extended headers
    /// if the server supports them, no metadata contexts, no reconnecting, 30 s for the handshake.
    #[must_use]
    pub fn new(uri: NbdUri) -> Self {
        Self { settings: Settings::new(uri) }
    }

    /// Selects another export than the URI names; empty for the server's default export.
    #[must_use]
    pub fn export_name(mut self, name: impl Into<String>) -> Self {
        self.settings = self.settings.with_export(&name.into());
        self
    }

    /// Selects metadata contexts for block status. Contexts that the server does not have are left
    /// out: [`Client::meta_contexts`] returns the others.
    #[must_use]
    pub fn meta_contexts(mut self, contexts: impl IntoIterator<Item = MetaContextName>) -> Self {
        self.settings.wanted.meta_contexts = contexts.into_iter().collect();
        self
    }

    /// Sets the most capable form of replies to request; a server that does not support it is asked
    /// for the next simpler one.
    #[must_use]
    pub fn reply_mode(mut self, highest: ReplyMode) -> Self {
        self.settings.wanted.reply_mode = highest;
        self
    }

    /// Sets the number of connections to open if the server allows several (CAN_MULTI_CONN);
    /// otherwise one is opened. If the server admits fewer, the client uses those.
    #[must_use]
    pub fn connections(mut self, connections: NonZeroUsize) -> Self {
        self.settings.connections = connections;
        self
    }

    /// Sets the runtimes whose tasks drive the connections, in turn: the first connection belongs
    /// to the first runtime, and so on. By default all belong to the runtime that connects.
    ///
    /// Each runtime needs I/O and time enabled, and has to be driven until the client is dropped. A
    /// request is sent over a connection of the runtime that makes it, if there is one. With a
    /// current-thread runtime for each core, data that arrives is then used by the thread that
    /// received it, which saves wakeups and caches in bulk transfers.
    #[must_use]
    pub fn runtimes(mut self, runtimes: impl IntoIterator<Item = Handle>) -> Self {
        self.settings.runtimes = runtimes.into_iter().collect();
        self
    }

    /// Reconnects after a lost connection: requests in flight and new ones wait up to `patience`
    /// for a new connection, and those in flight are sent again.
    ///
    /// A server that answers a request with ESHUTDOWN counts as lost once it has answered
    /// everything that was sent to it; refused requests are sent again.
    ///
    /// Every NBD request may be sent twice without harm. Two cases are *not* repaired:
    ///
    /// - Data that was acknowledged but not flushed is lost if the server loses it together with
    ///   its process or its machine; a successful FLUSH on the new connection does not restore it.
    ///   If [`Client::reconnects`] differs between the time before the writes and the time after
    ///   the flush, repeat the writes that have to be durable.
    /// - A server that is still busy with the old connection may carry out an old WRITE after the
    ///   new one. This matters only if the same range is written again at once.
    #[must_use]
    pub fn reconnect(mut self, patience: Duration) -> Self {
        self.settings.reconnect = Some(patience);
        self
    }

    /// Never gives a disk up that is only read: after the patience of
    /// [`reconnect`](Self::reconnect), without which this has no effect, requests fail, and each
    /// later one causes another attempt to connect, at most one a second. It fails at once if there
    /// was one, or if its own fails.
    ///
    /// From the first request that changes the disk, a lost connection is lost for good, as without
    /// `reconnect`, because the server may have lost with it what was not flushed.
    ///
    /// For disks that no one changes, such as the layers below an overlay: a server that is back
    /// after hours may serve another content under the same name.
    #[must_use]
    pub fn keep_reading(mut self) -> Self {
        self.settings.keeps_reading = true;
        self
    }

    /// Limits the time for connecting and the whole handshake, 30 s by default.
    /// [`Connector::inspect`] and the lists allow that time for each question.
    #[must_use]
    pub fn handshake_timeout(mut self, limit: Duration) -> Self {
        self.settings.handshake_timeout = limit;
        self
    }

    /// Limits the time from sending a request until its answer is complete, data included. No limit
    /// by default: some disks take very long for a flush.
    ///
    /// After a timeout the connection is closed, because a late answer could be mistaken for the
    /// answer to another request: all requests on it fail with
    /// [`LostConnection::RequestTimeout`](crate::LostConnection::RequestTimeout), which names the
    /// late one. Whether they were carried out is unknown. With [`reconnect`](Self::reconnect) they
    /// are sent again on a new connection instead; a request that repeatedly times out fails after
    /// the `patience` given there.
    ///
    /// Requests of dropped futures count as well.
    #[must_use]
    pub fn request_timeout(mut self, limit: Duration) -> Self {
        self.settings.limits.request_timeout = Some(limit);
        self
    }

    /// Sets the most requests in flight on one connection (128 by default); further ones wait.
    #[must_use]
    pub fn max_in_flight(mut self, requests: NonZeroUsize) -> Self {
        self.settings.limits.requests = requests;
        self
    }

    /// Sets the most bytes of data in flight on one connection (64 MiB by default). A larger single
    /// request is sent alone.
    #[must_use]
    pub fn max_bytes_in_flight(mut self, bytes: NonZeroUsize) -> Self {
        self.settings.limits.bytes = bytes;
        self
    }

    /// Sets the TLS options; they take precedence over the URI. By default a URI with `nbds`
    /// requires TLS, and any other does not use it.
    #[must_use]
    pub fn tls(mut self, options: TlsOptions) -> Self {
        self.settings.tls = Some(options);
        self
    }

    /// Sets whether the URI may name files of this machine (`tls-certificates`, `tls-psk-file`).
    /// Not allowed by default: a URI from an untrusted source must not choose files to read.
    #[must_use]
    pub fn local_files(mut self, files: LocalFiles) -> Self {
        self.settings.local_files = files;
        self
    }

    /// Returns the URI.
    #[must_use]
    pub const fn uri(&self) -> &NbdUri {
        &self.settings.uri
    }

    /// Connects. Tasks on the current tokio runtime, which needs I/O and time enabled, drive the
    /// connections until the last clone of the [`Client`] is dropped. Without a runtime use
    /// [`blocking::Client::connect`](crate::blocking::Client::connect).
    ///
    /// # Errors
    ///
    /// [`Error::Connect`], [`Error::HandshakeTimeout`], [`Error::Refused`] (ERR_UNKNOWN: there is
    /// no such export), [`Error::Tls`], or another handshake error.
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future closes the connections opened so far.
    pub async fn connect(&self) -> Result<Client> {
        let first = establish_on_its_runtime(&self.settings, 0).await?;
        Client::start(&self.settings, first).await
    }

    /// Connects, carries out the handshake, and returns the connection: for programs that send
    /// requests and receive replies themselves, such as load generators. The settings for several
    /// connections, reconnecting, request timeouts and limits of requests in flight do not apply;
    /// [`NegotiatedStream::reconnector`] makes further connections.
    ///
    /// # Errors
    ///
    /// As for [`Connector::connect`].
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future closes the connection.
    pub async fn connect_stream(&self) -> Result<NegotiatedStream> {
        let established = establish_at(&self.settings).await?;
        Ok(NegotiatedStream::new(established, self.settings.clone()))
    }

    /// Like [`connect_stream`](Self::connect_stream), over a connected socket, for example one end
    /// of a socket pair. The address in the URI is then used as in
    /// [`connect_over`](Self::connect_over).
    ///
    /// # Errors
    ///
    /// As for [`Connector::connect`].
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future closes the socket.
    pub async fn connect_stream_over(&self, socket: PlainSocket) -> Result<NegotiatedStream> {
        let settings = &self.settings;
        let target = settings.target();
        let socket = Socket::from_plain(socket).map_err(|error| Error::Connect {
            target: settings.target(),
            source: Arc::new(error),
        })?;
        let tls = load_tls(settings).await?;
        let wire = Wire::new(Stream::Plain(socket), target, settings.handshake_timeout, tls);
        let established = establish(wire, &settings.wanted).await?;
        Ok(NegotiatedStream::new(established, settings.clone()))
    }

    /// Connects over a stream that the caller provides: a socket pair, a tunnel, a virtual socket.
    /// The address in the URI is then used in messages, and for the name that the server's
    /// certificate must contain; the rest of the URI applies: the export, and TLS. There is no
    /// reconnecting and only this connection. A task on the current tokio runtime, which needs
    /// time enabled, drives it.
    ///
    /// # Errors
    ///
    /// As for [`Connector::connect`].
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future drops the stream.
    pub async fn connect_over<S>(&self, stream: S) -> Result<Client>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let stream = Stream::Plain(Socket::Other(Box::new(stream)));
        let settings = &self.settings;
        let tls = load_tls(settings).await?;
        let wire = Wire::new(stream, settings.target(), settings.handshake_timeout, tls);
        let first = establish(wire, &settings.wanted).await?;
        let alone = Settings {
            connections: NonZeroUsize::MIN,
            reconnect: None,
            runtimes: Arc::new([]),
            ..settings.clone()
        };
        Client::start(&alone, first).await
    }
}
