//! A repository of backups on an object store or in a folder.
//!
//! Its format is described in `FORMAT.md`.

#![allow(dead_code, unused_imports, reason = "the commands that use it follow")]

mod error;
mod id;
mod pack;
mod page;
mod protocol;
mod reader;
mod root;
mod seal;
mod stored;

pub use self::error::{RepositoryError, RepositoryErrorKind, Result};
pub use self::id::Id;
pub use self::pack::PACK_SIZE;
pub use self::page::{BLOCK_SIZE, PAGE_BLOCKS};
pub use self::root::{DISK_SIZE_MAX, Head};
