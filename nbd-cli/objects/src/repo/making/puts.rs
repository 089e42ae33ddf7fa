//! Packs that are being sent.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;

use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::objects::Objects;
use crate::runtime::boxed;

/// Packs that are sent at a time.
const PUTS: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Puts {
    tasks: JoinSet<Result<Bytes>>,
    /// Memory of what was sent.
    memory: Vec<BytesMut>,
    /// The first one that could not be sent: without it there is no backup.
    failed: Option<RepositoryError>,
}

impl Puts {
    /// Begins to send an object, when there is room.
    pub(super) async fn send(
        &mut self,
        objects: &Arc<Objects>,
        name: String,
        content: Bytes,
    ) -> Result<()> {
        while self.tasks.len() >= PUTS {
            self.sent().await?;
        }
        let objects = Arc::clone(objects);
        self.tasks.spawn(boxed(async move {
            objects.write(&name, content.clone()).await?;
            Ok(content)
        }));
        Ok(())
    }

    /// Returns memory of what was sent, or none.
    pub(super) fn memory(&mut self) -> BytesMut {
        self.memory.pop().unwrap_or_default()
    }

    /// Waits for one that is being sent.
    pub(super) async fn sent(&mut self) -> Result<()> {
        let Some(sent) = self.tasks.join_next().await else { return Ok(()) };
        let sent = sent.unwrap_or_else(|error| {
            let message = format!("a request was given up: {error}");
            Err(RepositoryError::new(RepositoryErrorKind::Store, message))
        });
        match sent {
            Ok(content) => {
                // The connection may not have let go of it yet.
                self.memory.extend(content.try_into_mut());
                self.memory.truncate(PUTS);
                Ok(())
            }
            Err(error) => {
                self.failed.get_or_insert_with(|| error.clone());
                Err(error)
            }
        }
    }

    /// Waits for all. An error that was told before is told again.
    pub(super) async fn finish(&mut self) -> Result<()> {
        while !self.tasks.is_empty() {
            self.sent().await?;
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::objects::Creates;
    use super::super::super::seal::Sealer;
    use super::*;
    use crate::{Place, StoreSettings};

    #[tokio::test]
    async fn pack_that_was_not_sent_is_not_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().to_str().unwrap().parse().unwrap();
        let place = Place::open(&url, &StoreSettings::default()).unwrap();
        let objects = Arc::new(Objects::new(place, Sealer::default(), Creates::Exclusive));
        std::fs::write(folder.path().join("packs"), "in the way").unwrap();
        let mut puts = Puts::default();
        puts.send(&objects, "packs/1".to_owned(), "one".into()).await.unwrap();
        assert!(puts.sent().await.is_err());
        puts.send(&objects, "elsewhere/2".to_owned(), "two".into()).await.unwrap();
        assert!(puts.finish().await.is_err());
        assert!(puts.is_empty());
        assert!(puts.finish().await.is_err());
    }
}
