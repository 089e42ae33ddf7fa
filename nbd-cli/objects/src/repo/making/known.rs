//! Frames that the repository has, by their hash: those of interrupted sessions, and those of the
//! backups that the user names.

use std::collections::HashMap;

use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::GetRange;

use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::id::{Folder, Id, Key, PackId};
use super::super::map::Map;
use super::super::objects::SMALL_LEN_MAX;
use super::super::pack::{Entry, FOOTER_LEN, Footer, FrameKind};
use super::super::protocol::{Moves, Writer};
use super::super::repository::Repository;
use super::super::seal::Hash;
use super::super::session_record::SessionRecord;
use super::super::stored::Stored;
use super::packs::Packs;

/// Most frames of interrupted sessions, and of named backups: 64 GiB of blocks, in about 122 MiB of
/// memory each. What is not known is sent again.
const FRAMES_MAX: usize = 1 << 20;
/// Packs whose directories are read at a time.
const READS: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Known {
    blocks: HashMap<Hash, Stored>,
    pages: HashMap<Hash, Stored>,
}

impl Known {
    pub(super) fn block(&self, hash: Hash) -> Option<Stored> {
        self.blocks.get(&hash).copied()
    }

    pub(super) fn page(&self, hash: Hash) -> Option<Stored> {
        self.pages.get(&hash).copied()
    }

    fn len(&self) -> usize {
        self.blocks.len() + self.pages.len()
    }

    /// Looks for frames of the interrupted sessions that are meant. The session of the writer is
    /// registered.
    pub(super) async fn find(
        repository: &Repository,
        writer: &Writer,
        own: Id,
        is_meant: &(dyn Fn(&SessionRecord) -> bool + Sync),
    ) -> Result<Self> {
        let mut known = Self::default();
        let objects = &repository.objects;
        let mut sent = Vec::new();
        for session in objects.list(Folder::Sessions).await? {
            let Key::Session(id) = session.key else { continue };
            let record = match id == own {
                true => None,
                false => objects.read(&session.key.to_string(), SMALL_LEN_MAX).await?,
            };
            let record = record.and_then(|it| SessionRecord::decode(&objects.sealer, id, &it));
            if record.is_none_or(|(record, _)| !is_meant(&record)) {
                continue;
            }
            // One that has ended: its packs are the backup's, or the next gc's.
            if objects.exists(Key::Backup(id)).await? {
                continue;
            }
            for listed in objects.list(Folder::PacksOf(id)).await? {
                if let Key::Pack(pack) = listed.key
                    && writer.may_refer(pack)
                {
                    sent.push(pack);
                }
            }
        }
        let mut entries =
            futures_util::stream::iter(sent).map(|pack| entries(repository, pack)).buffered(READS);
        while known.len() < FRAMES_MAX
            && let Some(entries) = entries.try_next().await?
        {
            known.add(entries);
        }
        drop(entries);
        Ok(known)
    }

    /// Adds the blocks of the backups that the user names.
    pub(super) async fn add_backups(
        &mut self,
        repository: &Repository,
        packs: &Packs,
        moves: &Moves,
        like: &[Id],
    ) -> Result<()> {
        let most = self.len() + FRAMES_MAX;
        for &like in like {
            let map = Map::open(repository, moves, like).await?;
            self.add_backup(&map, packs, most).await?;
        }
        Ok(())
    }

    fn add(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            match entry.kind {
                FrameKind::Block => self.blocks.insert(entry.stored.hash, entry.stored),
                FrameKind::Page => self.pages.insert(entry.stored.hash, entry.stored),
            };
        }
    }

    async fn add_backup(&mut self, map: &Map, packs: &Packs, most: usize) -> Result<()> {
        for number in 0..map.root().pages().len() {
            let page = map.page(number).await?;
            for stored in page.blocks.iter().flatten() {
                if packs.holds(stored) {
                    self.blocks.insert(stored.hash, *stored);
                }
            }
            if self.len() >= most {
                return Err(RepositoryError::invalid(
                    "the backups of --like have more than 64 GiB of data; name fewer or smaller ones",
                ));
            }
        }
        Ok(())
    }
}

/// Reads which frames a pack has. One that is damaged, empty or was deleted has none.
async fn entries(repository: &Repository, pack: PackId) -> Result<Vec<Entry>> {
    let objects = &repository.objects;
    let key = Key::Pack(pack);
    let end = GetRange::Suffix(FOOTER_LEN as u64);
    let Some((end, size)) = unless_damaged(objects.read_some(key, end).await)? else {
        return Ok(Vec::new());
    };
    let Some(footer) = Footer::read(&end, size) else { return Ok(Vec::new()) };
    let found = unless_damaged(objects.read_range(key, footer.range()).await)?;
    Ok(found
        .and_then(|frame| footer.entries(&objects.sealer, pack, &frame).ok())
        .unwrap_or_default())
}

/// What is damaged is not there.
fn unless_damaged<T>(found: Result<Option<T>>) -> Result<Option<T>> {
    match found {
        Err(error) if error.kind() == RepositoryErrorKind::Damaged => Ok(None),
        found => found,
    }
}
