//! Files that are renamed when they are complete.
//!
//! A command that creates a file writes it as `NAME.partial` beside the final name and renames it
//! at the end. An interruption, including `kill -9` and power failure, never leaves an incomplete
//! file under the final name, and an existing file stays unchanged until then. For block devices
//! see [`device`].

mod attributes;
mod companions;
pub mod device;
mod existing;
mod new_file;
mod publish;
pub(crate) mod stacked;

pub use self::existing::{Existing, final_name, look};
#[cfg(feature = "object-storage")]
pub(crate) use self::new_file::partial_name;
pub use self::new_file::{Durable, NewFile};
