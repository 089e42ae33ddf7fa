//! The objects of a repository in its store.

use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::{BoxStream, once};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, GetResultPayload, ObjectStoreExt as _, PutMode, PutOptions,
};

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Folder, Id, Key};
use super::root::{self, PREFIX_LEN};
use super::seal::Sealer;
use crate::error::StoreError;
use crate::refusal::Refusal;
use crate::store::Place;

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
}

/// The error of an object that ends too early.
pub(crate) fn shorter(key: Key) -> RepositoryError {
    RepositoryError::damaged(format!("the object {key} is shorter than it was"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
}
