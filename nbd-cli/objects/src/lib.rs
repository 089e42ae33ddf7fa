//! Disk images and backups on S3-compatible object stores.
//!
//! Requests are made and parsed by the crate [`object_store`]; the transport and TLS are this
//! crate's own, so that there is one TLS library, and each wait has an end.
//!
//! [`ObjectStorage`] is an image in a store, for reading; [`push`] uploads one, and [`repo`] is a
//! repository of backups:
//!
//! ```
//! use std::sync::Arc;
//!
//! use imgfmt::{GuestOffset, Image, OpenOptions};
//! use nbd_objects::{CacheSettings, ObjectCache, ObjectStorage, StoreSettings, StoreUrl};
//!
//! # let store = nbd_objects::testing::TestStore::start()?;
//! # store.put("/bucket/disk.img", vec![7; 1 << 20]);
//! # let address = format!("{}/bucket/disk.img", store.endpoint());
//! let url: StoreUrl = address.parse()?; // such as https://example.org/disk.qcow2
//! let cache = ObjectCache::open(&CacheSettings::default())?;
//! let interrupted = Arc::new(|| false);
//! let object = ObjectStorage::open(&url, &StoreSettings::default(), &cache, interrupted)?;
//! let image = Image::from_storage(Arc::new(object), &OpenOptions::new())?;
//! let mut start = [0; 4];
//! image.read_at(GuestOffset::new(0), &mut start)?;
//! assert_eq!(start, [7; 4]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
