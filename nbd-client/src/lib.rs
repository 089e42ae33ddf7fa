//! A Network Block Device client.
//!
//! ```text
//!   Connector --connect()--> Client (clones, used from many tasks)
//!       |                      | requests, answers
//!       | list(), inspect()    v
//!       |                    Connection, one or several: a queue and a task
//!       v                      |  Driver: gathers requests, takes replies apart
//!   Wire: the handshake        v
//!   over a Stream ---------> nbd_proto::transmission::client, Stream (TCP, unix, TLS over them)
//! ```
//!
//! [`Connector`] has the address and the features to request: newer features fall back to older
//! ones, from extended headers to oldstyle servers. [`Client`] makes requests; concurrent ones
//! share one or several connections. The server is not trusted: an answer that does not match its
//! request ends the connection with an error that names the mismatch.
//!
//! # TLS
//!
//! A URI with `nbds` or [`Connector::tls`] protects connections by TLS 1.2 or 1.3, with
//! certificates or with a pre-shared key; [`TlsError`] names the credential and the failed check.
//! TLS is the cargo feature `tls`, which is on by default. It uses the system's OpenSSL, or one
//! built from source if the program enables the feature `vendored` of the crate `openssl`.
//!
//! Both sides with the same pre-shared keys, which a program may make and keep in memory:
//!
//! ```
//! # #[cfg(feature = "tls")] {
//! use std::sync::Arc;
//!
//! use nbd_client::{Connector, PreSharedKeys, TlsMode, TlsOptions};
//! use nbd_server::export::{ExportEntry, MemoryExport};
//! use nbd_server::tls::{self, CredentialSource, TlsCredentials};
//! use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
//!
//! # tokio::runtime::Runtime::new()?.block_on(async move {
//! let keys = PreSharedKeys::parse(b"alice:00112233445566778899aabbccddeeff\n")?;
//! let credentials = TlsCredentials::load(CredentialSource::PskKeys(keys.clone()))?;
//! let mut config = ServerConfig::default();
//! config.tls = tls::TlsMode::Require(credentials);
//! let exports = ExportRegistry::new();
//! exports.add("disk", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20))))?;
//! let mut server = Server::new(config, exports);
//! server.listen(&ListenAddress::Tcp("127.0.0.1:0".to_owned())).await?;
//! let mut server = server.start();
//!
//! let options = TlsOptions::new(TlsMode::Require).pre_shared_keys_in_memory(keys);
//! let connector = Connector::new(server.addresses()[0].uri("disk")).tls(options);
//! let client = connector.connect().await?;
//! assert!(client.is_encrypted());
//! client.disconnect().await?;
//! server.shutdown();
//! server.wait().await?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Other interfaces
//!
//! - [`blocking`]: the same requests for programs without an async runtime.
//! - [`Connector::connect_stream`]: the connection itself, for programs that send requests and
//!   receive replies themselves.
//! - `ExportStorage` (feature `image`): an export as an `imgfmt::Storage`, so that images and
//!   layers of images may be on servers.
//!
//! # Example
//!
//! A disk in memory on a local server, written, read and inspected:
//!
//! ```
//! use std::sync::Arc;
//!
//! use nbd_client::{Bytes, Connector, Durability, MetaContextName};
//! use nbd_server::export::{ExportEntry, MemoryExport};
//! use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
//!
//! # let directory = tempfile::tempdir()?;
//! # let socket = directory.path().join("nbd.sock");
//! # tokio::runtime::Runtime::new()?.block_on(async move {
//! let exports = ExportRegistry::new();
//! exports.add("disk", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20))))?;
//! let mut server = Server::new(ServerConfig::default(), exports);
//! let address = server.listen(&ListenAddress::Unix(socket)).await?.remove(0);
//! let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
//! let serving = tokio::spawn(server.serve(async { stopped.await.unwrap_or(()) }));
//!
//! let allocation = MetaContextName::base_allocation();
//! let connector = Connector::new(address.uri("disk")).meta_contexts([allocation.clone()]);
//! let client = connector.connect().await?;
//!
//! client.write(0, Bytes::from_static(b"hello"), Durability::Cached).await?;
//! assert_eq!(client.read(0..5).await?, "hello");
//! client.flush().await?;
//!
//! let mut extents = client.extents(&allocation, 0..client.info().size);
//! while let Some(extent) = extents.next().await {
//!     let extent = extent?;
//!     println!("{} bytes at {}: {:?}", extent.length, extent.offset, extent.allocation());
//! }
//! client.disconnect().await?;
//! stop.send(()).ok();
//! serving.await??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod blocking;
mod client;
mod connection;
mod connector;
mod dial;
mod driver;
mod error;
mod extents;
mod handshake;
mod inflight;
mod info;
mod inspect;
mod memory;
mod negotiated_stream;
mod outbound;
mod queue;
mod reconnect;
mod request_timer;
mod requests;
mod settings;
#[cfg(feature = "image")]
mod storage;
mod stream;
mod tls;
mod transport;

pub use bytes::{Bytes, BytesMut};
pub use client::Client;
pub use connector::Connector;
pub use error::{Error, LostConnection, Result};
pub use extents::{Extent, ExtentStream};
pub use inflight::ReadChunk;
pub use info::{ExportInfo, Protocol, RefusedExport, Scope, ServerInfo};
pub use memory::ReadMemory;
pub use nbd_proto::handshake::{ListedExport, Negotiated, OptionError};
pub use nbd_proto::tls::{KeyFileError, KeyPassword, PreSharedKeys};
pub use nbd_proto::transmission::client::ServerError;
pub use nbd_proto::transmission::{Durability, ExtentLimit, Speed, ZeroMode};
pub use nbd_proto::uri::{NbdUri, Security, TlsKind, Transport, UriError};
pub use nbd_proto::wire::{
    AllocationFlags, BlockDescriptor, BlockSizes, CommandType, DirtyFlags, Errno, MetaContextId,
    MetaContextName, OptionReplyType, ReplyMode, TransmissionFlags,
};
pub use nbd_proto::{ApiMisuse, ProtocolError};
pub use negotiated_stream::{NegotiatedStream, PlainSocket, Reconnector};
#[cfg(feature = "image")]
pub use storage::ExportStorage;
pub use tls::{CertificateCheck, LocalFiles, TlsError, TlsMode, TlsOptions, VerifyPeer};

/// The Rust code of README.md, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
