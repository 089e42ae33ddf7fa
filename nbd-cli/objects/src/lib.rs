//! Disk images and backups on S3-compatible object stores.
//!
//! Requests are made and parsed by the crate [`object_store`]; the transport and TLS are this
//! crate's own, so that there is one TLS library, and each wait has an end.

mod credentials;
mod crypto;
mod error;
mod location;
pub mod repo;
mod runtime;
mod settings;
mod store;
mod transport;

pub use error::{Result, StoreError, StoreErrorKind};
pub use location::{SCHEMES, StoreUrl};
pub use runtime::runtime;
pub use settings::{Addressing, Environment, StoreSettings, Timeouts};
pub use store::Place;
