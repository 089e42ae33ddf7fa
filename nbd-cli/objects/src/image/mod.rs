//! Images by URL: read-only storages, with a cache on the local disk.

mod cache;
mod cache_file;
mod fetch;
mod flights;
mod held;
mod sequences;
mod spare;
mod storage;

pub use cache::{CACHE_SIZE_MIN, CacheSettings, Reads};
pub use cache_file::BLOCK_LEN;
pub use fetch::ObjectCache;
pub use storage::{Interrupted, ObjectStorage};
