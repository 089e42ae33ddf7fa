//! The server's information about a client.

use std::fmt;
use std::net::SocketAddr;

use tracing::field::{Empty, display};
use tracing::{Span, error_span};

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

/// The span of a client's log lines of all levels. Fields that are unknown yet are
/// [recorded](tracing::Span::record) later.
pub(crate) fn span(peer: &str) -> Span {
    error_span!(
        "client",
        %peer,
        pid = Empty,
        uid = Empty,
        program = Empty,
        tls = Empty,
        export = Empty
    )
}

/// Records the process of a client of a unix socket.
pub(crate) fn record_process(span: &Span, address: &ClientAddress) {
    let ClientAddress::Unix { process, user, .. } = address else { return };
    span.record("uid", user);
    if let Some(process) = process {
        span.record("pid", process);
        if let Some(program) = program(*process) {
            span.record("program", display(program.escape_debug()));
        }
    }
}

/// The name that a process has given itself: only for the log.
fn program(process: i32) -> Option<String> {
    let name = std::fs::read(format!("/proc/{process}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end().to_owned())
}
