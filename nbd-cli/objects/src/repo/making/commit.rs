//! The end of a backup that is being made.

use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::head::Head;
use super::super::id::Key;
use super::super::page::PAGE_SPAN;
use super::super::protocol::{Backup, Committed, Object};
use super::super::root;
use super::renewal::Left;
use super::{Made, Session, ended};

impl Session {
    /// Makes what was given a backup. When it returns, the backup is durable.
    ///
    /// # Errors
    ///
    /// [`Fenced`](crate::repo::RepositoryErrorKind::Fenced) if another process ended the session:
    /// there is no backup. If a request fails, there may be one.
    pub async fn commit(&mut self) -> Result<Made> {
        self.check_sound()?;
        if self.given != self.blocks() {
            return Err(RepositoryError::invalid("a part of the disk was not given"));
        }
        while !self.queue.is_empty() {
            self.take().await?;
        }
        self.send_pages().await?;
        self.sender.finish().await?;
        let root = std::mem::take(&mut self.root).finish();
        if root.pages().len() as u64 != self.new.size.div_ceil(PAGE_SPAN) {
            return Err(RepositoryError::invalid(
                "the map of the backup has another length than its disk; this is a fault of the \
                 program",
            ));
        }
        let head = self.head();
        let object = root::encode(&self.repository.objects.sealer, self.id, &head, &root)?;
        let added = self.sender.added + object.len() as u64;
        // All was read: a bitmap that is cleared from now on does not matter to this backup.
        let is_alone = self.repository.line(&self.new.name).await? == self.line;
        if self.new.follows.is_some() && !(is_alone && self.new.follows == self.line.last()?) {
            return Err(self.overtaken().await);
        }
        self.may_be_committed = true;
        self.writer.commit(Object::Live(Backup { packs: root.packs().into(), object }));
        let repository = self.repository.clone();
        match repository.drive(&mut self.writer, &mut self.renewal).await? {
            Committed::Yes => {}
            Committed::Fenced | Committed::Ready => return Err(ended("backup", self.id)),
        }
        let (name, line, id) = (&self.new.name, self.line, self.id);
        // A server that knows with which backup a bitmap started does not need to ask.
        let disks = &self.new.disks;
        let is_known = match disks.is_empty() {
            true => self.new.origin.identity.is_some(),
            false => disks.iter().all(|disk| disk.origin.identity.is_some()),
        };
        let told = match is_known {
            true => repository.name_last(name, line, id, is_alone).await,
            false => repository.succeed(name, line, id, is_alone).await,
        };
        told.map_err(|error| self.untold(&error))?;
        Ok(Made {
            id: self.id,
            data: self.data,
            added,
            found: self.found,
            packs: self.sender.packs,
        })
    }

    /// Ends the session, if its backup cannot be made or was not committed: a gc does not wait for
    /// it then. The next backup of this name uses again what was sent, if it comes before a gc.
    pub async fn give_up(mut self) {
        let left = match (self.may_be_committed, self.sender.packs) {
            (true, _) => Left::Create,
            (false, 0) => Left::Nothing,
            (false, _) => Left::Packs,
        };
        self.repository.give_up(self.id, &mut self.renewal, left).await;
    }

    /// Ends the session without a backup.
    async fn overtaken(&mut self) -> RepositoryError {
        self.renewal.stop().await;
        // Nothing more comes from this session. If its record stays, the next gc removes it.
        let _ = self.repository.objects.delete(&Key::Session(self.id).to_string()).await;
        RepositoryError::new(
            RepositoryErrorKind::Overtaken,
            format!(
                "another backup of '{}' was made meanwhile, and its bitmap may have been cleared, \
                 so there is no backup; make it again",
                &*self.new.name
            ),
        )
    }

    fn untold(&self, error: &RepositoryError) -> RepositoryError {
        let disks = self.new.disks.iter().map(|disk| &disk.origin);
        let has_bitmap = disks.chain([&self.new.origin]).any(|origin| origin.bitmap.is_some());
        let bitmap = if has_bitmap { ", so do not clear its bitmap" } else { "" };
        RepositoryError::new(
            error.kind(),
            format!(
                "the backup {} is complete, but it is not recorded as the last one{bitmap}: {error}",
                self.id
            ),
        )
    }

    fn head(&self) -> Head {
        Head {
            name: self.new.name.to_string(),
            size: self.new.size,
            time: self.time,
            origin: self.new.origin.clone(),
            imported: self.new.imported.clone(),
            disks: self.new.disks.clone(),
            data: self.data,
            added: self.sender.added,
            body_length: 0,
            body_hash: String::new(),
            id: None,
        }
    }
}
