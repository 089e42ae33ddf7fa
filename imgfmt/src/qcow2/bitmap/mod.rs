//! Persistent dirty bitmaps, as the format defines them.
//!
//! [`directory`] reads and writes the list of bitmaps, and [`table`] the bits of one. [`store`]
//! holds the bitmaps of one open image. [`change`] plans another list, and [`commit`] switches to
//! it at one instant; [`freeze`] has the changes that checkpoints make. [`mark`] marks bitmaps as
//! in use at the first change of the disk. [`session`] then keeps the bits in a file that survives
//! a crash, and [`recover`] reads them from it. [`close`] stores the bits, or [`overwrite`] where
//! there is no space.

mod change;
mod close;
mod commit;
mod directory;
mod error;
mod freeze;
mod frozen;
mod lineage;
mod lineage_change;
mod mark;
mod overwrite;
mod ownership;
mod plan;
mod query;
mod recover;
mod repair;
mod resize;
mod session;
mod session_state;
mod sidecar;
mod store;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use error::no_bitmap;
pub use frozen::frozen_bitmap_name;
pub(crate) use store::Bitmaps;
pub(in crate::qcow2) use store::ImageServices;
