//! NBD URIs (`doc/uri.md` of the NetworkBlockDevice project, with the query parameters libnbd
//! adds).
//!
//! ```text
//! nbd://HOST[:PORT]/EXPORT                      TCP
//! nbds://HOST[:PORT]/EXPORT                     TCP, TLS required
//! nbd+unix:///EXPORT?socket=PATH                unix socket
//! nbds+unix:///EXPORT?socket=PATH               unix socket, TLS required
//! ```
//!
//! The export name is the percent-decoded text after the first `/` of the path: no `.` or `..` is
//! resolved and no `/` is dropped, so `nbd://host//disk` names the export `/disk`. Unknown query
//! parameters are ignored, as in libnbd; of several with the same key the last one counts.

use core::net::Ipv6Addr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use thiserror::Error;

use crate::limits::{DEFAULT_PORT, MAX_STRING_LEN};

/// The address of a server, the name of an export, and the TLS settings.
///
/// ```
/// use nbd_proto::uri::{NbdUri, Transport};
///
/// let uri: NbdUri = "nbd+unix:///vm%201?socket=/run/nbd.sock".parse()?;
/// assert_eq!(uri.export_name, "vm 1");
/// assert_eq!(uri.transport, Transport::Unix { path: "/run/nbd.sock".into() });
/// assert_eq!(uri.to_string(), "nbd+unix:///vm%201?socket=/run/nbd.sock");
/// # Ok::<(), nbd_proto::uri::UriError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NbdUri {
    /// The transport and address of the server.
    pub transport: Transport,
    /// Whether TLS is required.
    pub security: Security,
    /// Name of the export; empty means the server's default export.
    pub export_name: String,
    /// User name for TLS with pre-shared keys.
    pub user: Option<String>,
    /// TLS parameters. They are kept, but have no effect, if TLS is not required.
    pub tls: TlsParameters,
}

impl NbdUri {
    /// Creates the URI of an export on the server at `transport`, without TLS.
    ///
    /// ```
    /// use nbd_proto::uri::{NbdUri, Transport};
    ///
    /// let uri = NbdUri::new(Transport::Unix { path: "/run/nbd.sock".into() }, "vm 1");
    /// assert_eq!(uri.to_string(), "nbd+unix:///vm%201?socket=/run/nbd.sock");
    /// ```
    #[must_use]
    pub fn new(transport: Transport, export_name: impl Into<String>) -> Self {
        Self {
            transport,
            security: Security::Plain,
            export_name: export_name.into(),
            user: None,
            tls: TlsParameters::default(),
        }
    }
}

/// The transport and address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// Over TCP.
    Tcp {
        /// Host name or address; an IPv6 address has no brackets.
        host: String,
        /// Port; [`DEFAULT_PORT`] unless given.
        port: u16,
    },
    /// Over a unix socket.
    Unix {
        /// Path of the socket.
        path: PathBuf,
    },
}

/// Whether TLS is required.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Security {
    /// `nbd`: TLS is not requested.
    #[default]
    Plain,
    /// `nbds`: TLS is required; there is no fallback.
    Tls,
}

/// The query parameters that begin with `tls-`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TlsParameters {
    /// `tls-type`.
    pub kind: Option<TlsKind>,
    /// `tls-certificates`: the directory with the certificates.
    pub certificates: Option<PathBuf>,
    /// `tls-psk-file`: the file with the pre-shared keys.
    pub psk_file: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must contain, if it differs from the
    /// host's.
    pub hostname: Option<String>,
    /// `tls-verify-peer`: false to accept any certificate.
    pub verify_peer: Option<bool>,
}

/// The kind of TLS authentication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TlsKind {
    /// None: encryption only.
    Anonymous,
    /// Certificates.
    X509,
    /// A pre-shared key.
    PreSharedKey,
}

impl TlsParameters {
    /// Returns the first parameter that names a file of this machine, if there is one. A program
    /// that receives URIs from untrusted sources must not let them choose files to read.
    #[must_use]
    pub const fn file_parameter(&self) -> Option<&'static str> {
        if self.certificates.is_some() {
            Some("tls-certificates")
        } else if self.psk_file.is_some() {
            Some("tls-psk-file")
        } else {
            None
        }
    }
}

impl TlsKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Anonymous => "anon",
            Self::X509 => "x509",
            Self::PreSharedKey => "psk",
        }
    }
}

/// The reasons for which a URI is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UriError {
    /// There is no scheme followed by `://`.
    #[error("{0:?} is not an NBD URI: it has to begin like nbd://localhost/disk")]
    NoScheme(String),
    /// The scheme is unknown or not supported.
    #[error(
        "the URI scheme {0:?} is not supported: use nbd, nbds, nbd+unix or nbds+unix, as in nbd://localhost/disk"
    )]
    UnknownScheme(String),
    /// The URI has a fragment (`#`).
    #[error("an NBD URI has no fragment: write a '#' as %23, as in nbd://localhost/disk%231")]
    Fragment,
    /// A `%` is not followed by two hexadecimal digits.
    #[error("{0:?} has a '%' without two hexadecimal digits: write a '%' as %25, as in 100%25")]
    BadPercent(String),
    /// A percent-decoded part contains bytes that the protocol cannot express.
    #[error("the {what} in the URI {why}; an example is nbd://localhost/disk")]
    BadText {
        /// The part of the URI.
        what: &'static str,
        /// The rule that it violates.
        why: &'static str,
    },
    /// The port is not a number between 1 and 65535.
    #[error("{0:?} is not a port between 1 and 65535, as in nbd://localhost:10809/disk")]
    BadPort(String),
    /// An IPv6 address is malformed or has no brackets.
    #[error(
        "{0:?} is not an address: an IPv6 address stands in brackets, as in nbd://[::1]:10809/"
    )]
    BadAddress(String),
    /// A unix URI has no `socket`.
    #[error(
        "the URI does not say which socket: add ?socket=, as in nbd+unix:///disk?socket=/run/nbd.sock"
    )]
    NoSocket,
    /// A unix URI has a host.
    #[error(
        "a unix URI has no host, so it has three slashes, as in nbd+unix:///disk?socket=/run/nbd.sock"
    )]
    HostWithSocket,
    /// A TCP URI with `socket`.
    #[error(
        "the parameter socket belongs to unix URIs, as in nbd+unix:///disk?socket=/run/nbd.sock"
    )]
    SocketWithTcp,
    /// A parameter of TLS without a value.
    #[error("the parameter {key} has no value: say which, or leave it out")]
    EmptyParameter {
        /// The parameter.
        key: String,
    },
    /// A parameter whose value is none of the legal ones.
    #[error("the parameter {key} cannot be {value:?}: use {legal}")]
    BadParameter {
        /// The parameter.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it can be.
        legal: &'static str,
    },
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(UriError::NoScheme(text.to_owned()));
        };
        let (security, is_unix) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" | "nbd+tcp" => (Security::Plain, false),
            "nbds" | "nbds+tcp" => (Security::Tls, false),
            "nbd+unix" => (Security::Plain, true),
            "nbds+unix" => (Security::Tls, true),
            _ => return Err(UriError::UnknownScheme(scheme.to_owned())),
        };
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, host) = match authority.rsplit_once('@') {
            Some(("", host)) => (None, host),
            Some((user, host)) => (Some(decode("user name", user)?), host),
            None => (None, authority),
        };
        let parameters = Parameters::parse(query)?;
        let export_name = decode("export name", path)?;
        if export_name.len() > MAX_STRING_LEN {
            return Err(UriError::BadText {
                what: "export name",
                why: "is longer than 4096 bytes",
            });
        }
        let transport = match (is_unix, parameters.socket) {
            (true, Some(path)) if host.is_empty() => Transport::Unix { path: path.into() },
            (true, Some(_)) => return Err(UriError::HostWithSocket),
            (true, None) => return Err(UriError::NoSocket),
            (false, Some(_)) => return Err(UriError::SocketWithTcp),
            (false, None) => tcp(host)?,
        };
        Ok(Self { transport, security, export_name, user, tls: parameters.tls })
    }
}

/// Reads `HOST[:PORT]`; no host means this machine.
fn tcp(authority: &str) -> Result<Transport, UriError> {
    let bad_address = || UriError::BadAddress(authority.to_owned());
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (address, behind) = rest.split_once(']').ok_or_else(bad_address)?;
        let address = decode("host", address)?;
        let (number, zone) = address.split_once('%').unwrap_or((&address, "zone"));
        if number.parse::<Ipv6Addr>().is_err() || zone.is_empty() || zone.contains(is_no_host) {
            return Err(bad_address());
        }
        match behind.strip_prefix(':') {
            Some(port) => (address, port),
            None if behind.is_empty() => (address, ""),
            None => return Err(bad_address()),
        }
    } else {
        let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
        if port.contains(':') {
            return Err(bad_address());
        }
        let host = if host.is_empty() { "localhost" } else { host };
        let host = decode("host", host)?;
        if host.contains(is_no_host) {
            return Err(bad_address());
        }
        (host, port)
    };
    let port = match port {
        "" => DEFAULT_PORT,
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => match digits.parse() {
            Ok(port @ 1..) => port,
            _ => return Err(UriError::BadPort(digits.to_owned())),
        },
        other => return Err(UriError::BadPort(other.to_owned())),
    };
    Ok(Transport::Tcp { host, port })
}

/// Whether a character can stand neither in a host's name nor in an IPv6 address's zone.
fn is_no_host(character: char) -> bool {
    character.is_control() || character.is_whitespace() || "/[]:@".contains(character)
}

#[derive(Default)]
struct Parameters {
    socket: Option<String>,
    tls: TlsParameters,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, UriError> {
        let mut parameters = Self::default();
        for pair in query.split(['&', ';']) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let tls = &mut parameters.tls;
            match decode("parameter name", key)?.as_str() {
                "socket" if value.is_empty() => return Err(UriError::NoSocket),
                "socket" => parameters.socket = Some(decode("parameter socket", value)?),
                "tls-type" => tls.kind = Some(tls_kind(&decode("parameter tls-type", value)?)?),
                key @ ("tls-certificates" | "tls-psk-file" | "tls-hostname")
                    if value.is_empty() =>
                {
                    return Err(UriError::EmptyParameter { key: key.to_owned() });
                }
                "tls-certificates" => {
                    tls.certificates = Some(decode("parameter tls-certificates", value)?.into());
                }
                "tls-psk-file" => {
                    tls.psk_file = Some(decode("parameter tls-psk-file", value)?.into());
                }
                "tls-hostname" => {
                    tls.hostname = Some(decode("parameter tls-hostname", value)?);
                }
                "tls-verify-peer" => {
                    let value = decode("parameter tls-verify-peer", value)?;
                    tls.verify_peer = Some(boolean("tls-verify-peer", &value)?);
                }
                _ => {}
            }
        }
        Ok(parameters)
    }
}

fn tls_kind(value: &str) -> Result<TlsKind, UriError> {
    [TlsKind::Anonymous, TlsKind::X509, TlsKind::PreSharedKey]
        .into_iter()
        .find(|kind| kind.as_str() == value)
        .ok_or_else(|| UriError::BadParameter {
            key: "tls-type",
            value: value.to_owned(),
            legal: "anon, x509 or psk",
        })
}

fn boolean(key: &'static str, value: &str) -> Result<bool, UriError> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => Err(UriError::BadParameter { key, value: value.to_owned(), legal: "true or false" }),
    }
}

/// Percent-decodes one part. A `+` stays a `+`: that a space can be written so is a rule of HTML
/// forms.
fn decode(what: &'static str, text: &str) -> Result<String, UriError> {
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte == b'%' && !behind.get(..2).is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
        {
            return Err(UriError::BadPercent(text.to_owned()));
        }
    }
    let decoded = percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| UriError::BadText { what, why: "is not UTF-8" })?;
    if decoded.contains('\0') {
        return Err(UriError::BadText { what, why: "contains a NUL byte" });
    }
    Ok(decoded.into_owned())
}

/// What is encoded in a host, user name or parameter: all but RFC 3986's unreserved characters.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// In paths, slashes and colons can be read as they are.
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
