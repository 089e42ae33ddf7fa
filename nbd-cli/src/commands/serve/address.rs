//! TCP addresses to listen on.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use nbd_proto::limits::DEFAULT_PORT;

/// Default host of a port alone: this machine only.
const DEFAULT_HOST: &str = "127.0.0.1";

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
        Self { host: DEFAULT_HOST.to_owned(), port: DEFAULT_PORT }
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

    /// Parses `ADDR`, `ADDR:PORT`, `:PORT` or `PORT`. Errors do not repeat the value: the caller
    /// names it.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            Err(format!("{why}; give an address such as 127.0.0.1, [::1]:10809 or 0.0.0.0:10809"))
        };
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
        let port = match port.map(str::parse::<u16>) {
            None => DEFAULT_PORT,
            Some(Ok(port)) => port,
            Some(Err(_)) => return wrong("the port is not a number from 0 to 65535"),
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

/// Returns whether a text is an IPv6 address, with or without a zone.
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').unwrap_or((text, "zone"));
    address.parse::<Ipv6Addr>().is_ok()
        && !zone.is_empty()
        && !zone.contains(['/', ' ', ':', '[', ']'])
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
        ] {
            assert_eq!(text.parse::<TcpAddress>().map(|a| a.to_string()), Ok(full.to_owned()));
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
        ] {
            let error = text.parse::<TcpAddress>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
            assert!(!error.contains("99999"), "clap names the value: {error}");
        }
    }
}
