//! The names and versions under which this program has the command lines of QEMU's programs.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// The version of QEMU whose command lines these are; programs that detect features read it.
const COMPATIBLE_VERSION: &str = "10.0.2";

/// Returns the arguments for the program of that name, without the name, if the whole command line
/// is one.
pub(crate) fn arguments_for<'a>(name: &str, arguments: &'a [OsString]) -> Option<&'a [OsString]> {
    let (program, rest) = arguments.split_first()?;
    if Path::new(program).file_name() == Some(OsStr::new(name)) {
        return Some(rest);
    }
    match rest.split_first() {
        Some((command, rest)) if command == name => Some(rest),
        _ => None,
    }
}

/// One line in the form that programs parse, which begins with `title`, then the name of this
/// program.
pub(crate) fn version(name: &str, title: &str) -> String {
    format!(
        "{title} {COMPATIBLE_VERSION} (nbd-cli {})\n\
         This is nbd-cli with the command line of {name}; it is not part of QEMU.\n\
         Licence: MIT or Apache-2.0.\n",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &[&str]) -> Option<Vec<OsString>> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        arguments_for("qemu-nbd", &words).map(<[OsString]>::to_vec)
    }

    #[test]
    fn the_name_or_the_first_word_says_which_program_it_is() {
        let expected = Some(vec![OsString::from("-t"), "disk".into()]);
        assert_eq!(found(&["/usr/bin/qemu-nbd", "-t", "disk"]), expected);
        assert_eq!(found(&["qemu-nbd", "-t", "disk"]), expected);
        assert_eq!(found(&["nbd-cli", "qemu-nbd", "-t", "disk"]), expected);
        assert_eq!(found(&["nbd-cli", "serve", "qemu-nbd"]), None);
        assert_eq!(found(&["nbd-cli", "qemu-img", "-t", "disk"]), None);
        assert_eq!(found(&["nbd-cli"]), None);
    }
}
