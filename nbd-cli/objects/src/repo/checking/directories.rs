//! What packs say that they hold.

use std::collections::HashMap;

use super::super::error::{RepositoryErrorKind, Result};
use super::super::id::{Key, PackId};
use super::super::pack::{Footer, FrameKind};
use super::super::repository::Repository;
use super::super::stored::Stored;

/// Most frames that are kept, in about 24 MiB: those of 4000 packs of blocks that do not compress.
const FRAMES_MAX: usize = 1 << 19;

/// The blocks of packs, as their directories list them.
#[derive(Default)]
pub(super) struct Directories {
    kept: HashMap<PackId, Vec<Stored>>,
    frames: usize,
}

impl Directories {
    /// Returns whether the directory of its pack, which was read before, lists a block. `None` if
    /// the pack was removed or changed meanwhile.
    pub(super) async fn lists(
        &mut self,
        repository: &Repository,
        footer: Footer,
        block: &Stored,
    ) -> Result<Option<bool>> {
        if !self.kept.contains_key(&block.pack) {
            let Some(blocks) = blocks_of(repository, footer, block.pack).await? else {
                return Ok(None);
            };
            if self.frames + blocks.len() > FRAMES_MAX {
                self.kept.clear();
                self.frames = 0;
            }
            self.frames += blocks.len();
            self.kept.insert(block.pack, blocks);
        }
        let Some(blocks) = self.kept.get(&block.pack) else { return Ok(None) };
        let found = blocks.binary_search_by_key(&block.offset, |block| block.offset);
        Ok(Some(found.is_ok_and(|at| blocks[at] == *block)))
    }
}

/// Reads which blocks a pack has, by their offsets.
async fn blocks_of(
    repository: &Repository,
    footer: Footer,
    pack: PackId,
) -> Result<Option<Vec<Stored>>> {
    let objects = &repository.objects;
    let frame = match objects.read_range(Key::Pack(pack), footer.range()).await {
        Ok(Some(frame)) => frame,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == RepositoryErrorKind::Damaged => return Ok(None),
        Err(error) => return Err(error),
    };
    let Ok(entries) = footer.entries(&objects.sealer, pack, &frame) else { return Ok(None) };
    let blocks = entries.iter().filter(|entry| entry.kind == FrameKind::Block);
    let mut blocks: Vec<_> = blocks.map(|entry| entry.stored).collect();
    blocks.sort_unstable_by_key(|block| block.offset);
    Ok(Some(blocks))
}
