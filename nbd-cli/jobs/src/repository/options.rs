//! The disk, the options and the result of a backup.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use imgfmt::Image;
use nbd_objects::repo::{BackupName, Id, Repository, RepositoryError, RepositoryErrorKind};

use crate::backup::BackupSource;
use crate::connect::ConnectOptions;
use crate::error::{JobError, JobErrorKind};
use crate::restore::Verify;

/// The disk of which a backup is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DiskToBackUp {
    /// A disk on a server, in its current state or at a checkpoint.
    Served(Box<BackupSource>),
    /// The disk in an image, which must not change meanwhile.
    Image(Arc<Image>),
}

/// Options of a backup in a repository.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RepositoryOptions {
    /// Connection options.
    pub connect: ConnectOptions,
    /// Reads in flight: 1 to 4096. By default 8, each of at most 1 MiB.
    pub requests: NonZeroUsize,
    /// The name of the disk in the repository.
    pub name: BackupName,
    /// The bitmap of the server that starts with this backup. If the last backup of this name is
    /// the one with which it started, only the dirty parts are read.
    pub bitmap: Option<String>,
    /// Reads the whole disk, whatever the bitmap says.
    pub full: bool,
    /// Backups whose blocks are not sent again, such as that of a template: `NAME@latest`.
    pub like: Vec<String>,
    /// The data to verify at the end, by reading it back from the repository.
    pub verify: Verify,
}

impl RepositoryOptions {
    /// Makes backups of this name.
    pub fn new(name: BackupName) -> Self {
        Self {
            connect: ConnectOptions::default(),
            requests: NonZeroUsize::new(8).unwrap_or(NonZeroUsize::MIN),
            name,
            bitmap: None,
            full: false,
            like: Vec::new(),
            verify: Verify::Nothing,
        }
    }
}

/// The result of a backup in a repository. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackedUpToRepository {
    /// The identity of the backup.
    pub id: Id,
    /// The backup on which it was built: what is equal there was not sent again.
    pub base: Option<Id>,
    /// Whether only the dirty parts were read.
    pub is_incremental: bool,
    /// Size of the disk.
    pub size: u64,
    /// Bytes read from the disk.
    pub read: u64,
    /// Bytes that were added to the repository.
    pub added: u64,
    /// Bytes that were compared, if the backup was verified.
    pub verified: Option<u64>,
    /// Duration.
    pub took: Duration,
}

/// Converts an error of a repository.
#[must_use]
#[allow(clippy::needless_pass_by_value)] // For map_err.
pub fn repository_error(error: RepositoryError) -> JobError {
    let kind = match error.kind() {
        RepositoryErrorKind::Invalid | RepositoryErrorKind::Key => JobErrorKind::InvalidArgument,
        RepositoryErrorKind::NotFound | RepositoryErrorKind::Damaged => JobErrorKind::Source,
        RepositoryErrorKind::Overtaken => JobErrorKind::Base,
        _ => JobErrorKind::Destination,
    };
    JobError::new(kind, error.to_string())
}

/// The backups of a name, newest first, that can be built on.
pub(super) async fn earlier(
    repository: &Repository,
    name: &str,
) -> Result<Vec<(Id, nbd_objects::repo::Head)>, JobError> {
    let all = repository.list().await.map_err(repository_error)?;
    let live = all.into_iter().filter(|info| !info.is_forgotten);
    let own = live.filter_map(|info| Some((info.id, info.head.ok()?)));
    let mut own: Vec<_> = own.filter(|(_, head)| head.name == name).collect();
    own.reverse();
    Ok(own)
}
