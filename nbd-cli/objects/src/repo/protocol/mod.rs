//! The protocol by which writers, collectors and readers share a repository without locks and
//! clocks.
//!
//! Each party is a machine: it gives one request at a time and takes its answer. A driver carries
//! the requests out; a test searches all orders in which the requests of several parties can reach
//! the store. The rules, and why each is needed, are in `FORMAT.md`.

mod collector;
mod forget;
mod moves;
mod reader;
#[cfg(test)]
mod search;
mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::id::{Folder, Id, Key, PackId};

pub(crate) use self::collector::{Collected, Collector};
pub(crate) use self::forget::Forget;
pub(crate) use self::moves::{Compaction, Moved, Moves, Part};
pub(crate) use self::reader::Reader;
pub(crate) use self::writer::{Committed, Writer};

/// The object of a backup, as the protocol sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Backup {
    /// The packs that it needs.
    pub(crate) packs: Arc<[PackId]>,
    /// The object itself. The search has none.
    pub(crate) object: Bytes,
}

/// What an object holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Object {
    /// A backup.
    Live(Backup),
    /// A tombstone, with the backup that was there, if there was one and it is still kept.
    Tombstone(Option<Backup>),
    /// The record of a session.
    Session(Bytes),
    /// Packs that a collector wants to delete.
    Condemned(Arc<BTreeSet<PackId>>),
    /// The backup that is read.
    Pin(Id),
    /// A compaction.
    Compaction(Compaction),
    /// Says that there may be a compaction.
    Mark,
}

/// A request to the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Request {
    /// Writes an object, over another one if there is one.
    Put(Key, Object),
    /// Writes an object unless there is one.
    Create(Key, Object),
    /// Reads an object.
    Get(Key),
    /// Reads which backups a compaction moves. What is none, or damaged, is [`Answer::Damaged`].
    GetMoves(Id),
    /// Reads the map of a backup in a compaction.
    GetMap(Id, Moved),
    /// Lists the objects of a folder.
    List(Folder),
    /// Removes an object, if there is one.
    Delete(Key),
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Answer {
    /// It is done.
    Done,
    /// There is an object of this name already.
    Exists,
    /// There is no such object.
    Missing,
    /// The object.
    Found(Object),
    /// The object holds something else than was written.
    Damaged,
    /// The names of the objects.
    Listed(Vec<Key>),
}

/// What a machine does next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step<T> {
    /// It needs the answer to a request.
    Request(Request),
    /// It is at an end, or at a point at which its user goes on.
    Reached(T),
}

/// The rules of the protocol. Only the search ever leaves one out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rules {
    /// A session is registered before the condemned lists are read.
    pub(crate) session_first: bool,
    /// Packs on a condemned list are not referred to.
    pub(crate) heed_condemned: bool,
    /// A collector deletes nothing before the sessions that it found have ended.
    pub(crate) wait_for_sessions: bool,
    /// A backup is created, never written over a tombstone.
    pub(crate) create: bool,
    /// A collector looks again at what is referred to before it deletes.
    pub(crate) mark_again: bool,
    /// Pinned backups count as live ones.
    pub(crate) heed_pins: bool,
    /// A reader pins before it reads.
    pub(crate) pin_first: bool,
    /// A tombstone stays for ever.
    pub(crate) keep_tombstones: bool,
    /// Packs are listed after the list of another collector was read, and before it is removed.
    pub(crate) list_packs_again: bool,
    /// Pinned backups keep all maps that they have had.
    pub(crate) keep_maps: bool,
    /// They do so in the second look as well.
    pub(crate) keep_maps_again: bool,
    /// A reader lists the compactions after it has pinned.
    pub(crate) list_moved_after_pin: bool,
    /// A compaction is marked before it is created.
    pub(crate) mark_first: bool,
    /// For a collector, a compaction that is not marked moves nothing, as for readers.
    pub(crate) heed_marks: bool,
}

impl Rules {
    /// All rules.
    pub(crate) const ALL: Self = Self {
        session_first: true,
        heed_condemned: true,
        wait_for_sessions: true,
        create: true,
        mark_again: true,
        heed_pins: true,
        pin_first: true,
        keep_tombstones: true,
        list_packs_again: true,
        keep_maps: true,
        keep_maps_again: true,
        list_moved_after_pin: true,
        mark_first: true,
        heed_marks: true,
    };
}
