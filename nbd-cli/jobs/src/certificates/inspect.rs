//! The contents and the defects of files of certificates and keys.

use std::path::{Path, PathBuf};

use nbd_proto::tls::{CA_CERTIFICATE_FILE, PSK_FILE, PreSharedKeys};
use openssl::hash::MessageDigest;
use openssl::x509::{X509, X509Ref};

use super::certificate::{self, Role, SECONDS_PER_DAY};
use super::credentials::{
    CA_KEY_FILE, certificates, directories, file_names, missing, private_key,
};
use super::credentials_error;
use super::files;
use super::names::{HostName, distinguished_name, host_names};
use crate::error::JobError;

/// One certificate, or one file of pre-shared keys.
#[derive(Clone, Debug)]
pub enum CredentialInfo {
    /// A certificate; a file may contain several.
    Certificate(Box<CertificateInfo>),
    /// A file of pre-shared keys.
    Keys(KeysInfo),
}

/// The users of a file of pre-shared keys.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KeysInfo {
    /// The file.
    pub file: PathBuf,
    /// The users in the order of the file; bytes that are not UTF-8 are replaced.
    pub users: Vec<String>,
    /// Its defects, a sentence each.
    pub problems: Vec<String>,
}

/// A certificate.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CertificateInfo {
    /// The file.
    pub file: PathBuf,
    /// Its use, according to the name of the file.
    pub kind: CertificateKind,
    /// Its distinguished name.
    pub subject: String,
    /// The distinguished name of its authority.
    pub issuer: String,
    /// The DNS names and addresses that it is for.
    pub names: Vec<HostName>,
    /// The first second in which it is valid, since 1970.
    pub not_before: u64,
    /// The last second in which it is valid, since 1970.
    pub not_after: u64,
    /// Days from now to the end, rounded up; negative after it.
    pub days_left: i64,
    /// Its validity now.
    pub validity: Validity,
    /// The SHA-256 of its DER form, in hexadecimal digits.
    pub sha256: String,
    /// Its defects, and those of the files beside it, a sentence each.
    pub problems: Vec<String>,
}

/// The use of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CertificateKind {
    /// Issues others.
    Authority,
    /// Of a server.
    Server,
    /// Of a client.
    Client,
    /// Between the certificate of a server or client and its authority.
    Intermediate,
    /// Unknown.
    Other,
}

/// The validity of a certificate at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Validity {
    /// Its end has passed.
    Expired,
    /// Its start has not come.
    NotYetValid,
    /// It ends within the chosen time.
    EndsSoon,
    /// None of these.
    Valid,
}

/// Describes the certificates and keys in a file, or in the files with the usual names in a
/// directory and directly below it. A certificate that ends within `soon_days` counts as ending
/// soon.
///
/// # Errors
///
/// If there are none, or one of the files cannot be read or is malformed.
pub fn inspect(path: &Path, soon_days: u32) -> Result<Vec<CredentialInfo>, JobError> {
    let mut found = Vec::new();
    if !path.exists() {
        return Err(missing(path));
    }
    if !path.is_dir() {
        add(path, soon_days, &mut found)?;
        return Ok(found);
    }
    for directory in directories(path)? {
        for name in names() {
            let path = directory.join(name);
            if path.is_file() {
                add(&path, soon_days, &mut found)?;
            }
        }
    }
    if found.is_empty() {
        return Err(credentials_error(format!(
            "there are no certificates and no keys in '{}'; 'nbd-cli tls --help' says how to make \
             them",
            path.display()
        )));
    }
    Ok(found)
}

fn names() -> [&'static str; 4] {
    [CA_CERTIFICATE_FILE, file_names(Role::Server).0, file_names(Role::Client).0, PSK_FILE]
}

/// Adds what a file contains.
fn add(path: &Path, soon_days: u32, found: &mut Vec<CredentialInfo>) -> Result<(), JobError> {
    let [authority, server, client, _] = names();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (kind, key) = match name {
        _ if path.extension().is_some_and(|extension| extension == "psk") => {
            found.push(CredentialInfo::Keys(keys(path)?));
            return Ok(());
        }
        _ if name == authority => (CertificateKind::Authority, None),
        _ if name == server => (CertificateKind::Server, Some(file_names(Role::Server).1)),
        _ if name == client => (CertificateKind::Client, Some(file_names(Role::Client).1)),
        _ => (CertificateKind::Other, None),
    };
    let chain = certificates(path)?.ok_or_else(|| missing(path))?;
    for (index, certificate) in chain.iter().enumerate() {
        let mut info = describe(soon_days, path, kind, certificate);
        match (kind, index) {
            (CertificateKind::Server | CertificateKind::Client, 0) => {
                info.problems.extend(key.and_then(|key| key_problem(certificate, path, key)));
                info.problems.extend(authority_problem(&chain, path));
                if kind == CertificateKind::Server && info.names.is_empty() {
                    info.problems.push("it has no host name: many clients refuse it".to_owned());
                }
            }
            (CertificateKind::Server | CertificateKind::Client, _) => {
                info.kind = CertificateKind::Intermediate;
            }
            // Servers and clients have no key of the authority.
            (CertificateKind::Authority, _) if path.with_file_name(CA_KEY_FILE).exists() => {
                info.problems.extend(key_problem(certificate, path, CA_KEY_FILE));
            }
            _ => {}
        }
        found.push(CredentialInfo::Certificate(Box::new(info)));
    }
    Ok(())
}

fn describe(
    soon_days: u32,
    path: &Path,
    kind: CertificateKind,
    certificate: &X509Ref,
) -> CertificateInfo {
    let not_before = certificate::seconds(certificate.not_before());
    let not_after = certificate::seconds(certificate.not_after());
    let now = certificate::now();
    let validity = match not_after {
        _ if not_after < now => Validity::Expired,
        _ if not_before > now => Validity::NotYetValid,
        _ if not_after <= now + u64::from(soon_days) * SECONDS_PER_DAY => Validity::EndsSoon,
        _ => Validity::Valid,
    };
    let mut problems = Vec::new();
    let names = host_names(certificate).unwrap_or_else(|_| {
        problems.push("it has names of other kinds, which are not shown".to_owned());
        Vec::new()
    });
    let digest = certificate.digest(MessageDigest::sha256());
    let seconds = i64::try_from(not_after).unwrap_or(i64::MAX) - i64::try_from(now).unwrap_or(0);
    let digest = digest.iter().flat_map(|digest| digest.iter());
    CertificateInfo {
        file: path.to_owned(),
        kind,
        subject: distinguished_name(certificate.subject_name()),
        issuer: distinguished_name(certificate.issuer_name()),
        names,
        not_before,
        not_after,
        days_left: -(-seconds).div_euclid(86_400),
        validity,
        sha256: digest.map(|byte| format!("{byte:02x}")).collect(),
        problems,
    }
}

/// Returns the defect of the key beside a certificate.
fn key_problem(certificate: &X509Ref, path: &Path, name: &str) -> Option<String> {
    let path = path.with_file_name(name);
    let text = match files::read(&path) {
        Ok(Some(text)) => text,
        Ok(None) => return Some(format!("{name} is missing beside it")),
        Err(error) => return Some(error.to_string()),
    };
    let key = match private_key(&text, &path) {
        Ok(key) => key,
        Err(error) => return Some(error.to_string()),
    };
    if !certificate.public_key().is_ok_and(|public| public.public_eq(&key)) {
        return Some(format!("{name} does not belong to it"));
    }
    readable(&path)
}

fn readable(path: &Path) -> Option<String> {
    files::readable_by_others(path).then(|| {
        format!("'{}' can be read by every user of this system: chmod 600 it", path.display())
    })
}

/// Returns the defect of the authority beside a certificate, for those that it signed directly.
fn authority_problem(chain: &[X509], path: &Path) -> Option<String> {
    let beside = path.with_file_name(CA_CERTIFICATE_FILE);
    let authorities = match certificates(&beside) {
        Ok(Some(authorities)) => authorities,
        Ok(None) => return Some(format!("{CA_CERTIFICATE_FILE} is missing beside it")),
        Err(error) => return Some(error.to_string()),
    };
    let signed = |certificate: &X509| {
        let by = |authority: &X509| authority.public_key().and_then(|key| certificate.verify(&key));
        authorities.iter().any(|authority| by(authority).unwrap_or(false))
    };
    let is_signed = chain.iter().any(signed);
    (!is_signed).then(|| format!("no authority in {CA_CERTIFICATE_FILE} beside it has signed it"))
}

fn keys(path: &Path) -> Result<KeysInfo, JobError> {
    let text = files::read(path)?.ok_or_else(|| missing(path))?;
    let keys = PreSharedKeys::parse(&text).map_err(|error| {
        credentials_error(format!("'{}' is not a file of keys: {error}", path.display()))
    })?;
    let users = keys.users().map(|user| String::from_utf8_lossy(user).into_owned()).collect();
    let problems = readable(path).into_iter().collect();
    Ok(KeysInfo { file: path.to_owned(), users, problems })
}
