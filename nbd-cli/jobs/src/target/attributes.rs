//! Owner, permissions and extended attributes of a file that replaces another one.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::Path;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr, getxattr, listxattr};
use rustix::io::Errno;

/// Largest extended attribute, and largest list of their names, in bytes: the kernel's limit.
const XATTR_MAX: usize = 64 << 10;

/// Copies the attributes of the old file to a new one.
///
/// # Errors
///
/// If an attribute cannot be set, usually for lack of rights.
pub(super) fn copy(old_path: &Path, old: &Metadata, new: &File) -> io::Result<()> {
    let now = new.metadata()?;
    if (now.uid(), now.gid()) != (old.uid(), old.gid()) {
        fchown(new, Some(old.uid()), Some(old.gid()))?;
    }
    // After the owner, because a change of owner may remove permissions.
    if now.mode() != old.mode() {
        new.set_permissions(std::fs::Permissions::from_mode(old.mode() & 0o7777))?;
    }
    copy_extended(old_path, new)
}

fn copy_extended(old: &Path, new: &File) -> io::Result<()> {
    let mut names = vec![0; XATTR_MAX];
    let length = match listxattr(old, &mut *names) {
        Err(Errno::NOTSUP) => return Ok(()),
        length => length?,
    };
    let (mut value, mut present) = (vec![0; XATTR_MAX], vec![0; XATTR_MAX]);
    let names = names.get(..length).unwrap_or_default();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = getxattr(old, name, &mut *value)?;
        let value = value.get(..length).unwrap_or_default();
        let has_it = fgetxattr(new, name, &mut *present)
            .is_ok_and(|length| present.get(..length) == Some(value));
        if !has_it {
            fsetxattr(new, name, value, XattrFlags::empty())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_and_extended_attributes_are_copied() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        let file = File::create(&old).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o640)).unwrap();
        let has_attributes = fsetxattr(&file, "user.test", b"value", XattrFlags::empty()).is_ok();
        let copied = File::create(&new).unwrap();
        copy(&old, &file.metadata().unwrap(), &copied).unwrap();
        assert_eq!(copied.metadata().unwrap().mode() & 0o7777, 0o640);
        if has_attributes {
            let mut value = [0; 16];
            let length = getxattr(&new, "user.test", &mut value).unwrap();
            assert_eq!(&value[..length], b"value");
        }
    }
}
