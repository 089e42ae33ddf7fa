//! What a backup is of, and its result.

use super::super::disks::{DISKS_MAX, DiskHead, DiskOrigin, are_laid_out};
use super::super::error::{RepositoryError, Result};
use super::super::id::{Id, random};
use super::super::name::BackupName;
use super::super::page::DISK_SIZE_MAX;
use super::super::root::HEAD_LEN_MAX;

/// Pages of the base that are looked at before they are taken whole: 16 GiB of the disk, in at most
/// 7 MB and about 32 requests.
pub(super) const LOOKS: usize = 512;

/// Bytes of a head that are not of its disks, at most.
const ROOM_IN_HEAD: usize = 8 << 10;

/// A backup that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewBackup {
    /// Its name: that of the disk, or of the machine with these disks.
    pub name: BackupName,
    /// Size of the disk in bytes, at most [`DISK_SIZE_MAX`].
    pub size: u64,
    /// The machine that makes it, for those who list sessions.
    pub host: String,
    /// Where the disk comes from, if there is only one.
    pub origin: DiskOrigin,
    /// The time of the backup, in milliseconds since 1970, if it is not now.
    pub time: Option<u64>,
    /// What is recorded of an imported image, so that it is not imported again.
    pub imported: Option<String>,
    /// The disks, if there are several, where [`lay_out`](super::super::lay_out) puts them: then
    /// `size` is where the last one ends. What is between them is given as zeroes.
    pub disks: Vec<DiskHead>,
    /// The backup on which this one builds: what is equal there is not sent again.
    pub base: Option<Id>,
    /// The last backup of this name, as [`Repository::last`](super::super::Repository::last) told,
    /// if only what is dirty since is given. If another one is committed meanwhile, there is no
    /// backup: the bitmap may have been cleared while it was read.
    pub follows: Option<Id>,
    /// Other backups whose blocks are not sent again either.
    pub like: Vec<Id>,
}

impl NewBackup {
    /// Begins the description of a backup: that of an empty disk.
    pub fn new(name: BackupName) -> Self {
        Self {
            name,
            size: 0,
            host: String::new(),
            origin: DiskOrigin::default(),
            time: None,
            imported: None,
            disks: Vec::new(),
            base: None,
            follows: None,
            like: Vec::new(),
        }
    }
}

/// The result of a backup. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Made {
    /// Its identity.
    pub id: Id,
    /// Bytes of the disk that are not zero, in whole blocks.
    pub data: u64,
    /// Bytes that were added to the repository.
    pub added: u64,
    /// Bytes of the disk that were found in the repository: in the last backup, in those that were
    /// named, or in an interrupted session.
    pub found: u64,
    /// Packs that were written.
    pub packs: u32,
}

/// Refuses disks and sizes that cannot be.
pub(super) fn check(new: &NewBackup) -> Result<()> {
    if !new.disks.is_empty() && !are_laid_out(&new.disks, new.size) {
        return Err(RepositoryError::invalid(format!(
            "the disks of a backup are at most {DISKS_MAX}, and each has a name of its own of 1 to 128 \
             bytes, without '/', '@', '#', '=', ':' and control characters",
        )));
    }
    let text = serde_json::to_vec(&new.disks).map_or(0, |text| text.len());
    if text > HEAD_LEN_MAX - ROOM_IN_HEAD {
        return Err(RepositoryError::invalid(
            "the names of the disks, exports and bitmaps are too long together",
        ));
    }
    if new.size > DISK_SIZE_MAX {
        return Err(RepositoryError::invalid(format!(
            "the disk has {} bytes; a backup has at most {DISK_SIZE_MAX}",
            new.size
        )));
    }
    Ok(())
}

/// Chooses the first of the pages of the base that are looked at: others each time, if the base has
/// more.
pub(super) fn first_look(pages: usize) -> Result<usize> {
    if pages <= LOOKS {
        return Ok(0);
    }
    let mut bytes = [0; 8];
    random(&mut bytes)?;
    Ok((u64::from_le_bytes(bytes) % pages as u64) as usize)
}
