//! TLS: who the server is, and who may connect (section "TLS support" of the specification).
//!
//! ```text
//!   CredentialSource --load--> TlsCredentials --in a TlsMode--> ServerConfig::tls
//!                                    ^
//!                                  reload, while the server runs
//! ```
//!
//! Credentials are either certificates, in a directory laid out as QEMU and libnbd have it or in
//! memory, or pre-shared keys, in a file as `psktool` writes it or in memory. TLS 1.2 and 1.3 are
//! spoken, nothing older.

mod authorization;
mod builder;
mod distinguished_name;
mod error;
mod file;
mod notes;
mod pem;
mod psk;
mod x509;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use openssl::ssl::Ssl;

pub use authorization::{Authorization, ClientCertificates, Matching, Rule, Verdict};
pub use error::TlsError;
pub(crate) use error::explain_handshake;
pub use nbd_proto::tls::PreSharedKeys;
pub(crate) use notes::Notes;
pub use notes::PeerIdentity;
pub use pem::PemCertificates;

use builder::Loaded;

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

/// Where credentials come from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum CredentialSource {
    /// Certificates in a directory: `server-cert.pem` (with those between it and the authority),
    /// `server-key.pem`, `ca-cert.pem` if clients have to show certificates, and `ca-crl.pem` if
    /// there is one.
    X509 {
        /// The directory.
        directory: PathBuf,
        /// Whether clients have to show certificates.
        client_certificates: ClientCertificates,
        /// Who may connect, of those whose certificate is valid.
        authorization: Authorization,
    },
    /// Certificates in memory.
    X509Pem {
        /// The server's certificate and key, and the authorities of clients.
        certificates: PemCertificates,
        /// Whether clients have to show certificates.
        client_certificates: ClientCertificates,
        /// Who may connect, of those whose certificate is valid.
        authorization: Authorization,
    },
    /// Users and their pre-shared keys.
    Psk {
        /// The file, as `psktool` writes it, or a directory with one named `keys.psk`.
        file: PathBuf,
    },
    /// Users and their pre-shared keys, in memory.
    PskKeys(PreSharedKeys),
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

impl CredentialSource {
    /// Reads and checks all of it.
    fn read(&self) -> Result<Loaded, TlsError> {
        match self {
            Self::X509 { directory, client_certificates, authorization } => {
                let files = pem::Files::new(directory);
                x509::load(&files, *client_certificates, authorization)
            }
            Self::X509Pem { certificates, client_certificates, authorization } => {
                x509::load(certificates, *client_certificates, authorization)
            }
            Self::Psk { file } => psk::load(file),
            Self::PskKeys(keys) => psk::serve_keys(keys.clone()),
        }
    }
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
        let loaded = RwLock::new(Arc::new(source.read()?));
        Ok(Self { inner: Arc::new(Inner { source, loaded }) })
    }

    /// Loads everything from the same place again. Clients that connect from now on meet the new
    /// credentials; established connections go on undisturbed.
    ///
    /// # Errors
    ///
    /// As [`TlsCredentials::load`]; the old credentials stay in use then.
    pub fn reload(&self) -> Result<(), TlsError> {
        let loaded = Arc::new(self.inner.source.read()?);
        *self.inner.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    /// Puts others in place of these. Clients that connect from now on meet them; established
    /// connections go on undisturbed. [`reload`](Self::reload) goes back to the
    /// [source](Self::source).
    ///
    /// # Errors
    ///
    /// As [`TlsCredentials::load`]; the old credentials stay in use then.
    pub fn replace(&self, source: &CredentialSource) -> Result<(), TlsError> {
        let loaded = Arc::new(source.read()?);
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
