//! Disks in OVA archives, which are read where they are: `machine.ova` is the first disk of the
//! machine, `machine.ova:2` the second, and `machine.ova:disk.vmdk` that of this name.
//!
//! An archive is a tar whose first member is the OVF descriptor. That one gives the order of the
//! disks; without one it is that of the members that look like images.

mod ovf;
mod tar;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::tar::{Member, refused};
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::open_policy::OpenPolicy;
use crate::options::{ArchiveNames, OpenOptions};
use crate::storage::{FileIdentity, Storage, StorageWindow};

/// The longest descriptor that is read, in bytes.
const DESCRIPTOR_MAX: u64 = 4 << 20;

/// Endings of the names of images.
const IMAGES: &[&str] =
    &["vmdk", "vhd", "vpc", "vhdx", "vdi", "img", "raw", "qcow2", "qcow", "qed", "hdd"];

/// How a disk in an archive is opened: it stands alone, because the author of the archive decides what it
/// names. A guest can make its own disk an archive, if the user calls that `.ova`.
pub(crate) fn options(options: &OpenOptions) -> OpenOptions {
    OpenOptions { policy: OpenPolicy::in_archive(), ..options.clone() }
}

/// A disk in an archive.
#[derive(Debug)]
pub(crate) struct ArchiveDisk {
    pub(crate) storage: Arc<dyn Storage>,
    /// The archive.
    pub(crate) path: PathBuf,
    pub(crate) identity: Option<FileIdentity>,
}

/// Opens the disk in an archive that `path` means; `None` if it means a file.
pub(crate) fn open(
    path: &Path,
    options: &OpenOptions,
    access: Access,
) -> Result<Option<ArchiveDisk>> {
    let Some((archive, wanted)) = split(path, options) else { return Ok(None) };
    let storage: Arc<dyn Storage> = Arc::new(options.open_file(&archive, Access::ReadOnly)?);
    let is_tar = tar::starts(&*storage);
    let is_tar = is_tar.map_err(|error| Error::from_io("read", error).with_path(&archive))?;
    if !is_tar {
        // The name alone does not make it one.
        return match wanted {
            None => Ok(None),
            Some(_) => {
                Err(refused(ErrorKind::InvalidFormat, "it is not an archive (tar)")
                    .with_path(&archive))
            }
        };
    }
    if access == Access::ReadWrite {
        let detail = "it is an archive, whose disks can only be read; convert the disk to a file";
        return Err(refused(ErrorKind::ReadOnly, detail).with_path(&archive));
    }
    let found = find(&storage, wanted.as_deref()).map_err(|error| error.with_path(&archive))?;
    let identity = storage.identity();
    let window = StorageWindow::new(storage, found.offset, Some(found.length));
    let window = window.map_err(|error| Error::from_io("read", error).with_path(&archive))?;
    Ok(Some(ArchiveDisk { storage: Arc::new(window), path: archive, identity }))
}

/// Returns which bytes of an archive are the disk that is wanted of it.
///
/// # Errors
///
/// If it is damaged or has no such disk.
#[cfg(feature = "test-util")]
pub fn disk_in(storage: &Arc<dyn Storage>, wanted: Option<&[u8]>) -> Result<std::ops::Range<u64>> {
    let found = find(storage, wanted)?;
    Ok(found.offset..found.offset + found.length)
}

/// The archive and what is wanted of it, if the name is that of an archive. A file of the whole name
/// comes first; with the format raw it is not looked into.
fn split(path: &Path, options: &OpenOptions) -> Option<(PathBuf, Option<Vec<u8>>)> {
    if path.symlink_metadata().is_ok() {
        let is_archive = has_ending(path.as_os_str().as_bytes(), "ova")
            && options.archives == ArchiveNames::All
            && options.format != Some(Format::Raw);
        return (is_archive && path.is_file()).then(|| (path.to_owned(), None));
    }
    let bytes = path.as_os_str().as_bytes();
    let places = bytes.iter().enumerate().filter(|(_, byte)| **byte == b':');
    places.map(|(place, _)| place).find_map(|place| {
        let (archive, wanted) = (&bytes[..place], &bytes[place + 1..]);
        let path = Path::new(OsStr::from_bytes(archive));
        (has_ending(archive, "ova") && !wanted.is_empty() && path.is_file())
            .then(|| (path.to_owned(), Some(wanted.to_vec())))
    })
}

fn has_ending(name: &[u8], ending: &str) -> bool {
    let found = name.rsplit(|byte| *byte == b'.').next();
    name.contains(&b'.') && found.is_some_and(|found| found.eq_ignore_ascii_case(ending.as_bytes()))
}

fn find(storage: &Arc<dyn Storage>, wanted: Option<&[u8]>) -> Result<Member> {
    let members = tar::members(&**storage)?;
    let number = match wanted {
        None => 1,
        Some(wanted) => match (named(&members, wanted)?, number(wanted)) {
            (Some(member), _) => return usable(member),
            (None, Some(number)) => number,
            (None, None) => {
                let wanted = wanted.escape_ascii();
                let detail = format!("the archive has no file '{wanted}'");
                return Err(refused(ErrorKind::NotFound, detail));
            }
        },
    };
    let mut own = members.iter().filter(|member| !is_companion(&member.name));
    let disks: Vec<ovf::Disk> = match own.find(|member| has_ending(&member.name, "ovf")) {
        Some(descriptor) => {
            // Refuses several of that name.
            named(&members, &descriptor.name)?;
            ovf::disks(&read(&**storage, descriptor)?)?
        }
        None => {
            let is_image = |name: &[u8]| IMAGES.iter().any(|ending| has_ending(name, ending));
            let is_disk = |name: &[u8]| is_image(name) && !is_companion(name);
            let images = members.iter().filter(|member| is_disk(&member.name));
            images.map(|member| ovf::Disk::whole(member.name.clone())).collect()
        }
    };
    let Some(disk) = number.checked_sub(1).and_then(|index| disks.get(index)) else {
        let detail = format!("the archive has {} disks, and no disk {number}", disks.len());
        return Err(refused(ErrorKind::NotFound, detail));
    };
    if disk.is_delta {
        let detail = format!(
            "disk {number} is only the differences to another disk of the archive: unpack the archive \
             first"
        );
        return Err(refused(ErrorKind::Unsupported, detail));
    }
    let found = match named(&members, &disk.href)? {
        None => named(&members, &percent_decoded(&disk.href))?,
        found => found,
    };
    match found {
        Some(member) => usable(member),
        None => {
            let name = disk.href.escape_ascii();
            let detail = format!(
                "its descriptor names the disk '{name}', which the archive does not contain: it was cut \
                 off, or the disk is elsewhere"
            );
            Err(refused(ErrorKind::InvalidFormat, detail))
        }
    }
}

/// The member of this name.
fn named<'m>(members: &'m [Member], name: &[u8]) -> Result<Option<&'m Member>> {
    let plain = |name: &'m [u8]| name.strip_prefix(b"./").unwrap_or(name);
    let name = name.strip_prefix(b"./").unwrap_or(name);
    let mut found = members.iter().filter(|member| plain(&member.name) == name);
    match (found.next(), found.next()) {
        (_, Some(_)) => {
            let name = name.escape_ascii();
            let detail = format!("the archive has several files '{name}': unpack it first");
            Err(refused(ErrorKind::InvalidFormat, detail))
        }
        (found, None) => Ok(found),
    }
}

/// Whether it is what macOS stores beside a file: its attributes.
fn is_companion(name: &[u8]) -> bool {
    name.rsplit(|byte| *byte == b'/').next().is_some_and(|last| last.starts_with(b"._"))
}

/// The path that a relative URI stands for.
fn percent_decoded(uri: &[u8]) -> Vec<u8> {
    let (mut path, mut rest) = (Vec::new(), uri);
    while let [first, behind @ ..] = rest {
        let digits = behind.first_chunk::<2>().filter(|_| *first == b'%');
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => (path.push(byte), rest = &behind[2..]),
            None => (path.push(*first), rest = behind),
        };
    }
    path
}

fn number(wanted: &[u8]) -> Option<usize> {
    std::str::from_utf8(wanted)
        .ok()
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?
        .parse()
        .ok()
}

/// A member whose bytes follow each other.
fn usable(member: &Member) -> Result<Member> {
    match member.is_plain {
        true => Ok(member.clone()),
        false => {
            let name = member.name.escape_ascii();
            let detail =
                format!("'{name}' is stored with its holes left out: unpack the archive first");
            Err(refused(ErrorKind::Unsupported, detail))
        }
    }
}

fn read(storage: &dyn Storage, member: &Member) -> Result<Vec<u8>> {
    if member.length > DESCRIPTOR_MAX {
        return Err(refused(ErrorKind::Unsupported, "its descriptor is longer than 4 MiB"));
    }
    let mut text = vec![0; usable(member)?.length as usize];
    let offset = crate::units::HostOffset::new(member.offset);
    let read = storage.read_exact_at(offset, &mut text);
    read.map_err(|error| Error::from_io("read", error))?;
    Ok(text)
}
