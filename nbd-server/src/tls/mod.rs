//! TLS: who the server is, and who may connect (section "TLS support" of the specification).
//!
//! ```text
//!   CredentialSource --load--> TlsCredentials --in a TlsMode--> ServerConfig::tls
//!                                    ^
//!                                  reload, while the server runs
//! ```
//!
//! Credentials are either certificates, in a folder laid out as QEMU and libnbd have it, or a file
//! of pre-shared keys as `psktool` writes it. TLS 1.2 and 1.3 are spoken, nothing older.

mod authorization;
mod context;
mod distinguished_name;
mod error;
mod file;
mod notes;
mod psk;
mod x509;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use openssl::ssl::Ssl;

pub use authorization::{Authorization, Matching, Rule, Verdict};
pub use error::TlsError;
pub(crate) use error::explain_handshake;
pub(crate) use notes::{Notes, PeerIdentity};

use context::Loaded;

/// Whether clients may or have to use TLS.
#[derive(Debug, Clone, Default)]
pub enum TlsMode {
    /// There is no TLS.
    #[default]
    Off,
    /// Clients may use TLS. Exports marked with
    /// [`ExportEntry::tls_required`](crate::export::ExportEntry::tls_required) are served to those
    /// that do (the specification's SELECTIVETLS).
    Allow(TlsCredentials),
    /// Nothing is served without TLS (the specification's FORCEDTLS).
    Require(TlsCredentials),
}

impl TlsMode {
    /// The credentials, unless there is no TLS.
    #[must_use]
    pub const fn credentials(&self) -> Option<&TlsCredentials> {
        match self {
            Self::Off => None,
            Self::Allow(credentials) | Self::Require(credentials) => Some(credentials),
        }
    }
}

/// Whether clients have to show a certificate that one of the authorities in `ca-cert.pem` signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientCertificates {
    /// They have to.
    #[default]
    Required,
    /// They are not asked for one: whoever reaches the server may use it.
    NotAsked,
}

/// Where credentials come from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum CredentialSource {
    /// Certificates in a folder: `server-cert.pem` (with those between it and the authority),
    /// `server-key.pem`, `ca-cert.pem` if clients have to show certificates, and `ca-crl.pem` if
    /// there is one.
    X509 {
        /// The folder.
        folder: PathBuf,
        /// Whether clients have to show certificates.
        client_certificates: ClientCertificates,
        /// Who may connect, of those whose certificate is valid.
        authorization: Authorization,
    },
    /// Users and their pre-shared keys.
    Psk {
        /// The file, as `psktool` writes it, or a folder with one named `keys.psk`.
        file: PathBuf,
    },
}

/// What a server proves its identity with, and what it holds clients against. A clone is the same
/// credentials: what is loaded again with one is loaded for all.
#[derive(Debug, Clone)]
pub struct TlsCredentials {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    source: CredentialSource,
    loaded: RwLock<Arc<Loaded>>,
}

impl TlsCredentials {
    /// Loads credentials and checks what can be checked without a client.
    ///
    /// A key file that every user of the system can read is used, with a warning in the log.
    ///
    /// # Errors
    ///
    /// [`TlsError`] names the file: it cannot be read, is malformed, has expired, or does not fit
    /// the others.
    pub fn load(source: CredentialSource) -> Result<Self, TlsError> {
        let loaded = RwLock::new(Arc::new(Loaded::load(&source)?));
        Ok(Self { inner: Arc::new(Inner { source, loaded }) })
    }

    /// Loads everything from the same place again. Clients that connect from now on meet the new
    /// credentials; established connections go on undisturbed.
    ///
    /// # Errors
    ///
    /// As [`TlsCredentials::load`]; the old credentials stay in use then.
    pub fn reload(&self) -> Result<(), TlsError> {
        let loaded = Arc::new(Loaded::load(&self.inner.source)?);
        *self.inner.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    /// Where they came from.
    #[must_use]
    pub fn source(&self) -> &CredentialSource {
        &self.inner.source
    }

    /// The host names and addresses in the server's certificate, those of its own first. Empty for
    /// pre-shared keys.
    #[must_use]
    pub fn host_names(&self) -> Vec<String> {
        self.current().host_names.clone()
    }

    /// The users who have a pre-shared key, as far as their names are text. Empty for certificates.
    #[must_use]
    pub fn users(&self) -> Vec<String> {
        self.current().users.clone()
    }

    fn current(&self) -> Arc<Loaded> {
        Arc::clone(&self.inner.loaded.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The state of one connection, ready for the TLS handshake.
    pub(crate) fn new_session(&self) -> Result<Ssl, TlsError> {
        let mut ssl = Ssl::new(&self.current().context)?;
        Notes::attach(&mut ssl)?;
        Ok(ssl)
    }
}
