//! Carries requests of the protocol out.

use std::sync::Arc;

use bytes::Bytes;

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Id, Key};
use super::objects::{Creates, Objects, SMALL_LEN_MAX};
use super::pack_list::read_packs;
use super::pin_record::{self, ReaderInfo};
use super::protocol::{Answer, Backup, Moved, Object, Request};
use super::reader::Reader;
use super::root::{self, Kind};
use super::{compaction, condemned_list};
use crate::transport::WHOLE_MAX;

impl Objects {
    /// Carries out a request of the protocol.
    pub(crate) async fn carry_out(&self, request: Request) -> Result<Answer> {
        Ok(match request {
            Request::Put(key, object) => {
                self.write(&key.to_string(), self.encode(key, object)?).await?;
                Answer::Done
            }
            Request::Create(
                Key::Backup(id),
                object @ (Object::Live(_) | Object::Compaction(_)),
            ) if self.creates == Creates::Overwriting => self.put_unless_ended(id, object).await?,
            Request::Create(key, object) => {
                match self.create(&key.to_string(), self.encode(key, object)?).await? {
                    true => Answer::Done,
                    false => Answer::Exists,
                }
            }
            Request::Get(key) => match self.get(key).await {
                // Readers of the lists of others can go on.
                Err(error)
                    if matches!(key, Key::Condemned(_))
                        && error.kind() == RepositoryErrorKind::Damaged =>
                {
                    Answer::Damaged
                }
                found => found?,
            },
            Request::GetMoves(id) => match self.get_moves(id).await {
                Err(error) if error.kind() == RepositoryErrorKind::Damaged => Answer::Damaged,
                found => found?,
            },
            Request::GetMap(id, moved) => self.get_map(id, &moved).await?,
            Request::List(folder) => {
                Answer::Listed(self.list(folder).await?.into_iter().map(|it| it.key).collect())
            }
            Request::Delete(key) => {
                self.delete(&key.to_string()).await?;
                Answer::Done
            }
        })
    }

    /// Writes a backup where a create would write over the tombstone of its session.
    /// [`Answer::Exists`] says that there is a tombstone now. What remains is in `FORMAT.md`.
    async fn put_unless_ended(&self, id: Id, object: Object) -> Result<Answer> {
        let (backup, session) = (Key::Backup(id), Key::Session(id));
        if self.exists(backup).await? {
            return Ok(Answer::Exists);
        }
        if self.exists(session).await? {
            let written = self.write(&backup.to_string(), self.encode(backup, object)?).await;
            // The record is removed before the tombstone is written.
            if self.exists(session).await? {
                return written.map(|()| Answer::Done);
            }
        }
        self.write(&backup.to_string(), root::empty()).await?;
        Ok(Answer::Exists)
    }

    async fn get(&self, key: Key) -> Result<Answer> {
        let longest = match key {
            Key::Pin(_) | Key::Session(_) => SMALL_LEN_MAX,
            _ => WHOLE_MAX,
        };
        Ok(match self.read(&key.to_string(), longest).await? {
            None => Answer::Missing,
            Some(content) => Answer::Found(self.decode(key, content)?),
        })
    }

    async fn get_moves(&self, id: Id) -> Result<Answer> {
        let Some((front, size)) = self.read_front(id).await? else { return Ok(Answer::Missing) };
        match root::kind(&front) {
            Some(Kind::Empty) => Ok(Answer::Found(Object::Tombstone(None))),
            Some(Kind::Compaction) => {
                let found = compaction::decode(&self.sealer, id, &front, size)?;
                Ok(Answer::Found(Object::Compaction(found)))
            }
            _ => Err(root::unknown(id)),
        }
    }

    /// [`Answer::Missing`] says that the compaction is a tombstone by now.
    async fn get_map(&self, id: Id, moved: &Moved) -> Result<Answer> {
        let (key, start) = (Key::Backup(id), moved.part.offset);
        let range = start..start + u64::from(moved.part.length);
        let frame = match self.read_range(key, range).await {
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                return match self.get_moves(id).await? {
                    Answer::Found(Object::Compaction(_)) => Err(error),
                    _ => Ok(Answer::Missing),
                };
            }
            found => found?,
        };
        let Some(frame) = frame else { return Ok(Answer::Missing) };
        let map = compaction::open_map(&self.sealer, id, moved, &frame)?;
        let packs = read_packs(&mut Reader(&map));
        let packs = packs.ok_or_else(|| root::damaged(id, "is malformed"))?.into();
        Ok(Answer::Found(Object::Live(Backup { packs, object: map.into() })))
    }

    fn encode(&self, key: Key, object: Object) -> Result<Bytes> {
        Ok(match (key, object) {
            (_, Object::Live(backup)) => backup.object,
            (_, Object::Tombstone(Some(backup))) => root::forgotten(&backup.object),
            (_, Object::Tombstone(None)) => root::empty(),
            (_, Object::Session(record)) => record,
            (_, Object::Compaction(compaction)) => compaction.object,
            (_, Object::Mark) => Bytes::from_static(b"moved"),
            (Key::Condemned(id), Object::Condemned(packs)) => {
                condemned_list::encode(&self.sealer, id, &packs)?
            }
            (Key::Pin(pin), Object::Pin(id)) => {
                pin_record::encode(&self.sealer, pin, id, &ReaderInfo::own())?
            }
            (key, Object::Condemned(_) | Object::Pin(_)) => {
                return Err(RepositoryError::invalid(format!("{key} cannot be a list or a pin")));
            }
        })
    }

    fn decode(&self, key: Key, content: Bytes) -> Result<Object> {
        match key {
            Key::Backup(id) => self.decode_backup(id, content),
            Key::Session(_) => Ok(Object::Session(content)),
            Key::Condemned(id) => condemned_list::decode(&self.sealer, id, &content)
                .map(|packs| Object::Condemned(Arc::new(packs)))
                .ok_or_else(|| RepositoryError::damaged(format!("the object {key} is damaged"))),
            Key::Pin(pin) => match pin_record::decode(&self.sealer, pin, &content) {
                Some((backup, _)) => Ok(Object::Pin(backup)),
                None => Err(RepositoryError::damaged(format!("the object {key} is damaged"))),
            },
            Key::Pack(_) => Err(RepositoryError::invalid("packs are read in parts")),
            Key::Moved(_) => Ok(Object::Mark),
        }
    }

    fn decode_backup(&self, id: Id, content: Bytes) -> Result<Object> {
        let kind = root::kind(&content).ok_or_else(|| root::unknown(id))?;
        match kind {
            Kind::Empty => return Ok(Object::Tombstone(None)),
            Kind::Compaction => {
                let found = compaction::decode(&self.sealer, id, &content, content.len() as u64)?;
                return Ok(Object::Compaction(found));
            }
            _ => {}
        }
        let head = root::head(&self.sealer, id, &content)?;
        let root = root::body(&self.sealer, id, &content, &head)?;
        let packs = root.packs().into();
        Ok(match kind {
            Kind::Live => Object::Live(Backup { packs, object: content }),
            _ => Object::Tombstone(Some(Backup { packs, object: root::live(&content) })),
        })
    }
}
