//! Passphrases of encrypted disks.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

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
    pub fn read_by(
        read: impl Fn() -> Result<Zeroizing<Vec<u8>>, String> + Send + Sync + 'static,
    ) -> Self {
        Self(Source::Read(Arc::new(read)))
    }

    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if it cannot be read.
    #[cfg(feature = "encryption")]
    pub(crate) fn bytes(&self) -> crate::Result<Arc<Zeroizing<Vec<u8>>>> {
        use crate::error::{Error, ErrorKind};

        match &self.0 {
            Source::Given(bytes) => Ok(Arc::clone(bytes)),
            Source::Read(read) => match read() {
                Ok(bytes) => Ok(Arc::new(bytes)),
                Err(why) => Err(Error::new(ErrorKind::InvalidInput, "open", why)),
            },
        }
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}
