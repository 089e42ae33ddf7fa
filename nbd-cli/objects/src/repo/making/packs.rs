//! The packs that are in the store: a backup refers to no others.

use super::super::error::Result;
use super::super::id::{Folder, Key, PackId};
use super::super::pack::FOOTER_LEN;
use super::super::protocol::Writer;
use super::super::repository::Repository;
use super::super::stored::Stored;

/// The packs that a writer may refer to, and their sizes, sorted.
#[derive(Debug, Default)]
pub(super) struct Packs(Vec<(PackId, u32)>);

impl Packs {
    /// Lists the packs. The session of the writer is registered, and it knows what is condemned:
    /// what is there now stays.
    pub(super) async fn list(repository: &Repository, writer: &Writer) -> Result<Self> {
        let listed = repository.objects.list(Folder::Packs).await?;
        let packs = listed.into_iter().filter_map(|listed| match listed.key {
            Key::Pack(pack) if writer.may_refer(pack) => {
                Some((pack, u32::try_from(listed.size).unwrap_or(u32::MAX)))
            }
            _ => None,
        });
        Ok(Self(packs.collect()))
    }

    #[cfg(test)]
    pub(super) fn of(packs: Vec<(PackId, u32)>) -> Self {
        Self(packs)
    }

    /// The packs and their sizes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (PackId, u32)> + '_ {
        self.0.iter().copied()
    }

    fn size(&self, pack: PackId) -> Option<u64> {
        let place = self.0.binary_search_by_key(&pack, |(pack, _)| *pack).ok()?;
        Some(u64::from(self.0[place].1))
    }

    /// Returns whether a backup may refer to a pack. What it refers to in there is not known.
    pub(super) fn has(&self, pack: PackId) -> bool {
        self.size(pack).is_some_and(|size| size > FOOTER_LEN as u64)
    }

    /// Returns whether a backup may refer to a frame.
    pub(super) fn holds(&self, stored: &Stored) -> bool {
        self.size(stored.pack).is_some_and(|size| stored.range().end <= size)
    }
}
