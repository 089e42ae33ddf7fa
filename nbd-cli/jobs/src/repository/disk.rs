//! A backup in a repository as a disk.

use std::sync::Arc;

use nbd_objects::repo::{Damage, OpenBackup, Repository};

use super::options::repository_error;
use crate::error::JobError;

/// Splits the address of a backup, `REPOSITORY/NAME@WHICH`, at its last slash: the repository, and
/// the name of the backup there.
///
/// ```
/// use nbd_jobs::repository::split_address;
///
/// assert_eq!(split_address("/srv/repo/vm1@latest"), Some(("/srv/repo", "vm1@latest")));
/// assert_eq!(split_address("s3://bucket/prefix/vm1"), Some(("s3://bucket/prefix", "vm1")));
/// assert_eq!(split_address("vm1"), None);
/// ```
#[must_use]
pub fn split_address(text: &str) -> Option<(&str, &str)> {
    let (repository, backup) = text.rsplit_once('/')?;
    let is_complete = !repository.is_empty() && !repository.ends_with('/') && !backup.is_empty();
    is_complete.then_some((repository, backup))
}

/// Opens a backup, or one disk of it (`NAME@WHICH#DISK`), as a disk that is read only: a raw image.
/// It is pinned until it is closed or dropped. Close it where others may still hold it: reads that
/// were given up.
///
/// # Errors
///
/// If there is no such backup, or it cannot be read.
pub async fn open_disk(
    repository: &Repository,
    backup: &str,
    damage: Damage,
) -> Result<Arc<OpenBackup>, JobError> {
    let (id, _, name) = repository.find_disk(backup).await.map_err(repository_error)?;
    let disk = repository.read_disk(id, name.as_deref(), damage).await;
    let disk = disk.map_err(repository_error)?;
    Ok(Arc::new(disk))
}
