//! A Network Block Device client.
//!
//! ```text
//!   Connector --connect()--> Client (clones, used from many tasks)
//!       |                      | requests, answers
//!       | list(), inspect()    v
//!       |                    Link x connections: a queue and a task
//!       v                      |  Driver: gathers requests, takes replies apart
//!   Wire: the handshake        v
//!   over a Stream ---------> nbd_proto::transmission::client, Stream (TCP, unix)
//! ```
//!
//! [`Connector`] says where to connect and what to ask for: everything newer falls back to
//! everything older, from extended headers to oldstyle servers. [`Client`] makes requests; many at
//! once share one connection or several. The server is not trusted: an answer that does not fit
//! its request ends the connection with an error that says what was wrong.
//!
//! # Example
//!
//! ```no_run
//! use nbd_client::{Bytes, Connector, Durability, MetaContextName};
//!
//! # async fn example() -> nbd_client::Result<()> {
//! let connector: Connector = "nbd+unix:///disk?socket=/run/nbd.sock".parse()?;
//! let allocation = MetaContextName::base_allocation();
//! let client = connector.meta_contexts([allocation.clone()]).connect().await?;
//!
//! client.write(0, Bytes::from_static(b"hello"), Durability::Cached).await?;
//! assert_eq!(client.read(0, 5).await?, "hello");
//! client.flush().await?;
//!
//! let mut extents = client.extents(&allocation, 0..client.info().size);
//! while let Some(extent) = extents.next().await {
//!     let extent = extent?;
//!     println!("{} bytes at {}: {:?}", extent.length, extent.offset, extent.allocation());
//! }
//! client.disconnect().await
//! # }
//! ```

mod client;
mod connector;
mod driver;
mod error;
mod extents;
mod handshake;
mod inflight;
mod inspect;
mod link;
mod outbound;
mod queue;
mod reconnect;
mod requests;
mod transport;

pub use bytes::Bytes;
pub use client::Client;
pub use connector::Connector;
pub use error::{Error, LostConnection, Result};
pub use extents::{Extent, ExtentStream};
pub use inflight::Piece;
pub use inspect::{ExportInfo, Protocol, Scope, ServerInfo};
pub use nbd_proto::handshake::{ListedExport, OptionError};
pub use nbd_proto::transmission::client::ServerError;
pub use nbd_proto::transmission::{Durability, ExtentLimit, Speed, ZeroMode};
pub use nbd_proto::uri::{NbdUri, Transport};
pub use nbd_proto::wire::{
    AllocationFlags, BlockDescriptor, BlockSizes, Errno, MetaContextName, OptionReplyType,
    ReplyMode, TransmissionFlags,
};
pub use nbd_proto::{ApiMisuse, ProtocolError};
