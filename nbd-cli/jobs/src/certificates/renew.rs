//! Certificates that end soon get a new term.
//!
//! Keys stay as they are: a certificate and a key cannot be replaced in one step, and a server that
//! is started in between would find two files that do not belong together.

use std::path::Path;

use nbd_proto::tls::CA_CERTIFICATE_FILE;
use openssl::x509::{X509, X509Ref};

use super::certificate::{self, Request, Role, SECONDS_PER_DAY};
use super::credentials::{
    Authority, certificate_file, certificates, directories, failed, file_names, missing,
};
use super::files::{self, CredentialsFile, ExistingCredentials};
use super::names::host_names;
use crate::error::JobError;
use crate::observer::Observer;

/// The certificates to be renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Those that end within this number of days.
    WithinDays(u32),
    /// All.
    All,
}

/// A renewal of the certificates of an authority, its own included; made by [`new`](Self::new).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Renewal<'a> {
    /// Directory of the authority. Certificates in it and directly below it are renewed.
    pub directory: &'a Path,
    /// The certificates to be renewed.
    pub due: Due,
    /// Days for which servers and clients are valid; by default as many as before.
    pub days: Option<u32>,
}

impl<'a> Renewal<'a> {
    /// Describes a renewal of the certificates in a directory.
    pub fn new(directory: &'a Path, due: Due) -> Self {
        Self { directory, due, days: None }
    }
}

impl Renewal<'_> {
    fn is_due(&self, certificate: &X509Ref) -> bool {
        let Due::WithinDays(days) = self.due else { return true };
        let limit = certificate::now() + u64::from(days) * SECONDS_PER_DAY;
        certificate::seconds(certificate.not_after()) <= limit
    }
}

/// Renews certificates. `written` gets the path of each file that was written, and the end of the
/// certificate in it, in seconds since 1970.
///
/// # Errors
///
/// If there is no usable authority, or files cannot be read or written. Files that were written
/// remain valid.
pub fn renew(
    renewal: &Renewal<'_>,
    observer: &dyn Observer,
    mut written: impl FnMut(&Path, u64),
) -> Result<(), JobError> {
    let mut report = |path: &Path, certificate: &X509Ref| {
        written(path, certificate::seconds(certificate.not_after()));
    };
    if !renewal.directory.is_dir() {
        return Err(missing(renewal.directory));
    }
    let lock = files::lock(renewal.directory)?;
    let mut authority = Authority::load(renewal.directory)?;
    if renewal.is_due(&authority.certificate) {
        let days = certificate::lifetime_days(&authority.certificate);
        let subject = authority.certificate.subject_name();
        authority.certificate = certificate::self_signed(subject, &authority.key, days)
            .map_err(|error| failed(&error))?;
        let path = renewal.directory.join(CA_CERTIFICATE_FILE);
        let file = certificate_file(path, &authority.certificate)?;
        files::write(&lock, std::slice::from_ref(&file), ExistingCredentials::Replace, observer)?;
        report(&file.path, &authority.certificate);
    }
    drop(lock);
    for directory in directories(renewal.directory)? {
        let lock = files::lock(&directory)?;
        let mut renewed = Vec::new();
        renewed.extend(copy_of_authority(&directory, &authority, observer)?);
        for role in [Role::Server, Role::Client] {
            renewed.extend(leaf(
                renewal,
                &directory.join(file_names(role).0),
                role,
                &authority,
                observer,
            )?);
        }
        for (file, certificate) in renewed {
            files::write(
                &lock,
                std::slice::from_ref(&file),
                ExistingCredentials::Replace,
                observer,
            )?;
            report(&file.path, &certificate);
        }
    }
    Ok(())
}

/// Returns the authority's certificate for a directory that has an older one with the same key,
/// also one that an interrupted run left.
fn copy_of_authority(
    directory: &Path,
    authority: &Authority,
    observer: &dyn Observer,
) -> Result<Option<(CredentialsFile, X509)>, JobError> {
    let path = directory.join(CA_CERTIFICATE_FILE);
    let Some(present) = certificates(&path)? else { return Ok(None) };
    let is_old = |certificate: &X509| {
        certificate.public_key().is_ok_and(|key| key.public_eq(&authority.key))
            && certificate.to_der().ok() != authority.certificate.to_der().ok()
    };
    match present.as_slice() {
        [only] if is_old(only) => {
            let file = certificate_file(path, &authority.certificate)?;
            Ok(Some((file, authority.certificate.clone())))
        }
        several if several.iter().any(is_old) => {
            observer.warning(&format!(
                "'{}' has several certificates, and an old one of this authority among them: \
                 replace that one by hand",
                path.display()
            ));
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Returns the new certificate of a server or a client if it is due and from this authority.
fn leaf(
    renewal: &Renewal<'_>,
    path: &Path,
    role: Role,
    authority: &Authority,
    observer: &dyn Observer,
) -> Result<Option<(CredentialsFile, X509)>, JobError> {
    let Some(present) = certificates(path)? else { return Ok(None) };
    let [old] = present.as_slice() else {
        observer.warning(&format!(
            "'{}' has several certificates and is left as it is",
            path.display()
        ));
        return Ok(None);
    };
    if !renewal.is_due(old) {
        return Ok(None);
    }
    if !old.verify(&authority.key).unwrap_or(false) {
        observer.warning(&format!(
            "'{}' ends soon, and another authority issued it: renew it there",
            path.display()
        ));
        return Ok(None);
    }
    let Ok(names) = host_names(old) else {
        observer.warning(&format!(
            "'{}' has names that are neither DNS names nor addresses: issue a new one with the \
             program that made it",
            path.display()
        ));
        return Ok(None);
    };
    let key = old.public_key().map_err(|error| failed(&error))?;
    let subject = old.subject_name();
    let days = renewal.days.unwrap_or_else(|| certificate::lifetime_days(old));
    let request = Request { role, subject, names: &names, key: &key, days };
    let new = authority.issue(&request)?;
    Ok(Some((certificate_file(path.to_owned(), &new)?, new)))
}
