//! Detects the format of an image from its first bytes, or, in files that are called so, from its
//! last bytes for formats with a header at the end.
//!
//! The first bytes of a raw disk belong to the guest. A guest that writes a qcow2 header there
//! turns its disk, at the next open by probing, into an image that names any file of the host as
//! its backing file (CVE-2008-2004). Therefore [`Image`](crate::Image) refuses writes to the first
//! sector of a raw image *found by probing* that would make it look like anything else, an archive
//! (tar) with images included.
//!
//! The last bytes of a raw disk belong to the guest too, and writes there are not guarded: one that
//! wrote a VHD footer would take the last sector away from its disk at the next open, or make it a
//! DMG, which is refused. Therefore a header at the end counts only if the name of the file has the
//! ending of that format, which the user chooses, and if its checksum or its position is right.
//! QEMU never looks there for a VHD, and for a DMG goes by the name as well.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::format::Format;
use crate::formats::{HeaderAtEnd, TABLE};
use crate::options::FileNames;
use crate::storage::Storage;
use crate::units::HostOffset;

/// How many bytes from the start decide on the format.
pub(crate) const PROBE_LENGTH: usize = 512;

/// The length of a header of a tar archive, in bytes.
pub(crate) const TAR_BLOCK: usize = 512;

const QCOW_MAGIC: &[u8] = b"QFI\xfb";

/// Formats whose first bytes never differ, besides those that are read.
const MAGICS: [(&[u8], Format); 3] = [
    (b"LUKS\xba\xbe\0\x01", Format::Luks),
    (b"LUKS\xba\xbe\0\x02", Format::Luks),
    (b"Bochs Virtual HD Image", Format::Bochs),
];

/// Looks at the first bytes of a file, which may be fewer than [`PROBE_LENGTH`].
pub(crate) fn probe(start: &[u8]) -> Format {
    // The first version is another format.
    if start.starts_with(QCOW_MAGIC) && start.get(4..8) != Some(&[0, 0, 0, 1]) {
        return Format::Qcow2;
    }
    if let Some((_, format)) = MAGICS.iter().find(|(magic, _)| start.starts_with(magic)) {
        return *format;
    }
    if let Some(entry) = TABLE.iter().find(|entry| (entry.starts)(start)) {
        entry.format
    } else if is_cloop(start) {
        Format::Cloop
    } else {
        Format::Raw
    }
}

impl Format {
    /// Detects the format of a storage from its bytes, like opening without a format. Unknown
    /// content is a raw disk. On a raw disk those bytes belong to the guest. Images whose header is
    /// at the end, such as fixed VHDs, are found only if the storage is called like one.
    ///
    /// # Errors
    ///
    /// Any error of the storage.
    pub fn probe(storage: &dyn Storage, name: Option<&Path>) -> io::Result<Self> {
        probe_named(storage, name, FileNames::Telling)
    }
}

/// As [`Format::probe`], or as QEMU does.
pub(crate) fn probe_named(
    storage: &dyn Storage,
    name: Option<&Path>,
    names: FileNames,
) -> io::Result<Format> {
    let mut start = [0; PROBE_LENGTH];
    let read = storage.read_at(HostOffset::new(0), &mut start)?;
    match (probe(&start[..read]), name) {
        (Format::Raw, Some(name)) => probe_end(storage, name.as_os_str().as_bytes(), names),
        (format, _) => Ok(format),
    }
}

/// Looks at the last bytes of a file that does not begin as an image, if it is called like one that
/// ends so.
fn probe_end(storage: &dyn Storage, name: &[u8], names: FileNames) -> io::Result<Format> {
    let is_called = |end: &HeaderAtEnd| end.names.iter().any(|ending| has_ending(name, ending));
    let ends = TABLE.iter().filter_map(|entry| Some((entry.format, entry.end.as_ref()?)));
    let called = ends.filter(|_| names == FileNames::Telling).find(|(_, end)| is_called(end));
    if called.is_none() && !has_ending(name, "dmg") {
        return Ok(Format::Raw);
    }
    let length = storage.len()?;
    let Some(offset) = length.checked_sub(TRAILER_LENGTH as u64) else { return Ok(Format::Raw) };
    let mut end = [0; TRAILER_LENGTH];
    let read = storage.read_at(HostOffset::new(offset), &mut end)?;
    Ok(match called {
        _ if read < end.len() => Format::Raw,
        Some((format, header)) if (header.is_one)(&end, length) => format,
        None if is_dmg_trailer(&end, offset) => Format::Dmg,
        _ => Format::Raw,
    })
}

/// Whether a name has this ending, in letters of either case.
pub(crate) fn has_ending(name: &[u8], ending: &str) -> bool {
    let found = name.rsplit(|byte| *byte == b'.').next();
    name.contains(&b'.') && found.is_some_and(|found| found.eq_ignore_ascii_case(ending.as_bytes()))
}

/// The length of the footer of a VHD and of the trailer of a DMG, in bytes.
const TRAILER_LENGTH: usize = 512;

/// Whether this is the trailer of a DMG at that offset: its data and its list of properties then
/// lie before it.
fn is_dmg_trailer(trailer: &[u8], offset: u64) -> bool {
    const FORKS: [usize; 3] = [24, 40, 216];
    let fits = |place: usize| {
        let number = |at: usize| {
            let bytes = trailer.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u64::from_be_bytes)
        };
        let end = number(place)
            .zip(number(place + 8))
            .and_then(|(from, length)| from.checked_add(length));
        end.is_some_and(|end| end <= offset)
    };
    // Magic, version 4, and the length of the trailer itself.
    trailer.starts_with(b"koly\0\0\0\x04\0\0\x02\0") && FORKS.into_iter().all(fits)
}

/// Whether this is the first header of a tar archive, by its checksum. An archive has no format:
/// only its name makes it one. Raw disks that were probed must not look like one, whatever their
/// names.
pub(crate) fn is_archive(start: &[u8]) -> bool {
    let Some(header) = start.first_chunk::<TAR_BLOCK>() else { return false };
    let is_own = |place: usize| (148..156).contains(&place);
    let bytes = header.iter().enumerate();
    let sum = bytes.map(|(place, byte)| if is_own(place) { 32 } else { u64::from(*byte) }).sum();
    tar_number(&header[148..156]) == Some(sum) && &header[257..262] == b"ustar"
}

/// A number in the header of a tar archive: octal in text, or binary.
pub(crate) fn tar_number(field: &[u8]) -> Option<u64> {
    if let [0x80, rest @ ..] = field {
        let fits = rest.iter().rev().skip(8).all(|byte| *byte == 0);
        let number = rest.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        return fits.then_some(number);
    }
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
    match text {
        [] => Some(0),
        _ => u64::from_str_radix(std::str::from_utf8(text).ok()?, 8).ok(),
    }
}

/// Whether this is a compressed loop device: a shell script that says its version.
fn is_cloop(start: &[u8]) -> bool {
    let version = start.strip_prefix(b"#!/bin/sh\n#V");
    let line = version.and_then(|rest| rest.split(|byte| *byte == b'\n').next());
    line.and_then(|line| line.strip_suffix(b" Format"))
        .is_some_and(|number| number.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.'))
}

#[cfg(test)]
mod tests;
