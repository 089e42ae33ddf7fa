//! Errors of setting a server up. What goes wrong on one connection is logged, not returned.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// What `sun_path` of a unix socket's address holds besides the zero at its end, in bytes.
pub(crate) const SOCKET_PATH_MAX: usize = 107;

/// The server cannot listen or serve.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {}", advice(source))]
    Bind {
        /// The address as it was given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Another server answers on the unix socket.
    #[error("cannot listen on {}: another server is using this socket", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket stands where the unix socket should be.
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
    /// The name of an address leads nowhere.
    #[error("cannot listen on {address}: the name has no address")]
    NoAddress {
        /// The address as it was given.
        address: String,
    },
    /// The service manager handed over no sockets, or some that cannot be used.
    #[error("cannot use the sockets of the service manager: {why}")]
    Systemd {
        /// What is wrong.
        why: String,
    },
    /// No address was given to listen on.
    #[error("the server has no address to listen on")]
    NoListener,
    /// A worker thread could not be started.
    #[error("cannot start a worker thread: {0}")]
    Worker(io::Error),
    /// Data could not be made durable at the end.
    #[error("the export \"{export}\" could not be flushed at the end: {message}; data may be lost")]
    Flush {
        /// Name of the export.
        export: String,
        /// What went wrong.
        message: String,
    },
}

fn advice(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            "another program is using this address; stop it or choose another port".to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "permission denied; choose another path or a port above 1023".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
        _ => source.to_string(),
    }
}

/// An export cannot be registered under a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The name is taken.
    #[error("there is already an export named \"{0}\"")]
    NameTaken(String),
    /// The protocol cannot carry the name or description.
    #[error("{what} cannot be used: {why}")]
    BadString {
        /// Which string.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The size or block sizes break the rules of the protocol.
    #[error("the export \"{name}\" cannot be served: {why}")]
    BadExport {
        /// Name of the export.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}
