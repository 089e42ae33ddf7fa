//! Addresses to listen on, and those that a server listens on.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use nbd_proto::limits::DEFAULT_PORT;
use nbd_proto::uri::{NbdUri, Transport};

/// The host of a port alone: this machine only.
const DEFAULT_HOST: &str = "127.0.0.1";

/// An address to listen on.
///
/// Its text is `HOST`, `HOST:PORT`, `:PORT` or `PORT` for TCP, and `unix:PATH` for a unix socket.
/// The default host is 127.0.0.1, the default port 10809.
///
/// ```
/// use nbd_server::ListenAddress;
///
/// assert_eq!("[::1]:10810".parse(), Ok(ListenAddress::Tcp("[::1]:10810".into())));
/// assert_eq!("10810".parse(), Ok(ListenAddress::Tcp("127.0.0.1:10810".into())));
/// assert_eq!("unix:/run/disk.sock".parse(), Ok(ListenAddress::Unix("/run/disk.sock".into())));
/// ```
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

impl Default for ListenAddress {
    /// The loopback interface and the port of NBD.
    fn default() -> Self {
        tcp(DEFAULT_HOST, DEFAULT_PORT)
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    /// Errors do not repeat the text: the caller names it.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            Err(format!("{why}; give an address such as 127.0.0.1, [::1]:10809 or 0.0.0.0:10809"))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("the path is missing; give unix:PATH".to_owned()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
            let Some((host, rest)) = bracketed.split_once(']') else {
                return wrong("the closing bracket is missing");
            };
            if !is_ipv6(host) {
                return wrong("there is no IPv6 address between the brackets");
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return wrong("only a port can follow the bracket"),
            }
        } else if is_ipv6(text) {
            (text, None)
        } else if is_number(text) {
            (DEFAULT_HOST, Some(text))
        } else {
            match text.split_once(':') {
                Some(("", port)) => (DEFAULT_HOST, Some(port)),
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() || host.contains(['/', ' ']) {
            return wrong("the host is missing or is not a host name");
        }
        match port.map(str::parse::<u16>) {
            None => Ok(tcp(host, DEFAULT_PORT)),
            Some(Ok(port)) => Ok(tcp(host, port)),
            Some(Err(_)) => wrong("the port is not a number from 0 to 65535"),
        }
    }
}

fn tcp(host: &str, port: u16) -> ListenAddress {
    ListenAddress::Tcp(match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    })
}

/// Returns whether a text is an IPv6 address, with or without a zone.
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').unwrap_or((text, "zone"));
    address.parse::<Ipv6Addr>().is_ok()
        && !zone.is_empty()
        && !zone.contains(['/', ' ', ':', '[', ']'])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_an_optional_port() {
        for (text, full) in [
            ("127.0.0.1", "127.0.0.1:10809"),
            ("0.0.0.0:1", "0.0.0.0:1"),
            ("localhost:0", "localhost:0"),
            ("::1", "[::1]:10809"),
            ("[::]", "[::]:10809"),
            ("[::1]:10810", "[::1]:10810"),
            ("[fe80::1%eth0]:0", "[fe80::1%eth0]:0"),
            ("fe80::1%2", "[fe80::1%2]:10809"),
            (":10901", "127.0.0.1:10901"),
            ("10901", "127.0.0.1:10901"),
            ("unix", "unix:10809"),
        ] {
            assert_eq!(text.parse(), Ok(ListenAddress::Tcp(full.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_path_is_that_of_a_unix_socket() {
        for path in ["/run/a b", "beside", "/a:b"] {
            let address = format!("unix:{path}").parse();
            assert_eq!(address, Ok(ListenAddress::Unix(path.into())));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "host is missing"),
            (":", "not a number"),
            ("70000", "not a number"),
            ("localhost:99999", "not a number"),
            ("host:65536", "not a number"),
            ("host:", "not a number"),
            ("[::1", "closing bracket"),
            ("[host]:1", "no IPv6 address"),
            ("[::1]10809", "only a port"),
            ("[fe80::1%]:1", "no IPv6 address"),
            ("/run/socket", "not a host name"),
            ("nbd://host", "not a number"),
            ("unix:", "path is missing"),
        ] {
            let error = text.parse::<ListenAddress>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
            assert!(!error.contains("99999"), "clap names the value: {error}");
        }
    }
}
