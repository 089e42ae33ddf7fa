//! The secrets of QEMU's command lines: `--object secret,id=ID,file=FILE`, and reading secrets.
//!
//! What is read is overwritten when it is dropped, and is never moved to larger memory without
//! that: no copy of it stays in freed memory.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use imgfmt::Passphrase;
use nbd_proto::tls::KeyPassword;
use zeroize::Zeroizing;

use crate::key_values::KeyValues;

/// The maximum length of a secret in bytes, that of key files of `cryptsetup`.
pub const SECRET_LEN_MAX: u64 = 8 << 20;

/// A secret, overwritten on drop.
pub type SecretBytes = Zeroizing<Vec<u8>>;

/// Reads a secret up to the end of the file. Blocks.
///
/// # Errors
///
/// [`FileTooLarge`](io::ErrorKind::FileTooLarge) if it has more than 8 MiB, and those of `file`.
pub fn read_secret(file: &mut dyn Read) -> io::Result<SecretBytes> {
    // Of the full size at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; 64 << 10]);
    let (mut file, mut length) = (file.take(SECRET_LEN_MAX + 1), 0);
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
    match length as u64 > SECRET_LEN_MAX {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(Zeroizing::new(bytes[..length].to_vec())),
    }
}

/// The source of a password. Its `Debug` form does not contain it.
#[derive(Clone)]
pub struct Secret {
    source: Source,
    format: Format,
}

#[derive(Clone)]
enum Source {
    Known(SecretBytes),
    File(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Base64,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Secret {
    /// Takes the properties of a secret; its file is not read yet.
    ///
    /// # Errors
    ///
    /// A sentence about the invalid property.
    pub fn new(properties: &mut KeyValues) -> Result<Self, String> {
        for encrypted in ["keyid", "iv"] {
            if properties.take(encrypted).is_some() {
                return Err(format!("'{encrypted}' is not supported: secrets are not encrypted"));
            }
        }
        let format = match properties.take("format").as_deref() {
            None | Some("raw") => Format::Raw,
            Some("base64") => Format::Base64,
            Some(other) => {
                return Err(format!("Parameter 'format' does not accept value '{other}'"));
            }
        };
        let source = match (properties.take("data"), properties.take("file")) {
            (Some(data), None) => Source::Known(format.decode(Zeroizing::new(data.into_bytes()))?),
            (None, Some(file)) => Source::File(file.into()),
            (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".to_owned()),
            (None, None) => return Err("Either 'file' or 'data' must be provided".to_owned()),
        };
        Ok(Self { source, format })
    }

    /// Reads the secret as the passphrase of an image. All bytes of a file count.
    ///
    /// # Errors
    ///
    /// A sentence if the file cannot be read, has more than 8 MiB, or is not base64 as it should
    /// be.
    pub fn read(&self) -> Result<Passphrase, String> {
        self.bytes().map(|mut bytes| Passphrase::new(std::mem::take(&mut *bytes)))
    }

    /// Reads the secret as the passphrase of a new image, as [`read`](Self::read) does. QEMU opens
    /// images only with passphrases that are text.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); or if it is not UTF-8.
    pub fn read_text(&self) -> Result<Passphrase, String> {
        let mut bytes = self.bytes()?;
        match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(Passphrase::new(std::mem::take(&mut *bytes))),
            Err(_) => {
                Err("it is not UTF-8, and QEMU would not open the image; choose a text".into())
            }
        }
    }

    /// Reads the secret as the password of a private key.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn password(&self) -> Result<KeyPassword, String> {
        self.bytes().map(|mut bytes| KeyPassword::new(std::mem::take(&mut *bytes)))
    }

    fn bytes(&self) -> Result<SecretBytes, String> {
        let path = match &self.source {
            Source::Known(bytes) => return Ok(bytes.clone()),
            Source::File(path) => path,
        };
        let read = File::open(path).and_then(|mut file| read_secret(&mut file));
        let bytes = read.map_err(|error| {
            imgfmt::Error::from_io("read the secret in", error).with_path(path).to_string()
        })?;
        self.format.decode(bytes)
    }

    /// Reads the secret now and keeps it, for one that can be read only once.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn load(&mut self) -> Result<(), String> {
        self.source = Source::Known(self.bytes()?);
        Ok(())
    }
}

impl Format {
    fn decode(self, mut bytes: SecretBytes) -> Result<SecretBytes, String> {
        if self == Self::Raw {
            return Ok(bytes);
        }
        bytes.retain(|byte| !byte.is_ascii_whitespace());
        let text = std::str::from_utf8(&bytes).ok();
        let decoded = text.and_then(|text| openssl::base64::decode_block(text).ok());
        decoded.map(Zeroizing::new).ok_or_else(|| "a secret is not valid base64".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// A secret of letters, each of them inverted: what searches for it does not hold it.
    const INVERTED: [u8; 20] =
        *b"\x8c\x9a\x9c\x8d\x9a\x8b\x96\x91\x92\x9a\x92\x90\x8d\x86\x90\x99\x91\x9d\x9b\x8c";

    fn secret() -> SecretBytes {
        // More than what is read at first.
        Zeroizing::new(INVERTED.iter().cycle().take(100_000).map(|byte| !byte).collect())
    }

    /// Whether the memory of this process holds the secret.
    fn is_in_memory() -> bool {
        let memory = File::open("/proc/self/mem").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let bounds = |line: &str| {
            let (range, rights) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            rights.starts_with("rw").then_some((number(start)?, number(end)?))
        };
        let mut found = false;
        let mut part = Zeroizing::new(vec![0; 64 << 10]);
        let own = part.as_ptr() as u64..part.as_ptr() as u64 + part.len() as u64;
        for (mut start, end) in maps.lines().filter_map(bounds) {
            while start < end {
                // Mappings may have gone since.
                let Ok(read @ 1..) = memory.read_at(&mut part, start) else { break };
                let place = start..start + read as u64;
                let is_own = place.start < own.end && own.start < place.end;
                let is_it = |bytes: &[u8]| bytes.iter().zip(INVERTED).all(|(it, not)| *it == !not);
                // A copy fills whole pages.
                let starts = part[..read].chunks(4096).map(|page| &page[..page.len().min(64)]);
                let mut starts = starts.flat_map(|start| start.windows(INVERTED.len()));
                found |= !is_own && starts.any(is_it);
                start = place.end;
            }
        }
        found
    }

    #[test]
    fn a_secret_that_was_dropped_is_not_in_memory_any_more() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        let content = secret();
        fs::write(&file, &content).unwrap();
        assert!(is_in_memory(), "it is found");
        drop(content);
        assert!(!is_in_memory(), "nothing else has it");
        for format in ["raw", "base64"] {
            let properties = format!("format={format},file={}", file.display());
            let known = Secret::new(&mut KeyValues::parse(&properties, None).unwrap()).unwrap();
            let mut loaded = known.clone();
            loaded.load().unwrap();
            for secret in [known, loaded] {
                secret.read().unwrap();
                secret.password().unwrap();
            }
            assert!(!is_in_memory(), "{format}");
        }
    }

    #[test]
    fn secrets_in_base64_may_have_line_breaks() {
        let read = |properties: &str| {
            let mut properties = KeyValues::parse(properties, None).unwrap();
            Secret::new(&mut properties)?.password()
        };
        let password = |text: &str| KeyPassword::new(text.as_bytes().to_vec());
        assert_eq!(read("format=base64,data=bGV0\nbWVp bg==\n"), Ok(password("letmein")));
        assert_eq!(read("data=bGV0\n"), Ok(password("bGV0\n")));
        for wrong in ["bGV", "b\u{e9}==", "?"] {
            assert!(read(&format!("format=base64,data={wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_secret_is_read_to_its_end_and_has_a_limit() {
        assert_eq!(**read_secret(&mut &b"abc\n"[..]).unwrap(), *b"abc\n");
        assert!(*read_secret(&mut &secret()[..]).unwrap() == *secret());
        let endless = read_secret(&mut io::repeat(7)).unwrap_err();
        assert_eq!(endless.kind(), io::ErrorKind::FileTooLarge);
    }
}
