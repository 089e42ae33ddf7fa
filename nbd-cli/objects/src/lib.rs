//! Disk images and backups on S3-compatible object stores.
//!
//! Requests are made and parsed by the crate [`object_store`]; the transport and TLS are this
//! crate's own, so that there is one TLS library, and each wait has an end.

mod calendar;
mod credentials;
mod crypto;
mod error;
mod image;
mod location;
mod push;
mod refusal;
pub mod repo;
mod runtime;
mod settings;
mod shown;
mod store;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
mod transport;
mod uploads;

pub use error::{Result, StoreError, StoreErrorKind};
pub use image::{
    BLOCK_LEN, CACHE_SIZE_MIN, CacheSettings, Interrupted, ObjectCache, ObjectStorage, Reads,
};
pub use location::{SCHEMES, StoreUrl};
pub use push::{PushOptions, PushSource, Pushed, push};
pub use runtime::runtime;
pub use settings::{Addressing, Environment, StoreSettings, Timeouts};
pub use store::Place;
