//! Unix sockets that only this user can use.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

/// The file of a listening socket. Removed on drop, if it is owned.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode number: another file in its place is left alone.
    identity: (u64, u64),
    is_owned: bool,
}

impl SocketFile {
    /// The file of a socket of another program, not owned yet.
    pub(crate) const fn adopted(path: PathBuf, identity: (u64, u64)) -> Self {
        Self { path, identity, is_owned: false }
    }

    /// Returns its absolute path.
    #[cfg(feature = "monitor")]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it on drop.
    pub(crate) const fn own(&mut self) {
        self.is_owned = true;
    }

    /// Leaves it to another program. Returns its absolute path, and its device and inode number.
    pub(crate) fn disown(mut self) -> (PathBuf, (u64, u64)) {
        self.is_owned = false;
        (std::mem::take(&mut self.path), self.identity)
    }

    /// Whether it is what a client finds at this path, perhaps another one than its own.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|found| self.is(&found))
    }

    fn is(&self, found: &Metadata) -> bool {
        found.file_type().is_socket() && (found.dev(), found.ino()) == self.identity
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Its path may be another program's word.
        if self.is_owned && std::fs::symlink_metadata(&self.path).is_ok_and(|it| self.is(&it)) {
            // There is no remedy for a directory that does not allow it any more.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Listens on a new socket, which does not block, with the mode 0600.
///
/// # Errors
///
/// Those of the system.
pub(crate) fn listen_privately(
    path: &Path,
    backlog: i32,
) -> io::Result<(UnixListener, SocketFile)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before there is a file: it has these permissions from the start.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, backlog)?;
    let metadata = std::fs::symlink_metadata(path)?;
    let identity = (metadata.dev(), metadata.ino());
    let file = SocketFile { path: std::path::absolute(path)?, identity, is_owned: true };
    Ok((UnixListener::from(socket), file))
}
