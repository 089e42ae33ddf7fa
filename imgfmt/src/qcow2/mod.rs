//! qcow2 images, versions 2 and 3.
//!
//! A guest offset is looked up in two steps: the L1 table, always in memory, names L2 tables, which
//! are cached; an L2 entry gives the place of a cluster's data. [`map`] does only that; [`io`] then
//! transfers the bytes with no lock held. Changes of metadata are made in memory; [`flush`] writes
//! them to disk in a safe order. [`image`] combines the parts.

mod alloc;
mod bitmap;
mod check;
mod close;
mod data_file;
mod detach;
mod flush;
mod image;
mod info;
mod io;
mod layer;
mod map;
mod metadata;
mod on_disk;
mod open;
mod purpose;
mod structure;

pub use bitmap::frozen_bitmap_name;
pub(crate) use bitmap::no_bitmap;
pub use check::{CheckReport, Repair};
pub(crate) use image::Qcow2;
pub use info::{BitmapEntry, Qcow2Info};
pub(crate) use io::populate::{Below, Populated};
pub(crate) use metadata::backing_change::{Use, change_backing};
pub(crate) use metadata::seal::seal;
pub(crate) use on_disk::incomplete::incomplete_header;
pub use on_disk::snapshot::Snapshot;
pub(crate) use purpose::Purpose;
pub(crate) use structure::amend::{amend, luks_place, refuse_amendment};
pub(crate) use structure::create::{check_sizes, layout};
pub(crate) use structure::snapshot_change::Changed;
