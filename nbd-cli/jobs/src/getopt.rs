//! Parses command lines like getopt_long: options and operands in any order, long options that may
//! be abbreviated, values attached or separate, `--` before the last operands.
//!
//! ```
//! use nbd_jobs::getopt::{Getopt, Known, Takes};
//!
//! const KNOWN: &[Known<char>] =
//!     &[Known { short: Some(b'f'), long: "format", takes: Takes::Value, means: 'f' }];
//! let mut words = Getopt::new(KNOWN, vec!["disk".into(), "--form=raw".into()]);
//! assert_eq!(words.next()?, Some(('f', "raw".into())));
//! assert_eq!(words.next()?, None);
//! assert_eq!(words.into_operands(), ["disk"]);
//! # Ok::<(), String>(())
//! ```

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

/// Whether an option has a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// It has none.
    Nothing,
    /// It has one.
    Value,
}

/// A known option.
#[derive(Debug)]
pub struct Known<T: 'static> {
    /// The letter of the short form, if there is one.
    pub short: Option<u8>,
    /// The long form, without its dashes.
    pub long: &'static str,
    /// Whether it has a value.
    pub takes: Takes,
    /// What the caller calls it.
    pub means: T,
}

/// Iterates over the options of a command line.
#[derive(Debug)]
pub struct Getopt<T: 'static> {
    known: &'static [Known<T>],
    /// The remaining words, in reverse order.
    rest: Vec<OsString>,
    /// The letters after a short option without a value: `rst` of `-rst`.
    letters: Vec<u8>,
    operands: Vec<OsString>,
}

impl<T: Copy> Getopt<T> {
    /// Starts at the first word.
    #[must_use]
    pub fn new(known: &'static [Known<T>], arguments: Vec<OsString>) -> Self {
        let mut rest = arguments;
        rest.reverse();
        Self { known, rest, letters: Vec::new(), operands: Vec::new() }
    }

    /// Returns the next option with its value, which is empty for an option that takes none; `None`
    /// at the end.
    ///
    /// # Errors
    ///
    /// The defect of the next word, without the program's name.
    #[allow(clippy::should_implement_trait, reason = "a word can be wrong")]
    pub fn next(&mut self) -> Result<Option<(T, OsString)>, String> {
        loop {
            if !self.letters.is_empty() {
                return self.short().map(Some);
            }
            let Some(word) = self.rest.pop() else { return Ok(None) };
            match word.as_bytes() {
                b"--" => {
                    self.operands.extend(self.rest.drain(..).rev());
                    return Ok(None);
                }
                [b'-', b'-', long @ ..] => return self.long(long).map(Some),
                [b'-', letters @ ..] if !letters.is_empty() => self.letters = letters.to_vec(),
                _ => self.operands.push(word),
            }
        }
    }

    /// Returns the operands, once [`next`](Self::next) has returned `None`.
    #[must_use]
    pub fn into_operands(self) -> Vec<OsString> {
        self.operands
    }

    fn short(&mut self) -> Result<(T, OsString), String> {
        let letter = self.letters.remove(0);
        let shown = OsString::from_vec(vec![letter]);
        let shown = shown.display();
        let Some(known) = self.known.iter().find(|known| known.short == Some(letter)) else {
            return Err(format!("invalid option -- '{shown}'"));
        };
        let value = match known.takes {
            Takes::Nothing => OsString::new(),
            Takes::Value if !self.letters.is_empty() => {
                OsString::from_vec(std::mem::take(&mut self.letters))
            }
            Takes::Value => self
                .rest
                .pop()
                .ok_or_else(|| format!("option requires an argument -- '{shown}'"))?,
        };
        Ok((known.means, value))
    }

    fn long(&mut self, word: &[u8]) -> Result<(T, OsString), String> {
        let (name, value) = match word.iter().position(|byte| *byte == b'=') {
            Some(at) => (&word[..at], Some(OsStr::from_bytes(&word[at + 1..]).to_owned())),
            None => (word, None),
        };
        let known = self.find(name)?;
        let value = match (known.takes, value) {
            (Takes::Nothing, None) => OsString::new(),
            (Takes::Nothing, Some(_)) => {
                return Err(format!("option '--{}' doesn't allow an argument", known.long));
            }
            (Takes::Value, Some(value)) => value,
            (Takes::Value, None) => self
                .rest
                .pop()
                .ok_or_else(|| format!("option '--{}' requires an argument", known.long))?,
        };
        Ok((known.means, value))
    }

    /// Returns the option of that name, or the only one whose name starts with it.
    fn find(&self, name: &[u8]) -> Result<&'static Known<T>, String> {
        if let Some(exact) = self.known.iter().find(|known| known.long.as_bytes() == name) {
            return Ok(exact);
        }
        let shown = OsStr::from_bytes(name).display();
        let begins = |known: &&Known<T>| known.long.as_bytes().starts_with(name);
        let mut found: Vec<_> = self.known.iter().filter(begins).collect();
        match (found.pop(), found.is_empty()) {
            (None, _) => Err(format!("unrecognized option '--{shown}'")),
            (Some(only), true) => Ok(only),
            (Some(last), false) => {
                found.push(last);
                let names: Vec<_> =
                    found.iter().map(|known| format!("'--{}'", known.long)).collect();
                let names = names.join(" ");
                Err(format!("option '--{shown}' is ambiguous; possibilities: {names}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Known<char>] = &[
        Known { short: Some(b'r'), long: "read-only", takes: Takes::Nothing, means: 'r' },
        Known { short: Some(b'e'), long: "shared", takes: Takes::Value, means: 'e' },
        Known { short: None, long: "snapshot", takes: Takes::Nothing, means: 's' },
    ];

    /// Returns the options with their values, and the operands.
    type Parsed = (Vec<(char, String)>, Vec<OsString>);

    fn parse(words: &[&str]) -> Result<Parsed, String> {
        let mut getopt = Getopt::new(KNOWN, words.iter().map(OsString::from).collect());
        let mut options = Vec::new();
        while let Some((option, value)) = getopt.next()? {
            options.push((option, value.into_string().unwrap()));
        }
        Ok((options, getopt.into_operands()))
    }

    #[test]
    fn options_and_operands_come_in_any_order() {
        let one = |option, value: &str| (option, value.to_owned());
        for words in [
            &["-r", "-e", "3", "disk"] as &[_],
            &["disk", "-re3"],
            &["--read-only", "disk", "--shared=3"],
            &["--re", "--sh", "3", "--", "disk"],
        ] {
            let expected = (vec![one('r', ""), one('e', "3")], vec!["disk".into()]);
            assert_eq!(parse(words), Ok(expected), "{words:?}");
        }
        assert_eq!(parse(&["-", "--", "-r"]), Ok((vec![], vec!["-".into(), "-r".into()])));
        assert_eq!(parse(&["--shared="]), Ok((vec![one('e', "")], vec![])));
    }

    #[test]
    fn what_is_wrong_is_said_as_the_c_library_does() {
        for (words, error) in [
            (&["-z"] as &[_], "invalid option -- 'z'"),
            (&["-rz"], "invalid option -- 'z'"),
            (&["-e"], "option requires an argument -- 'e'"),
            (&["--shared"], "option '--shared' requires an argument"),
            (&["--read-only=x"], "option '--read-only' doesn't allow an argument"),
            (&["--nothing"], "unrecognized option '--nothing'"),
            (&["--s"], "option '--s' is ambiguous; possibilities: '--shared' '--snapshot'"),
        ] {
            assert_eq!(parse(words), Err(error.to_owned()), "{words:?}");
        }
    }
}
