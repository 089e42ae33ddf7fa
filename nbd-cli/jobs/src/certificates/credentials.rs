//! The files of an authority, of servers and of clients.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nbd_proto::tls::{
    CA_CERTIFICATE_FILE, CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE, SERVER_CERTIFICATE_FILE,
    SERVER_KEY_FILE,
};
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;

use super::certificate::{self, Request, Role};
use super::credentials_error;
use super::files::{self, CredentialsFile, Secrecy};
use crate::error::JobError;

/// The private key of an authority.
pub(super) const CA_KEY_FILE: &str = "ca-key.pem";

/// An authority with its key.
pub(super) struct Authority {
    pub(super) certificate: X509,
    pub(super) key: PKey<Private>,
    directory: PathBuf,
}

impl Authority {
    /// Reads the authority of a directory.
    pub(super) fn load(directory: &Path) -> Result<Self, JobError> {
        let key_path = directory.join(CA_KEY_FILE);
        let Some(text) = files::read(&key_path)? else {
            return Err(credentials_error(format!(
                "there is no authority in '{}': create one with 'nbd-cli tls init DIR', and give \
                 its directory",
                directory.display()
            )));
        };
        let key = private_key(&text, &key_path)?;
        let path = directory.join(CA_CERTIFICATE_FILE);
        let certificate = certificate(&path)?.ok_or_else(|| missing(&path))?;
        if !certificate.public_key().is_ok_and(|public| public.public_eq(&key)) {
            return Err(credentials_error(format!(
                "'{}' does not belong to '{}': restore both files from one backup",
                key_path.display(),
                path.display()
            )));
        }
        Ok(Self { certificate, key, directory: directory.to_owned() })
    }

    /// Issues a certificate.
    pub(super) fn issue(&self, request: &Request<'_>) -> Result<X509, JobError> {
        if certificate::seconds(self.certificate.not_after()) <= certificate::now() {
            return Err(credentials_error(format!(
                "the authority's certificate in '{0}' has expired: renew it with 'nbd-cli tls \
                 renew {0}'",
                self.directory.display()
            )));
        }
        certificate::issue(&self.certificate, &self.key, request).map_err(|error| failed(&error))
    }
}

/// The names of the certificate and the key of a role.
#[must_use]
pub(super) fn file_names(role: Role) -> (&'static str, &'static str) {
    match role {
        Role::Server => (SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE),
        Role::Client => (CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE),
    }
}

/// A file with a private key.
pub(super) fn key_file(path: PathBuf, key: &PKey<Private>) -> Result<CredentialsFile, JobError> {
    let contents = key.private_key_to_pem_pkcs8().map_err(|error| failed(&error))?;
    Ok(CredentialsFile { path, contents, secrecy: Secrecy::Secret })
}

/// A file with a certificate.
pub(super) fn certificate_file(
    path: PathBuf,
    certificate: &X509,
) -> Result<CredentialsFile, JobError> {
    let contents = certificate.to_pem().map_err(|error| failed(&error))?;
    Ok(CredentialsFile { path, contents, secrecy: Secrecy::Public })
}

/// Reads a private key in PEM form.
///
/// # Errors
///
/// If it is not one, or has a pass phrase.
pub(super) fn private_key(text: &[u8], path: &Path) -> Result<PKey<Private>, JobError> {
    // Without a callback OpenSSL would ask for a pass phrase on the terminal.
    PKey::private_key_from_pem_callback(text, |_| Ok(0)).map_err(|_| {
        credentials_error(format!(
            "'{}' is not a private key in PEM form without a pass phrase: decrypt it with 'openssl \
             pkey', and protect it by permissions",
            path.display()
        ))
    })
}

/// Reads all certificates of a file; `None` if there is no such file.
///
/// # Errors
///
/// If it cannot be read, or is not a file of certificates.
pub(super) fn certificates(path: &Path) -> Result<Option<Vec<X509>>, JobError> {
    let Some(text) = files::read(path)? else { return Ok(None) };
    match X509::stack_from_pem(&text) {
        Ok(certificates) if !certificates.is_empty() => Ok(Some(certificates)),
        _ => Err(credentials_error(format!(
            "'{}' is not a certificate in PEM form: replace it by one",
            path.display()
        ))),
    }
}

/// Reads the only certificate of a file.
fn certificate(path: &Path) -> Result<Option<X509>, JobError> {
    let Some(certificates) = certificates(path)? else { return Ok(None) };
    let count = certificates.len();
    match <[X509; 1]>::try_from(certificates) {
        Ok([certificate]) => Ok(Some(certificate)),
        Err(_) => Err(credentials_error(format!(
            "'{}' has {count} certificates: leave only the one that belongs to {CA_KEY_FILE}",
            path.display()
        ))),
    }
}

/// A directory and those directly below it, in alphabetical order.
///
/// # Errors
///
/// If the directory cannot be listed.
pub(super) fn directories(directory: &Path) -> Result<Vec<PathBuf>, JobError> {
    let list = || -> io::Result<Vec<PathBuf>> {
        let mut below = Vec::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                below.push(entry.path());
            }
        }
        below.sort();
        Ok(below)
    };
    let below = list().map_err(|error| {
        credentials_error(format!("cannot list '{}': {error}", directory.display()))
    })?;
    let mut all = vec![directory.to_owned()];
    all.extend(below);
    Ok(all)
}

/// The error for a file or directory that does not exist.
#[must_use]
pub(super) fn missing(path: &Path) -> JobError {
    credentials_error(format!("'{}' does not exist", path.display()))
}

/// Errors that occur only when memory is exhausted or the library lacks an algorithm.
pub(super) fn failed(error: &ErrorStack) -> JobError {
    credentials_error(format!("OpenSSL cannot make the certificate: {error}"))
}
