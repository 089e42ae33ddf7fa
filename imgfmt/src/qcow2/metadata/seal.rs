//! The identity of a backup in its own file.
//!
//! The header extension `0x62636b70` names the backup and the length of its file. Autoclear bit 61
//! says that the file has not changed since: other programs clear it when they open the file for
//! writing. QEMU does not clear it if it opens the file for reading and writes it later, as
//! `qemu-img commit` does with a backing file. So the modification time must be unchanged too,
//! unless the file is a copy. `DESIGN.md` has the layout.

use std::sync::atomic::Ordering::{Acquire, Release};

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, StatxFlags, Timespec, Timestamps, futimens, statx};

use crate::backup::{Backup, BackupBase, BackupIdentity, ContentSum, Uuid};
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::metadata::header_edit::{change_autoclear, replace_extension, rewrite_autoclear};
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::extension;
use crate::qcow2::on_disk::header::{Header, autoclear};
use crate::qcow2::purpose::Purpose;
use crate::storage::Storage;

const VERSION: u32 = 1;
const FIXED_LENGTH: usize = 104;
/// Granularity of the modification time, in seconds: every file system can store its multiples.
const TIME_STEP: i64 = 2;
const EXPORT_LENGTH_MAX: usize = 4096;
/// Flag: the user declared the base.
const TRUSTED_BASE: u32 = 1;
/// Flag: the sum of the content follows the names.
const HAS_CONTENT: u32 = 2;
const CONTENT_LENGTH: usize = 32;

/// Writes the identity into the file of an image that no program has open.
pub(crate) fn seal(storage: &dyn Storage, identity: &BackupIdentity) -> Result<()> {
    let header = Header::read(storage, Purpose::Use)?;
    if header.version < 3 {
        let detail = "images of version 2 cannot carry the identity of a backup";
        return Err(Error::new(ErrorKind::Unsupported, SEAL, detail));
    }
    let length = storage.len().map_err(crate::qcow2::on_disk::words::read_error)?;
    let times = storage.as_fd().and_then(|fd| Some((fd, FileTimes::of(fd)?.rounded())));
    let content = encode(identity, length, times.map(|(_, times)| times))?;
    let cluster_size = header.geometry.cluster_size();
    // Without the bit, the extension is ignored.
    change_autoclear(storage, 0, autoclear::SEAL)?;
    replace_extension(storage, cluster_size, extension::BACKUP, &content)?;
    change_autoclear(storage, autoclear::SEAL, 0)?;
    if let Some((fd, times)) = times
        && times.set(fd).is_err()
    {
        // Another user's file, for example.
        let content = encode(identity, length, None)?;
        replace_extension(storage, cluster_size, extension::BACKUP, &content)?;
    }
    Ok(())
}

/// The identity of the file, and its last modification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileTimes {
    inode: u64,
    /// Time of its creation, in nanoseconds since 1970.
    born: u64,
    /// In nanoseconds since 1970.
    modified: u64,
}

impl FileTimes {
    /// `None` if the file system does not record when a file was created.
    fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let wanted = StatxFlags::BTIME | StatxFlags::MTIME | StatxFlags::INO;
        let found = statx(fd, "", AtFlags::EMPTY_PATH, wanted).ok()?;
        if !StatxFlags::from_bits_retain(found.stx_mask).contains(wanted) {
            return None;
        }
        let nanoseconds = |seconds: i64, rest: u32| {
            let seconds = u64::try_from(seconds).ok()?.checked_mul(1_000_000_000)?;
            seconds.checked_add(u64::from(rest))
        };
        Some(Self {
            inode: found.stx_ino,
            born: nanoseconds(found.stx_btime.tv_sec, found.stx_btime.tv_nsec)?,
            modified: nanoseconds(found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec)?,
        })
    }

    fn rounded(mut self) -> Self {
        let step = TIME_STEP as u64 * 1_000_000_000;
        self.modified = self.modified / step * step;
        self
    }

    /// Sets the modification time of the file to this.
    fn set(self, fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
        let time = Timespec { tv_sec: (self.modified / 1_000_000_000) as i64, tv_nsec: 0 };
        futimens(fd, &Timestamps { last_access: time, last_modification: time })
    }

    /// Whether the file, now with these attributes, was modified in place. For a copy this is
    /// unknown.
    fn was_modified(self, now: Self) -> bool {
        (self.inode, self.born) == (now.inode, now.born) && self.modified != now.modified
    }
}

impl MetadataFile {
    /// The record of the backup in the file.
    pub(crate) fn backup(&self) -> Option<Backup> {
        let Sealed { identity, length, times } =
            decode(self.header().extensions.backup.as_deref()?)?;
        let is_sealed = self.is_sealed();
        let now = self.file.as_fd().and_then(FileTimes::of);
        let was_modified = times.zip(now).is_some_and(|(then, now)| then.was_modified(now));
        let is_unchanged = is_sealed && !was_modified && self.file.len().ok() == Some(length);
        Some(Backup { identity, is_unchanged, is_sealed, was_modified })
    }

    /// Whether the file has a record of a backup that cannot be read.
    pub(crate) fn is_unreadable_backup(&self) -> bool {
        self.header().extensions.backup.as_deref().is_some_and(|data| decode(data).is_none())
    }

    /// Whether the header says that the file is as the backup left it. The first change must clear
    /// that before.
    pub(in crate::qcow2) fn is_sealed(&self) -> bool {
        self.is_sealed.load(Acquire)
    }

    /// Clears the bit that says that the file has not changed since the backup.
    pub(crate) fn break_seal(&self) -> Result<()> {
        if !self.is_sealed() {
            return Ok(());
        }
        self.edit_header(|file, _| rewrite_autoclear(file, 0, autoclear::SEAL))?;
        self.is_sealed.store(false, Release);
        Ok(())
    }
}

/// The content of the extension.
#[derive(Debug, PartialEq)]
struct Sealed {
    identity: BackupIdentity,
    /// The length of the file, in bytes.
    length: u64,
    times: Option<FileTimes>,
}

fn encode(identity: &BackupIdentity, length: u64, times: Option<FileTimes>) -> Result<Vec<u8>> {
    let bitmap = identity.bitmap.as_deref().unwrap_or_default();
    let too_long = bitmap.len() > crate::bitmap::BITMAP_NAME_BYTES_MAX
        || identity.export.len() > EXPORT_LENGTH_MAX;
    if too_long {
        let detail = "a name of a bitmap or an export is too long for it";
        return Err(Error::new(ErrorKind::InvalidInput, SEAL, detail));
    }
    let mut flags = match identity.base {
        BackupBase::Trusted(_) => TRUSTED_BASE,
        BackupBase::None | BackupBase::Backup(_) => 0,
    };
    if identity.content.is_some() {
        flags |= HAS_CONTENT;
    }
    let uuid = |uuid: Option<Uuid>| uuid.map_or([0; 16], Uuid::bytes);
    let mut content = Vec::new();
    content.extend(VERSION.to_be_bytes());
    content.extend([0; 4]); // the checksum
    content.extend(identity.id.bytes());
    content.extend(uuid(identity.base.id()));
    content.extend(uuid(identity.disk));
    content.extend(identity.disk_size.to_be_bytes());
    content.extend(length.to_be_bytes());
    for number in times.map_or([0; 3], |times| [times.inode, times.born, times.modified]) {
        content.extend(number.to_be_bytes());
    }
    content.extend(flags.to_be_bytes());
    content.extend((bitmap.len() as u16).to_be_bytes());
    content.extend((identity.export.len() as u16).to_be_bytes());
    content.extend(bitmap.as_bytes());
    content.extend(identity.export.as_bytes());
    content.extend(identity.content.iter().flat_map(|sum| sum.bytes()));
    let checksum = crc32fast::hash(&content[8..]);
    content[4..8].copy_from_slice(&checksum.to_be_bytes());
    Ok(content)
}

/// Decodes the content of the extension, if its checksum is right.
fn decode(content: &[u8]) -> Option<Sealed> {
    if content.len() < FIXED_LENGTH
        || u32_at(content, 0) != VERSION
        || u32_at(content, 4) != crc32fast::hash(&content[8..])
    {
        return None;
    }
    let uuid = |at: usize| Uuid::from_bytes(content[at..at + 16].try_into().ok()?);
    let base = match (uuid(24), u32_at(content, 96) & TRUSTED_BASE) {
        (None, 0) => BackupBase::None,
        (Some(id), 0) => BackupBase::Backup(id),
        (id, _) => BackupBase::Trusted(id),
    };
    let bitmap_end = FIXED_LENGTH + usize::from(u16_at(content, 100));
    let export_end = bitmap_end + usize::from(u16_at(content, 102));
    let text = |bytes: Option<&[u8]>| Some(std::str::from_utf8(bytes?).ok()?.to_owned());
    let identity = BackupIdentity {
        id: uuid(8)?,
        base,
        disk: uuid(40),
        disk_size: u64_at(content, 56),
        bitmap: text(content.get(FIXED_LENGTH..bitmap_end)).filter(|name| !name.is_empty()),
        export: text(content.get(bitmap_end..export_end))?,
        content: None,
    };
    let sum = content.get(export_end..export_end + CONTENT_LENGTH);
    let identity = match u32_at(content, 96) & HAS_CONTENT {
        0 => identity,
        _ => {
            let content = ContentSum::from_bytes(sum?.try_into().ok()?);
            BackupIdentity { content: Some(content), ..identity }
        }
    };
    let (inode, born, modified) = (u64_at(content, 72), u64_at(content, 80), u64_at(content, 88));
    let times = (inode != 0).then_some(FileTimes { inode, born, modified });
    Some(Sealed { identity, length: u64_at(content, 64), times })
}

const SEAL: &str = "write the identity of a backup into";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_read_as_they_are_written_and_damaged_ones_are_none() {
        let uuid = || Uuid::random().unwrap();
        let mut identity = BackupIdentity::new(uuid(), 1_000_001);
        for (base, sum) in [
            (BackupBase::None, true),
            (BackupBase::Backup(uuid()), false),
            (BackupBase::Trusted(None), false),
            (BackupBase::Trusted(Some(uuid())), true),
        ] {
            identity.content = sum.then(|| ContentSum::from_bytes([0xa5; 32]));
            identity.base = base;
            identity.disk = Some(uuid());
            identity.bitmap = Some("daily".into());
            identity.export = "vm".into();
            let times = FileTimes { inode: 5, born: 6, modified: 7 };
            let content = encode(&identity, 77, Some(times)).unwrap();
            assert_eq!(content.len(), 104 + 7 + if sum { 32 } else { 0 });
            let sealed = Sealed { identity: identity.clone(), length: 77, times: Some(times) };
            assert_eq!(decode(&content), Some(sealed));
            for length in 0..content.len() {
                assert_eq!(decode(&content[..length]), None);
            }
            for index in 0..content.len() {
                let mut damaged = content.clone();
                damaged[index] ^= 4;
                assert_eq!(decode(&damaged), None, "byte {index}");
            }
        }
        identity.export = "x".repeat(EXPORT_LENGTH_MAX + 1);
        assert!(encode(&identity, 0, None).is_err());
    }
}
