//! `nbd-cli tls psk`: users of a file of pre-shared keys.

use std::path::{Path, PathBuf};

use clap::Args;
use nbd_proto::limits::{MAX_PSK_USER_LEN, MAX_PSK_USERS};
use nbd_proto::tls::{KeyFileError, PSK_FILE, PreSharedKeys};
use openssl::rand::rand_bytes;

use super::files::{self, Existing, Locked, NewFile, Secrecy};
use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli tls psk alice                                        adds alice to ./keys.psk
  nbd-cli tls psk bob --file /etc/nbd/keys.psk --client-file bob.psk
  nbd-cli serve --tls-psk keys.psk disk.img
  nbd-cli info --tls-psk bob.psk nbds://bob@vmhost/

The server has a file with all users. A client needs only its own key. A running server reads its
file again on SIGHUP.";

/// Length of a new key, in bytes.
const KEY_LEN: usize = 32;

/// Arguments of `nbd-cli tls psk`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct PskArgs {
    /// Name of the user, as in nbds://USER@HOST/.
    #[arg(value_parser = parse_user)]
    pub user: String,

    /// File of the server, to which the user is added.
    #[arg(long, value_name = "FILE", default_value = PSK_FILE)]
    pub file: PathBuf,

    /// Write a file with this user alone, for the client.
    #[arg(long, value_name = "FILE")]
    pub client_file: Option<PathBuf>,

    /// Replace the key of a user who exists, and an existing client file.
    #[arg(long)]
    pub force: bool,
}

fn parse_user(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("it is empty".to_owned()),
        length if length > MAX_PSK_USER_LEN => {
            Err(format!("it has {length} bytes; {MAX_PSK_USER_LEN} is the limit"))
        }
        _ if text.contains(char::is_control) => Err("it has a control character".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

pub(super) fn run(args: &PskArgs) -> Result<Outcome, CommandError> {
    let existing = Existing::from_force_flag(args.force);
    let line = new_line(&args.user)?;
    let lock = files::create_and_lock(files::directory_of(&args.file))?;
    let old = files::read(&args.file)?;
    let contents = with_user(old.as_deref().unwrap_or_default(), &args.user, &line, existing)
        .map_err(|why| CommandError::new(format!("'{}' {why}", args.file.display())))?;
    let mut output = Output::new();
    if let Some(path) = &args.client_file {
        write_client_file(path, &args.file, &line, &lock, existing)?;
        output.line(&printable(&path.display().to_string()))?;
    }
    let file = NewFile { path: args.file.clone(), contents, secrecy: Secrecy::Secret };
    let replace = if old.is_some() { Existing::Replace } else { Existing::Refuse };
    if let Err(error) = files::write(&lock, &[file], replace) {
        if let Some(path) = &args.client_file {
            // No server knows the key in it.
            let _ = std::fs::remove_file(path);
        }
        return Err(error);
    }
    output.line(&printable(&args.file.display().to_string()))?;
    output.finish()?;
    Ok(Outcome::Success)
}

fn write_client_file(
    path: &Path,
    server: &Path,
    line: &str,
    lock: &Locked,
    existing: Existing,
) -> Result<(), CommandError> {
    let same = path == server
        || path.canonicalize().is_ok_and(|path| server.canonicalize().is_ok_and(|it| it == path));
    if same {
        return Err(CommandError::new(format!(
            "'{}' is the file of the server and of the client; give the client one of its own",
            path.display()
        )));
    }
    let client = NewFile {
        path: path.to_owned(),
        contents: line.as_bytes().to_vec(),
        secrecy: Secrecy::Secret,
    };
    files::write(lock, &[client], existing)
}

/// A user with a random key, as psktool writes it.
fn new_line(user: &str) -> Result<String, CommandError> {
    let mut key = [0; KEY_LEN];
    rand_bytes(&mut key)
        .map_err(|error| CommandError::new(format!("OpenSSL cannot make a key: {error}")))?;
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
fn with_user(old: &[u8], user: &str, line: &str, existing: Existing) -> Result<Vec<u8>, String> {
    let users = match PreSharedKeys::parse(old) {
        Ok(keys) => keys.users().count(),
        Err(KeyFileError::NoUsers) => 0,
        Err(error) => return Err(format!("is not a file of keys: {error}")),
    };
    let mut new = Vec::with_capacity(old.len() + line.len() + 1);
    let mut replaced = false;
    for part in old.split_inclusive(|byte| *byte == b'\n') {
        let is_user = PreSharedKeys::parse(part)
            .is_ok_and(|keys| keys.users().next() == Some(user.as_bytes()));
        match (is_user, existing) {
            (false, _) => new.extend_from_slice(part),
            (true, Existing::Replace) => {
                new.extend_from_slice(line.as_bytes());
                replaced = true;
            }
            (true, Existing::Refuse) => {
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
        let added = with_user(old.as_bytes(), "bob", "bob:NEW\n", Existing::Refuse).unwrap();
        assert_eq!(added, format!("{old}\nbob:NEW\n").as_bytes());
        let replaced = with_user(old.as_bytes(), "alice", "alice:NEW\n", Existing::Replace);
        let expected = format!("# staff\nalice:NEW\n#bob:{KEY}\n#613a62:{KEY}");
        assert_eq!(replaced.unwrap(), expected.as_bytes());
        // "a:b" is there under its encoded name.
        let refused = with_user(old.as_bytes(), "a:b", "", Existing::Refuse);
        assert!(refused.unwrap_err().contains("--force"));
        assert!(with_user(b"nonsense", "a", "", Existing::Replace).is_err());
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
