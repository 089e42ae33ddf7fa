//! Locks that QEMU understands.
//!
//! QEMU keeps two programs from writing one image with open-file-description locks on single bytes
//! far past any header: a *shared* lock on byte 100 + n means "I hold permission n", and one on
//! byte 200 + n means "I do not tolerate that another process holds permission n". After taking its
//! own locks, a program looks for contradicting locks of others, and gives up if it finds any. Two
//! programs that start at the same instant may both give up, but never both continue.
//!
//! Permissions: 0 consistent read, 1 write, 2 write unchanged, 3 resize.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use super::FileIdentity;
use super::writers::writes_to;
use crate::access::{Access, Locking};
use crate::error::{Error, ErrorKind, Result, is_not_supported};
use crate::sys;

const HELD_BASE: u64 = 100;
const NOT_SHARED_BASE: u64 = 200;

const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// The result of an attempt to lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LockOutcome {
    /// The locks are held until the file is closed.
    Taken,
    /// Another program, or another image of this process, writes the file.
    HeldByWriter,
    /// Another process does not tolerate this use of the file.
    NotShared,
}

/// Locks the file of this identity; false if its file system has no locks and `locking` does
/// not require them.
pub(super) fn lock_file(
    file: &File,
    identity: FileIdentity,
    path: &Path,
    access: Access,
    locking: Locking,
) -> Result<bool> {
    let busy = |detail: &str| Err(Error::new(ErrorKind::Busy, "open", detail).with_path(path));
    let outcome = match (locking, access) {
        (Locking::Off, _) => return Ok(true),
        (Locking::Auto | Locking::On, _) => take(file.as_fd(), access),
        (Locking::Shared, Access::ReadOnly) => take_shared(file.as_fd()),
        (Locking::Shared, Access::ReadWrite) => {
            let detail = "a file that others may write to at the same time can only be read";
            return Err(Error::new(ErrorKind::InvalidInput, "open", detail).with_path(path));
        }
    };
    match outcome {
        Ok(LockOutcome::Taken) => Ok(true),
        Ok(LockOutcome::HeldByWriter) => {
            let error = busy(match writes_to(identity) {
                true => {
                    "this process has it open for writing already, as another export perhaps; \
                     close it first"
                }
                false => {
                    "another program (a virtual machine, qemu-nbd, another export?) has it open \
                     for writing; stop it first"
                }
            });
            match access {
                Access::ReadOnly => error.map_err(Error::but_could_be_shared),
                Access::ReadWrite => error,
            }
        }
        Ok(LockOutcome::NotShared) => busy(
            "another program (a virtual machine, qemu-nbd, another export?) is using it and does \
             not share it with writers; stop it first, or open it read-only",
        ),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            busy("another program has locked it; stop it first")
        }
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EINVAL))
                || is_not_supported(&error) =>
        {
            match locking {
                Locking::On => {
                    let detail = "its file system has no locks; open it with locking off if you \
                                  are sure that no other program uses it";
                    Err(Error::new(ErrorKind::Unsupported, "lock", detail).with_path(path))
                }
                // A caller that shares the file has asked for no protection.
                Locking::Shared => Ok(true),
                Locking::Auto | Locking::Off => Ok(false),
            }
        }
        Err(error) => Err(Error::from_io("lock", error).with_path(path)),
    }
}

/// Takes the locks for `access`, or none.
fn take(fd: BorrowedFd<'_>, access: Access) -> io::Result<LockOutcome> {
    let outcome = try_to_take(fd, access);
    if !matches!(outcome, Ok(LockOutcome::Taken)) {
        // Closing the file is not enough: a process that another thread has just forked keeps the
        // descriptor.
        let _ = sys::unlock(fd);
    }
    outcome
}

/// Locks for reading, and lets others write to the image at the same time.
fn take_shared(fd: BorrowedFd<'_>) -> io::Result<LockOutcome> {
    sys::lock_byte_shared(fd, HELD_BASE + CONSISTENT_READ)?;
    match sys::byte_is_locked(fd, NOT_SHARED_BASE + CONSISTENT_READ)? {
        false => Ok(LockOutcome::Taken),
        true => {
            sys::unlock(fd)?;
            Ok(LockOutcome::NotShared)
        }
    }
}

fn try_to_take(fd: BorrowedFd<'_>, access: Access) -> io::Result<LockOutcome> {
    let held: &[u64] = match access {
        Access::ReadOnly => &[CONSISTENT_READ],
        Access::ReadWrite => &[CONSISTENT_READ, WRITE, RESIZE],
    };
    let not_shared = [WRITE, RESIZE];
    for permission in held {
        sys::lock_byte_shared(fd, HELD_BASE + permission)?;
    }
    for permission in not_shared {
        sys::lock_byte_shared(fd, NOT_SHARED_BASE + permission)?;
    }
    for permission in not_shared {
        if sys::byte_is_locked(fd, HELD_BASE + permission)? {
            return Ok(LockOutcome::HeldByWriter);
        }
    }
    for permission in held {
        if sys::byte_is_locked(fd, NOT_SHARED_BASE + permission)? {
            return Ok(LockOutcome::NotShared);
        }
    }
    Ok(LockOutcome::Taken)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    /// As a process that was forked meanwhile has them until it executes its program.
    #[test]
    fn an_attempt_in_vain_leaves_no_lock_to_copies_of_its_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let writer = open();
        assert_eq!(take(writer.as_fd(), Access::ReadWrite).unwrap(), LockOutcome::Taken);
        let second = open();
        let copy = second.try_clone().unwrap();
        assert_ne!(take(second.as_fd(), Access::ReadWrite).unwrap(), LockOutcome::Taken);
        drop((writer, second));
        let third = open();
        assert_eq!(take(third.as_fd(), Access::ReadWrite).unwrap(), LockOutcome::Taken);
        drop(copy);
    }
}
