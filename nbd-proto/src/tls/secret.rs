//! Secrets in memory.

use core::fmt;
use core::hint::black_box;

use crate::limits::{MAX_PSK_LEN, MIN_PSK_LEN};

/// Bytes that are overwritten on drop, compared in a time that depends on their length only, and
/// hidden in `Debug` output.
#[derive(Clone)]
struct Secret(Vec<u8>);

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        equal_in_constant_time(&self.0, &other.0)
    }
}

impl Eq for Secret {}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Prevents the compiler from removing a store that is never read.
        black_box(&self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

/// A secret of 16 to 256 bytes that a client and a server share. It is overwritten on drop,
/// compared in a time that depends on the length only, and hidden in `Debug` output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreSharedKey(Secret);

impl PreSharedKey {
    /// Creates a key of 16 to 256 bytes; returns `None` for any other length.
    #[must_use]
    pub fn new(key: &[u8]) -> Option<Self> {
        (MIN_PSK_LEN..=MAX_PSK_LEN).contains(&key.len()).then(|| Self(Secret(key.to_vec())))
    }

    /// Takes a key without a copy; the caller checks its length.
    pub(super) const fn of_any_length(key: Vec<u8>) -> Self {
        Self(Secret(key))
    }

    /// Returns the secret itself.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0.0
    }
}

/// The password of an encrypted private key. It is overwritten on drop, compared in a time that
/// depends on the length only, and hidden in `Debug` output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPassword(Secret);

impl KeyPassword {
    /// Takes all of these bytes.
    #[must_use]
    pub const fn new(password: Vec<u8>) -> Self {
        Self(Secret(password))
    }

    /// Returns the password itself.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0.0
    }

    /// Copies it to the start of `buffer` and returns its length; 0 if it is longer.
    pub fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let password = self.expose();
        match buffer.get_mut(..password.len()) {
            Some(place) => {
                place.copy_from_slice(password);
                place.len()
            }
            None => 0,
        }
    }
}

/// Returns true if both are equal. The duration does not depend on the position of a difference;
/// the length is not secret.
#[must_use]
pub(super) fn equal_in_constant_time(left: &[u8], right: &[u8]) -> bool {
    if left.len() != right.len() {
        return false;
    }
    let mut difference = 0;
    for (left, right) in left.iter().zip(right) {
        difference |= black_box(left ^ right);
    }
    black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparison_finds_any_single_difference() {
        let left = [7; 40];
        assert!(equal_in_constant_time(&left, &left));
        assert!(!equal_in_constant_time(&left, &left[..39]));
        for place in 0..left.len() {
            let mut right = left;
            right[place] ^= 0x80;
            assert!(!equal_in_constant_time(&left, &right), "{place}");
        }
        assert_eq!(PreSharedKey::new(&left), PreSharedKey::new(&left));
        assert_eq!(PreSharedKey::new(&left[..15]), None);
    }
}
