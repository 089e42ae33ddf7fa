//! The identity of a backup, and the backup after which a bitmap started.
//!
//! A backup file records its identity, and a disk records for each bitmap the backup after which it
//! started. An incremental backup is valid only on that backup.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::str::FromStr;

/// A universally unique identifier: of a disk, or of one backup.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid([u8; 16]);

impl Uuid {
    /// Creates a random UUID (version 4 of RFC 9562).
    ///
    /// # Errors
    ///
    /// Those of reading the system's random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    pub(crate) const fn bytes(self) -> [u8; 16] {
        self.0
    }

    /// A UUID of all zeroes means that there is none.
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then_some(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAUuid;

impl fmt::Display for NotAUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a UUID has 32 hexadecimal digits in groups of 8, 4, 4, 4 and 12, not all zero")
    }
}

impl std::error::Error for NotAUuid {}

impl FromStr for Uuid {
    type Err = NotAUuid;

    fn from_str(text: &str) -> Result<Self, NotAUuid> {
        let is_well_formed = text.len() == 36
            && text.bytes().enumerate().all(|(index, byte)| match index {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            });
        if !is_well_formed {
            return Err(NotAUuid);
        }
        let digits = text.replace('-', "");
        let number = u128::from_str_radix(&digits, 16).map_err(|_| NotAUuid)?;
        Self::from_bytes(number.to_be_bytes()).ok_or(NotAUuid)
    }
}

/// The sum of the blocks of a backup: 256 bits, the lowest byte first. Blocks can be added in any
/// order. The sum of no blocks is 0.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct ContentSum([u64; 4]);

impl ContentSum {
    /// Creates a sum from its bytes, such as the digest of one block.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Self(words)
    }

    /// Returns its bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (place, word) in bytes.as_chunks_mut().0.iter_mut().zip(self.0) {
            *place = word.to_le_bytes();
        }
        bytes
    }

    /// Adds another sum, modulo 2^256.
    pub fn add(&mut self, other: Self) {
        let mut carry = false;
        for (word, other) in self.0.iter_mut().zip(other.0) {
            let (sum, over) = word.overflowing_add(other);
            let (sum, over_again) = sum.overflowing_add(u64::from(carry));
            (*word, carry) = (sum, over || over_again);
        }
    }
}

/// Hides the [sum](ContentSum) of a backup in the header of an encrypted image, which is not
/// encrypted itself: the sum would let everybody who has the file try guesses at the content of the
/// disk. [`Image::sum_mask`](crate::Image::sum_mask) derives it from the key.
#[derive(Clone)]
pub struct ContentMask([u8; 32]);

impl ContentMask {
    /// Of an image that is not encrypted.
    pub(crate) const fn none() -> Self {
        Self([0; 32])
    }

    #[cfg(feature = "encryption")]
    pub(crate) const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Hides a sum, or shows one that was hidden.
    #[must_use]
    pub fn apply(&self, sum: ContentSum) -> ContentSum {
        let mut bytes = sum.bytes();
        bytes.iter_mut().zip(self.0).for_each(|(byte, mask)| *byte ^= mask);
        ContentSum::from_bytes(bytes)
    }
}

impl fmt::Debug for ContentMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContentMask(..)")
    }
}

impl fmt::Display for ContentSum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentSum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The identity of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupIdentity {
    /// The backup itself.
    pub id: Uuid,
    /// Its base.
    pub base: BackupBase,
    /// The disk, if it has an identity.
    pub disk: Option<Uuid>,
    /// Size of the disk in bytes. The size of the image is this, rounded up to a multiple of 512.
    pub disk_size: u64,
    /// The bitmap that records the changes since, if there is one: at most 1023 bytes.
    pub bitmap: Option<String>,
    /// The name of the export that was backed up; at most 4096 bytes.
    pub export: String,
    /// The sum of the blocks that the file itself holds, if it was computed. In an encrypted image
    /// it is recorded with a [mask](ContentMask).
    pub content: Option<ContentSum>,
}

/// The base of a backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupBase {
    /// Nothing: a full backup.
    #[default]
    None,
    /// The backup with that identity.
    Backup(Uuid),
    /// A file that the user declared to be the base, with its identity, if it has one.
    Trusted(Option<Uuid>),
}

impl BackupBase {
    /// Returns the identity of the base, if it has one.
    pub fn id(self) -> Option<Uuid> {
        match self {
            Self::None => None,
            Self::Backup(id) => Some(id),
            Self::Trusted(id) => id,
        }
    }
}

impl BackupIdentity {
    /// Creates the identity of a full backup of a disk of that size in bytes.
    pub fn new(id: Uuid, disk_size: u64) -> Self {
        let base = BackupBase::None;
        Self { id, base, disk: None, disk_size, bitmap: None, export: String::new(), content: None }
    }
}

/// The identity recorded in a backup file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Backup {
    /// The identity.
    pub identity: BackupIdentity,
    /// True if the file is as the backup left it: it has its recorded length, no other program that
    /// respects the format has opened it for writing, and it was not modified, if it is still the
    /// same file. Changes that this crate makes count as well. Changes that other programs make to
    /// a copy cannot be detected.
    pub is_unchanged: bool,
    /// True if no program that respects the format has opened the file for writing since. If its
    /// content differs nevertheless, the file is damaged, or [was modified](Self::was_modified).
    pub is_sealed: bool,
    /// True if the file is the original, not a copy, and was modified after the backup was made.
    pub was_modified: bool,
}

/// The backup after which a bitmap started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BeganAfter {
    /// Unknown: the image does not record it.
    #[default]
    Unknown,
    /// The bitmap started after this backup.
    Backup(Uuid),
    /// Probably this one. Another program has had the image open for writing, and may have cleared
    /// the bitmap.
    PerhapsBackup(Uuid),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_content_carry_and_wrap() {
        let bytes = |first: u8, last: u8| {
            let mut bytes = [0xff; 32];
            (bytes[0], bytes[31]) = (first, last);
            ContentSum::from_bytes(bytes)
        };
        let mut one = [0; 32];
        one[0] = 1;
        let mut sum = bytes(0xff, 0x7f);
        assert_eq!(ContentSum::from_bytes(sum.bytes()), sum);
        sum.add(ContentSum::from_bytes(one));
        assert_eq!(sum.to_string(), format!("{}80", "00".repeat(31)));
        sum.add(sum);
        assert_eq!(sum, ContentSum::default());
    }

    #[test]
    fn uuids_are_written_as_they_are_read() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(text.parse::<Uuid>().unwrap().to_string(), text);
        let random = Uuid::random().unwrap();
        assert_eq!(random.to_string().parse(), Ok(random));
        assert_eq!(&random.to_string()[14..15], "4");
        for wrong in [
            "",
            "00112233445566778899aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeef",
            "00112233-4455-6677-8899-aabbccddeefg",
            "+0112233-4455-6677-8899-aabbccddeeff",
            "00000000-0000-0000-0000-000000000000",
        ] {
            assert_eq!(wrong.parse::<Uuid>(), Err(NotAUuid), "{wrong}");
        }
    }
}
