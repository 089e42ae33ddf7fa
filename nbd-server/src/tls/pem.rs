//! The sources of a server's certificates: files of a directory, or memory.

use std::fmt;
use std::path::{Path, PathBuf};

use nbd_proto::tls::{
    CA_CERTIFICATE_FILE, CA_REVOCATION_FILE, SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE,
};

use super::{KeyPassword, TlsError, file};

pub(super) const CERTIFICATE: &str = "the server's certificate";
pub(super) const KEY: &str = "the server's key";
pub(super) const AUTHORITY: &str = "the authority's certificate";
pub(super) const REVOCATIONS: &str = "the list of revoked certificates";

/// The text in messages in place of a file name.
const IN_MEMORY: &str = "(in memory)";

/// A text in PEM form, and its origin.
pub(super) struct Pem {
    pub(super) text: Vec<u8>,
    pub(super) path: PathBuf,
}

/// Provides the credentials of a server with certificates.
pub(super) trait Source {
    fn certificate(&self) -> Result<Pem, TlsError>;
    fn key(&self) -> Result<Pem, TlsError>;
    /// The password of the key.
    fn key_password(&self) -> Option<&KeyPassword> {
        None
    }
    fn authorities(&self) -> Result<Pem, TlsError>;
    /// The file of revoked certificates, if there is one.
    fn revocations(&self) -> Result<Option<PathBuf>, TlsError>;
}

/// The files of a directory.
pub(super) struct Files<'a> {
    directory: &'a Path,
    key_password: Option<&'a KeyPassword>,
}

impl<'a> Files<'a> {
    pub(super) const fn new(directory: &'a Path, key_password: Option<&'a KeyPassword>) -> Self {
        Self { directory, key_password }
    }
}

impl Source for Files<'_> {
    fn certificate(&self) -> Result<Pem, TlsError> {
        let path = self.directory.join(SERVER_CERTIFICATE_FILE);
        Ok(Pem { text: file::read(CERTIFICATE, &path)?, path })
    }

    fn key(&self) -> Result<Pem, TlsError> {
        let path = self.directory.join(SERVER_KEY_FILE);
        Ok(Pem { text: file::read_secret(KEY, &path)?, path })
    }

    fn key_password(&self) -> Option<&KeyPassword> {
        self.key_password
    }

    fn authorities(&self) -> Result<Pem, TlsError> {
        let path = self.directory.join(CA_CERTIFICATE_FILE);
        Ok(Pem { text: file::read(AUTHORITY, &path)?, path })
    }

    fn revocations(&self) -> Result<Option<PathBuf>, TlsError> {
        let path = self.directory.join(CA_REVOCATION_FILE);
        if !path.try_exists().unwrap_or(true) {
            return Ok(None);
        }
        // Opened here first, for a better message.
        file::read(REVOCATIONS, &path)?;
        Ok(Some(path))
    }
}

/// Certificates and a key in memory, in PEM form. The `Debug` output hides the key.
///
/// Lists of revoked certificates are read from files only.
#[derive(Clone)]
pub struct PemCertificates {
    certificate: Vec<u8>,
    key: Vec<u8>,
    authorities: Vec<u8>,
}

impl PemCertificates {
    /// Creates a value from the server's certificate, followed by its intermediate certificates,
    /// and its key, which must not be encrypted.
    #[must_use]
    pub fn new(certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), authorities: Vec::new() }
    }

    /// Sets the certificates of the authorities that sign clients' certificates. Needed if [clients
    /// must present certificates](super::ClientCertificates::Required).
    #[must_use]
    pub fn authorities(mut self, authorities: impl Into<Vec<u8>>) -> Self {
        self.authorities = authorities.into();
        self
    }
}

impl fmt::Debug for PemCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PemCertificates").finish_non_exhaustive()
    }
}

fn in_memory(text: &[u8]) -> Pem {
    Pem { text: text.to_vec(), path: PathBuf::from(IN_MEMORY) }
}

impl Source for PemCertificates {
    fn certificate(&self) -> Result<Pem, TlsError> {
        Ok(in_memory(&self.certificate))
    }

    fn key(&self) -> Result<Pem, TlsError> {
        Ok(in_memory(&self.key))
    }

    fn authorities(&self) -> Result<Pem, TlsError> {
        Ok(in_memory(&self.authorities))
    }

    fn revocations(&self) -> Result<Option<PathBuf>, TlsError> {
        Ok(None)
    }
}
