//! Addresses to listen on, and those that a server listens on.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use nbd_proto::uri::{NbdUri, Transport};

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ListenAddress {
    /// A TCP address: `host:port`, with IPv6 addresses in brackets. A link-local address has a
    /// zone, the name or number of an interface, as in `[fe80::1%eth0]:10809`. Port 0 selects any
    /// free port. A name with several addresses means all of them. A port in use by another server
    /// is retried for about a second.
    Tcp(String),
    /// A unix socket. A socket file without a listening process is replaced, and one in use by
    /// another server is retried for about a second; the file is removed when the server ends.
    Unix(PathBuf),
    /// The sockets passed by a service manager (`LISTEN_PID`, `LISTEN_FDS`: sd_listen_fds). The
    /// only variant that reads the environment. Use it once in a process.
    Systemd,
}

/// The actual address of a listening server.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BoundAddress {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket, by its absolute path; `None` if it has no name in the file system.
    Unix(Option<PathBuf>),
}

impl BoundAddress {
    /// Returns the URI under which a client on this machine reaches the export `name`, without TLS.
    /// That of a server which requires TLS is made from it:
    ///
    /// ```
    /// use nbd_server::{BoundAddress, Security};
    ///
    /// let mut uri = BoundAddress::Tcp(([127, 0, 0, 1], 10810).into()).uri("disk");
    /// assert_eq!(uri.to_string(), "nbd://127.0.0.1:10810/disk");
    /// uri.security = Security::Tls;
    /// assert_eq!(uri.to_string(), "nbds://127.0.0.1:10810/disk");
    /// ```
    #[must_use]
    pub fn uri(&self, name: &str) -> NbdUri {
        let transport = match self {
            Self::Tcp(address) => Transport::Tcp { host: host_of(address), port: address.port() },
            Self::Unix(path) => Transport::Unix { path: path.clone().unwrap_or_default() },
        };
        NbdUri::new(transport, name)
    }
}

/// The host under which a client on this machine reaches a socket.
fn host_of(address: &SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) if address.ip().is_unspecified() => "127.0.0.1".to_owned(),
        SocketAddr::V6(address) if address.ip().is_unspecified() => "::1".to_owned(),
        SocketAddr::V6(address) if address.scope_id() != 0 => {
            let number = address.scope_id();
            // Interface numbers can change with every restart of the machine.
            let zone = interface_name(number).unwrap_or_else(|| number.to_string());
            format!("{}%{zone}", address.ip())
        }
        address => address.ip().to_string(),
    }
}

fn interface_name(number: u32) -> Option<String> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    // Any socket can be asked.
    let (family, kind, flags) = (AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC);
    let socket = socket_with(family, kind, flags, None).ok()?;
    netdevice::index_to_name(socket, number).ok()
}

impl fmt::Display for BoundAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(Some(path)) => path.display().fmt(f),
            Self::Unix(None) => f.write_str("(unnamed unix socket)"),
        }
    }
}
