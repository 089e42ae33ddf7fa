//! Users of a file of pre-shared keys.

use std::path::Path;

use nbd_proto::limits::{MAX_PSK_USER_LEN, MAX_PSK_USERS};
use nbd_proto::tls::{KeyFileError, PreSharedKeys};
use openssl::rand::rand_bytes;

use super::credentials_error;
use super::files::{self, CredentialsFile, ExistingCredentials, Locked, Secrecy};
use crate::error::JobError;
use crate::files::directory_of;
use crate::observer::Observer;

/// Length of a new key, in bytes.
const KEY_LEN: usize = 32;

/// Parses the name of a user.
///
/// # Errors
///
/// A phrase with the reason.
pub fn parse_user(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("it is empty".to_owned()),
        length if length > MAX_PSK_USER_LEN => {
            Err(format!("it has {length} bytes; {MAX_PSK_USER_LEN} is the limit"))
        }
        _ if text.contains(char::is_control) => Err("it has a control character".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// A user to be added to a file of pre-shared keys; made by [`new`](Self::new), changed field by
/// field.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AddUser<'a> {
    /// Name of the user.
    pub user: &'a str,
    /// File of the server; created if it does not exist.
    pub file: &'a Path,
    /// A new file with this user alone, for the client. By default none.
    pub client_file: Option<&'a Path>,
    /// The treatment of a key of this user, and of an existing client file. By default they are
    /// kept, and the call fails.
    pub existing: ExistingCredentials,
}

impl<'a> AddUser<'a> {
    /// Describes a user of the file of a server.
    pub fn new(user: &'a str, file: &'a Path) -> Self {
        Self { user, file, client_file: None, existing: ExistingCredentials::Refuse }
    }
}

/// Adds a user with a random key.
///
/// # Errors
///
/// If a file is not one of keys, or cannot be read or written.
pub fn add_user(added: &AddUser<'_>, observer: &dyn Observer) -> Result<(), JobError> {
    let line = new_line(added.user)?;
    let lock = files::create_and_lock(directory_of(added.file))?;
    let old = files::read(added.file)?;
    let contents = old.as_deref().unwrap_or_default();
    let contents = with_user(contents, added.user, &line, added.existing)
        .map_err(|why| credentials_error(format!("'{}' {why}", added.file.display())))?;
    if let Some(path) = added.client_file {
        write_client_file(path, added.file, &line, &lock, added.existing, observer)?;
    }
    let file = CredentialsFile { path: added.file.to_owned(), contents, secrecy: Secrecy::Secret };
    let replace = match old {
        Some(_) => ExistingCredentials::Replace,
        None => ExistingCredentials::Refuse,
    };
    files::write(&lock, &[file], replace, observer).inspect_err(|_| {
        if let Some(path) = added.client_file {
            // No server knows the key in it.
            let _ = std::fs::remove_file(path);
        }
    })
}

fn write_client_file(
    path: &Path,
    server: &Path,
    line: &str,
    lock: &Locked,
    existing: ExistingCredentials,
    observer: &dyn Observer,
) -> Result<(), JobError> {
    let same = path == server
        || path.canonicalize().is_ok_and(|path| server.canonicalize().is_ok_and(|it| it == path));
    if same {
        return Err(credentials_error(format!(
            "'{}' is the file of the server and of the client; give the client one of its own",
            path.display()
        )));
    }
    let client = CredentialsFile {
        path: path.to_owned(),
        contents: line.as_bytes().to_vec(),
        secrecy: Secrecy::Secret,
    };
    files::write(lock, &[client], existing, observer)
}

/// A user with a random key, as psktool writes it.
fn new_line(user: &str) -> Result<String, JobError> {
    let mut key = [0; KEY_LEN];
    rand_bytes(&mut key)
        .map_err(|error| credentials_error(format!("OpenSSL cannot make a key: {error}")))?;
    Ok(format!("{}:{}\n", encoded(user), hexadecimal(&key)))
}

/// A name that could be taken for something else is written in hexadecimal after a `#`.
fn encoded(user: &str) -> String {
    if user.starts_with('#') || user.contains(':') {
        format!("#{}", hexadecimal(user.as_bytes()))
    } else {
        user.to_owned()
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the file with a line for the user: in place of the old one, or at the end.
fn with_user(
    old: &[u8],
    user: &str,
    line: &str,
    existing: ExistingCredentials,
) -> Result<Vec<u8>, String> {
    let users = match PreSharedKeys::parse(old) {
        Ok(keys) => keys.users().count(),
        Err(KeyFileError::NoUsers) => 0,
        Err(error) => return Err(format!("is not a file of keys: {error}")),
    };
    let mut new = Vec::with_capacity(old.len() + line.len() + 1);
    let mut replaced = false;
    for text in old.split_inclusive(|byte| *byte == b'\n') {
        let is_user = PreSharedKeys::parse(text)
            .is_ok_and(|keys| keys.users().next() == Some(user.as_bytes()));
        match (is_user, existing) {
            (false, _) => new.extend_from_slice(text),
            (true, ExistingCredentials::Replace) => {
                new.extend_from_slice(line.as_bytes());
                replaced = true;
            }
            (true, ExistingCredentials::Refuse) => {
                return Err(format!(
                    "has a key for the user '{user}' already; add --force to replace it"
                ));
            }
        }
    }
    if !replaced {
        if users == MAX_PSK_USERS {
            return Err(format!("has {users} users already, and more are not possible"));
        }
        if new.last().is_some_and(|byte| *byte != b'\n') {
            new.push(b'\n');
        }
        new.extend_from_slice(line.as_bytes());
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "1ec2dcb47f725a98675eef59f5f8655d";

    #[test]
    fn other_lines_stay_as_they_are() {
        let old = format!("# staff\nalice:{KEY}\n#bob:{KEY}\n#613a62:{KEY}");
        let added =
            with_user(old.as_bytes(), "bob", "bob:NEW\n", ExistingCredentials::Refuse).unwrap();
        assert_eq!(added, format!("{old}\nbob:NEW\n").as_bytes());
        let replaced =
            with_user(old.as_bytes(), "alice", "alice:NEW\n", ExistingCredentials::Replace);
        let expected = format!("# staff\nalice:NEW\n#bob:{KEY}\n#613a62:{KEY}");
        assert_eq!(replaced.unwrap(), expected.as_bytes());
        // "a:b" is there under its encoded name.
        let refused = with_user(old.as_bytes(), "a:b", "", ExistingCredentials::Refuse);
        assert!(refused.unwrap_err().contains("--force"));
        assert!(with_user(b"nonsense", "a", "", ExistingCredentials::Replace).is_err());
    }

    #[test]
    fn every_name_is_read_back() {
        for user in ["alice", "#alice", "a:b", "\u{fc}ber x", "0"] {
            let line = new_line(user).unwrap();
            let keys = PreSharedKeys::parse(line.as_bytes()).unwrap();
            assert_eq!(keys.users().collect::<Vec<_>>(), [user.as_bytes()]);
            assert_eq!(keys.key_of(user.as_bytes()).unwrap().expose().len(), KEY_LEN);
        }
    }
}
