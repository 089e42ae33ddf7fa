//! A repository of backups on an object store or in a folder.
//!
//! Its format is described in `FORMAT.md`.

mod checking;
mod collecting;
mod compaction;
mod condemned_list;
mod config;
mod disks;
mod error;
mod head;
mod id;
#[cfg(any(test, feature = "test-util"))]
pub mod large;
mod listing;
mod making;
mod map;
mod name;
mod objects;
mod pack;
mod pack_list;
mod page;
mod pin_record;
mod protocol;
mod reader;
mod reading;
mod recent;
mod repository;
mod requests;
mod retention;
mod root;
mod seal;
mod session_record;
mod sessions;
mod staging;
mod stored;
mod succession;
#[cfg(test)]
mod tests;
mod tries;

pub use self::checking::{Checked, Problem};
pub use self::collecting::{CollectOptions, Garbage};
pub use self::disks::{DISKS_MAX, DiskHead, DiskOrigin, are_names, lay_out};
pub use self::error::{RepositoryError, RepositoryErrorKind, Result};
pub use self::head::Head;
pub use self::id::Id;
pub use self::listing::BackupInfo;
pub use self::making::{CompactOptions, Compacted, Made, NewBackup, OnCopied, Session};
pub use self::name::BackupName;
pub use self::objects::Creates;
pub use self::pack::PACK_SIZE;
pub use self::page::{BLOCK_SIZE, DISK_SIZE_MAX, PAGE_BLOCKS};
pub use self::pin_record::{ReaderInfo, host_name};
pub use self::reading::{Damage, Difference, OnDamage, OpenBackup};
pub use self::repository::Repository;
pub use self::retention::Retention;
pub use self::session_record::SessionRecord;
pub use self::sessions::{PinInfo, SessionInfo};
