//! The secrets of QEMU's command lines: `--object secret,id=ID,file=FILE`.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;

use imgfmt::Passphrase;
use nbd_proto::tls::KeyPassword;

use crate::key_values::KeyValues;

/// The maximum length of a file with a secret, in bytes.
const SECRET_MAX: u64 = 8 << 20;

/// The source of a password. Its `Debug` form does not contain it.
#[derive(Clone)]
pub struct Secret {
    source: Source,
    format: Format,
}

#[derive(Clone)]
enum Source {
    Known(KeyPassword),
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
            (Some(data), None) => Source::Known(format.decode(data.into_bytes())?),
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
        Ok(Passphrase::new(self.password()?.expose().to_vec()))
    }

    /// Reads the secret as the passphrase of a new image, as [`read`](Self::read) does. QEMU opens
    /// images only with passphrases that are text.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); or if it is not UTF-8.
    pub fn read_text(&self) -> Result<Passphrase, String> {
        match std::str::from_utf8(self.password()?.expose()) {
            Ok(_) => self.read(),
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
        let path = match &self.source {
            Source::Known(password) => return Ok(password.clone()),
            Source::File(path) => path,
        };
        let failed = |error: io::Error| {
            imgfmt::Error::from_io("read the secret in", error).with_path(path).to_string()
        };
        let mut bytes = Vec::with_capacity(64 << 10);
        let file = File::open(path).map_err(failed)?;
        file.take(SECRET_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > SECRET_MAX {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        self.format.decode(bytes)
    }

    /// Reads the secret now and keeps it, for one that can be read only once.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn load(&mut self) -> Result<(), String> {
        self.source = Source::Known(self.password()?);
        Ok(())
    }
}

impl Format {
    fn decode(self, bytes: Vec<u8>) -> Result<KeyPassword, String> {
        match self {
            Self::Raw => Ok(KeyPassword::new(bytes)),
            Self::Base64 => {
                // Made passwords, so that their memory is overwritten.
                let text: String =
                    String::from_utf8_lossy(&bytes).split_ascii_whitespace().collect();
                drop(KeyPassword::new(bytes));
                let decoded = openssl::base64::decode_block(&text);
                drop(KeyPassword::new(text.into_bytes()));
                decoded.map(KeyPassword::new).map_err(|_| "a secret is not valid base64".to_owned())
            }
        }
    }
}
