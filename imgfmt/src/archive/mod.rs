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
use crate::options::{FileNames, OpenOptions};
use crate::probe::has_ending;
use crate::storage::{FileIdentity, Storage, StorageWindow};
use crate::units::HostOffset;

/// The longest descriptor that is read, in bytes.
const DESCRIPTOR_MAX: u64 = 4 << 20;

/// How much of a file is read at a time, in bytes.
const PART: u64 = 1 << 20;

/// Endings of the names of images.
const IMAGES: &[&str] =
    &["vmdk", "vhd", "vpc", "vhdx", "vdi", "img", "raw", "qcow2", "qcow", "qed", "hdd"];

/// How a disk in an archive is opened: it stands alone, because the author of the archive decides
/// what it names. A guest can make its own disk an archive, if the user calls that `.ova`. Its own
/// name helps to tell its format.
pub(crate) fn options(options: &OpenOptions, disk: &ArchiveDisk) -> OpenOptions {
    let known_as = Some(disk.name.clone());
    OpenOptions { policy: OpenPolicy::in_archive(), known_as, ..options.clone() }
}

/// An archive of a virtual machine, of which the files are read.
#[derive(Debug)]
pub struct Archive {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    members: Vec<Member>,
}

/// A file in an [`Archive`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ArchiveMember {
    /// Its name, without `./` before it.
    pub name: Vec<u8>,
    /// Its length in bytes.
    pub length: u64,
}

impl ArchiveMember {
    /// Returns whether its name has this ending, such as `mf`, in letters of either case.
    #[must_use]
    pub fn has_ending(&self, ending: &str) -> bool {
        has_ending(&self.name, ending)
    }
}

impl Archive {
    /// Opens the archive that a path means; `None` if it means something else, a disk in an archive
    /// included.
    ///
    /// # Errors
    ///
    /// `InvalidFormat` if the archive is damaged; those of opening a file.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Option<Self>> {
        let path = path.as_ref();
        let Some((archive, None)) = split(path, options) else { return Ok(None) };
        let opened = options.open_file(&archive, Access::ReadOnly).and_then(|file| {
            let storage: Arc<dyn Storage> = Arc::new(file);
            if !tar::starts(&*storage).map_err(|error| Error::from_io("read", error))? {
                return Ok(None);
            }
            let members = tar::members(&*storage)?;
            Ok(Some(Self { storage, path: archive, members }))
        });
        opened.map_err(|error| error.with_path(path))
    }

    /// Returns its files, without the attributes that macOS stores beside them.
    pub fn members(&self) -> Vec<ArchiveMember> {
        let own = self.members.iter().filter(|member| !is_companion(&member.name));
        let member = |member: &Member| {
            let (name, length) = (plain(&member.name).to_vec(), member.length);
            ArchiveMember { name, length }
        };
        own.map(member).collect()
    }

    /// Passes the content of a file on, in order and in parts; `false` ends that. Blocks.
    ///
    /// # Errors
    ///
    /// `NotFound`, and `InvalidFormat` if there are several files of this name; `Unsupported` if it
    /// is stored with its holes left out; `Io`.
    pub fn read(&self, name: &[u8], mut part: impl FnMut(&[u8]) -> bool) -> Result<()> {
        let mut read = || {
            let Some(member) = named(&self.members, name)? else {
                let detail = format!("the archive has no file '{}'", name.escape_ascii());
                return Err(refused(ErrorKind::NotFound, detail));
            };
            let Member { mut offset, mut length, .. } = usable(member)?;
            let mut buffer = vec![0; PART.min(length) as usize];
            while length > 0 {
                let bytes = &mut buffer[..PART.min(length) as usize];
                let read = self.storage.read_exact_at(HostOffset::new(offset), bytes);
                read.map_err(|error| Error::from_io("read", error).at(offset))?;
                (offset, length) = (offset + bytes.len() as u64, length - bytes.len() as u64);
                if !part(bytes) {
                    break;
                }
            }
            Ok(())
        };
        read().map_err(|error: Error| error.with_path(&*self.path))
    }
}

/// A disk in an archive.
#[derive(Debug)]
pub(crate) struct ArchiveDisk {
    pub(crate) storage: Arc<dyn Storage>,
    /// Its name in the archive.
    pub(crate) name: PathBuf,
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
    let name = OsStr::from_bytes(&found.name).into();
    Ok(Some(ArchiveDisk { storage: Arc::new(window), name, path: archive, identity }))
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

/// The archive and what is wanted of it, if the name is that of an archive. A file of the whole
/// name comes first; with the format raw it is not looked into.
fn split(path: &Path, options: &OpenOptions) -> Option<(PathBuf, Option<Vec<u8>>)> {
    if path.symlink_metadata().is_ok() {
        let is_archive = has_ending(path.as_os_str().as_bytes(), "ova")
            && options.names == FileNames::Telling
            && options.format != Some(Format::Raw)
            && options.part.is_whole();
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

fn find(storage: &Arc<dyn Storage>, wanted: Option<&[u8]>) -> Result<Member> {
    let members = tar::members(&**storage)?;
    let number = match wanted {
        None => 1,
        Some(wanted) => match (named(&members, wanted)?, number(wanted)) {
            (Some(member), _) => return usable(whole(&**storage, &members, member)?),
            (None, Some(number)) => number,
            (None, None) => {
                let wanted = wanted.escape_ascii();
                let detail = format!("the archive has no file '{wanted}'");
                return Err(refused(ErrorKind::NotFound, detail));
            }
        },
    };
    let disks = disks(&**storage, &members)?;
    let Some(disk) = number.checked_sub(1).and_then(|index| disks.get(index)) else {
        let detail = format!("the archive has {} disks, and no disk {number}", disks.len());
        return Err(refused(ErrorKind::NotFound, detail));
    };
    if disk.is_delta {
        return Err(only_differences(&format!("disk {number}")));
    }
    match file_of(disk, &members)? {
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

/// The disks of an archive in their order.
fn disks(storage: &dyn Storage, members: &[Member]) -> Result<Vec<ovf::Disk>> {
    let mut own = members.iter().filter(|member| !is_companion(&member.name));
    if let Some(descriptor) = own.find(|member| has_ending(&member.name, "ovf")) {
        // Refuses several of that name.
        named(members, &descriptor.name)?;
        return ovf::disks(&read(storage, descriptor)?);
    }
    let is_image = |name: &[u8]| IMAGES.iter().any(|ending| has_ending(name, ending));
    let is_disk = |name: &[u8]| is_image(name) && !is_companion(name);
    let images = members.iter().filter(|member| is_disk(&member.name));
    Ok(images.map(|member| ovf::Disk::whole(member.name.clone())).collect())
}

/// The file of a disk.
fn file_of<'m>(disk: &ovf::Disk, members: &'m [Member]) -> Result<Option<&'m Member>> {
    match named(members, &disk.href)? {
        None => named(members, &percent_decoded(&disk.href)),
        found => Ok(found),
    }
}

/// Refuses a file that the descriptor calls the differences to another disk. A descriptor that says
/// nothing does not keep its files from being read by their names.
fn whole<'m>(storage: &dyn Storage, members: &[Member], member: &'m Member) -> Result<&'m Member> {
    let disks = disks(storage, members).unwrap_or_default();
    let is_it = |disk: &&ovf::Disk| {
        disk.is_delta && matches!(file_of(disk, members), Ok(Some(found)) if found == member)
    };
    match disks.iter().find(is_it) {
        Some(_) => Err(only_differences(&format!("'{}'", member.name.escape_ascii()))),
        None => Ok(member),
    }
}

fn only_differences(what: &str) -> Error {
    let detail = format!(
        "{what} is only the differences to another disk of the archive: unpack the archive first"
    );
    refused(ErrorKind::Unsupported, detail)
}

/// The member of this name.
fn named<'m>(members: &'m [Member], name: &[u8]) -> Result<Option<&'m Member>> {
    let name = plain(name);
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

fn plain(name: &[u8]) -> &[u8] {
    name.strip_prefix(b"./").unwrap_or(name)
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
    let read = storage.read_exact_at(HostOffset::new(member.offset), &mut text);
    read.map_err(|error| Error::from_io("read", error))?;
    Ok(text)
}
