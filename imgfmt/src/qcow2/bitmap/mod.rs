//! Persistent dirty bitmaps, as the format defines them.
//!
//! [`directory`] knows the list of bitmaps and [`table`] the bits of one. [`store`] holds the bitmaps
//! of one open image. [`change`] plans another list, which [`commit`] makes true at one instant;
//! [`freeze`] is what checkpoints do. [`mark`] announces the first change of the disk, for which
//! [`session`] keeps the bits where they survive a crash; [`recover`] finds them there. [`close`]
//! stores what was noted while the image was open.

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
