//! A store as the protocol sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::super::super::id::{Folder, Id, Key, PackId};
use super::super::{Answer, Backup, Moves, Object, Request};

/// The store.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Store {
    pub(super) objects: BTreeMap<Key, Object>,
    pub(super) packs: BTreeSet<PackId>,
    /// The maps of backups in compactions.
    pub(super) maps: BTreeMap<(Id, Id), Arc<[PackId]>>,
}

impl Store {
    pub(super) fn carry_out(&mut self, request: Request) -> Answer {
        match request {
            Request::Put(key, object) => {
                self.objects.insert(key, object);
                Answer::Done
            }
            Request::Create(key, _) if self.objects.contains_key(&key) => Answer::Exists,
            Request::Create(key, object) => self.carry_out(Request::Put(key, object)),
            Request::Get(key) => match self.objects.get(&key) {
                Some(object) => Answer::Found(object.clone()),
                None => Answer::Missing,
            },
            Request::GetMoves(id) => match self.objects.get(&Key::Backup(id)) {
                Some(Object::Live(_)) => Answer::Damaged,
                _ => self.carry_out(Request::Get(Key::Backup(id))),
            },
            Request::GetMap(id, moved) => match self.objects.get(&Key::Backup(id)) {
                Some(Object::Compaction(_)) => {
                    Answer::Found(Object::Live(backup(&self.maps[&(id, moved.backup)])))
                }
                _ => Answer::Missing,
            },
            Request::Delete(Key::Pack(pack)) => {
                self.packs.remove(&pack);
                Answer::Done
            }
            Request::Delete(key) => {
                self.objects.remove(&key);
                Answer::Done
            }
            Request::List(Folder::Packs) => {
                Answer::Listed(self.packs.iter().map(|&pack| Key::Pack(pack)).collect())
            }
            Request::List(folder) => {
                let keys = self.objects.keys().filter(|key| is_in(folder, key));
                Answer::Listed(keys.copied().collect())
            }
        }
    }

    /// A pack that a live backup needs, and that is not there.
    pub(super) fn lost(&self) -> Option<PackId> {
        let live = self.objects.keys().filter_map(|key| match key {
            Key::Backup(id) => self.map_of(*id),
            _ => None,
        });
        live.flat_map(|packs| packs.iter().copied()).find(|pack| !self.packs.contains(pack))
    }

    /// The packs of the map that a reader would choose now.
    pub(super) fn map_of(&self, id: Id) -> Option<&Arc<[PackId]>> {
        let Some(Object::Live(backup)) = self.objects.get(&Key::Backup(id)) else { return None };
        let mut moves = Moves::default();
        for key in self.objects.keys() {
            if let Key::Moved(id) = key
                && let Some(Object::Compaction(it)) = self.objects.get(&Key::Backup(*id))
            {
                moves.add(*id, Arc::clone(&it.moved));
            }
        }
        match moves.map_of(id) {
            Some((compaction, _)) => self.maps.get(&(compaction, id)),
            None => Some(&backup.packs),
        }
    }
}

fn is_in(folder: Folder, key: &Key) -> bool {
    matches!(
        (folder, key),
        (Folder::Backups, Key::Backup(_))
            | (Folder::Sessions, Key::Session(_))
            | (Folder::Condemned, Key::Condemned(_))
            | (Folder::Pins, Key::Pin(_))
            | (Folder::Moved, Key::Moved(_))
    )
}

pub(super) fn id(number: u8) -> Id {
    Id::from_bytes([number; 16])
}

pub(super) fn pack(session: u8) -> PackId {
    PackId { session: id(session), number: 0 }
}

pub(super) fn backup(packs: &[PackId]) -> Backup {
    Backup { packs: packs.into(), object: Bytes::new() }
}
