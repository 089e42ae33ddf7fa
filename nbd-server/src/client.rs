//! The server's information about a client.

use std::fmt;
use std::net::SocketAddr;

#[cfg(feature = "tls")]
use crate::tls::PeerIdentity;

/// The address of a client, or its process credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientAddress {
    /// The address of a TCP peer.
    Tcp(SocketAddr),
    /// The process that connected to a unix socket, as of that moment.
    Unix {
        /// Its process id, if the system reports it.
        process: Option<i32>,
        /// Its effective user id.
        user: u32,
        /// Its effective group id.
        group: u32,
        /// Its supplementary group ids; empty if the system does not report them.
        groups: Vec<u32>,
    },
    /// The system reports nothing.
    Unknown,
}

/// The server's information about a client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientInfo {
    /// The client's address.
    pub address: ClientAddress,
    /// The authenticated identity; `None` before STARTTLS and without it.
    #[cfg(feature = "tls")]
    pub tls: Option<PeerIdentity>,
}

impl fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { process: Some(process), user, .. } => {
                write!(f, "process {process} of user {user}")
            }
            Self::Unix { process: None, user, .. } => write!(f, "a process of user {user}"),
            Self::Unknown => f.write_str("an unknown address"),
        }
    }
}

impl fmt::Display for ClientInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[cfg(feature = "tls")]
        if let Some(identity) = &self.tls {
            write!(f, "{identity} at ")?;
        }
        self.address.fmt(f)
    }
}
