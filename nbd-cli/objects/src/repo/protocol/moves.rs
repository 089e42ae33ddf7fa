//! Which map a backup has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::super::id::Id;
use super::super::seal::Hash;

/// A compaction, as the protocol sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Compaction {
    /// What it moves, sorted by the backups.
    pub(crate) moved: Arc<[Moved]>,
    /// The object; when it is read, its head alone. The search has none.
    pub(crate) object: Bytes,
}

impl Compaction {
    /// Returns whether another one, which was read, is this one.
    pub(super) fn is(&self, read: &Self) -> bool {
        self.moved == read.moved && self.object.starts_with(&read.object)
    }
}

/// A backup that a compaction moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Moved {
    pub(crate) backup: Id,
    /// Where its map is. The search does not say.
    pub(crate) part: Part,
}

/// A part of the object of a compaction. Lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Part {
    pub(crate) number: u32,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    /// Length before compression.
    pub(crate) content: u32,
    pub(crate) hash: Hash,
}

/// What the compactions move. Everybody who needs the map of a backup asks here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Moves(BTreeMap<Id, Arc<[Moved]>>);

impl Moves {
    pub(crate) fn add(&mut self, compaction: Id, moved: Arc<[Moved]>) {
        self.0.insert(compaction, moved);
    }

    /// The compactions, oldest first.
    pub(crate) fn ids(&self) -> impl DoubleEndedIterator<Item = Id> + '_ {
        self.0.keys().copied()
    }

    /// Returns the compaction that has the map of a backup; `None` if the backup has it itself.
    pub(crate) fn map_of(&self, backup: Id) -> Option<(Id, Moved)> {
        self.all_of(backup).next()
    }

    pub(crate) fn has(&self, compaction: Id) -> bool {
        self.0.contains_key(&compaction)
    }

    /// Returns all compactions that have a map of the backup, newest first.
    pub(super) fn all_of(&self, backup: Id) -> impl Iterator<Item = (Id, Moved)> + '_ {
        self.0.iter().rev().filter_map(move |(id, moved)| {
            let at = moved.binary_search_by_key(&backup, |moved| moved.backup).ok()?;
            Some((*id, moved[at]))
        })
    }

    /// Returns whether a compaction moves one of these backups.
    pub(super) fn has_any(&self, compaction: Id, backups: &BTreeSet<Id>) -> bool {
        let moved = self.0.get(&compaction);
        moved.is_some_and(|moved| moved.iter().any(|moved| backups.contains(&moved.backup)))
    }
}
