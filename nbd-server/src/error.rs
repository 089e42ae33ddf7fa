//! Errors of setting up a server. Errors of a single connection are logged, not returned.

use std::io;
use std::path::PathBuf;

pub(crate) use nbd_proto::system_words::system_words;
use thiserror::Error;

/// The maximum length of a unix socket's path, in bytes: that of `sun_path` without the final zero.
pub(crate) const SOCKET_PATH_MAX: usize = 107;

/// The server cannot listen or serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The server cannot listen on the address.
    #[error("cannot listen on {address}: {}", advice(address, source))]
    Bind {
        /// The address, as given.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// Another server answers on the unix socket.
    #[error("cannot listen on {}: another server is using this socket", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The path of the unix socket is in use by a file that is not a socket.
    #[error("cannot listen on {}: a file of that name exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path of the unix socket is too long for the system.
    #[error(
        "cannot listen on {}: the path is {length} bytes long, and {SOCKET_PATH_MAX} is the limit; \
         choose a shorter one", path.display()
    )]
    LongSocketPath {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The directory of the unix socket does not exist.
    #[error("cannot listen on {}: its directory does not exist; create it first", path.display())]
    NoDirectory {
        /// The path.
        path: PathBuf,
    },
    /// The name in an address cannot be resolved.
    #[error("cannot listen on {address}: the name has no address")]
    NoAddress {
        /// The address, as given.
        address: String,
    },
    /// The service manager passed no sockets, or unusable ones.
    #[error("cannot use the sockets of the service manager: {why}")]
    Systemd {
        /// The defect.
        why: String,
    },
    /// There is no address to listen on.
    #[error("the server has no address to listen on")]
    NoListener,
    /// A worker thread could not be started.
    #[error("cannot start a worker thread: {}", system_words(.0))]
    Worker(io::Error),
    /// The tokio runtime on which the server was started has ended before the server. Connections
    /// were cut, and no export was flushed.
    #[error(
        "the runtime of the server was shut down before the server, and nothing was flushed; \
         shut the server down first, and wait for it"
    )]
    RuntimeShutDown,
    /// Data could not be made durable at the end of the server.
    #[error("the export \"{export}\" could not be flushed at the end: {message}; data may be lost")]
    Flush {
        /// Name of the export.
        export: String,
        /// The error of the flush.
        message: String,
    },
}

/// The remedy; `address` is a path or has a port.
fn advice(address: &str, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            "another program is using this address; stop it or choose another port".to_owned()
        }
        io::ErrorKind::PermissionDenied if !has_port(address) => {
            "permission denied; choose a path in a directory that this user may write to".to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "permission denied; choose a port above 1023, or run as root".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
        _ => system_words(source),
    }
}

/// Whether an address ends with a port, as addresses other than paths do.
fn has_port(address: &str) -> bool {
    let port = address.rsplit_once(':').map(|(_, port)| port);
    !address.contains('/')
        && port.is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// An export cannot be registered under a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The name is in use.
    #[error("there is already an export named \"{0}\"")]
    NameTaken(String),
    /// There is no export of that name.
    #[error("there is no export named \"{0}\"")]
    NotFound(String),
    /// The protocol cannot express the name or description.
    #[error("{what} cannot be used: {why}")]
    BadString {
        /// The kind of string.
        what: &'static str,
        /// The rule that the string violates.
        why: String,
    },
    /// The size or block sizes violate the rules of the protocol.
    #[error("the export \"{name}\" cannot be served: {why}")]
    BadExport {
        /// Name of the export.
        name: String,
        /// The rule that its properties violate.
        why: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_to_listen_is_explained_for_paths_and_for_ports() {
        let denied = |address: &str| {
            let source = io::Error::from_raw_os_error(13);
            ServeError::Bind { address: address.to_owned(), source }.to_string()
        };
        for path in ["/run/s", "a/b:1", "socket"] {
            assert!(denied(path).contains("choose a path"), "{path}");
            assert!(!denied(path).contains("port"), "{path}");
        }
        for address in ["127.0.0.1:80", "[::1]:80", "localhost:80"] {
            assert!(denied(address).contains("choose a port"), "{address}");
            assert!(!denied(address).contains("path"), "{address}");
        }
    }

    #[test]
    fn errors_of_the_system_are_words_without_a_number() {
        let error = ServeError::Worker(io::Error::from_raw_os_error(11));
        assert!(error.to_string().ends_with("Resource temporarily unavailable"), "{error}");
    }
}
