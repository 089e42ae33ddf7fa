//! TLS, as the client side of STARTTLS.
//!
//! ```text
//!   TlsOptions + NbdUri --settings--> Setup --context--> Context      files, loaded per connection
//!                                                          |
//!   Wire: STARTTLS agreed ---------------------------------+--> Session    OpenSSL, bytes only
//!                                                                 |
//!                                                               TlsStream   Session + socket
//! ```
//!
//! The options and errors exist even if the crate is built without TLS.

#[cfg(feature = "tls")]
mod context;
mod error;
#[cfg(feature = "tls")]
mod explain;
#[cfg(feature = "tls")]
mod session;
mod settings;
#[cfg(feature = "tls")]
mod stream;
#[cfg(all(test, feature = "tls"))]
mod tests;
#[cfg(not(feature = "tls"))]
mod without;

use std::path::PathBuf;

use nbd_proto::tls::{KeyPassword, PreSharedKeys};

pub use error::{CertificateCheck, TlsError};

#[cfg(feature = "tls")]
pub(crate) use context::Context;
pub(crate) use settings::setup;
#[cfg(feature = "tls")]
pub(crate) use stream::{HandshakeFailure, TlsStream};
#[cfg(not(feature = "tls"))]
pub(crate) use without::{Context, HandshakeFailure, TlsStream};

/// The TLS policy of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum TlsMode {
    /// TLS is never used. A server that requires it is refused.
    Off,
    /// TLS is used if the server offers it, otherwise the connection is in the clear. This defeats
    /// passive eavesdropping, not an active attacker, who can suppress the offer. A *failed* TLS
    /// handshake is an error, and never leads to a connection without TLS.
    Prefer,
    /// TLS is required. A server without it is refused. A URI with `nbds` means this.
    #[default]
    Require,
}

/// The verification of the server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum VerifyPeer {
    /// The certificate must be signed by a trusted authority, currently valid, not revoked, and
    /// issued for the name of the server.
    #[default]
    Required,
    /// Any certificate is accepted: encryption without authentication of the server.
    Off,
}

/// The policy for URIs that name files of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LocalFiles {
    /// Refused: for URIs from untrusted sources.
    #[default]
    Refused,
    /// `tls-certificates` and `tls-psk-file` are followed.
    Allowed,
}

/// The source of pre-shared keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeySource {
    /// A file, or a directory with one of the default name.
    File(PathBuf),
    Memory(PreSharedKeys),
}

/// TLS options, for [`Connector::tls`](crate::Connector::tls). They take precedence over the URI.
///
/// ```no_run
/// # async fn example() -> nbd_client::Result<()> {
/// use nbd_client::{Connector, TlsMode, TlsOptions};
///
/// let client = "nbds://backup.example.org/disk"
///     .parse::<Connector>()?
///     .tls(TlsOptions::new(TlsMode::Require).certificates("/etc/pki/nbd"))
///     .connect()
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct TlsOptions {
    pub(crate) mode: TlsMode,
    pub(crate) certificates: Option<PathBuf>,
    pub(crate) key_password: Option<KeyPassword>,
    pub(crate) pre_shared_keys: Option<KeySource>,
    pub(crate) user: Option<String>,
    pub(crate) hostname: Option<String>,
    pub(crate) verify_peer: Option<VerifyPeer>,
}

impl TlsOptions {
    /// Creates options without credentials: the server's certificate must be signed by an authority
    /// that this machine trusts, and the client has no certificate.
    #[must_use]
    pub fn new(mode: TlsMode) -> Self {
        Self { mode, ..Self::default() }
    }

    /// Uses the certificates in a directory: `ca-cert.pem`, and optionally `ca-crl.pem` and
    /// `client-cert.pem` with `client-key.pem`. The files are read for each connection, so that
    /// renewed ones are picked up.
    #[must_use]
    pub fn certificates(mut self, directory: impl Into<PathBuf>) -> Self {
        self.certificates = Some(directory.into());
        self
    }

    /// Opens the private key beside the certificates with this password if it is encrypted.
    #[must_use]
    pub fn key_password(mut self, password: KeyPassword) -> Self {
        self.key_password = Some(password);
        self
    }

    /// Uses a pre-shared key from a file as psktool writes it, or from the file `keys.psk` in a
    /// directory. Takes precedence over certificates. The file is read for each connection.
    #[must_use]
    pub fn pre_shared_keys(mut self, file: impl Into<PathBuf>) -> Self {
        self.pre_shared_keys = Some(KeySource::File(file.into()));
        self
    }

    /// Like [`pre_shared_keys`](Self::pre_shared_keys), with keys that are in memory.
    #[must_use]
    pub fn pre_shared_keys_in_memory(mut self, keys: PreSharedKeys) -> Self {
        self.pre_shared_keys = Some(KeySource::Memory(keys));
        self
    }

    /// Selects the user whose pre-shared key is used. By default the user in the URI, or the only
    /// one that has a key.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Sets the name or address that the server's certificate must contain, if it differs from the
    /// host of the URI. Needed for certificates over a unix socket.
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Sets whether the server's certificate is verified. Has no effect with pre-shared keys: there
    /// the server always has to know the key.
    #[must_use]
    pub fn verify_peer(mut self, verify: VerifyPeer) -> Self {
        self.verify_peer = Some(verify);
        self
    }
}
