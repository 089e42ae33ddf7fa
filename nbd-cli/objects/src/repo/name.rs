//! The names of new backups.

use std::ops::Deref;

use crate::shown::shown;

use super::error::{RepositoryError, Result};

/// Longest name of a backup, in bytes.
const NAME_LEN_MAX: usize = 1024;

/// The name of new backups: one that `backup:REPOSITORY/NAME@WHICH#DISK` can name.
///
/// Earlier versions also made backups with other names, so what is found in a repository is any
/// text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupName(String);

impl BackupName {
    /// Parses a name.
    ///
    /// ```
    /// use nbd_objects::repo::BackupName;
    ///
    /// assert_eq!(&*BackupName::parse("vm 1")?, "vm 1");
    /// assert!(BackupName::parse("web/vm1").is_err());
    /// # Ok::<(), nbd_objects::repo::RepositoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If an address could not name it.
    pub fn parse(name: &str) -> Result<Self> {
        match is_name(name, NAME_LEN_MAX, "/@#") {
            true => Ok(Self(name.to_owned())),
            false => Err(RepositoryError::invalid(format!(
                "'{}' cannot be the name of a backup: a name has 1 to {NAME_LEN_MAX} bytes, without \
                 '/', '@', '#' and control characters, and is not '.' or '..'",
                shown(name)
            ))),
        }
    }

    /// Any name, as earlier versions made them.
    #[cfg(any(test, feature = "test-util"))]
    pub fn of_earlier_version(name: &str) -> Self {
        Self(name.to_owned())
    }
}

impl Deref for BackupName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// Returns whether a name has 1 to `longest` bytes, none of these characters and no control
/// characters, and is not `.` or `..`.
pub(super) fn is_name(name: &str, longest: usize, refused: &str) -> bool {
    let is_wrong = |it: char| it.is_control() || refused.contains(it);
    (1..=longest).contains(&name.len()) && !matches!(name, "." | "..") && !name.contains(is_wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_an_address_cannot_have_are_refused() {
        let longest = "n".repeat(1024);
        for name in ["a", "vm 1", "a:b", "a=b", "ü.b-c", "...", "?%\\", &longest] {
            assert_eq!(&*BackupName::parse(name).unwrap(), name);
        }
        let longer = longest.clone() + "n";
        for name in [
            "", "/", "a/b", "a/", "a@b", "a#b", "#", ".", "..", "a\nb", "\u{7f}", "\u{85}", &longer,
        ] {
            let error = BackupName::parse(name).unwrap_err().to_string();
            assert!(error.contains("cannot be the name of a backup"), "{error}");
            assert!(error.len() < 600 && !error.contains(char::is_control), "{error:?}");
        }
    }
}
