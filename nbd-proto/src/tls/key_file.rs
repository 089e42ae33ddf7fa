//! Files of pre-shared keys, as psktool writes them.

use core::hint::black_box;

use thiserror::Error;

use super::secret::{PreSharedKey, equal_in_constant_time};
use crate::limits::{MAX_PSK_LEN, MAX_PSK_USER_LEN, MAX_PSK_USERS, MIN_PSK_LEN};

/// Longest line of a key file, in bytes: a hex-encoded name, a colon, a hex-encoded key.
const MAX_LINE_LEN: usize = 2 * MAX_PSK_USER_LEN + 2 * MAX_PSK_LEN + 16;

/// Users and their pre-shared keys.
///
/// ```
/// use nbd_proto::tls::PreSharedKeys;
///
/// let keys = PreSharedKeys::parse(b"alice:00112233445566778899aabbccddeeff\n")?;
/// assert!(keys.key_of(b"alice").is_some());
/// assert!(keys.key_of(b"bob").is_none());
/// # Ok::<(), nbd_proto::tls::KeyFileError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreSharedKeys {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    user: Box<[u8]>,
    key: PreSharedKey,
    line: usize,
}

impl PreSharedKeys {
    /// Parses a key file as psktool writes it: one `user:hexkey` per line. A user name that needs
    /// encoding is `#` followed by its bytes in hexadecimal. Any other line that begins with `#` is
    /// a comment (so a `#` before a user disables the user); empty lines are skipped.
    ///
    /// # Errors
    ///
    /// [`KeyFileError`], with the number of the line: it is not `user:hexkey`, its user has a key
    /// already, its key has less than 16 or more than 256 bytes, or its name is empty, contains a
    /// NUL byte or has more than 128 bytes. Also if there are more than 4096 users, or none.
    pub fn parse(text: &[u8]) -> Result<Self, KeyFileError> {
        let mut entries: Vec<Entry> = Vec::new();
        for (index, bytes) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = index + 1;
            let Some((user, key)) =
                parse_line(bytes).map_err(|problem| KeyFileError::Line { line, problem })?
            else {
                continue;
            };
            if entries.len() == MAX_PSK_USERS {
                return Err(KeyFileError::TooManyUsers);
            }
            entries.push(Entry { user, key, line });
        }
        if entries.is_empty() {
            return Err(KeyFileError::NoUsers);
        }
        refuse_duplicates(&entries)?;
        Ok(Self { entries })
    }

    /// Returns the key of a user. The duration depends neither on the user's position in the file
    /// nor on whether the user exists.
    #[must_use]
    pub fn key_of(&self, user: &[u8]) -> Option<&PreSharedKey> {
        let mut found = None;
        for entry in &self.entries {
            if black_box(equal_in_constant_time(&entry.user, user)) {
                found = Some(&entry.key);
            }
        }
        found
    }

    /// Returns the names of the users, in the order of the file.
    pub fn users(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().map(|entry| &*entry.user)
    }
}

/// A defect of a file of pre-shared keys. Never contains a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// A line is malformed.
    #[error("line {line} {problem}")]
    Line {
        /// Line number, from 1.
        line: usize,
        /// The defect.
        problem: KeyLineProblem,
    },
    /// One user has two keys.
    #[error("lines {first} and {second} are for the same user: remove one")]
    DuplicateUser {
        /// Line number of the first key, from 1.
        first: usize,
        /// Line number of the second key, from 1.
        second: usize,
    },
    /// There are more users than [`MAX_PSK_USERS`].
    #[error("it has more than {MAX_PSK_USERS} users")]
    TooManyUsers,
    /// There is no user.
    #[error("it has no user: add one with 'nbd-cli tls psk NAME --file FILE'")]
    NoUsers,
}

/// A defect of one line of a file of pre-shared keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KeyLineProblem {
    /// The line is longer than any legal line.
    #[error("is longer than {MAX_LINE_LEN} bytes")]
    TooLong,
    /// The line has no colon.
    #[error("has no colon: it has to read USER:HEXKEY, as psktool writes it")]
    NoColon,
    /// The name is missing, too long, or contains a NUL byte.
    #[error("has a user name that is empty, longer than {MAX_PSK_USER_LEN} bytes or not text")]
    BadUser,
    /// The key is not hexadecimal.
    #[error("has a key that is not an even number of hexadecimal digits")]
    NotHexadecimal,
    /// The key is too short or too long.
    #[error(
        "has a key of {0} bytes, and {MIN_PSK_LEN} to {MAX_PSK_LEN} are possible: \
         make one with 'nbd-cli tls psk'"
    )]
    BadKeyLength(usize),
}

/// A user and its key.
type Credential = (Box<[u8]>, PreSharedKey);

/// Reads one line: a user and its key, or nothing.
fn parse_line(line: &[u8]) -> Result<Option<Credential>, KeyLineProblem> {
    let line = line.trim_ascii_end();
    if line.is_empty() {
        return Ok(None);
    }
    if line.len() > MAX_LINE_LEN {
        return Err(KeyLineProblem::TooLong);
    }
    let colon = line.iter().position(|byte| *byte == b':');
    let (user, key) = match (line.strip_prefix(b"#"), colon) {
        (Some(encoded), Some(colon)) => {
            let (encoded, key) = encoded.split_at(colon - 1);
            match decode_hexadecimal(encoded) {
                Some(user) if !user.is_empty() => (user, key),
                _ => return Ok(None),
            }
        }
        (Some(_), None) => return Ok(None),
        (None, Some(colon)) => {
            let (user, key) = line.split_at(colon);
            (user.into(), key)
        }
        (None, None) => return Err(KeyLineProblem::NoColon),
    };
    if user.is_empty() || user.len() > MAX_PSK_USER_LEN || user.contains(&0) {
        return Err(KeyLineProblem::BadUser);
    }
    let digits = key.strip_prefix(b":").unwrap_or(key);
    let key = decode_hexadecimal(digits).ok_or(KeyLineProblem::NotHexadecimal)?;
    let length = key.len();
    let key = PreSharedKey::of_any_length(key.into_vec());
    if !(MIN_PSK_LEN..=MAX_PSK_LEN).contains(&length) {
        return Err(KeyLineProblem::BadKeyLength(length));
    }
    Ok(Some((user, key)))
}

fn decode_hexadecimal(digits: &[u8]) -> Option<Box<[u8]>> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    pairs.iter().map(|[high, low]| u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()).collect()
}

fn refuse_duplicates(entries: &[Entry]) -> Result<(), KeyFileError> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by(|left, right| left.user.cmp(&right.user));
    for pair in sorted.windows(2) {
        if let [left, right] = pair
            && left.user == right.user
        {
            let (first, second) = (left.line.min(right.line), left.line.max(right.line));
            return Err(KeyFileError::DuplicateUser { first, second });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "1ec2dcb47f725a98675eef59f5f8655d";

    fn problem(text: &str) -> (usize, KeyLineProblem) {
        match PreSharedKeys::parse(text.as_bytes()) {
            Err(KeyFileError::Line { line, problem }) => (line, problem),
            other => panic!("{text:?} gave {other:?}"),
        }
    }

    #[test]
    fn what_psktool_writes_is_read() {
        // "#613a62" is how psktool writes the user "a:b".
        let text = format!("alice:{KEY}\n#613a62:49CF934E1A014618039efa9e47608a17\r\n");
        let keys = PreSharedKeys::parse(text.as_bytes()).unwrap();
        assert_eq!(keys.users().collect::<Vec<_>>(), [b"alice".as_slice(), b"a:b"]);
        let alice = keys.key_of(b"alice").unwrap();
        assert_eq!(alice.expose().first_chunk(), Some(&[0x1e, 0xc2, 0xdc]));
        assert_eq!(alice.expose().len(), 16);
        assert_ne!(keys.key_of(b"a:b"), Some(alice));
        assert_eq!(keys.key_of(b"#613a62"), None);
        assert_eq!(keys.key_of(b""), None);
    }

    #[test]
    fn comments_and_users_taken_out_are_skipped() {
        let text = format!("# keys: of the\n#\n\n  \n#bob:{KEY}\n#:{KEY}\nüber x:{KEY}");
        let keys = PreSharedKeys::parse(text.as_bytes()).unwrap();
        assert_eq!(keys.users().collect::<Vec<_>>(), ["über x".as_bytes()]);
    }

    #[test]
    fn every_bad_line_is_named() {
        let good = format!("a:{KEY}\n");
        let long = "x".repeat(MAX_LINE_LEN + 1);
        let name = "x".repeat(MAX_PSK_USER_LEN + 1);
        let long_key = "0".repeat(2 * MAX_PSK_LEN + 2);
        for (line, expected) in [
            ("bob", KeyLineProblem::NoColon),
            (&*format!(":{KEY}"), KeyLineProblem::BadUser),
            (&*format!("{name}:{KEY}"), KeyLineProblem::BadUser),
            (&*format!("#61006a:{KEY}"), KeyLineProblem::BadUser),
            (&*format!("bob:{KEY}0"), KeyLineProblem::NotHexadecimal),
            (&*format!("bob:{KEY}+1"), KeyLineProblem::NotHexadecimal),
            (&*format!("bob: {KEY}"), KeyLineProblem::NotHexadecimal),
            ("bob:", KeyLineProblem::BadKeyLength(0)),
            ("bob:00112233445566778899aabbccddee", KeyLineProblem::BadKeyLength(15)),
            (&*format!("b:{long_key}"), KeyLineProblem::BadKeyLength(MAX_PSK_LEN + 1)),
            (&*long, KeyLineProblem::TooLong),
        ] {
            assert_eq!(problem(&format!("{good}\n{line}\n")), (3, expected), "{line}");
        }
    }

    #[test]
    fn a_file_without_users_with_one_twice_or_with_too_many_is_refused() {
        assert_eq!(PreSharedKeys::parse(b"# nobody\n"), Err(KeyFileError::NoUsers));
        let twice = format!("a:{KEY}\nb:{KEY}\n#61:{KEY}\n");
        assert_eq!(
            PreSharedKeys::parse(twice.as_bytes()),
            Err(KeyFileError::DuplicateUser { first: 1, second: 3 })
        );
        let many: String =
            (0..=MAX_PSK_USERS).map(|number| format!("user{number}:{KEY}\n")).collect();
        assert_eq!(PreSharedKeys::parse(many.as_bytes()), Err(KeyFileError::TooManyUsers));
    }

    #[test]
    fn no_key_shows_in_debug_output_or_in_errors() {
        let keys = PreSharedKeys::parse(format!("alice:{KEY}").as_bytes()).unwrap();
        let shown = format!("{keys:?}");
        assert!(shown.contains("PreSharedKey(..)"), "{shown}");
        assert!(!shown.contains("1e") && !shown.contains("30"), "{shown}");
        let error = PreSharedKeys::parse(format!("alice:{KEY}x").as_bytes()).unwrap_err();
        assert!(!error.to_string().contains(KEY) && !format!("{error:?}").contains(KEY));
    }
}
