//! System calls without a safe wrapper: the databases of users and groups.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;

/// The longest entry of a database that is read, in bytes: a group has many members.
const ENTRY_MAX_LEN: usize = 16 << 20;

/// Finds the id of a user by name; `None` if there is none.
///
/// # Errors
///
/// If the database cannot be read.
pub(crate) fn user_id(name: &str) -> io::Result<Option<u32>> {
    let Ok(name) = CString::new(name) else { return Ok(None) };
    with_buffer(|buffer| {
        // SAFETY: the structure is plain integers and pointers, for which zero is a value.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: name, entry, buffer (of the given length) and result live across the call, which
        // keeps none of them. Pointers in the entry are not followed.
        let error = unsafe {
            let start = buffer.as_mut_ptr().cast();
            libc::getpwnam_r(name.as_ptr(), &raw mut entry, start, buffer.len(), &raw mut found)
        };
        (error, (!found.is_null()).then_some(entry.pw_uid))
    })
}

/// Finds the id of a group by name; `None` if there is none.
///
/// # Errors
///
/// If the database cannot be read.
pub(crate) fn group_id(name: &str) -> io::Result<Option<u32>> {
    let Ok(name) = CString::new(name) else { return Ok(None) };
    with_buffer(|buffer| {
        // SAFETY: the structure is plain integers and pointers, for which zero is a value.
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: as in `user_id`.
        let error = unsafe {
            let start = buffer.as_mut_ptr().cast();
            libc::getgrnam_r(name.as_ptr(), &raw mut entry, start, buffer.len(), &raw mut found)
        };
        (error, (!found.is_null()).then_some(entry.gr_gid))
    })
}

/// Looks an entry up, with a buffer that is long enough for it.
fn with_buffer(
    mut look_up: impl FnMut(&mut [u8]) -> (libc::c_int, Option<u32>),
) -> io::Result<Option<u32>> {
    let mut buffer = vec![0; 4096];
    loop {
        match look_up(&mut buffer) {
            (0, found) => return Ok(found),
            (libc::EINTR, _) => {}
            (libc::ERANGE, _) if buffer.len() < ENTRY_MAX_LEN => {
                let length = buffer.len() * 4;
                buffer.resize(length, 0);
            }
            // The answers of the databases for a name that is unknown or malformed.
            (libc::ENOENT | libc::ESRCH | libc::EINVAL, _) => return Ok(None),
            (error, _) => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_known_and_nonsense_is_not() {
        assert_eq!(user_id("root").unwrap(), Some(0));
        assert_eq!(group_id("root").unwrap(), Some(0));
        for name in ["no such user", "", "a\0b", "root:x"] {
            assert_eq!(user_id(name).unwrap(), None, "{name}");
            assert_eq!(group_id(name).unwrap(), None, "{name}");
        }
    }
}
