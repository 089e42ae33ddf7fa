//! The server's side of the control socket: for any `nbd-server` (feature `server`).
//!
//! ```
//! use std::sync::Arc;
//!
//! use nbd_jobs::control::server::{ControlSocket, Controller, ServedDisk, ServedDisks};
//! use nbd_server::export::MemoryExport;
//! use nbd_server::{ExportRegistry, Server, ServerConfig};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("control");
//! # tokio::runtime::Runtime::new()?.block_on(async move {
//! let server = Server::new(ServerConfig::default(), ExportRegistry::new()).start();
//! let controller = Arc::new(Controller::new(server.handle().clone(), ServedDisks::default()));
//! let disk = ServedDisk::new("memory:1M", Arc::new(MemoryExport::new(1 << 20)));
//! controller.add_export("disk", disk).await?;
//! let (socket, served) = (ControlSocket::open(&path).await?, controller.clone());
//! let clients = tokio::spawn(async move { socket.serve(served).await });
//! // … until a client requests it: controller.shutdown_requested().await
//! clients.abort();
//! server.shutdown();
//! controller.end_checkpoints().await;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bitmaps;
mod checkpoint;
mod checkpoint_bitmap;
mod closed;
mod controller;
mod disks;
mod event;
mod files;
mod lines;
mod listing;
mod openings;
mod requests;
mod slots;
mod socket;
mod stream;
mod streaming;
mod together;

pub use self::closed::{ClosedDisks, NotClosed, refuse_removed};
pub use self::controller::{Controller, Reloading, RequestedSource};
pub use self::disks::{Reopen, ServedDisk, ServedDisks};
pub use self::event::{ControlEvent, ControlObserver};
pub(crate) use self::files::{DiskFile, DiskFiles};
pub use self::openings::OpeningGuard;
pub use self::socket::{ControlSocket, ControlSocketError};
