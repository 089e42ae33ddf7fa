//! TLS: the server's credentials and the authorization of clients (section "TLS support" of the
//! specification).
//!
//! ```text
//!   CredentialSource --load--> TlsCredentials --in a TlsMode--> ServerConfig::tls
//!                                    ^
//!                                  reload, while the server runs
//! ```
//!
//! Credentials are either certificates, in a directory with the layout of QEMU and libnbd or in
//! memory, or pre-shared keys, in a file as `psktool` writes it or in memory. TLS 1.2 and 1.3 are
//! supported, no older version.

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
pub use nbd_proto::tls::{KeyPassword, PreSharedKeys};
pub(crate) use notes::Notes;
pub use notes::PeerIdentity;
pub use pem::PemCertificates;

use builder::Loaded;

/// The TLS policy.
#[derive(Debug, Clone, Default)]
pub enum TlsMode {
    /// TLS is not offered.
    #[default]
    Off,
    /// Clients may use TLS. Exports marked with
    /// [`ExportEntry::tls_required`](crate::export::ExportEntry::tls_required) are served to those
    /// that do (the specification's SELECTIVETLS).
    Allow(TlsCredentials),
    /// Clients must use TLS (the specification's FORCEDTLS).
    Require(TlsCredentials),
}

impl TlsMode {
    /// Returns the credentials, unless TLS is off.
    #[must_use]
    pub const fn credentials(&self) -> Option<&TlsCredentials> {
        match self {
            Self::Off => None,
            Self::Allow(credentials) | Self::Require(credentials) => Some(credentials),
        }
    }
}

/// The source of credentials.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum CredentialSource {
    /// Certificates in a directory: `server-cert.pem` (with its intermediate certificates),
    /// `server-key.pem`, `ca-cert.pem` if clients must present certificates, and optionally
    /// `ca-crl.pem`.
    X509 {
        /// The directory.
        directory: PathBuf,
        /// The password of the server's key, if that is encrypted.
        key_password: Option<KeyPassword>,
        /// Whether clients must present certificates.
        client_certificates: ClientCertificates,
        /// The authorization of clients with a valid certificate.
        authorization: Authorization,
    },
    /// Certificates in memory.
    X509Pem {
        /// The server's certificate and key, and the authorities of clients.
        certificates: PemCertificates,
        /// Whether clients must present certificates.
        client_certificates: ClientCertificates,
        /// The authorization of clients with a valid certificate.
        authorization: Authorization,
    },
    /// Users and their pre-shared keys.
    Psk {
        /// The file, as `psktool` writes it, or a directory that contains `keys.psk`.
        file: PathBuf,
    },
    /// Users and their pre-shared keys, in memory.
    PskKeys(PreSharedKeys),
}

/// The server's credentials and the requirements for clients. Clones share one state: reloading one
/// reloads all.
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
    /// Reads and checks the credentials.
    fn read(&self) -> Result<Loaded, TlsError> {
        match self {
            Self::X509 { directory, key_password, client_certificates, authorization } => {
                let files = pem::Files::new(directory, key_password.as_ref());
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
    /// Loads credentials and checks everything that does not depend on a client.
    ///
    /// A key file that every user of the system can read is used, with a warning in the log. Blocks
    /// while it reads files.
    ///
    /// # Errors
    ///
    /// [`TlsError`] names the file: it cannot be read, is malformed, has expired, or does not fit
    /// the others.
    pub fn load(source: CredentialSource) -> Result<Self, TlsError> {
        let loaded = RwLock::new(Arc::new(source.read()?));
        Ok(Self { inner: Arc::new(Inner { source, loaded }) })
    }

    /// Loads everything from the same source again. Clients that connect from now on use the new
    /// credentials; established connections are not affected.
    ///
    /// # Errors
    ///
    /// As [`TlsCredentials::load`]; the old credentials then stay in use.
    pub fn reload(&self) -> Result<(), TlsError> {
        let loaded = Arc::new(self.inner.source.read()?);
        *self.inner.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    /// Replaces the credentials. Clients that connect from now on use the new ones; established
    /// connections are not affected. [`reload`](Self::reload) returns to the
    /// [source](Self::source).
    ///
    /// # Errors
    ///
    /// As [`TlsCredentials::load`]; the old credentials then stay in use.
    pub fn replace(&self, source: &CredentialSource) -> Result<(), TlsError> {
        let loaded = Arc::new(source.read()?);
        *self.inner.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    /// Returns the source of the credentials.
    #[must_use]
    pub fn source(&self) -> &CredentialSource {
        &self.inner.source
    }

    /// Returns the host names and addresses in the server's certificate, or its common name if
    /// there are none. Empty for pre-shared keys.
    #[must_use]
    pub fn host_names(&self) -> Vec<String> {
        self.current().host_names.clone()
    }

    /// Returns the users with a pre-shared key whose names are UTF-8. Empty for certificates.
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
