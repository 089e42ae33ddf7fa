//! Passphrases of encrypted disks.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// A passphrase, or the content of a key file: any bytes. Its memory is overwritten when the last
/// clone is dropped, and its `Debug` form does not contain it.
#[derive(Clone)]
pub struct Passphrase(Arc<Zeroizing<Vec<u8>>>);

impl Passphrase {
    /// Takes the bytes as they are: a line break at the end is a part of them.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    #[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "nothing is decrypted"))]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}
