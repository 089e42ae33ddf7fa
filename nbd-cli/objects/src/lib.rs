//! Disk images and backups on S3-compatible object stores.
//!
//! Requests are made and parsed by the crate [`object_store`]; the transport and TLS are this
//! crate's own, so that there is one TLS library, and each wait has an end.

mod runtime;

pub use runtime::runtime;
