//! QEMU's drivers below an image format: what a disk's bytes are taken from.

mod null;
mod part;
mod sectors;

pub(super) use self::null::Null;
pub(super) use self::part::Part;
pub(super) use self::sectors::{SECTOR, in_whole_sectors};
