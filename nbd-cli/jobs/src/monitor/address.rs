//! The address of the metrics: `[HOST:]PORT` or `unix:PATH`.

use std::path::PathBuf;
use std::str::FromStr;

/// The address of the metrics and the status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// A host and a port.
    Tcp {
        /// Name or address; IPv6 addresses without brackets.
        host: String,
        /// 0 selects a free one.
        port: u16,
    },
    /// The path of a unix socket.
    Unix(PathBuf),
}

impl FromStr for MetricsAddress {
    type Err = String;

    /// Errors do not repeat the value: the caller names it.
    fn from_str(text: &str) -> Result<Self, String> {
        const EXAMPLES: &str = "give a port such as 9810, 127.0.0.1:9810, [::1]:9810 or unix:PATH";
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(format!("the path is missing; {EXAMPLES}")),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let Ok(port) = port.parse() else {
            return Err(format!("the port is missing or is not a number; {EXAMPLES}"));
        };
        let unbracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match (host, unbracketed) {
            ("", _) => "127.0.0.1",
            (_, Some(host)) if host.contains(':') => host,
            (host, None) if !host.contains([':', '/', ' ', '[', ']']) => host,
            _ => return Err(format!("the host is not a name or an address; {EXAMPLES}")),
        };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_this_machine() {
        for (text, host, port) in [
            ("9810", "127.0.0.1", 9810),
            (":9810", "127.0.0.1", 9810),
            ("localhost:0", "localhost", 0),
            ("[::1]:9810", "::1", 9810),
            ("0.0.0.0:1", "0.0.0.0", 1),
        ] {
            let address = MetricsAddress::Tcp { host: host.to_owned(), port };
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        let path = MetricsAddress::Unix("/run/a b".into());
        assert_eq!("unix:/run/a b".parse(), Ok(path));
        for text in
            ["", ":", "host", "::1", "[::1]", "::1:80", "unix:", "h:70000", "a/b:1", "[x]:1"]
        {
            assert!(text.parse::<MetricsAddress>().is_err(), "{text}");
        }
    }
}
