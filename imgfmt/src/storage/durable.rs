//! Writes that are on stable storage when they return.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use rustix::io::{Errno, ReadWriteFlags};

use super::Durability;
use crate::error::LostWriteback;

/// Writes all of `data`; every write starts at a multiple of `unit` bytes.
pub(super) fn write_all(
    file: &File,
    offset: u64,
    data: &[u8],
    unit: usize,
    durability: Durability,
) -> io::Result<()> {
    let mut done = 0;
    let mut must_sync = false;
    while let Some(rest) = data.get(done..)
        && !rest.is_empty()
    {
        let position = offset.checked_add(done as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let written = match durability {
            Durability::Fua if !must_sync => write_durable(file, position, rest),
            _ => file.write_at(rest, position),
        };
        match written {
            Ok(written) if written == rest.len() => done = data.len(),
            // A block that was written in part is written again.
            Ok(written) if written >= unit => done += written - written % unit,
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if !must_sync && is_lacking(&error) && durability == Durability::Fua => {
                must_sync = true;
            }
            Err(error) if !must_sync && durability == Durability::Fua && is_full(&error) => {
                return Err(cause(error, || file.write_at(rest, position)));
            }
            Err(error) => return Err(error),
        }
    }
    if must_sync { sync(file) } else { Ok(()) }
}

/// Syncs a file for a write that has its space: what lacks it is data that was written before.
pub(super) fn sync(file: &File) -> io::Result<()> {
    file.sync_data().map_err(of_sync)
}

fn of_sync(error: io::Error) -> io::Error {
    if is_full(&error) { LostWriteback::error(Errno::IO.raw_os_error()) } else { error }
}

fn write_durable(file: &File, offset: u64, data: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::pwritev2(file, &[IoSlice::new(data)], offset, ReadWriteFlags::DSYNC)?)
}

/// Whether no space is left.
fn is_full(error: &io::Error) -> bool {
    [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded].contains(&error.kind())
}

/// Returns what a durable write that found no space is to report. If the bytes have space, its sync
/// failed, which may have taken the error of data that was written before: the system reports that
/// once. Then this write does not lack space.
fn cause(error: io::Error, write: impl FnOnce() -> io::Result<usize>) -> io::Error {
    match write() {
        Ok(_) => LostWriteback::error(Errno::IO.raw_os_error()),
        Err(_) => error,
    }
}

/// Whether the kernel or the file system does not support such writes.
fn is_lacking(error: &io::Error) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS]
        .map(Errno::raw_os_error)
        .map(Some)
        .contains(&error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_space_for_a_write_is_told_from_data_that_a_sync_has_lost() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = write_all(&full, 0, &[1; 512], 1, Durability::Fua).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "the bytes have no space either");
        let lost = || Errno::NOSPC.into();
        let error = cause(lost(), || Ok(512)).to_string();
        assert!(error.ends_with("is lost: Input/output error"), "{error}");
        assert!(of_sync(lost()).to_string().ends_with("is lost: Input/output error"));
        assert_eq!(of_sync(Errno::NOENT.into()).kind(), io::ErrorKind::NotFound);
        let error = cause(lost(), || Err(lost()));
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
