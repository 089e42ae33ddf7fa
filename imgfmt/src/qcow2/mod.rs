//! qcow2 images, versions 2 and 3.
//!
//! A guest offset is looked up in two steps: the L1 table, always in memory, names L2 tables, which
//! are [cached](cache); an L2 entry says where a cluster's data is. [`map`] does that and nothing
//! else; [`read`] and [`write`] then move the bytes with no lock held. Changes of metadata are made
//! in memory and reach the disk in the order that [`flush`] keeps.

#![allow(dead_code)]

mod alloc;
mod cache;
mod compress;
mod driver;
mod extension;
mod flush;
mod geometry;
mod header;
mod l2;
mod lease;
mod map;
mod open;
mod read;
mod refcount;
mod snapshot;
mod tables;
mod write;
mod writer;
mod zero;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use crate::driver::Driver;
use crate::error::{Error, ErrorKind};
use crate::storage::Storage;

use cache::TableCache;
use geometry::Geometry;
use header::Header;
use l2::{Compressed, EntryFormat};
use writer::Writer;

pub use snapshot::Snapshot;

/// An open qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    /// Holds the metadata, and the data too unless there is a data file.
    file: Arc<dyn Storage>,
    /// Holds the data.
    data: Arc<dyn Storage>,
    path: Option<PathBuf>,
    header: Header,
    format: EntryFormat,
    /// Size of the disk that is shown: the image's or that of a snapshot.
    size: u64,
    /// Offsets of L2 tables and their COPIED bits, as in the file.
    l1: Box<[AtomicU64]>,
    tables: TableCache,
    backing: Option<Backing>,
    /// Everything that only an image open for writing needs.
    writer: Option<Writer>,
    decompressed: Mutex<VecDeque<(Compressed, Arc<[u8]>)>>,
}

/// The image below, which has what this one has not.
#[derive(Debug)]
struct Backing {
    driver: Box<dyn Driver>,
    size: u64,
}

impl Qcow2 {
    fn geometry(&self) -> Geometry {
        self.format.geometry
    }
}

/// The error of a change to an image that was opened read-only.
fn unwritable() -> Error {
    Error::new(ErrorKind::ReadOnly, "change", "the image was opened read-only")
}
