//! The members of a tar archive: POSIX (ustar and pax) and GNU.
//!
//! | offset | size | field of a header |
//! | ---: | ---: | --- |
//! | 0 | 100 | name |
//! | 124 | 12 | length, octal, or binary if the first bit is set |
//! | 148 | 8 | sum of all bytes of the header, with blanks in place of itself |
//! | 156 | 1 | type |
//! | 257 | 6 | `ustar` |
//! | 345 | 155 | what comes before the name |

use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::probe::{TAR_BLOCK as BLOCK, is_archive, tar_number};
use crate::storage::Storage;
use crate::units::HostOffset;

/// Most headers that are read: archives of machines have a few.
const HEADERS_MAX: usize = 4096;

/// Most blocks with extents of files with holes, in the whole archive: each has 21 of them.
const EXTENSIONS_MAX: usize = 1 << 16;

/// Where a header, and a block with extents, say that another block with extents follows.
const IS_EXTENDED: usize = 482;
const EXTENSION_GOES_ON: usize = 504;

/// The longest name or list of attributes that is before a member, in bytes.
const ATTRIBUTES_MAX: u64 = 64 << 10;

/// The longest name, in bytes: no file has a longer path, and all names are in memory at once.
const NAME_MAX: usize = 4096;

/// A file in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    /// Of its first byte in the archive.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: u64,
    /// Whether its bytes follow each other.
    pub(super) is_plain: bool,
}

/// Whether it begins as an archive.
pub(super) fn starts(storage: &dyn Storage) -> io::Result<bool> {
    let mut header = [0; BLOCK];
    let read = storage.read_at(HostOffset::new(0), &mut header)?;
    Ok(read == BLOCK && is_archive(&header))
}

/// All files of an archive.
pub(super) fn members(storage: &dyn Storage) -> Result<Vec<Member>> {
    let length = storage.len().map_err(|error| Error::from_io("find the size of", error))?;
    let (mut members, mut offset) = (Vec::new(), 0_u64);
    let (mut next, mut extensions) = (Attributes::default(), 0);
    for _ in 0..HEADERS_MAX {
        let mut header = [0; BLOCK];
        let read = storage.read_at(HostOffset::new(offset), &mut header);
        if read.map_err(|error| Error::from_io("read", error))? < BLOCK || header == [0; BLOCK] {
            return Ok(members);
        }
        if !is_archive(&header) {
            return Err(damaged(offset));
        }
        let mut start = offset + BLOCK as u64;
        let stated = tar_number(&header[124..136]);
        let kind = header[156];
        if kind == b'S' {
            start = behind_extents(storage, &header, start, &mut extensions)?;
        }
        let size = match kind {
            // Links and directories have no content, whatever is stated.
            b'1'..=b'6' => Some(0),
            b'x' | b'g' | b'L' | b'K' => stated,
            _ => next.length.or(stated),
        };
        let end = size.and_then(|size| start.checked_add(size)).filter(|end| *end <= length);
        let Some((size, end)) = size.zip(end) else { return Err(damaged(offset)) };
        match kind {
            b'x' | b'L' => next.read(storage, (start, size), kind)?,
            b'g' | b'K' => {}
            _ => {
                let attributes = std::mem::take(&mut next);
                let stated = attributes.sparse_name.or(attributes.name);
                let name = stated.unwrap_or_else(|| name(&header));
                let is_plain = matches!(kind, b'0' | 0 | b'7') && !attributes.is_sparse;
                if !matches!(kind, b'1'..=b'6') {
                    members.push(Member { name, offset: start, length: size, is_plain });
                }
            }
        }
        // The last one need not be padded.
        offset = end.next_multiple_of(BLOCK as u64);
    }
    Err(refused(ErrorKind::Unsupported, format!("the archive has more than {HEADERS_MAX} members")))
}

/// Where the content of a member begins whose holes are left out as in old GNU archives: behind the
/// blocks with extents for which its header has no space. Its length does not count them.
fn behind_extents(
    storage: &dyn Storage,
    header: &[u8; BLOCK],
    mut start: u64,
    extensions: &mut usize,
) -> Result<u64> {
    if &header[257..263] != b"ustar " {
        return Err(damaged(start - BLOCK as u64));
    }
    let mut goes_on = header[IS_EXTENDED] != 0;
    while goes_on {
        *extensions += 1;
        if *extensions > EXTENSIONS_MAX {
            let detail = "the archive has files with too many holes: unpack it first";
            return Err(refused(ErrorKind::Unsupported, detail));
        }
        let mut extension = [0; BLOCK];
        let read = storage.read_at(HostOffset::new(start), &mut extension);
        if read.map_err(|error| Error::from_io("read", error))? < BLOCK {
            return Err(damaged(start));
        }
        goes_on = extension[EXTENSION_GOES_ON] != 0;
        start += BLOCK as u64;
    }
    Ok(start)
}

/// What is said of the next member.
#[derive(Debug, Default)]
struct Attributes {
    name: Option<Vec<u8>>,
    /// The true name, where the other one says how it is stored.
    sparse_name: Option<Vec<u8>>,
    length: Option<u64>,
    is_sparse: bool,
}

impl Attributes {
    /// Reads a long name of GNU, or a list of POSIX: `LENGTH KEY=VALUE\n`.
    fn read(&mut self, storage: &dyn Storage, (start, size): (u64, u64), kind: u8) -> Result<()> {
        if size > ATTRIBUTES_MAX {
            return Err(damaged(start));
        }
        let mut bytes = vec![0; size as usize];
        let read = storage.read_exact_at(HostOffset::new(start), &mut bytes);
        read.map_err(|error| Error::from_io("read", error))?;
        if kind == b'L' {
            self.name = Some(stated_name(until_zero(&bytes), start)?);
            return Ok(());
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let line = line_of(rest).ok_or_else(|| damaged(start))?;
            let text = line.strip_suffix(b"\n").ok_or_else(|| damaged(start))?;
            let blank = text.iter().position(|byte| *byte == b' ').unwrap_or(0);
            let text = text.get(blank + 1..).unwrap_or_default();
            let equals =
                text.iter().position(|byte| *byte == b'=').ok_or_else(|| damaged(start))?;
            let (key, value) = (&text[..equals], &text[equals + 1..]);
            match key {
                b"path" => self.name = Some(stated_name(value, start)?),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                    self.length = Some(size.ok_or_else(|| damaged(start))?);
                }
                _ if key.starts_with(b"GNU.sparse.") => {
                    self.is_sparse = true;
                    if key == b"GNU.sparse.name" {
                        self.sparse_name = Some(stated_name(value, start)?);
                    }
                }
                _ => {}
            }
            rest = &rest[line.len()..];
        }
        Ok(())
    }
}

/// A name that comes before its member, at `start`.
fn stated_name(name: &[u8], start: u64) -> Result<Vec<u8>> {
    match name.len() {
        0..=NAME_MAX => Ok(name.to_vec()),
        _ => Err(damaged(start)),
    }
}

/// The first line, by the length that it begins with; it is not empty.
fn line_of(rest: &[u8]) -> Option<&[u8]> {
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let length: usize = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
    rest.get(..length).filter(|line| !line.is_empty())
}

fn name(header: &[u8; BLOCK]) -> Vec<u8> {
    let (name, prefix) = (until_zero(&header[..100]), until_zero(&header[345..500]));
    // GNU has other fields there.
    match prefix.is_empty() || &header[257..263] != b"ustar\0" {
        true => name.to_vec(),
        false => [prefix, b"/", name].concat(),
    }
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn damaged(offset: u64) -> Error {
    let detail = "the archive is damaged or cut off: a header in it makes no sense";
    refused(ErrorKind::InvalidFormat, detail).at(offset)
}

pub(super) fn refused(kind: ErrorKind, detail: impl Into<String>) -> Error {
    Error::new(kind, "open", detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    fn member(kind: u8, content: &[u8]) -> Vec<u8> {
        let mut header = [0; BLOCK];
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[148..156].fill(b' ');
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let mut bytes = [&header[..], content].concat();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    #[test]
    fn names_that_no_file_can_have_are_refused() {
        for (length, is_read) in [(NAME_MAX, true), (NAME_MAX + 1, false)] {
            let name = "n".repeat(length);
            let line = format!(" path={name}\n");
            let line = format!("{}{line}", line.len() + 4);
            for before in [member(b'L', name.as_bytes()), member(b'x', line.as_bytes())] {
                let archive = MemoryStorage::from_bytes(&[before, member(b'0', b"disk")].concat());
                match members(&archive) {
                    Ok(found) => assert!(is_read && found[0].name == name.as_bytes()),
                    Err(error) => assert!(!is_read && error.kind() == ErrorKind::InvalidFormat),
                }
            }
        }
    }
}
