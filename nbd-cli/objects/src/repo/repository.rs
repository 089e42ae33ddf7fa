//! A repository: made, opened, unlocked.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::config::{Config, WrappedKey};
use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Id, random};
use super::objects::{Creates, Objects, SMALL_LEN_MAX};
use super::seal::Sealer;
use crate::store::Place;

const CONFIG_NAME: &str = "repo.json";

/// An open repository. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    pub(crate) objects: Arc<Objects>,
    config: Config,
    /// Of an encrypted repository: the master key, and the key that unlocked it.
    master: Option<([u8; 32], Id)>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("objects", &self.objects).finish_non_exhaustive()
    }
}

impl Repository {
    /// Makes a repository, encrypted if there is a passphrase.
    ///
    /// # Errors
    ///
    /// If there is one already, and as for all requests to the store.
    ///
    /// # Cancel safety
    ///
    /// A repository that is not complete is none; it can be made again.
    pub async fn init(place: Place, passphrase: Option<&[u8]>) -> Result<Self> {
        let objects = Objects::new(place, Sealer::default(), Creates::Exclusive);
        let exists = || {
            let message = format!("{} is a repository already", objects.name());
            RepositoryError::new(RepositoryErrorKind::Exists, message)
        };
        if objects.read(CONFIG_NAME, SMALL_LEN_MAX).await?.is_some() {
            return Err(exists());
        }
        let (id, creates) = (Id::random()?, probe(&objects).await?);
        let mut master = None;
        if let Some(passphrase) = passphrase {
            check_passphrase(passphrase)?;
            let mut key = [0; 32];
            random(&mut key)?;
            master = Some((key, Id::random()?));
        }
        let config = Config::new(id, creates, master.as_ref().map(|(master, _)| master));
        if let (Some((master, key)), Some(passphrase)) = (&master, passphrase) {
            add_key(&objects, &config, (master, *key), passphrase).await?;
        }
        // The last object: before it there is no repository.
        if !create_config(&objects, config.encode()?.into()).await? {
            return Err(exists());
        }
        Ok(Self::unlocked(objects, config, master))
    }

    /// Opens a repository. An encrypted one needs one of its passphrases.
    ///
    /// # Errors
    ///
    /// If there is none, if this version does not know its format, and if the passphrase is missing
    /// or wrong. With a passphrase, a repository that is not encrypted is refused: those who can
    /// write to the store could have replaced what says that it is.
    pub async fn open(place: Place, passphrase: Option<&[u8]>) -> Result<Self> {
        let objects = Objects::new(place, Sealer::default(), Creates::Exclusive);
        let name = objects.name().to_owned();
        let content = objects.read(CONFIG_NAME, SMALL_LEN_MAX).await?.ok_or_else(|| {
            RepositoryError::not_found(format!(
                "there is no repository of backups in {name}; make one with 'nbd-cli repo init'"
            ))
        })?;
        let config = Config::decode(&content, &name)?;
        let master = match (config.is_encrypted(), passphrase) {
            (false, None) => None,
            (false, Some(_)) => {
                let message = format!(
                    "{name} is not encrypted, but a passphrase was given; if it was encrypted once, \
                     somebody changed its repo.json; otherwise leave the passphrase out \
                     (--passphrase-file, NBD_PASSPHRASE_FILE)"
                );
                return Err(RepositoryError::new(RepositoryErrorKind::Key, message));
            }
            (true, None) => {
                let message = format!("{name} is encrypted; give its passphrase");
                return Err(RepositoryError::new(RepositoryErrorKind::Key, message));
            }
            (true, Some(passphrase)) => Some(unlock(&objects, &config, passphrase).await?),
        };
        Ok(Self::unlocked(objects, config, master))
    }

    fn unlocked(mut objects: Objects, config: Config, master: Option<([u8; 32], Id)>) -> Self {
        objects.creates = config.creates().unwrap_or(Creates::Exclusive);
        if let Some((master, _)) = &master {
            objects.sealer = Sealer::encrypting(master);
        }
        Self { objects: Arc::new(objects), config, master }
    }

    /// The address, for messages.
    pub fn name(&self) -> &str {
        self.objects.name()
    }

    /// The identity of the repository.
    pub fn id(&self) -> &str {
        &self.config.id
    }

    /// Whether the store honours creates.
    pub fn creates(&self) -> Creates {
        self.objects.creates
    }

    /// Whether the content is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.master.is_some()
    }

    /// Adds a passphrase; returns the identity of its key, which is the one that it has if it was
    /// added before, by a process that was killed, for example.
    ///
    /// # Errors
    ///
    /// If the repository is not encrypted, or the passphrase is empty.
    pub async fn add_key(&self, passphrase: &[u8]) -> Result<Id> {
        check_passphrase(passphrase)?;
        let (master, _) = self.master()?;
        if let Some((_, id)) = find_key(&self.objects, &self.config, passphrase).await? {
            return Ok(id);
        }
        let id = Id::random()?;
        add_key(&self.objects, &self.config, (master, id), passphrase).await?;
        Ok(id)
    }

    fn master(&self) -> Result<(&[u8; 32], Id)> {
        let master = self.master.as_ref().map(|(master, key)| (master, *key));
        master.ok_or_else(|| self.not_encrypted())
    }

    /// Returns the identities of the keys, oldest first. Those of another master key are none: an
    /// interrupted `init` leaves them.
    ///
    /// # Errors
    ///
    /// If the repository is not encrypted, and as for all requests to the store.
    pub async fn keys(&self) -> Result<Vec<Id>> {
        let (master, _) = self.master()?;
        let mut keys = Vec::new();
        for id in key_ids(&self.objects).await? {
            if read_key(&self.objects, id).await?.is_some_and(|(key, _)| key.is_of(master, id)) {
                keys.push(id);
            }
        }
        Ok(keys)
    }

    /// Removes a passphrase, by the identity of its key. The one by which the repository was opened
    /// stays, so that there is always one.
    ///
    /// # Errors
    ///
    /// If there is no such key, if it is the one by which the repository was opened, and if another
    /// process removes the others: then it stays.
    pub async fn remove_key(&self, key: Id) -> Result<()> {
        let (_, own) = self.master()?;
        if key == own {
            return Err(RepositoryError::invalid(format!(
                "{key} is the key of the passphrase that was given: without any, nothing could be \
                 read; to remove it, add another one, and give that",
            )));
        }
        let Some((_, content)) = read_key(&self.objects, key).await? else {
            return Err(RepositoryError::not_found(format!("{} has no key {key}", self.name())));
        };
        self.objects.delete(&key_name(key)).await?;
        // Another process may have removed the own one.
        if self.keys().await?.is_empty() {
            self.objects.write(&key_name(key), content).await?;
            return Err(RepositoryError::new(
                RepositoryErrorKind::Fenced,
                format!(
                    "another process removes the other keys of {}, so {key} stays",
                    self.name()
                ),
            ));
        }
        Ok(())
    }

    fn not_encrypted(&self) -> RepositoryError {
        RepositoryError::invalid(format!("{} is not encrypted", self.name()))
    }
}

fn check_passphrase(passphrase: &[u8]) -> Result<()> {
    match passphrase.is_empty() {
        true => Err(RepositoryError::invalid("the passphrase is empty")),
        false => Ok(()),
    }
}

fn key_name(key: Id) -> String {
    format!("keys/{key}")
}

async fn key_ids(objects: &Objects) -> Result<Vec<Id>> {
    let names = objects.list_names("keys").await?;
    let id = |(name, _): &(String, u64)| name.strip_prefix("keys/")?.parse().ok();
    let mut keys: Vec<Id> = names.iter().filter_map(id).collect();
    keys.sort_unstable();
    Ok(keys)
}

/// Reads a key, and its object; `None` if it is none.
async fn read_key(objects: &Objects, id: Id) -> Result<Option<(WrappedKey, Bytes)>> {
    let content = match objects.read(&key_name(id), SMALL_LEN_MAX).await {
        // There may be another one.
        Err(error) if error.kind() == RepositoryErrorKind::Damaged => None,
        content => content?,
    };
    Ok(content.and_then(|content| Some((serde_json::from_slice(&content).ok()?, content))))
}

async fn add_key(
    objects: &Objects,
    config: &Config,
    (master, id): (&[u8; 32], Id),
    passphrase: &[u8],
) -> Result<()> {
    let key = WrappedKey::wrap(master, passphrase, (&config.id, id))?;
    objects.write(&key_name(id), key.encode()?.into()).await
}

/// Returns the master key, and the key that has it.
async fn unlock(objects: &Objects, config: &Config, passphrase: &[u8]) -> Result<([u8; 32], Id)> {
    let found = find_key(objects, config, passphrase).await?;
    found.ok_or_else(|| {
        let message = format!("the passphrase is none of {}", objects.name());
        RepositoryError::new(RepositoryErrorKind::Key, message)
    })
}

/// Finds the key of a passphrase; returns the master key as well.
async fn find_key(
    objects: &Objects,
    config: &Config,
    passphrase: &[u8],
) -> Result<Option<([u8; 32], Id)>> {
    for id in key_ids(objects).await? {
        let key = read_key(objects, id).await?;
        let master = key.and_then(|(key, _)| key.unwrap(passphrase, &config.id));
        if let Some(master) = master.filter(|master| config.accepts(master)) {
            return Ok(Some((master, id)));
        }
    }
    Ok(None)
}

/// Creates `repo.json`; returns whether it is this one. A create is not repeated by the client of
/// the store, and its reply may be lost although the object was written: then it is found.
async fn create_config(objects: &Objects, content: Bytes) -> Result<bool> {
    let created = objects.create(CONFIG_NAME, content.clone()).await;
    let failure = match created {
        Ok(true) => return Ok(true),
        Ok(false) => None,
        Err(error) => Some(error),
    };
    match (objects.read(CONFIG_NAME, SMALL_LEN_MAX).await, failure) {
        (Ok(Some(found)), _) => Ok(found == content),
        // Nothing was written.
        (Ok(None), _) => objects.create(CONFIG_NAME, content).await,
        (Err(_), Some(error)) | (Err(error), None) => Err(error),
    }
}

/// Finds out whether the store honours creates, by creating an object twice.
async fn probe(objects: &Objects) -> Result<Creates> {
    let name = format!("probe/{}", Id::random()?);
    if !objects.create(&name, "1".into()).await? {
        return Err(RepositoryError::new(
            RepositoryErrorKind::Store,
            format!("{} says of a new object that it exists", objects.name()),
        ));
    }
    let second = objects.create(&name, "2".into()).await;
    objects.delete(&name).await?;
    Ok(if second? { Creates::Overwriting } else { Creates::Exclusive })
}
