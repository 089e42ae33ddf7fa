//! TCP addresses to listen on.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use nbd_proto::limits::DEFAULT_PORT;

/// A host name or address and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpAddress {
    /// Name or address; IPv6 addresses without brackets.
    host: String,
    port: u16,
}

impl Default for TcpAddress {
    /// The loopback interface and the port of NBD.
    fn default() -> Self {
        Self { host: "127.0.0.1".to_owned(), port: DEFAULT_PORT }
    }
}

impl fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for TcpAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            Err(format!(
                "'{text}' is not an address to listen on: {why}; give one such as 127.0.0.1, \
                 [::1]:10809 or 0.0.0.0:10809"
            ))
        };
        let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
            let Some((host, rest)) = bracketed.split_once(']') else {
                return wrong("the closing bracket is missing");
            };
            if host.parse::<Ipv6Addr>().is_err() {
                return wrong("between the brackets is no IPv6 address");
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return wrong("behind the bracket may only stand a port"),
            }
        } else if text.parse::<Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() || host.contains(['/', ' ']) {
            return wrong("the host is missing or no host name");
        }
        let port = match port.map(str::parse::<u16>) {
            None => DEFAULT_PORT,
            Some(Ok(port)) => port,
            Some(Err(_)) => return wrong("the port is not a number from 0 to 65535"),
        };
        Ok(Self { host: host.to_owned(), port })
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
        ] {
            assert_eq!(text.parse::<TcpAddress>().map(|a| a.to_string()), Ok(full.to_owned()));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "host is missing"),
            (":10809", "host is missing"),
            ("host:65536", "not a number"),
            ("host:", "not a number"),
            ("[::1", "closing bracket"),
            ("[host]:1", "no IPv6 address"),
            ("[::1]10809", "only stand a port"),
            ("nbd://host", "not a number"),
        ] {
            let error = text.parse::<TcpAddress>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
