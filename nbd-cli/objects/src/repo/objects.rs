//! Carries requests out.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{BoxStream, once};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, GetResultPayload, ObjectStoreExt as _, PutMode, PutOptions,
};

use super::compaction;
use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Folder, Id, Key, PackId};
use super::pack_list::{push_packs, read_packs};
use super::pin_record::{self, ReaderInfo};
use super::protocol::{Answer, Backup, Moved, Object, Request};
use super::reader::Reader;
use super::root::{self, Kind, PREFIX_LEN};
use super::seal::{CONDEMNED, FramePlace, Hash, Sealer};
use super::stored::push;
use crate::error::StoreError;
use crate::refusal::Refusal;
use crate::store::Place;
use crate::transport::WHOLE_MAX;

/// The first bytes of a condemned list.
const LIST_MAGIC: &[u8; 8] = b"nbdlist1";
/// Longest condemned list, in bytes.
const LIST_LEN_MAX: usize = 256 << 20;
/// Most objects of a folder: packs of 64 TiB.
const LISTED_MAX: usize = 8 << 20;
/// Most objects of a folder whose names are kept, such as that of keys.
const NAMES_MAX: usize = 100_000;
/// Longest object that is neither a backup nor a list, in bytes.
pub(crate) const SMALL_LEN_MAX: u64 = 64 << 10;
/// Bytes of a backup that are read for its head, unless its names are long.
const FIRST_LEN: u64 = 4096;

/// Whether the store honours `If-None-Match: *`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creates {
    /// A create fails if there is an object.
    Exclusive,
    /// A create writes over it.
    Overwriting,
}

/// The objects of a repository.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    place: Place,
    pub(crate) sealer: Sealer,
    pub(crate) creates: Creates,
}

/// An object in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) key: Key,
    /// Size in bytes.
    pub(crate) size: u64,
}

impl Objects {
    pub(crate) fn new(place: Place, sealer: Sealer, creates: Creates) -> Self {
        Self { place, sealer, creates }
    }

    /// The address of the repository, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.place.name
    }

    /// Where the repository is, if it is a folder.
    pub(crate) fn directory(&self) -> Option<&std::path::Path> {
        self.place.directory.as_deref()
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.place.path.clone(), |path, part| path.join(part))
    }

    fn failed(&self, operation: &str, name: &str, error: &Error) -> RepositoryError {
        let object = format!("{} in {}", name, self.name());
        let is_of_range = Refusal::of(error).is_some_and(Refusal::is_of_range);
        let error = StoreError::of(operation, &object, error).to_string();
        // There is an object, and it ends before the range that was asked for: a store answers so,
        // and a folder has no other means to tell it.
        if is_of_range || error.contains(": Wanted range starting at") {
            let message = format!("the object {name} is shorter than it was");
            return RepositoryError::damaged(message);
        }
        RepositoryError::new(RepositoryErrorKind::Store, error)
    }

    /// Reads an object of at most `longest` bytes; `None` if there is none.
    pub(crate) async fn read(&self, name: &str, longest: u64) -> Result<Option<Bytes>> {
        let failed = |error: Error| self.failed("read", name, &error);
        let found = match self.place.store.get(&self.path(name)).await {
            Err(Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed)?,
        };
        if found.meta.size > longest {
            return Err(RepositoryError::damaged(format!(
                "the object {name} has {} bytes, more than it may have",
                found.meta.size
            )));
        }
        found.bytes().await.map(Some).map_err(failed)
    }

    /// Reads an object that is neither a backup nor a list; `None` if there is none. One that is
    /// too long is damaged, and as good as an empty one.
    pub(crate) async fn read_small(&self, key: Key) -> Result<Option<Bytes>> {
        match self.read(&key.to_string(), SMALL_LEN_MAX).await {
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => Ok(Some(Bytes::new())),
            found => found,
        }
    }

    /// Reads a part of an object; `None` if there is no object. An object that ends before the
    /// range is an error.
    pub(crate) async fn read_range(&self, key: Key, range: Range<u64>) -> Result<Option<Bytes>> {
        let wanted = range.end.saturating_sub(range.start);
        let found = self.read_some(key, GetRange::Bounded(range)).await?;
        match found {
            Some(found) if found.0.len() as u64 != wanted => Err(shorter(key)),
            found => Ok(found.map(|(bytes, _)| bytes)),
        }
    }

    /// Begins to read a part of an object; `None` if there is no object. Its pieces may be fewer
    /// bytes.
    pub(crate) async fn stream_range(
        &self,
        key: Key,
        range: Range<u64>,
    ) -> Result<Option<BoxStream<'_, Result<Bytes>>>> {
        let name = key.to_string();
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(range)));
        let found = match self.place.store.get_opts(&self.path(&name), options).await {
            Err(Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(|error| self.failed("read", &name, &error))?,
        };
        let pieces = match &found.payload {
            GetResultPayload::Stream(_) => found.into_stream(),
            // Its pieces would be small.
            GetResultPayload::File(..) => once(found.bytes()).boxed(),
        };
        Ok(Some(pieces.map_err(move |error| self.failed("read", &name, &error)).boxed()))
    }

    /// Reads the first or the last bytes of an object, and its size.
    pub(crate) async fn read_some(
        &self,
        key: Key,
        range: GetRange,
    ) -> Result<Option<(Bytes, u64)>> {
        let name = key.to_string();
        let failed = |error: Error| self.failed("read", &name, &error);
        let options = GetOptions::new().with_range(Some(range));
        let found = match self.place.store.get_opts(&self.path(&name), options).await {
            Err(Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed)?,
        };
        let size = found.meta.size;
        Ok(Some((found.bytes().await.map_err(failed)?, size)))
    }

    /// Reads the first bytes of a backup or of a compaction, with its head, and the size of the
    /// object.
    pub(crate) async fn read_front(&self, id: Id) -> Result<Option<(Bytes, u64)>> {
        let (key, first) = (Key::Backup(id), |length| GetRange::Bounded(0..length));
        let Some((bytes, size)) = self.read_some(key, first(FIRST_LEN)).await? else {
            return Ok(None);
        };
        let wanted = (PREFIX_LEN + root::head_length(&bytes).unwrap_or_default()) as u64;
        match wanted > bytes.len() as u64 && wanted <= size {
            true => self.read_some(key, first(wanted)).await,
            false => Ok(Some((bytes, size))),
        }
    }

    /// Returns whether there is an object, whatever it holds.
    pub(crate) async fn exists(&self, key: Key) -> Result<bool> {
        let name = key.to_string();
        match self.place.store.head(&self.path(&name)).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed("look for", &name, &error)),
        }
    }

    pub(crate) async fn write(&self, name: &str, content: Bytes) -> Result<()> {
        let written = self.place.store.put(&self.path(name), content.into()).await;
        written.map(drop).map_err(|error| self.failed("write", name, &error))
    }

    /// Writes an object unless there is one; returns whether it did.
    pub(crate) async fn create(&self, name: &str, content: Bytes) -> Result<bool> {
        if self.creates == Creates::Overwriting {
            return self.write(name, content).await.map(|()| true);
        }
        let options = PutOptions::from(PutMode::Create);
        match self.place.store.put_opts(&self.path(name), content.into(), options).await {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
            Err(error) => Err(self.failed("create", name, &error)),
        }
    }

    pub(crate) async fn delete(&self, name: &str) -> Result<()> {
        match self.place.store.delete(&self.path(name)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("delete", name, &error)),
        }
    }

    /// Lists the objects of a folder whose names are of this format.
    pub(crate) async fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        let keep = |relative: String, size| {
            listed.extend(relative.parse().ok().map(|key| Listed { key, size }));
        };
        self.each_name(&folder.to_string(), LISTED_MAX, keep).await?;
        listed.sort_unstable_by_key(|listed| listed.key);
        Ok(listed)
    }

    /// Lists all objects of a folder that has few: names below the repository's prefix, and sizes.
    pub(crate) async fn list_names(&self, folder: &str) -> Result<Vec<(String, u64)>> {
        let mut names = Vec::new();
        self.each_name(folder, NAMES_MAX, |name, size| names.push((name, size))).await?;
        Ok(names)
    }

    /// Gives the name and size of each object of a folder; of too many, an error.
    async fn each_name(
        &self,
        folder: &str,
        most: usize,
        mut found: impl FnMut(String, u64),
    ) -> Result<()> {
        let folder_path = self.path(folder);
        let mut listing = self.place.store.list(Some(&folder_path));
        let mut count = 0;
        loop {
            let next = listing.try_next().await;
            let Some(meta) = next.map_err(|error| self.failed("list", folder, &error))? else {
                return Ok(());
            };
            count += 1;
            if count > most {
                return Err(RepositoryError::damaged(format!(
                    "{} has more than {most} objects in {folder}/, which no repository has",
                    self.name()
                )));
            }
            if let Some(parts) = meta.location.prefix_match(&self.place.path) {
                let parts: Vec<_> = parts.map(|part| part.as_ref().to_owned()).collect();
                found(parts.join("/"), meta.size);
            }
        }
    }

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
                encode_list(&self.sealer, id, &packs)?
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
            Key::Condemned(id) => decode_list(&self.sealer, id, &content)
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

/// The error of an object that ends too early.
pub(crate) fn shorter(key: Key) -> RepositoryError {
    RepositoryError::damaged(format!("the object {key} is shorter than it was"))
}

fn encode_list(sealer: &Sealer, id: Id, packs: &BTreeSet<PackId>) -> Result<Bytes> {
    let mut content = Vec::new();
    push_packs(&mut content, packs.iter());
    if content.len() > LIST_LEN_MAX {
        return Err(RepositoryError::invalid("there are too many packs to delete at once"));
    }
    let mut object = LIST_MAGIC.to_vec();
    push(&mut object, content.len());
    object.extend_from_slice(&sealer.hash(&content).0);
    object.extend_from_slice(&sealer.frame(list_place(id), &content)?);
    Ok(object.into())
}

fn list_place(id: Id) -> FramePlace {
    FramePlace { session: id, number: CONDEMNED, offset: 0 }
}

fn decode_list(sealer: &Sealer, id: Id, object: &[u8]) -> Option<BTreeSet<PackId>> {
    let mut reader = Reader(object.strip_prefix(LIST_MAGIC)?);
    let length = usize::try_from(reader.u32()?).ok().filter(|&it| it <= LIST_LEN_MAX)?;
    let hash = Hash(reader.array()?);
    let content = sealer.open(list_place(id), reader.0, length, hash).ok()?;
    let mut reader = Reader(&content);
    let packs = read_packs(&mut reader)?;
    reader.0.is_empty().then(|| packs.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn list_without_an_end_is_an_error() {
        let store = Arc::new(object_store::memory::InMemory::new());
        let place = Place {
            store,
            path: Path::from("repo"),
            name: "memory".to_owned(),
            identity: "memory".to_owned(),
            directory: None,
        };
        let objects = Objects::new(place, Sealer::default(), Creates::Exclusive);
        for name in ["keys/1", "keys/2", "keys/3", "other/4"] {
            objects.write(name, "x".into()).await.unwrap();
        }
        let mut found = Vec::new();
        objects.each_name("keys", 3, |name, size| found.push((name, size))).await.unwrap();
        found.sort();
        assert_eq!(found, ["keys/1", "keys/2", "keys/3"].map(|name| (name.to_owned(), 1)));
        let mut count = 0;
        let error = objects.each_name("keys", 2, |_, _| count += 1).await.unwrap_err();
        assert!(error.to_string().contains("more than 2 objects in keys/"), "{error}");
        assert_eq!(count, 2);
    }

    #[test]
    fn condemned_lists_are_read_as_they_were_written() {
        let pack = |n: u32| PackId { session: Id::from_bytes([n as u8 % 3; 16]), number: n };
        let (id, sealer) = (Id::from_bytes([8; 16]), Sealer::default());
        for count in [0, 1, 100] {
            let packs: BTreeSet<_> = (0..count).map(pack).collect();
            let object = encode_list(&sealer, id, &packs).unwrap();
            assert_eq!(decode_list(&sealer, id, &object).as_ref(), Some(&packs));
            for at in 0..object.len() {
                let mut damaged = object.to_vec();
                damaged[at] ^= 4;
                let found = decode_list(&sealer, id, &damaged);
                assert!(found.is_none_or(|found| found == packs), "byte {at}");
            }
        }
    }
}
