//! The file of a unix socket: it is bound, and removed with its listener.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::error::SOCKET_PATH_MAX;
use crate::error::ServeError;

/// The file of a unix socket that this server created. It is removed on drop, if it is still the
/// same file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    pub(crate) path: PathBuf,
    pub(crate) identity: (u64, u64),
    /// False while another server may still use the socket.
    pub(crate) is_owned: bool,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Its path may be another server's word.
        let is_same =
            |now: Metadata| now.file_type().is_socket() && (now.dev(), now.ino()) == self.identity;
        if self.is_owned && std::fs::symlink_metadata(&self.path).is_ok_and(is_same) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl SocketFile {
    /// Listens on a unix socket. A file without a listener is replaced.
    ///
    /// # Errors
    ///
    /// [`ServeError`]; no file remains.
    pub(crate) fn bind(path: &Path) -> Result<(Self, UnixListener), ServeError> {
        let bind_error = |source| ServeError::Bind { address: path.display().to_string(), source };
        let length = path.as_os_str().len();
        if length > SOCKET_PATH_MAX {
            return Err(ServeError::LongSocketPath { path: path.to_path_buf(), length });
        }
        let listener = match UnixListener::bind(path) {
            Ok(listener) => listener,
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(bind_error)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ServeError::NoDirectory { path: path.to_path_buf() });
            }
            Err(error) => return Err(bind_error(error)),
        };
        let identity = identity(path).map_err(bind_error)?;
        // The working directory may have changed when a client gets the URI or the file is removed,
        // so that needs an absolute path. Binding uses the given path: the absolute one may be too
        // long for it.
        let path = std::path::absolute(path).map_err(bind_error)?;
        Ok((Self { path, identity, is_owned: true }, listener))
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket file without a listener, and nothing else.
fn remove_stale(path: &Path) -> Result<(), ServeError> {
    let bind_error = |source| ServeError::Bind { address: path.display().to_string(), source };
    // A server that ends may have removed it in the meantime.
    let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if is_gone(&error) => return Ok(()),
        found => found.map_err(bind_error)?,
    };
    if !metadata.file_type().is_socket() {
        return Err(ServeError::NotASocket { path: path.to_path_buf() });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing a socket without a listener");
            match std::fs::remove_file(path) {
                Err(error) if is_gone(&error) => Ok(()),
                removed => removed.map_err(bind_error),
            }
        }
        Err(error) if is_gone(&error) => Ok(()),
        Ok(_) => Err(ServeError::SocketInUse { path: path.to_path_buf() }),
        Err(error) => Err(bind_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_a_socket_is_never_removed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_path_buf();
        let identity = identity(&path).unwrap();
        drop(SocketFile { path, identity, is_owned: true });
        assert!(file.path().exists());
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let result = SocketFile::bind(&path);
        assert!(matches!(result, Err(ServeError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_a_socket_is_refused_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let said = |path: PathBuf| SocketFile::bind(&path).unwrap_err().to_string();
        let long = said(directory.path().join("x".repeat(150)));
        assert!(long.contains("107 is the limit"), "{long}");
        let nowhere = said(directory.path().join("missing/socket"));
        assert!(nowhere.contains("its directory does not exist"), "{nowhere}");
    }
}
