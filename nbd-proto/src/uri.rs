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

mod display;
mod error;
mod parse;

use std::path::PathBuf;

pub use self::error::UriError;
#[cfg(doc)]
use crate::limits::DEFAULT_PORT;
use crate::tls::KeyPassword;

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
    /// The password of the private key beside the certificates. It is never a part of the text.
    pub key_password: Option<KeyPassword>,
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
    /// that receives URIs from untrusted sources must refuse such parameters.
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
