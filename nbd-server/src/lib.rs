//! A Network Block Device server.
//!
//! The protocol itself is in `nbd-proto`; this crate owns the sockets, the exports, the memory for
//! requests, and the orderly shutdown.
//!
//! ```text
//!   ListenAddress --> Server --accept--> worker threads, each with a small runtime
//!                       |                      |
//!                 ExportRegistry         one connection = one task:
//!                  name -> Export          handshake, then  receive -> execute -> send
//!                                                                |
//!                                          calls that may block go through a fair queue to a few threads
//! ```
//!
//! The crate never reads the environment (except for [`ListenAddress::Systemd`]), never prints and
//! never exits the process; it logs through `tracing`.
//!
//! # Example
//!
//! A disk in memory, served until the caller stops the server:
//!
//! ```
//! use std::sync::Arc;
//! use nbd_server::export::{ExportEntry, MemoryExport};
//! use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
//!
//! # let directory = tempfile::tempdir()?;
//! # let socket = directory.path().join("nbd.sock");
//! # tokio::runtime::Runtime::new()?.block_on(async move {
//! let exports = ExportRegistry::new();
//! exports.add("scratch", ExportEntry::new(Arc::new(MemoryExport::new(1 << 20))))?;
//! exports.set_default("scratch");
//!
//! let mut server = Server::new(ServerConfig::default(), exports);
//! server.listen(&ListenAddress::Unix(socket)).await?;
//! let mut server = server.start();
//! println!("{}", server.addresses()[0].uri("scratch"));
//! // ... clients come and go ...
//! server.shutdown();
//! server.wait().await?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//!
//! * `image` (default): [`export::ImageExport`], disk images through the `imgfmt` crate.
//! * `tls` (default): the module `tls`, through OpenSSL.

mod acceptor;
mod access;
mod budget;
mod client;
mod clients;
mod config;
mod connection;
mod error;
pub mod export;
mod handle;
mod handover;
mod listen_address;
mod listener;
mod log_limit;
mod overview;
mod pace;
mod paused;
mod queue;
mod quota;
mod reply_bytes;
mod ring;
mod rules;
mod running;
mod scheduler;
mod server;
mod serving;
mod shutdown;
mod slots;
mod socket_file;
pub mod statistics;
mod sys;
#[cfg(feature = "tls")]
pub mod tls;
mod worker;

pub use access::Refusal;
pub use client::{ClientAddress, ClientInfo};
pub use clients::{ClientCount, ClientStatistics, ConnectedClient};
pub use config::ServerConfig;
pub use error::{RegistryError, ServeError};
pub use export::ExportRegistry;
pub use handle::{InUse, RemoveError, ServerHandle};
pub use listen_address::{BoundAddress, ListenAddress};
pub use nbd_proto::uri::{NbdUri, Security, Transport};
pub use nbd_proto::wire::ReplyMode;
pub use overview::{PoolStatistics, ServerStatistics};
pub use paused::{ListenerOrigin, Paused, PausedConnection, PausedListener};
pub use quota::Quota;
pub use ring::RingStatistics;
pub use rules::{AccessRules, ClientRule, Network, Permission};
pub use running::{ClientStream, ConnectionRefused, RunningServer};
pub use server::Server;
