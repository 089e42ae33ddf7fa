//! Which backup of a name is the last one: the one with which a bitmap started that its operator
//! cleared.
//!
//! `after/ID` holds the backup that follows another one, and is created only once: of two that were
//! made at the same time, only one finds no object there. The other one appends an identity of no
//! backup, because with which of them a bitmap started is not known.

use std::time::Duration;

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::Id;
use super::objects::{Creates, SMALL_LEN_MAX};
use super::repository::Repository;

/// Backups that may follow the one that `last/NAME` names: as many as ended at the same time.
const STEPS_MAX: usize = 1000;
/// Creates of one object at most.
const CREATES_MAX: u32 = 8;
/// Pause before the second one; it doubles with each.
const PAUSE: Duration = Duration::from_millis(100);

/// What a backup finds of the others of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    /// What `last/NAME` holds.
    named: Option<Id>,
    /// The end of what follows it.
    end: Option<Id>,
}

impl Line {
    /// Returns whether no backup is between its commit and its end: it may be about to let its
    /// bitmap be cleared.
    fn is_settled(&self) -> bool {
        self.named == self.end
    }

    /// The last one; an identity of no backup if another one is ending.
    pub(super) fn last(&self) -> Result<Option<Id>> {
        match self.is_settled() {
            true => Ok(self.end),
            false => Id::random().map(Some),
        }
    }
}

impl Repository {
    /// Returns which backup of this name was committed last, whatever became of it since. The
    /// identity is of no backup if two were made at the same time, and while one
    /// ends.
    ///
    /// # Errors
    ///
    /// As for all requests to the store.
    pub async fn last(&self, name: &str) -> Result<Option<Id>> {
        self.line(name).await?.last()
    }

    pub(super) async fn line(&self, name: &str) -> Result<Line> {
        let named = self.named(name).await?;
        let mut end = named;
        for _ in 0..STEPS_MAX {
            match self.id_in(&self.after(name, end)).await? {
                Some(next) => end = Some(next),
                None => return Ok(Line { named, end }),
            }
        }
        Err(self.endless(name))
    }

    /// Tells that a backup was committed, which found `before` when it began. Unless it is alone,
    /// it is not the last one, and nobody is. Ask nobody to clear a bitmap before this succeeds.
    pub(super) async fn succeed(
        &self,
        name: &str,
        before: Line,
        id: Id,
        is_alone: bool,
    ) -> Result<()> {
        if self.creates() != Creates::Exclusive {
            return self.name_last(name, before, id, is_alone).await;
        }
        let is_alone = is_alone && before.is_settled();
        let last = self.append(name, before.end, id, is_alone).await?;
        self.set_last(name, last).await
    }

    /// As [`succeed`](Self::succeed), where nothing depends on it, or where the store cannot do
    /// better: two that do this at the same moment may both take themselves for the last one.
    pub(super) async fn name_last(
        &self,
        name: &str,
        before: Line,
        id: Id,
        is_alone: bool,
    ) -> Result<()> {
        let is_alone = is_alone && before.is_settled() && self.named(name).await? == before.named;
        let last = if is_alone { id } else { Id::random()? };
        self.set_last(name, last).await?;
        if self.named(name).await? != Some(last) {
            self.set_last(name, Id::random()?).await?;
        }
        Ok(())
    }

    /// Appends a backup, if it follows `last`, or an identity of none, to the end. Returns what the
    /// end is.
    async fn append(&self, name: &str, last: Option<Id>, id: Id, mut is_alone: bool) -> Result<Id> {
        let nobody = Id::random()?;
        let mut at = last;
        for _ in 0..STEPS_MAX {
            let own = if is_alone { id } else { nobody };
            let found = self.create_after(&self.after(name, at), own).await?;
            if found == own {
                return Ok(own);
            }
            (at, is_alone) = (Some(found), false);
        }
        Err(self.endless(name))
    }

    /// Creates an object that holds an identity, and returns which one it holds then.
    async fn create_after(&self, key: &str, id: Id) -> Result<Id> {
        for tried in 0.. {
            let created = self.objects.create(key, id.to_string().into()).await;
            match created {
                Ok(true) => return Ok(id),
                // What is there is another one's, or this one's by an attempt whose reply was lost;
                // and a store that is busy says the same.
                Ok(false) => {}
                Err(error) if error.kind() == RepositoryErrorKind::Store && tried < CREATES_MAX => {
                    tracing::debug!("{error}; the object is looked for");
                }
                Err(error) => return Err(error),
            }
            if let Some(found) = self.id_in(key).await? {
                return Ok(found);
            }
            if tried >= CREATES_MAX {
                break;
            }
            tokio::time::sleep(PAUSE * 2_u32.pow(tried)).await;
        }
        Err(RepositoryError::new(
            RepositoryErrorKind::Store,
            format!("{} says of a new object again and again that it exists", self.name()),
        ))
    }

    /// The identity in an object; one of no backup if it holds something else.
    async fn id_in(&self, key: &str) -> Result<Option<Id>> {
        let content = match self.objects.read(key, SMALL_LEN_MAX).await {
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => Some(Default::default()),
            content => content?,
        };
        let Some(content) = content else { return Ok(None) };
        let id = std::str::from_utf8(&content).ok().and_then(|text| text.parse().ok());
        id.map_or_else(Id::random, Ok).map(Some)
    }

    async fn named(&self, name: &str) -> Result<Option<Id>> {
        self.id_in(&self.last_name(name)).await
    }

    async fn set_last(&self, name: &str, last: Id) -> Result<()> {
        self.objects.write(&self.last_name(name), last.to_string().into()).await
    }

    fn last_name(&self, name: &str) -> String {
        format!("last/{:?}", self.objects.sealer.hash(format!("name {name}").as_bytes()))
    }

    /// The object that holds what follows a backup, or the first one of a name.
    fn after(&self, name: &str, last: Option<Id>) -> String {
        match last {
            Some(last) => format!("after/{last}"),
            None => self.last_name(name).replacen("last", "after", 1),
        }
    }

    fn endless(&self, name: &str) -> RepositoryError {
        RepositoryError::damaged(format!(
            "the objects after/ID in {} do not lead to a last backup of '{name}': they are damaged",
            self.name()
        ))
    }
}
