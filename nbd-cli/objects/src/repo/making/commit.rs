//! The end of a backup that is being made.

use super::super::error::{RepositoryError, Result};
use super::super::id::Id;
use super::super::page::PAGE_SPAN;
use super::super::protocol::{Backup, Committed};
use super::super::root::{self, Head};
use super::{Made, Session};

impl Session {
    /// Makes what was given a backup. When it returns, the backup is durable.
    ///
    /// # Errors
    ///
    /// [`Fenced`](crate::repo::RepositoryErrorKind::Fenced) if another process ended the session:
    /// there is no backup. If a request fails, there may be one.
    pub async fn commit(mut self) -> Result<Made> {
        self.check_sound()?;
        if self.given != self.blocks() {
            return Err(RepositoryError::invalid("a part of the disk was not given"));
        }
        while !self.queue.is_empty() {
            self.take().await?;
        }
        self.send_pages().await?;
        self.send_pack().await?;
        self.puts.finish().await?;
        let root = std::mem::take(&mut self.root).finish();
        if root.pages().len() as u64 != self.new.size.div_ceil(PAGE_SPAN) {
            return Err(RepositoryError::invalid(
                "the map of the backup has another length than its disk; this is a fault of the \
                 program",
            ));
        }
        let head = self.head();
        let object = root::encode(&self.repository.objects.sealer, self.id, &head, &root)?;
        let added = self.added + object.len() as u64;
        self.writer.commit(Backup { packs: root.packs().into(), object });
        let repository = self.repository.clone();
        let last = self.begin_to_be_last().await?;
        match repository.drive(&mut self.writer, &mut self.renewal).await? {
            Committed::Yes => {
                // The backup is complete, whatever becomes of this.
                let _ = self.stay_last(last).await;
                Ok(Made {
                    id: self.id,
                    data: self.data,
                    added,
                    found: self.found,
                    packs: self.next_pack - 1,
                })
            }
            Committed::Fenced | Committed::Ready => Err(self.ended()),
        }
    }

    /// Makes this the last backup of its name, or none, if another one was committed meanwhile:
    /// with which of them a bitmap started is not known.
    async fn begin_to_be_last(&self) -> Result<Id> {
        let is_alone = self.repository.last(&self.new.name).await? == self.last;
        let last = if is_alone { self.id } else { Id::random()? };
        self.repository.set_last(&self.new.name, last).await?;
        Ok(last)
    }

    /// Looks whether another backup of this name was committed at the same moment.
    async fn stay_last(&self, last: Id) -> Result<()> {
        match self.repository.last(&self.new.name).await? == Some(last) {
            true => Ok(()),
            false => self.repository.set_last(&self.new.name, Id::random()?).await,
        }
    }

    fn head(&self) -> Head {
        Head {
            name: self.new.name.clone(),
            size: self.new.size,
            time: self.time,
            identity: self.new.identity.clone(),
            disk: self.new.disk.clone(),
            export: self.new.export.clone(),
            bitmap: self.new.bitmap.clone(),
            data: self.data,
            added: self.added,
            body_length: 0,
            body_hash: String::new(),
        }
    }
}
