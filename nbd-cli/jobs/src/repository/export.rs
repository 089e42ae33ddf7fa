//! Exports backups of a repository as a chain of qcow2 files.

mod file;
mod folder;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbd_objects::repo::{Damage, Head, Id, OpenBackup, Repository};

use self::file::{Base, New};
use self::folder::{Folder, check_chain, check_existing, file_name};
use super::options::repository_error;
use crate::error::JobError;
use crate::observer::JobContext;

/// Most files of a chain: then a full one begins another. QEMU opens all of them at once, and the
/// image engine refuses more than 500.
const CHAIN_MAX: usize = 200;

/// An exported backup. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exported {
    /// The backup.
    pub id: Id,
    /// Its file.
    pub path: PathBuf,
    /// The file below, in the same folder; a full one has none.
    pub base: Option<PathBuf>,
    /// Size of the disk.
    pub size: u64,
    /// Bytes that were written.
    pub copied: u64,
    /// Whether the file is new; if not, an earlier export made it.
    pub is_new: bool,
}

/// Exports backups of one disk, oldest first, to a folder. Of a backup of several disks, the head
/// is that of one of them ([`Head::of_disk`]). Each becomes a qcow2 file with the blocks that
/// differ from the backup before, which is its backing file. A folder that does not exist is made.
///
/// A file grows as `NAME.partial` and is renamed when it is complete and durable. Files of an
/// earlier export are kept, and built on; what an interrupted one left is made again. `told` is
/// called for each file.
///
/// # Errors
///
/// If the folder cannot be written to or another export uses it, if a file of an earlier export was
/// changed or what is below it is missing, if a backup is damaged or was forgotten meanwhile, and
/// if the job is cancelled. The files that were told stay.
///
/// # Cancel safety
///
/// Dropping the future leaves complete files and what an interrupted one left.
pub async fn export_from_repository(
    repository: &Repository,
    backups: &[(Id, Head)],
    folder: &Path,
    context: &JobContext,
    told: impl FnMut(&Exported),
) -> Result<(), JobError> {
    let mut export =
        Export { repository, folder: Folder::open(folder, context)?, context, read: None };
    let result = export.all(backups, told).await;
    export.forget().await;
    result
}

struct Export<'a> {
    repository: &'a Repository,
    folder: Folder,
    context: &'a JobContext,
    /// The backup that was exported last: the next one is compared with it.
    read: Option<Arc<OpenBackup>>,
}

/// The file before.
struct Before<'a> {
    id: Id,
    head: &'a Head,
    name: String,
    /// Files of its chain, if it was looked at.
    depth: Option<usize>,
}

impl Export<'_> {
    async fn all(
        &mut self,
        backups: &[(Id, Head)],
        mut told: impl FnMut(&Exported),
    ) -> Result<(), JobError> {
        let mut before: Option<Before<'_>> = None;
        for (id, head) in backups {
            let name = file_name(*id, head);
            let path = self.folder.path(&name);
            if path.symlink_metadata().is_ok() {
                check_existing(&path, *id, head)?;
                let (id, base, size) = (*id, None, head.size);
                told(&Exported { id, path, base, size, copied: 0, is_new: false });
                before = Some(Before { id, head, name, depth: None });
                continue;
            }
            let base = match before {
                Some(before) => self.base(before).await?.filter(|base| base.fits(head)),
                None => None,
            };
            let opened = self.open(*id, head).await?;
            let new = New { path: &path, id: *id, head, base: base.as_ref() };
            let copied = match new.write(&opened, &self.folder, self.context).await {
                Ok(copied) => copied,
                Err(error) => {
                    // Reads that were given up may still hold it.
                    opened.close().await;
                    let words = format!("exporting the backup {id} failed: {error}");
                    return Err(error.in_words(words));
                }
            };
            let depth = base.as_ref().map_or(1, |base| base.depth + 1);
            let base = base.map(|base| self.folder.path(&base.name));
            let (id, size) = (*id, head.size);
            told(&Exported { id, path, base, size, copied, is_new: true });
            before = Some(Before { id, head, name, depth: Some(depth) });
            self.keep(opened).await;
        }
        // What was not built on was not looked at.
        match before {
            Some(Before { name, depth: None, .. }) => {
                check_chain(&self.folder.path(&name)).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// The file before as the base of a new one; `None` if its chain is long enough.
    async fn base(&mut self, before: Before<'_>) -> Result<Option<Base>, JobError> {
        let depth = match before.depth {
            Some(depth) => depth,
            None => check_chain(&self.folder.path(&before.name))?,
        };
        if depth >= CHAIN_MAX {
            return Ok(None);
        }
        let backup = match &self.read {
            Some(kept) if kept.id() == before.id => Arc::clone(kept),
            _ => {
                let opened = self.open(before.id, before.head).await?;
                self.keep(Arc::clone(&opened)).await;
                opened
            }
        };
        let Before { id, head, name, .. } = before;
        Ok(Some(Base { backup, id, head: head.clone(), name, depth }))
    }

    async fn open(&self, id: Id, head: &Head) -> Result<Arc<OpenBackup>, JobError> {
        let disk = head.disks.first().map(|disk| &*disk.name);
        let opened = self.repository.read_disk(id, disk, Damage::Refused).await;
        opened.map(Arc::new).map_err(repository_error)
    }

    /// Keeps a backup open for the next file, and no other one.
    async fn keep(&mut self, backup: Arc<OpenBackup>) {
        let former = self.read.replace(backup);
        if let Some(former) = former {
            former.close().await;
        }
    }

    /// Removes the pin.
    async fn forget(&mut self) {
        if let Some(backup) = self.read.take() {
            backup.close().await;
        }
    }
}
