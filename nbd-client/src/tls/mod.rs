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
//! What is asked for and what can go wrong is here whether the crate has TLS built in or not.

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

pub use error::{CertificateCheck, TlsError};

#[cfg(feature = "tls")]
pub(crate) use context::Context;
pub(crate) use settings::setup;
#[cfg(feature = "tls")]
pub(crate) use stream::{HandshakeFailure, TlsStream};
#[cfg(not(feature = "tls"))]
pub(crate) use without::{Context, HandshakeFailure, TlsStream};

/// Whether a connection uses TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TlsMode {
    /// Never. A server that requires it cannot be used.
    Off,
    /// If the server says that it has TLS; otherwise in the clear. Whoever can change the bytes on
    /// the way can make it say that it has none: this protects from listeners only. A TLS handshake
    /// that *fails* is an error, and never leads to a connection without TLS.
    Prefer,
    /// Always. A server without TLS cannot be used. A URI with `nbds` means this.
    #[default]
    Require,
}

/// Whether the server has to prove by its certificate that it is the one that was meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum VerifyPeer {
    /// The certificate has to be signed by a known authority, valid today, not revoked, and made
    /// out to the name of the server.
    #[default]
    Required,
    /// Any certificate will do: encryption without knowing who is at the other end.
    Off,
}

/// Whether a URI may name files of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LocalFiles {
    /// It may not: for URIs that come from somebody else.
    #[default]
    Refused,
    /// `tls-certificates` and `tls-psk-file` are followed.
    Allowed,
}

/// How a connection uses TLS, for [`Connector::tls`](crate::Connector::tls). What is set here goes
/// before what the URI says.
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
    pub(crate) pre_shared_keys: Option<PathBuf>,
    pub(crate) user: Option<String>,
    pub(crate) hostname: Option<String>,
    pub(crate) verify_peer: Option<VerifyPeer>,
}

impl TlsOptions {
    /// No credentials: the server's certificate has to be signed by an authority that this machine
    /// trusts, and the client has no certificate of its own.
    #[must_use]
    pub fn new(mode: TlsMode) -> Self {
        Self { mode, ..Self::default() }
    }

    /// Uses the certificates in a directory: `ca-cert.pem`, and if they are there `ca-crl.pem` and
    /// `client-cert.pem` with `client-key.pem`. The files are read for each connection, so that
    /// renewed ones are picked up.
    #[must_use]
    pub fn certificates(mut self, directory: impl Into<PathBuf>) -> Self {
        self.certificates = Some(directory.into());
        self
    }

    /// Uses a pre-shared key of a file as psktool writes it, or of the file `keys.psk` in a
    /// directory. Goes before certificates. The file is read for each connection.
    #[must_use]
    pub fn pre_shared_keys(mut self, file: impl Into<PathBuf>) -> Self {
        self.pre_shared_keys = Some(file.into());
        self
    }

    /// Whose pre-shared key to use. Unless this or the URI says it, the one user in the file.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// The name or address that has to stand in the server's certificate, if it is not the host of
    /// the URI. Needed for certificates over a unix socket.
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Whether the server's certificate is verified. Has no meaning with pre-shared keys: there the
    /// server always has to know the key.
    #[must_use]
    pub fn verify_peer(mut self, verify: VerifyPeer) -> Self {
        self.verify_peer = Some(verify);
        self
    }
}
