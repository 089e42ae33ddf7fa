//! A client for programs without an async runtime.
//!
//! [`Client`] makes the requests of [`crate::Client`] and waits for their answers. It is described
//! by the same [`Connector`]: TCP, unix sockets and TLS, time limits, several connections,
//! reconnecting.
//!
//! ```
//! # fn example(uri: &str) -> nbd_client::Result<()> {
//! use nbd_client::{Bytes, Connector, Durability, blocking};
//!
//! let connector: Connector = uri.parse()?;
//! let client = blocking::Client::connect(&connector)?;
//! client.write(0, Bytes::from_static(b"hello"), Durability::Cached)?;
//! client.flush()?;
//! assert_eq!(client.read(0..5)?, "hello");
//! client.disconnect()
//! # }
//! # let directory = tempfile::tempdir()?;
//! # let socket = directory.path().join("nbd.sock");
//! # let runtime = tokio::runtime::Runtime::new()?;
//! # let exports = nbd_server::ExportRegistry::new();
//! # let disk = std::sync::Arc::new(nbd_server::export::MemoryExport::new(1 << 20));
//! # exports.add("", nbd_server::export::ExportEntry::new(disk))?;
//! # let mut server = nbd_server::Server::new(nbd_server::ServerConfig::default(), exports);
//! # let address = nbd_server::ListenAddress::Unix(socket);
//! # let address = runtime.block_on(server.listen(&address))?.remove(0);
//! # let serving = runtime.spawn(server.serve(std::future::pending::<()>()));
//! # example(&address.uri("").to_string())?;
//! # serving.abort();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Threads
//!
//! Each client has a thread that drives its connections; a client with several connections has one
//! more thread for each connection, up to the number of processors. A call hands its request to
//! that thread and blocks the calling thread until the answer is complete. Clones share the
//! connections and may be used from many threads at once; that is how several requests are in
//! flight together.
//!
//! # In asynchronous programs
//!
//! Every function here may be called from an asynchronous task: none panics there, and none waits
//! for the runtime of the caller. But each blocks the thread of that runtime, and the other tasks
//! on it, until it returns. In asynchronous code use [`crate::Client`], or make the calls in
//! `tokio::task::spawn_blocking`.

mod wait;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd_proto::handshake::ListedExport;
use nbd_proto::transmission::{Durability, ExtentLimit, Speed, ZeroMode};
use nbd_proto::wire::{BlockDescriptor, MetaContextName, ReplyMode};

use crate::client;
use crate::connector::Connector;
use crate::error::Result;
use crate::extents::{Extent, ExtentStream};
use crate::inflight::ReadChunk;
use crate::info::{ExportInfo, Protocol, Scope, ServerInfo};

pub use wait::Interrupter;
use wait::{Driver, run};

/// A connected client whose methods block until they are complete.
///
/// Clones share the connections and may be used from many threads at once. Dropping the last clone
/// ends the connections in the background and returns at once: if the program exits right
/// afterwards, the connections may be cut off. [`Client::disconnect`] waits for the end.
///
/// Requests in flight may overtake each other. This matters only between threads: on one thread
/// each request is complete before the next begins.
///
/// # Errors
///
/// All request methods fail like those of [`crate::Client`], and with
/// [`Error::Interrupted`](crate::Error::Interrupted) once the [`Interrupter`] passed at connecting
/// is used.
#[derive(Debug, Clone)]
pub struct Client {
    client: client::Client,
    interrupter: Interrupter,
    /// Ends the thread after the last clone.
    driver: Arc<Driver>,
}

impl Client {
    /// Connects. Time limits are those of the connector:
    /// [`handshake_timeout`](Connector::handshake_timeout) for this call,
    /// [`request_timeout`](Connector::request_timeout) for each request.
    ///
    /// # Errors
    ///
    /// As for [`Connector::connect`], and [`Error::NoThread`](crate::Error::NoThread).
    pub fn connect(connector: &Connector) -> Result<Self> {
        Self::connect_interruptible(connector, &Interrupter::new())
    }

    /// Connects; `interrupter` can cancel this call and all later calls of the client.
    ///
    /// # Errors
    ///
    /// As for [`Client::connect`], and [`Error::Interrupted`](crate::Error::Interrupted).
    pub fn connect_interruptible(connector: &Connector, interrupter: &Interrupter) -> Result<Self> {
        let (client, driver) = Driver::start(connector, interrupter)?;
        let interrupter = interrupter.clone();
        Ok(Self { client, interrupter, driver: Arc::new(driver) })
    }

    /// Returns the client of asynchronous tasks over the same connections. They end with this
    /// client.
    #[must_use]
    pub const fn asynchronous(&self) -> &client::Client {
        &self.client
    }

    /// Returns the properties of the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        self.client.info()
    }

    /// Returns true if every connection is protected by TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.client.is_encrypted()
    }

    /// Returns the kind of handshake that the server uses.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.client.protocol()
    }

    /// Returns the negotiated form of replies.
    #[must_use]
    pub fn reply_mode(&self) -> ReplyMode {
        self.client.reply_mode()
    }

    /// Returns the number of connections that were opened.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.client.connections()
    }

    /// Returns the number of lost connections that were replaced so far: see
    /// [`Client::reconnects`](crate::Client::reconnects).
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.client.reconnects()
    }

    /// Returns the requested metadata contexts that the server has, in the order of the request.
    #[must_use]
    pub fn meta_contexts(&self) -> &[MetaContextName] {
        self.client.meta_contexts()
    }

    /// Reads a range of the export, in bytes. Ranges longer than the server's maximum are split.
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn read(&self, range: Range<u64>) -> Result<Bytes> {
        self.wait(self.client.read(range))
    }

    /// Like [`Client::read`], into memory that the caller no longer needs: see
    /// [`Client::read_reusing`](crate::Client::read_reusing).
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn read_reusing(&self, range: Range<u64>, buffer: BytesMut) -> Result<Bytes> {
        self.wait(self.client.read_reusing(range, buffer))
    }

    /// Fills `buffer` with the bytes at `offset`. Needs one copy more than [`Client::read`].
    ///
    /// # Errors
    ///
    /// See [`Client`]. After an error the contents of `buffer` are unspecified.
    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.wait(self.client.read_into(offset, buffer))
    }

    /// Reads a range as data and holes, in ascending order and without gaps.
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn read_chunks(&self, range: Range<u64>) -> Result<Vec<ReadChunk>> {
        self.wait(self.client.read_chunks(range))
    }

    /// Writes `data` at `offset`. Writes longer than the server's maximum are split; if one part
    /// fails, others may have been carried out.
    ///
    /// # Errors
    ///
    /// See [`Client`]; FUA needs a server with
    /// [`SEND_FUA`](crate::TransmissionFlags::SEND_FUA).
    pub fn write(&self, offset: u64, data: Bytes, durability: Durability) -> Result<()> {
        self.wait(self.client.write(offset, data, durability))
    }

    /// Makes all writes durable that were complete before the call, on all connections.
    ///
    /// # Errors
    ///
    /// See [`Client`]; needs [`SEND_FLUSH`](crate::TransmissionFlags::SEND_FLUSH).
    pub fn flush(&self) -> Result<()> {
        self.wait(self.client.flush())
    }

    /// Discards the range: the server may free its space, and the contents are undefined
    /// afterwards. Needs [`SEND_TRIM`](crate::TransmissionFlags::SEND_TRIM).
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn trim(&self, range: Range<u64>, durability: Durability) -> Result<()> {
        self.wait(self.client.trim(range, durability))
    }

    /// Asks the server to prefetch the range. Needs
    /// [`SEND_CACHE`](crate::TransmissionFlags::SEND_CACHE).
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn cache(&self, range: Range<u64>) -> Result<()> {
        self.wait(self.client.cache(range))
    }

    /// Makes the range read as zeroes: see [`Client::write_zeroes`](crate::Client::write_zeroes).
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn write_zeroes(
        &self,
        range: Range<u64>,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()> {
        self.wait(self.client.write_zeroes(range, mode, speed, durability))
    }

    /// Queries the status of the start of the range in every selected metadata context: see
    /// [`Client::block_status`](crate::Client::block_status).
    ///
    /// # Errors
    ///
    /// See [`Client`].
    pub fn block_status(
        &self,
        range: Range<u64>,
        limit: ExtentLimit,
    ) -> Result<Vec<(MetaContextName, Vec<BlockDescriptor>)>> {
        self.wait(self.client.block_status(range, limit))
    }

    /// Returns the extents of `range` in one context, in ascending order and without gaps;
    /// neighbours differ in status. The first request is sent when the first extent is needed. The
    /// iterator ends after an error.
    #[must_use]
    pub fn extents(&self, context: &MetaContextName, range: Range<u64>) -> Extents {
        Extents { stream: self.client.extents(context, range), client: self.clone() }
    }

    /// Ends the connections after the requests made before, and waits for the end. Other clones get
    /// [`Error::Closed`](crate::Error::Closed) from then on. Nothing is flushed: call
    /// [`Client::flush`] first.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`](crate::Error::Lost) if a connection had been lost before, or requests were
    /// still unanswered after 5 s; [`Error::Interrupted`](crate::Error::Interrupted).
    pub fn disconnect(self) -> Result<()> {
        self.wait(self.client.clone().disconnect())
    }

    fn wait<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        self.driver.server.wait(&self.interrupter, request)
    }
}

/// The extents of a range, returned by [`Client::extents`].
#[derive(Debug)]
pub struct Extents {
    stream: ExtentStream,
    client: Client,
}

impl Iterator for Extents {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.stream.next();
        self.client.wait(async { next.await.transpose() }).transpose()
    }
}

/// Lists the names of all exports: [`Connector::list`], blocking.
///
/// # Errors
///
/// As for [`Connector::list`], and [`Error::NoThread`](crate::Error::NoThread).
pub fn list(connector: &Connector) -> Result<Vec<ListedExport>> {
    run(NonZeroUsize::MIN, connector.list())
}

/// Lists the metadata contexts of the export: [`Connector::list_meta_contexts`], blocking.
///
/// # Errors
///
/// As for [`list`].
pub fn list_meta_contexts(
    connector: &Connector,
    queries: &[String],
) -> Result<Vec<MetaContextName>> {
    run(NonZeroUsize::MIN, connector.list_meta_contexts(queries))
}

/// Queries all properties of a server and its exports: [`Connector::inspect`], blocking.
///
/// # Errors
///
/// As for [`list`].
pub fn inspect(connector: &Connector, scope: Scope) -> Result<ServerInfo> {
    run(NonZeroUsize::MIN, connector.inspect(scope))
}
