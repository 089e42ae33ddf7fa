//! The sessions that make backups, and the pins of those that read them.

use super::error::Result;
use super::id::{Folder, Id, Key};
use super::objects::Creates;
use super::pin_record::{self, ReaderInfo};
use super::protocol::{Answer, Object, Request};
use super::repository::Repository;
use super::session_record::SessionRecord;
use super::tries::Tries;

/// A backup or a compaction that is being made, or was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    /// Its identity.
    pub id: Id,
    /// Who makes which backup, unless the object is damaged.
    pub record: Option<SessionRecord>,
}

/// A pin: gc keeps the data of its backup, even if that is forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinInfo {
    /// Its identity.
    pub id: Id,
    /// The backup that is read, unless the object is damaged.
    pub backup: Option<Id>,
    /// Who reads it. Pins of older versions do not tell.
    pub reader: Option<ReaderInfo>,
}

impl Repository {
    /// Lists the backups and compactions that are being made or were interrupted.
    ///
    /// # Errors
    ///
    /// As for all requests to the store.
    pub async fn sessions(&self) -> Result<Vec<SessionInfo>> {
        let mut sessions = Vec::new();
        for listed in self.objects.list(Folder::Sessions).await? {
            let Key::Session(id) = listed.key else { continue };
            // One that is gone has ended.
            let Some(object) = self.objects.read_small(listed.key).await? else { continue };
            let found = SessionRecord::decode(&self.objects.sealer, id, &object);
            sessions.push(SessionInfo { id, record: found.map(|(record, _)| record) });
        }
        Ok(sessions)
    }

    /// The record of a session, and its counter; `None` if it is gone or damaged.
    pub(super) async fn record(&self, id: Id) -> Result<Option<(SessionRecord, u32)>> {
        let object = self.objects.read_small(Key::Session(id)).await?;
        Ok(object.and_then(|object| SessionRecord::decode(&self.objects.sealer, id, &object)))
    }

    /// Says what an identity is, if not that of a backup: for messages.
    ///
    /// # Errors
    ///
    /// As for all requests to the store.
    pub async fn other_than_backup(&self, id: Id) -> Result<Option<&'static str>> {
        if let Some((record, _)) = self.record(id).await? {
            return Ok(Some(match record.is_compaction() {
                true => "a compaction that runs or was interrupted ('repo forget-session' ends it)",
                false => {
                    "a backup that is being made or was interrupted ('repo forget-session' ends it)"
                }
            }));
        }
        let found = self.objects.carry_out(Request::GetMoves(id)).await?;
        let is_compaction = matches!(found, Answer::Found(Object::Compaction(_)));
        Ok(is_compaction.then_some("a compaction; 'repo gc' removes it when no backup needs it"))
    }

    /// Lists the pins: who reads which backup.
    ///
    /// # Errors
    ///
    /// As for all requests to the store. A damaged pin is not an error.
    pub async fn pins(&self) -> Result<Vec<PinInfo>> {
        let mut pins = Vec::new();
        for listed in self.objects.list(Folder::Pins).await? {
            let Key::Pin(id) = listed.key else { continue };
            let Some(object) = self.objects.read_small(listed.key).await? else { continue };
            let decoded = pin_record::decode(&self.objects.sealer, id, &object);
            let (backup, reader) = decoded.unzip();
            pins.push(PinInfo { id, backup, reader: reader.flatten() });
        }
        Ok(pins)
    }

    /// Ends a session or removes a pin, by its identity. Returns whether there was one.
    ///
    /// A backup that is being made under this session fails at its end. A reader with this pin may
    /// fail after the next gc, if its backup was forgotten.
    ///
    /// # Errors
    ///
    /// As for all requests to the store.
    pub async fn end_session(&self, id: Id) -> Result<bool> {
        // Whatever they hold: they may be damaged.
        let (pin, session) = (Key::Pin(id), Key::Session(id));
        if self.objects.exists(pin).await? {
            return self.objects.delete(&pin.to_string()).await.map(|()| true);
        }
        if !self.objects.exists(session).await? {
            return Ok(false);
        }
        let key = Key::Backup(id);
        if self.creates() == Creates::Overwriting {
            // First, so that a writer that creates the backup at the same time notices.
            self.objects.carry_out(Request::Delete(session)).await?;
        }
        let mut tries = Tries::default();
        // An answer that it exists may mean that the store is busy.
        while self.objects.carry_out(Request::Get(key)).await? == Answer::Missing {
            tries.create(&self.objects, Request::Create(key, Object::Tombstone(None))).await?;
        }
        self.objects.carry_out(Request::Delete(session)).await?;
        Ok(true)
    }
}
