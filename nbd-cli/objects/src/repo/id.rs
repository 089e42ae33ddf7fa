//! Identities, and the names of objects.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use super::error::{RepositoryError, Result};

/// The identity of a session, of the backup that it makes, of a gc or of a pin: 48 bits of the
/// time, in milliseconds since 1970, and 80 random bits. Printed as 32 hexadecimal digits, so that
/// names sort by time. The protocol does not depend on the time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; 16]);

impl Id {
    /// Makes a new identity.
    ///
    /// # Errors
    ///
    /// If the system gives no random numbers.
    pub fn random() -> Result<Self> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::random_at(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// Makes a new identity of this time, in milliseconds since 1970.
    pub(crate) fn random_at(milliseconds: u64) -> Result<Self> {
        let mut bytes = [0; 16];
        random(&mut bytes)?;
        bytes[..6].copy_from_slice(&milliseconds.to_be_bytes()[2..]);
        Ok(Self(bytes))
    }

    /// When it was made, in milliseconds since 1970, by the clock of its maker.
    pub(crate) fn milliseconds(&self) -> u64 {
        self.0[..6].iter().fold(0, |time, byte| time << 8 | u64::from(*byte))
    }

    /// Returns the identity with these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Id {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 32 || !text.bytes().all(is_digit) {
            return Err(());
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| ())
    }
}

/// Fills a buffer with random bytes.
pub(crate) fn random(buffer: &mut [u8]) -> Result<()> {
    openssl::rand::rand_bytes(buffer).map_err(|error| {
        RepositoryError::invalid(format!("the system gives no random numbers: {error}"))
    })
}

/// A pack: the session that wrote it, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PackId {
    /// The session.
    pub(crate) session: Id,
    /// Its number, from 0.
    pub(crate) number: u32,
}

/// The name of an object, without the prefix of the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    /// `packs/SESSION/NUMBER`.
    Pack(PackId),
    /// `backups/SESSION`.
    Backup(Id),
    /// `sessions/SESSION`.
    Session(Id),
    /// `condemned/GC`.
    Condemned(Id),
    /// `pins/PIN`.
    Pin(Id),
    /// `moved/SESSION`.
    Moved(Id),
}

/// A group of objects that are listed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Folder {
    /// `packs/`, of all sessions.
    Packs,
    /// `packs/SESSION/`.
    PacksOf(Id),
    /// `backups/`.
    Backups,
    /// `sessions/`.
    Sessions,
    /// `condemned/`.
    Condemned,
    /// `pins/`.
    Pins,
    /// `moved/`.
    Moved,
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packs => f.write_str("packs"),
            Self::PacksOf(session) => write!(f, "packs/{session}"),
            Self::Backups => f.write_str("backups"),
            Self::Sessions => f.write_str("sessions"),
            Self::Condemned => f.write_str("condemned"),
            Self::Pins => f.write_str("pins"),
            Self::Moved => f.write_str("moved"),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pack(pack) => write!(f, "packs/{}/{:08x}", pack.session, pack.number),
            Self::Backup(id) => write!(f, "backups/{id}"),
            Self::Session(id) => write!(f, "sessions/{id}"),
            Self::Condemned(id) => write!(f, "condemned/{id}"),
            Self::Pin(id) => write!(f, "pins/{id}"),
            Self::Moved(id) => write!(f, "moved/{id}"),
        }
    }
}

impl FromStr for Key {
    type Err = ();

    /// Parses a name; others than this format's are errors.
    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (folder, name) = text.split_once('/').ok_or(())?;
        match folder {
            "packs" => {
                let (session, number) = name.split_once('/').ok_or(())?;
                let pack = PackId {
                    session: session.parse()?,
                    number: u32::from_str_radix(number, 16).map_err(|_| ())?,
                };
                // Only one spelling of a number is a name.
                (Self::Pack(pack).to_string() == text).then_some(Self::Pack(pack)).ok_or(())
            }
            "backups" => name.parse().map(Self::Backup),
            "sessions" => name.parse().map(Self::Session),
            "condemned" => name.parse().map(Self::Condemned),
            "pins" => name.parse().map(Self::Pin),
            "moved" => name.parse().map(Self::Moved),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_printed() {
        let id = Id::from_bytes([0xa5; 16]);
        let pack = PackId { session: id, number: 0x1f };
        let of_id = [Key::Backup, Key::Session, Key::Condemned, Key::Pin, Key::Moved];
        for key in of_id.map(|key| key(id)).into_iter().chain([Key::Pack(pack)]) {
            assert_eq!(key.to_string().parse(), Ok(key));
        }
        let name = id.to_string();
        for other in [
            format!("packs/{name}/1f"),
            format!("packs/{name}/+000001f"),
            format!("backups/{}", &name[1..]),
            format!("backups/{}", name.replace(char::is_alphabetic, "X")),
            format!("elsewhere/{name}"),
            name.clone(),
        ] {
            assert!(other.parse::<Key>().is_err(), "{other}");
        }
    }

    #[test]
    fn later_identities_sort_behind_earlier_ones() {
        let first = Id::random().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(first < Id::random().unwrap());
    }
}
