//! New authorities, and certificates that they issue, with their keys.

use std::path::{Component, Path, PathBuf};

use nbd_proto::tls::CA_CERTIFICATE_FILE;

use super::certificate::{self, Request, Role};
use super::credentials::{
    Authority, CA_KEY_FILE, certificate_file, certificates, failed, file_names, key_file,
};
use super::credentials_error;
use super::files::{self, CredentialsFile, ExistingCredentials};
use super::names::HostName;
use crate::error::JobError;
use crate::observer::Observer;

/// An authority to be created; made by [`new`](Self::new), changed field by field.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct NewAuthority<'a> {
    /// Its directory; created if it does not exist.
    pub directory: &'a Path,
    /// Its name; one with random digits by default.
    pub name: Option<&'a str>,
    /// Days for which it is valid. By default 3650.
    pub days: u32,
    /// The treatment of an existing authority. By default it is kept, and the call fails.
    pub existing: ExistingCredentials,
}

impl<'a> NewAuthority<'a> {
    /// Describes an authority in `directory`.
    pub fn new(directory: &'a Path) -> Self {
        Self { directory, name: None, days: 3650, existing: ExistingCredentials::Refuse }
    }
}

/// A certificate to be issued; made by [`new`](Self::new), changed field by field.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Issue<'a> {
    /// Directory of the authority.
    pub authority: &'a Path,
    /// Directory for the files; by default `directory_name` in that of the authority.
    pub directory: Option<&'a Path>,
    /// Name of a directory in that of the authority. By default the common name.
    pub directory_name: &'a str,
    /// The owner.
    pub role: Role,
    /// The common name.
    pub name: &'a str,
    /// The host names of a server. By default none.
    pub names: &'a [HostName],
    /// Organization (O) in the distinguished name. By default none.
    pub organization: Option<&'a str>,
    /// Days for which it is valid; it ends with its authority at the latest. By default 365.
    pub days: u32,
    /// The treatment of existing files. By default they are kept, and the call fails.
    pub existing: ExistingCredentials,
}

impl<'a> Issue<'a> {
    /// Describes a certificate with the common name `name`, from the authority in a directory.
    pub fn new(authority: &'a Path, role: Role, name: &'a str) -> Self {
        Self {
            authority,
            directory: None,
            directory_name: name,
            role,
            name,
            names: &[],
            organization: None,
            days: 365,
            existing: ExistingCredentials::Refuse,
        }
    }
}

/// Files that were written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Issued {
    /// Their paths, in the order in which they were written.
    pub files: Vec<PathBuf>,
    /// End of the certificate, in seconds since 1970.
    pub valid_until: u64,
}

impl Issued {
    fn new(files: &[CredentialsFile], certificate: &openssl::x509::X509Ref) -> Self {
        let valid_until = certificate::seconds(certificate.not_after());
        Self { files: files.iter().map(|file| file.path.clone()).collect(), valid_until }
    }
}

/// Creates an authority: a key, and a certificate signed by itself.
///
/// # Errors
///
/// If files exist that are not to be replaced, or cannot be written.
pub fn new_authority(
    authority: &NewAuthority<'_>,
    observer: &dyn Observer,
) -> Result<Issued, JobError> {
    let make = || {
        let key = certificate::new_key()?;
        let name = authority.name.map(str::to_owned);
        let name = name.map_or_else(|| certificate::authority_name(&key), Ok)?;
        let subject = certificate::subject(None, &name)?;
        let certificate = certificate::self_signed(&subject, &key, authority.days)?;
        Ok((key, certificate))
    };
    let (key, certificate) = make().map_err(|error| failed(&error))?;
    let lock = files::create_and_lock(authority.directory)?;
    let files = [
        key_file(authority.directory.join(CA_KEY_FILE), &key)?,
        certificate_file(authority.directory.join(CA_CERTIFICATE_FILE), &certificate)?,
    ];
    files::write(&lock, &files, authority.existing, observer)?;
    Ok(Issued::new(&files, &certificate))
}

/// Issues a certificate with a new key, and writes them beside the certificate of the authority.
///
/// # Errors
///
/// If there is no usable authority, or files exist that are not to be replaced, or cannot be
/// written.
pub fn issue(wanted: &Issue<'_>, observer: &dyn Observer) -> Result<Issued, JobError> {
    let directory = match wanted.directory {
        Some(directory) => directory.to_owned(),
        None => wanted.authority.join(plain_name(wanted.directory_name)?),
    };
    let authority = Authority::load(wanted.authority)?;
    let make = || {
        let key = certificate::new_key()?;
        let subject = certificate::subject(wanted.organization, wanted.name)?;
        Ok((certificate::public_half(&key)?, key, subject))
    };
    let (public, key, subject) = make().map_err(|error| failed(&error))?;
    let Issue { role, names, days, existing, .. } = *wanted;
    let request = Request { role, subject: &subject, names, key: &public, days };
    let certificate = authority.issue(&request)?;
    let lock = files::create_and_lock(&directory)?;
    let (certificate_name, key_name) = file_names(role);
    let mut files = Vec::new();
    if needs_authority(&directory.join(CA_CERTIFICATE_FILE), &authority, existing)? {
        let path = directory.join(CA_CERTIFICATE_FILE);
        files.push(certificate_file(path, &authority.certificate)?);
    }
    files.push(key_file(directory.join(key_name), &key)?);
    files.push(certificate_file(directory.join(certificate_name), &certificate)?);
    files::write(&lock, &files, existing, observer)?;
    Ok(Issued::new(&files, &certificate))
}

/// Returns whether a directory lacks the certificate of the authority.
fn needs_authority(
    path: &Path,
    authority: &Authority,
    existing: ExistingCredentials,
) -> Result<bool, JobError> {
    let Some(present) = certificates(path)? else { return Ok(true) };
    let same = |certificate: &openssl::x509::X509| {
        certificate.to_der().ok() == authority.certificate.to_der().ok()
    };
    if present.iter().any(same) {
        return Ok(false);
    }
    if existing == ExistingCredentials::Replace {
        return Ok(true);
    }
    Err(credentials_error(format!(
        "'{}' is that of another authority; choose another directory with --output, or add --force \
         to replace it",
        path.display()
    )))
}

/// A name that can be that of a directory, and no path.
fn plain_name(name: &str) -> Result<&Path, JobError> {
    let path = Path::new(name);
    let mut components = path.components();
    let is_plain = matches!(components.next(), Some(Component::Normal(first)) if first == name)
        && components.next().is_none()
        && !name.contains('*');
    if is_plain {
        Ok(path)
    } else {
        Err(credentials_error(format!(
            "'{name}' cannot be the name of a directory; give one for the files with --output"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::plain_name;

    #[test]
    fn files_go_to_a_directory_of_the_authority() {
        for name in ["vmhost", "laptop 1", "::1", "ca"] {
            assert!(plain_name(name).is_ok(), "{name}");
        }
        for name in ["..", ".", "/etc", "a/b", "a/", "*.example.com"] {
            assert!(plain_name(name).is_err(), "{name}");
        }
    }
}
