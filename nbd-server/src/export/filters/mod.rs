//! Filters: exports that wrap other exports.
//!
//! [`Window`] serves a part of a disk as a separate disk. [`FilterOptions`] change requests: ignore
//! discards, detect zeroes, make writes durable before the answer. Both cost nothing where they
//! change nothing, and forward the calls that make an export fast. A custom filter implements
//! [`Filter`](super::Filter).
//!
//! ```
//! use std::sync::Arc;
//!
//! use nbd_server::export::filters::{Discard, FilterOptions, Window};
//! use nbd_server::export::{Export, MemoryExport};
//!
//! let disk: Arc<dyn Export> = Arc::new(MemoryExport::new(1 << 20));
//! let part = Window { offset: 64 << 10, size: Some(128 << 10) }.apply(disk)?;
//! let mut options = FilterOptions::default();
//! options.discard = Discard::Ignore;
//! let part = options.apply(part);
//! assert_eq!(part.info().size, 128 << 10);
//! # Ok::<(), nbd_server::export::filters::WindowError>(())
//! ```
//!
//! `examples/filtered_export.rs` serves such a part.

mod options;
mod requests;
mod window;

pub use options::{
    AdvisedMinimum, Blocking, DetectZeroes, Discard, FilterOptions, Medium, MultiConn,
    PreferredSize, WriteCache, ZeroUnit,
};
pub use requests::RequestFilter;
pub use window::{Window, WindowError};
