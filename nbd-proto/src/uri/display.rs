//! Writes URIs.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{NbdUri, Security, Transport};
use crate::limits::DEFAULT_PORT;

/// The characters that are encoded in a host, user name or parameter: all but RFC 3986's unreserved
/// ones.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// In paths, slashes and colons are not encoded, for readability.
const ENCODED_IN_PATH: &AsciiSet = &ENCODED.remove(b'/').remove(b':');

impl fmt::Display for NbdUri {
    /// Writes a URI that parses to the same value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.security {
            Security::Plain => "nbd",
            Security::Tls => "nbds",
        })?;
        let is_unix = matches!(self.transport, Transport::Unix { .. });
        f.write_str(if is_unix { "+unix://" } else { "://" })?;
        if let Some(user) = &self.user {
            write!(f, "{}@", utf8_percent_encode(user, ENCODED))?;
        }
        if let Transport::Tcp { host, port } = &self.transport {
            if host.contains(':') {
                write!(f, "[{}]", utf8_percent_encode(host, ENCODED_IN_PATH))?;
            } else {
                write!(f, "{}", utf8_percent_encode(host, ENCODED))?;
            }
            if *port != DEFAULT_PORT {
                write!(f, ":{port}")?;
            }
        }
        write!(f, "/{}", utf8_percent_encode(&self.export_name, ENCODED_IN_PATH))?;
        self.fmt_parameters(f)
    }
}

impl NbdUri {
    fn fmt_parameters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path_text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let socket = match &self.transport {
            Transport::Unix { path } => Some(path_text(path)),
            Transport::Tcp { .. } => None,
        };
        let tls = &self.tls;
        let parameters = [
            ("socket", socket),
            ("tls-type", tls.kind.map(|kind| kind.as_str().to_owned())),
            ("tls-certificates", tls.certificates.as_ref().map(path_text)),
            ("tls-psk-file", tls.psk_file.as_ref().map(path_text)),
            ("tls-hostname", tls.hostname.clone()),
            ("tls-verify-peer", tls.verify_peer.map(|verify| verify.to_string())),
        ];
        let mut separator = '?';
        for (key, value) in parameters {
            if let Some(value) = value {
                write!(f, "{separator}{key}={}", utf8_percent_encode(&value, ENCODED_IN_PATH))?;
                separator = '&';
            }
        }
        Ok(())
    }
}
