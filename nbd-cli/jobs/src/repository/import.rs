//! Imports chains of images into a repository.

mod files;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::{OpenOptions, Uuid};
use nbd_objects::repo::{BackupName, DiskOrigin, Id, Repository};

use self::files::{Chain, Layer};
use super::identity::identity_of;
use super::job::{Described, Parts, Work};
use super::options::{RepositoryOptions, earlier};
use crate::copy::source::Source;
use crate::error::JobError;
use crate::observer::JobContext;
use crate::restore::Verify;
use crate::tasks;

/// Options of an import.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImportOptions {
    /// The name of the disk in the repository.
    pub name: BackupName,
    /// How the files are opened: the format of the newest, their passphrases, and the files that
    /// they may name. By default only those in their directory and below.
    pub image: OpenOptions,
    /// Reads in flight: 1 to 4096. By default 8, each of at most 1 MiB.
    pub requests: NonZeroUsize,
    /// The data to verify at the end, by reading it back from the repository.
    pub verify: Verify,
}

impl ImportOptions {
    /// Imports backups of this name.
    pub fn new(name: BackupName) -> Self {
        let RepositoryOptions { name, requests, verify, .. } = RepositoryOptions::new(name);
        Self { name, image: OpenOptions::new(), requests, verify }
    }
}

/// An imported file. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// The file.
    pub path: PathBuf,
    /// Its backup.
    pub id: Id,
    /// Whether it is new; if not, the repository had it.
    pub is_new: bool,
    /// Size of the disk.
    pub size: u64,
    /// Bytes read from the disk.
    pub read: u64,
    /// Bytes that were added to the repository.
    pub added: u64,
}

/// Imports chains of images, each given by its newest file: every file of a chain, from the bottom
/// to the top, becomes a backup of the disk that is seen in it, with the time at which it was
/// written last.
///
/// A file that a backup made, and that is as that left it, keeps the identities of the backup and
/// of its disk, and its recorded sum is checked. A file that was imported before is left out, so
/// that an interrupted import is called again. `told` is called for each file.
///
/// # Errors
///
/// If a file cannot be opened, is in use or is damaged, if a backup is upon another one than it was
/// made upon, if what is below a file is not a file, if a file changes meanwhile, if the repository
/// cannot be reached, and if the job is cancelled. The backups that were told stay.
///
/// # Cancel safety
///
/// Dropping the future leaves whole backups, and packs that the next import of this name uses
/// again.
pub async fn import_to_repository(
    files: &[PathBuf],
    repository: &Repository,
    options: &ImportOptions,
    context: &JobContext,
    mut told: impl FnMut(&Imported),
) -> Result<(), JobError> {
    let known = earlier(repository, &options.name).await?;
    // No file is several disks.
    let known = known.into_iter().filter(|(_, head)| head.disks.is_empty());
    let known = known.map(|(id, head)| Known {
        id,
        time: head.time,
        size: head.size,
        identity: identity_of(id, &head).ok(),
        what: head.imported,
    });
    let mut import = Import { repository, options, context, known: known.collect() };
    for file in files {
        import.chain(file, &mut told).await.map_err(|error| {
            let words = format!("importing '{}' failed: {error}", file.display());
            error.in_words(words)
        })?;
    }
    Ok(())
}

/// A backup that the repository has.
struct Known {
    id: Id,
    time: u64,
    size: u64,
    identity: Option<Uuid>,
    /// What was imported.
    what: Option<String>,
}

struct Import<'a> {
    repository: &'a Repository,
    options: &'a ImportOptions,
    context: &'a JobContext,
    /// The backups of this name: the newest first, when it began, and the new ones at the end.
    known: Vec<Known>,
}

/// The backup of the file below.
#[derive(Clone, Copy)]
struct Below {
    id: Id,
    time: u64,
}

impl Import<'_> {
    async fn chain(
        &mut self,
        path: &Path,
        told: &mut impl FnMut(&Imported),
    ) -> Result<(), JobError> {
        let (path, options) = (path.to_owned(), self.options.image.clone());
        let chain = blocking(move || Chain::open(&path, &options)).await?;
        let chain = Arc::new(chain);
        let mut below: Option<Below> = None;
        for (number, time) in chain.times()?.into_iter().enumerate() {
            let opened = Arc::clone(&chain);
            let layer = blocking(move || opened.layer(number)).await?;
            let (id, time) = match self.found(&layer) {
                Some(known) => {
                    let (path, id, size) = (layer.path, known.id, known.size);
                    let found = (id, known.time);
                    told(&Imported { path, id, is_new: false, size, read: 0, added: 0 });
                    found
                }
                None => {
                    if let Some(warning) = layer.left_out() {
                        self.context.observer.warning(&warning);
                    }
                    let time = time.max(below.map_or(0, |below| below.time.saturating_add(1)));
                    let (checked, context) = (Arc::clone(&chain), self.context.clone());
                    blocking(move || checked.check(number, &context)).await?;
                    let imported = self.layer(&Arc::new(layer), below, time).await?;
                    told(&imported);
                    (imported.id, time)
                }
            };
            below = Some(Below { id, time });
        }
        Ok(())
    }

    /// Finds the backup that a file is.
    fn found(&self, layer: &Layer) -> Option<&Known> {
        let own = layer.backup.as_ref().map(|backup| &backup.identity);
        self.known.iter().find(|known| {
            let is_made = own
                .is_some_and(|own| known.identity == Some(own.id) && known.size == own.disk_size);
            is_made || known.what.as_deref() == Some(&*layer.what)
        })
    }

    /// Makes a file a backup.
    async fn layer(
        &mut self,
        layer: &Arc<Layer>,
        below: Option<Below>,
        time: u64,
    ) -> Result<Imported, JobError> {
        let mut options = RepositoryOptions::new(self.options.name.clone());
        (options.requests, options.verify) = (self.options.requests, self.options.verify);
        let identity = layer.backup.as_ref().map(|backup| &backup.identity);
        let origin = DiskOrigin {
            export: identity.map(|identity| identity.export.clone()),
            // Whether it started again since is not known here: a bitmap is used only by the
            // identity that its server knows.
            bitmap: None,
            identity: identity.map(|identity| identity.id.to_string()),
            disk: identity.and_then(|identity| identity.disk).map(|disk| disk.to_string()),
        };
        let described = Described { origin, imported: Some((time, layer.what.clone())) };
        let same = Arc::clone(layer);
        let newest = self.known.first().map(|known| known.id);
        let work = Work {
            repository: self.repository,
            options: &options,
            context: self.context,
            like: Vec::new(),
            base: below.map(|below| below.id).or(newest),
            base_size: None,
            follows: None,
            before_commit: Some(Arc::new(move || same.check_unchanged())),
        };
        let parts = below.map_or(Parts::All, |_| Parts::OfImage(&layer.image));
        let source = Source::image(Arc::clone(&layer.image));
        let made = work.run(source, parts, &described).await?;
        self.known.push(Known {
            id: made.id,
            time,
            size: made.size,
            identity: layer.backup.as_ref().map(|backup| backup.identity.id),
            what: Some(layer.what.clone()),
        });
        let (path, id, size) = (layer.path.clone(), made.id, made.size);
        Ok(Imported { path, id, is_new: true, size, read: made.read, added: made.added })
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JobError> + Send + 'static,
) -> Result<T, JobError> {
    let done = tasks::spawn_blocking(work).await;
    done.map_err(|error| JobError::given_up("read", &error))?
}
