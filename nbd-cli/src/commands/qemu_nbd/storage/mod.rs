//! QEMU's drivers below an image format: the storage of a disk.

mod null;
mod part;
mod sectors;

pub(super) use self::null::Null;
pub(super) use self::part::Part;
pub(super) use self::sectors::{SECTOR, in_whole_sectors};
