//! The fixed part of a mount: directories, disks and partitions.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The number of the directory that is mounted on.
pub(super) const ROOT: u64 = 1;
/// The numbers of files inside file systems begin here.
pub(super) const FIRST_DYNAMIC: u64 = 1 << 32;

/// What a fixed name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    /// A part of a disk, given by its index, in bytes.
    Part {
        disk: usize,
        range: Range<u64>,
    },
    /// The root of a file system, given by its index.
    Volume(usize),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: OsString,
    pub(super) parent: u64,
    pub(super) kind: Kind,
    pub(super) modified: SystemTime,
    pub(super) children: Vec<u64>,
}

/// The entries; their numbers count from 1.
#[derive(Debug)]
pub(super) struct Tree {
    entries: Vec<Entry>,
}

impl Tree {
    pub(super) fn new(now: SystemTime) -> Self {
        let root = Entry {
            name: OsString::new(),
            parent: ROOT,
            kind: Kind::Directory,
            modified: now,
            children: Vec::new(),
        };
        Self { entries: vec![root] }
    }

    /// Adds an entry and returns its number.
    pub(super) fn add(
        &mut self,
        parent: u64,
        name: impl Into<OsString>,
        kind: Kind,
        modified: SystemTime,
    ) -> u64 {
        let name = name.into();
        self.entries.push(Entry { name, parent, kind, modified, children: Vec::new() });
        let number = self.entries.len() as u64;
        if let Some(entry) = index(parent).and_then(|index| self.entries.get_mut(index)) {
            entry.children.push(number);
        }
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<&Entry> {
        self.entries.get(index(number)?)
    }

    pub(super) fn child(&self, parent: u64, name: &OsStr) -> Option<u64> {
        let children = &self.get(parent)?.children;
        children.iter().copied().find(|child| self.get(*child).is_some_and(|is| is.name == name))
    }

    /// The paths of the disks and partitions, below the root.
    pub(super) fn parts(&self) -> Vec<PathBuf> {
        let parts = self.entries.iter().filter(|entry| matches!(entry.kind, Kind::Part { .. }));
        // Deeper than a directory for each disk they are not.
        let directory = |entry: &Entry| self.get(entry.parent).map(|parent| &parent.name);
        parts
            .map(|entry| {
                Path::new(directory(entry).map_or(OsStr::new(""), |name| name)).join(&entry.name)
            })
            .collect()
    }
}

fn index(number: u64) -> Option<usize> {
    usize::try_from(number.checked_sub(1)?).ok()
}
