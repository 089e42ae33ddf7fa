//! Passphrases of encrypted images, by command line options. They are read from files: arguments
//! can be seen by every user of the machine.
//!
//! A file is read when an image is opened that needs it, by the process that opens it. What can be
//! read only once, such as a pipe or the answer of a user, is kept, and a process in the background
//! gets it from its parent.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use imgfmt::{OpenOptions, Passphrase};
use nbd_jobs::secret::{SECRET_LEN_MAX, SecretBytes, read_secret};
use nbd_jobs::text::printable;
use nbd_proto::tls::KeyPassword;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::termios::{LocalModes, OptionalActions, isatty, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::error::CommandError;
use crate::signals;

/// The maximum length of a line of a terminal in bytes.
const LINE_MAX: usize = 4096;

/// The passphrases of encrypted images.
#[derive(Clone, Debug, Default, Args)]
pub struct KeyArgs {
    /// A file with the passphrase of an encrypted image or of one below it, all bytes of it (as
    /// with cryptsetup and QEMU, a line break at the end counts). '-' asks for it, or reads
    /// standard input if that is not a terminal; /dev/fd/N reads a descriptor. May be repeated.
    #[arg(
        long, value_name = "FILE", value_parser = OsStringValueParser::new().map(KeyFile::new)
    )]
    pub key_file: Vec<KeyFile>,
}

/// A key file, which is not read yet.
#[derive(Clone)]
pub struct KeyFile {
    path: PathBuf,
    /// The content of a file that can be read only once, after that.
    kept: Arc<Mutex<Option<SecretBytes>>>,
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyFile").field(&self.path).finish()
    }
}

impl KeyArgs {
    pub(crate) fn passphrases(&self) -> Vec<Passphrase> {
        self.key_file.iter().map(KeyFile::passphrase).collect()
    }

    /// Returns the options with these passphrases.
    pub(crate) fn apply(&self, mut options: OpenOptions) -> OpenOptions {
        options.passphrases = self.passphrases();
        options
    }

    /// Refuses what a server cannot read again when it likes, in a configuration file.
    pub(crate) fn refuse_descriptors(&self) -> Result<(), CommandError> {
        let is_no_file = |path: &Path| {
            let starts = ["/dev/fd/", "/dev/stdin", "/dev/tty", "/proc/self/fd/"];
            path == Path::new("-")
                || starts
                    .iter()
                    .any(|start| path.as_os_str().as_encoded_bytes().starts_with(start.as_bytes()))
        };
        match self.key_file.iter().find(|file| is_no_file(&file.path)) {
            None => Ok(()),
            Some(file) => Err(CommandError::new(format!(
                "key-file: '{}' is not a file, which the server has to read again at each reload",
                file.shown()
            ))),
        }
    }

    /// What a process in the background needs of the files that only this one can read: for each
    /// file the number of bytes and the bytes, or a number that says that it reads the file itself.
    pub(crate) fn handed_over(&self) -> Result<SecretBytes, CommandError> {
        let mut all = Zeroizing::new(Vec::new());
        for file in &self.key_file {
            let content = if file.can_be_read_again() { None } else { Some(file.read()) };
            let content = content.transpose().map_err(CommandError::new)?;
            let length = content.as_ref().map_or(u64::MAX, |bytes| bytes.len() as u64);
            // Of the full size at once: a buffer that grows leaves copies behind.
            let room = all.len() + 8 + content.as_ref().map_or(0, |bytes| bytes.len());
            let mut more = Zeroizing::new(Vec::with_capacity(room));
            more.extend_from_slice(&all);
            more.extend_from_slice(&length.to_be_bytes());
            more.extend_from_slice(content.as_deref().map(Vec::as_slice).unwrap_or_default());
            all = more;
        }
        Ok(all)
    }

    /// Takes what the parent [handed over](Self::handed_over), from standard input.
    pub(crate) fn take_over(&self) -> Result<(), CommandError> {
        if self.key_file.is_empty() {
            return Ok(());
        }
        let failed = |_| CommandError::new("the passphrases from the starting process are lost");
        for file in &self.key_file {
            let mut length = [0; 8];
            Descriptor.read_exact(&mut length).map_err(failed)?;
            let length = u64::from_be_bytes(length);
            if length > SECRET_LEN_MAX {
                continue;
            }
            let mut bytes = Zeroizing::new(vec![0; length as usize]);
            Descriptor.read_exact(&mut bytes).map_err(failed)?;
            file.keep(&bytes);
        }
        let null = File::open("/dev/null").map_err(failed)?;
        rustix::stdio::dup2_stdin(&null).map_err(|error| failed(error.into()))
    }
}

impl KeyFile {
    pub(crate) fn new(path: OsString) -> Self {
        Self { path: path.into(), kept: Arc::default() }
    }

    pub(crate) fn passphrase(&self) -> Passphrase {
        let file = self.clone();
        Passphrase::read_by(move || file.read())
    }

    fn shown(&self) -> String {
        printable(&self.path.to_string_lossy())
    }

    fn is_standard_input(&self) -> bool {
        self.path == Path::new("-")
    }

    fn can_be_read_again(&self) -> bool {
        // A path of a descriptor is another file in another process.
        let is_descriptor = self.path.starts_with("/dev/fd") || self.path.starts_with("/proc/self");
        !is_descriptor && std::fs::metadata(&self.path).is_ok_and(|found| found.is_file())
    }

    fn keep(&self, bytes: &SecretBytes) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes.clone());
    }

    /// A new passphrase, which is asked for twice on a terminal.
    ///
    /// # Errors
    ///
    /// If it cannot be read or is empty, or the user has not typed it twice.
    pub(crate) fn new_passphrase(&self) -> Result<Passphrase, CommandError> {
        leave_no_dump();
        let is_asked = self.is_standard_input() && isatty(io::stdin());
        let has_asked = || self.kept.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if is_asked && !has_asked() {
            let failed = |_| CommandError::new("the new passphrase cannot be read");
            let first = ask(b"New passphrase: ").map_err(failed)?;
            let second = ask(b"The new passphrase again: ").map_err(failed)?;
            if *first != *second {
                return Err(CommandError::new(
                    "the two passphrases are not the same; nothing was changed",
                ));
            }
            if first.is_empty() {
                return Err(CommandError::new("the new passphrase is empty"));
            }
            self.keep(&first);
        }
        let mut bytes = self.read().map_err(CommandError::new)?;
        Ok(Passphrase::new(std::mem::take(&mut *bytes)))
    }

    /// Its content. From now on this process leaves no core dump, and others of the same user may
    /// not look into its memory.
    fn read(&self) -> Result<SecretBytes, String> {
        leave_no_dump();
        // Held meanwhile, so that several images that are opened at once ask only once.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = &*kept {
            return Ok(bytes.clone());
        }
        let bytes = match self.is_standard_input() {
            true if isatty(io::stdin()) => ask(b"Passphrase: "),
            true => read_secret(&mut Descriptor),
            false => File::open(&self.path).and_then(|mut file| read_secret(&mut file)),
        };
        let wrong = |why: &str| format!("the key file '{}' {why}", self.shown());
        let bytes = bytes.map_err(|error| wrong(&in_words(&error)))?;
        if bytes.is_empty() {
            return Err(wrong("is empty"));
        }
        if !self.can_be_read_again() {
            *kept = Some(bytes.clone());
        }
        Ok(bytes)
    }
}

/// Why a file with a secret cannot be read, as a predicate.
fn in_words(error: &io::Error) -> String {
    let predicate = match error.kind() {
        io::ErrorKind::NotFound => "does not exist; check the path",
        io::ErrorKind::PermissionDenied => "may not be read by you",
        io::ErrorKind::IsADirectory => "is a directory",
        io::ErrorKind::FileTooLarge => return format!("has more than {SECRET_LEN_MAX} bytes"),
        _ => "cannot be read",
    };
    predicate.to_owned()
}

/// From now on this process leaves no core dump, and others of the same user may not look into its
/// memory.
pub(crate) fn leave_no_dump() {
    // Where the system refuses this, the disk is opened nevertheless.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Standard input, without the buffer of the standard library, which would keep what it has read.
struct Descriptor;

impl Read for Descriptor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(io::stdin(), buffer)?)
    }
}

/// Parses the name of a file with the password of a private key, its first line as with OpenSSL's
/// `-passin file:`, and reads it.
pub(crate) fn key_password_parser() -> impl TypedValueParser<Value = KeyPassword> {
    OsStringValueParser::new().try_map(|path| key_password(Path::new(&path)))
}

fn key_password(path: &Path) -> Result<KeyPassword, String> {
    leave_no_dump();
    let bytes = File::open(path).and_then(|mut file| read_secret(&mut file));
    let bytes = bytes.map_err(|error| format!("the file {}", in_words(&error)))?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match line.is_empty() {
        true => Err("its first line, the password, is empty".to_owned()),
        false => Ok(KeyPassword::new(line.to_vec())),
    }
}

/// Asks for a passphrase on the terminal without showing it.
fn ask(prompt: &[u8]) -> io::Result<SecretBytes> {
    let terminal = File::options().read(true).write(true).open("/dev/tty")?;
    let before = tcgetattr(&terminal)?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO);
    let other = terminal.try_clone()?;
    let restore = move || {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(&other, OptionalActions::Now, &before);
    };
    let bytes = signals::with_restored_terminal(restore, || {
        tcsetattr(&terminal, OptionalActions::Flush, &silent)?;
        (&terminal).write_all(prompt)?;
        let bytes = read_line(&terminal);
        (&terminal).write_all(b"\n").and(bytes)
    });
    bytes?
}

/// Reads up to the end of a line, which is not a part of the result.
fn read_line(terminal: &File) -> io::Result<SecretBytes> {
    let (mut line, mut length) = (Zeroizing::new([0; LINE_MAX]), 0);
    while length < LINE_MAX && !line[..length].ends_with(b"\n") {
        match rustix::io::read(terminal, &mut line[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let line = &line[..length];
    Ok(Zeroizing::new(line.strip_suffix(b"\n").unwrap_or(line).to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_there_and_not_empty() {
        let read = |path: &str| KeyFile::new(path.into()).read();
        assert!(read("/dev/null").is_err());
        assert!(read("/nowhere").unwrap_err().contains("does not exist"));
    }

    #[test]
    fn the_password_of_a_private_key_is_the_first_line_of_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        for (content, expected) in
            [("a b", Some("a b")), ("a\r\nb\n", Some("a")), ("\nb", None), ("", None)]
        {
            std::fs::write(&file, content).unwrap();
            let read = key_password(&file).ok();
            assert_eq!(read, expected.map(|text| KeyPassword::new(text.into())), "{content:?}");
        }
        assert!(!format!("{:?}", KeyPassword::new(b"secret".to_vec())).contains("secret"));
    }

    #[test]
    fn files_of_descriptors_are_for_the_command_line_only() {
        let refuses = |path: &str| {
            KeyArgs { key_file: vec![KeyFile::new(path.into())] }.refuse_descriptors().is_err()
        };
        for path in ["-", "/dev/fd/3", "/dev/stdin", "/proc/self/fd/0"] {
            assert!(refuses(path), "{path}");
        }
        assert!(!refuses("/etc/disk.key") && !refuses("-key"));
    }
}
