//! Passphrases of encrypted images, by command line options. They are read from files: arguments can
//! be seen by every user of the machine.

use std::fs::File;
use std::io::{self, BufRead as _, Read};

use clap::Args;
use imgfmt::{OpenOptions, Passphrase};
use rustix::termios::{LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

/// The maximum length of a key file in bytes, that of `cryptsetup`.
const LENGTH_MAX: u64 = 8 << 20;

/// The passphrases of encrypted images.
#[derive(Clone, Debug, Default, Args)]
pub struct KeyArgs {
    /// A file with the passphrase of an encrypted image or of one below it, all bytes of it (as with
    /// cryptsetup and QEMU, a line break at the end counts). '-' asks for it, or reads standard input
    /// if that is no terminal; /dev/fd/N reads a descriptor. May be repeated.
    #[arg(long, value_name = "FILE", value_parser = read)]
    pub key_file: Vec<Passphrase>,
}

impl KeyArgs {
    pub(crate) fn passphrases(&self) -> Vec<Passphrase> {
        self.key_file.clone()
    }

    /// Returns the options with these passphrases.
    pub(crate) fn apply(&self, mut options: OpenOptions) -> OpenOptions {
        options.passphrases = self.passphrases();
        options
    }
}

fn read(name: &str) -> Result<Passphrase, String> {
    let bytes = match name {
        "-" if isatty(io::stdin()) => ask(),
        "-" => read_all(io::stdin()),
        path => File::open(path).and_then(read_all),
    };
    let bytes = bytes.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "you may not read it".to_owned(),
        io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        io::ErrorKind::FileTooLarge => format!("it has more than {LENGTH_MAX} bytes"),
        _ => "it cannot be read".to_owned(),
    })?;
    match bytes.is_empty() {
        true => Err("it is empty".to_owned()),
        false => Ok(Passphrase::new(bytes)),
    }
}

fn read_all(file: impl Read) -> io::Result<Vec<u8>> {
    // Of the full size at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; 64 << 10]);
    let (mut file, mut length) = (file.take(LENGTH_MAX + 1), 0);
    loop {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if length == bytes.len() {
            let mut larger = Zeroizing::new(vec![0; 2 * length]);
            larger[..length].copy_from_slice(&bytes);
            bytes = larger;
        }
    }
    match length as u64 > LENGTH_MAX {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(bytes[..length].to_vec()),
    }
}

/// Asks for a passphrase on the terminal without showing it.
fn ask() -> io::Result<Vec<u8>> {
    let _hidden = Hidden::new()?;
    eprint!("Passphrase: ");
    let mut line = Zeroizing::new(String::with_capacity(4096));
    io::stdin().lock().read_line(&mut line)?;
    eprintln!();
    Ok(line.trim_end_matches('\n').as_bytes().to_vec())
}

/// Keeps the terminal from showing what is typed.
struct Hidden(Termios);

impl Hidden {
    fn new() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_of_a_key_file_count_and_there_are_not_too_many() {
        assert_eq!(read_all(&b"abc\n"[..]).unwrap(), b"abc\n");
        let large = vec![7; 200_000];
        assert_eq!(read_all(&large[..]).unwrap(), large);
        assert!(read_all(io::repeat(7)).is_err());
        assert!(read("/dev/null").is_err());
        assert!(read("/nowhere").unwrap_err().contains("no such file"));
    }
}
