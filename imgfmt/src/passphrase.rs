//! Passphrases of encrypted disks.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

#[cfg(feature = "encryption")]
use crate::error::{Error, ErrorKind};

/// A passphrase, or the content of a key file: any bytes. Its memory is overwritten when the last
/// clone is dropped, and its `Debug` form does not contain it.
#[derive(Clone)]
pub struct Passphrase(
    #[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "nothing is decrypted"))]
    Source,
);

#[derive(Clone)]
#[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "nothing is decrypted"))]
enum Source {
    Given(Arc<Zeroizing<Vec<u8>>>),
    Read(Arc<Read>),
}

/// Reads a passphrase; an error is a clause that says what is wrong with which file.
type Read = dyn Fn() -> Result<Zeroizing<Vec<u8>>, String> + Send + Sync;

impl Passphrase {
    /// Takes the bytes as they are: a line break at the end is a part of them.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Source::Given(Arc::new(Zeroizing::new(bytes))))
    }

    /// A passphrase that is read each time an image is opened that needs it, and not kept. `read`
    /// runs on the thread that opens the image; its error is a clause such as "the key file 'x' is
    /// a directory".
    ///
    /// ```
    /// use imgfmt::{OpenOptions, Passphrase, Zeroizing};
    ///
    /// let passphrase = Passphrase::read_by(|| match std::fs::read("/run/secrets/disk") {
    ///     Ok(bytes) => Ok(Zeroizing::new(bytes)),
    ///     Err(error) => Err(format!("the key file cannot be read: {error}")),
    /// });
    /// let options = OpenOptions::new().passphrase(passphrase);
    /// ```
    pub fn read_by(
        read: impl Fn() -> Result<Zeroizing<Vec<u8>>, String> + Send + Sync + 'static,
    ) -> Self {
        Self(Source::Read(Arc::new(read)))
    }

    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if it cannot be read.
    #[cfg(feature = "encryption")]
    pub(crate) fn bytes(&self) -> Result<Arc<Zeroizing<Vec<u8>>>, Error> {
        match &self.0 {
            Source::Given(bytes) => Ok(Arc::clone(bytes)),
            Source::Read(read) => match read() {
                Ok(bytes) => Ok(Arc::new(bytes)),
                Err(why) => Err(Error::new(ErrorKind::InvalidInput, "open", why)),
            },
        }
    }
}

/// A new passphrase of an encrypted image, and how much work each guess at it takes.
#[derive(Clone, Debug)]
pub struct NewKey {
    pub(crate) passphrase: Passphrase,
    pub(crate) iteration_time: Duration,
}

impl NewKey {
    /// Takes a passphrase, of at least one byte, that two seconds of this processor's time are
    /// spent on, as in QEMU and `cryptsetup`.
    pub fn new(passphrase: Passphrase) -> Self {
        Self { passphrase, iteration_time: Duration::from_secs(2) }
    }

    /// Sets how much of this processor's time opening the image takes. At least 100 000 iterations
    /// of PBKDF2 with SHA-256 are done, and at most 20 million.
    #[must_use]
    pub fn iteration_time(mut self, time: Duration) -> Self {
        self.iteration_time = time;
        self
    }

    /// Returns the passphrase, which opens the image.
    pub fn passphrase(&self) -> &Passphrase {
        &self.passphrase
    }

    /// The same key, whose passphrase has been read: it is the same whenever it is used.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if it cannot be read or is empty.
    #[cfg(feature = "encryption")]
    pub(crate) fn read(&self) -> Result<Self, Error> {
        let bytes = self.passphrase.bytes()?;
        if bytes.is_empty() {
            let detail = "the new passphrase is empty";
            return Err(Error::new(ErrorKind::InvalidInput, "encrypt", detail));
        }
        Ok(Self { passphrase: Passphrase(Source::Given(bytes)), ..self.clone() })
    }
}

/// A change of the passphrases of an encrypted image, for
/// [`Image::change_keys`](crate::Image::change_keys). The disk and its key stay the same.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum KeyChange {
    /// Adds a passphrase. One of [`OpenOptions::passphrases`](crate::OpenOptions::passphrases) has
    /// to open the image.
    Add {
        /// The new passphrase.
        key: NewKey,
        /// The number of the key slot, from 0 to 7; `None` is the first that is not in use.
        slot: Option<u32>,
    },
    /// Adds a passphrase, and then removes every key slot that the old one opens. One key slot has
    /// to be free.
    Replace {
        /// The old passphrase.
        old: Passphrase,
        /// The new one, which may be the same.
        key: NewKey,
    },
    /// Removes every key slot that this passphrase opens. One of
    /// [`OpenOptions::passphrases`](crate::OpenOptions::passphrases) has to open a slot that stays.
    Remove(Passphrase),
    /// Removes a key slot, by its number from 0 to 7, under the same condition.
    RemoveSlot(u32),
}

/// What a change of passphrases has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeysChanged {
    /// The number of the key slot that has the new passphrase.
    pub added: Option<u32>,
    /// The numbers of the key slots that were removed.
    pub removed: Vec<u32>,
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}
