//! The names that complete a command line: exports, bitmaps and snapshots.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use clap::{Arg, Command};
use nbd_client::{Connector, LocalFiles};
use nbd_jobs::known_names::{
    bitmaps_in, controlled_bitmaps, controlled_exports, served_bitmaps, served_exports,
    snapshots_in,
};

/// Time limit: a shell waits for the names, and a server may not answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns the words that can replace the last one; none if that is not a name, or if the server or
/// the image does not answer.
pub(super) fn complete(program: Command, words: &[OsString]) -> Vec<String> {
    let words: Option<Vec<String>> = words.iter().map(|word| unquoted(word.to_str()?)).collect();
    let Some(position) = words.and_then(|words| Position::find(program, &words)) else {
        return Vec::new();
    };
    let (sender, receiver) = mpsc::channel();
    // A waiting thread ends with the program.
    std::thread::spawn(move || {
        let names = position.names().unwrap_or_default();
        let fits = |name: &String| {
            // A name must not end the line or look like an option.
            name.starts_with(&position.word)
                && !name.is_empty()
                && !name.starts_with('-')
                && !name.contains(char::is_control)
        };
        let mut names: Vec<_> = names
            .into_iter()
            .filter(fits)
            .map(|name| format!("{}{name}", position.before))
            .collect();
        names.sort();
        names.dedup();
        let _ = sender.send(names);
    });
    receiver.recv_timeout(PATIENCE).unwrap_or_default()
}

/// A word without the quotes around it; the closing one may be missing.
fn unquoted(word: &str) -> Option<String> {
    let inner = match word.strip_prefix(['\'', '"']) {
        Some(inner) => inner.strip_suffix(['\'', '"']).unwrap_or(inner),
        None => word,
    };
    Some(inner.to_owned())
}

/// The place of the cursor on the command line.
#[derive(Debug, Default)]
struct Position {
    /// The subcommands, such as `image`, `snapshot`, `apply`.
    commands: Vec<String>,
    /// The arguments of each command, the program's own first.
    arguments: Vec<Vec<String>>,
    options: BTreeMap<String, String>,
    /// Id of the argument or of the option whose value is completed.
    id: String,
    /// The text before the completed word: `--bitmap=`.
    before: String,
    /// The word so far.
    word: String,
}

impl Position {
    fn find(mut program: Command, words: &[String]) -> Option<Self> {
        let (last, words) = words.get(1..)?.split_last()?;
        program.build();
        let mut command = &program;
        let mut position = Self { arguments: vec![Vec::new()], ..Self::default() };
        let mut pending: Option<&Arg> = None;
        for word in words {
            if let Some(option) = pending.take() {
                position.options.insert(option.get_id().to_string(), word.clone());
            } else if let Some(rest) = word.strip_prefix("--") {
                let (name, value) =
                    rest.split_once('=').map_or((rest, None), |(n, v)| (n, Some(v)));
                match (long_option(command, name), value) {
                    (Some(option), Some(value)) => {
                        position.options.insert(option.get_id().to_string(), value.to_owned());
                    }
                    (option, None) => pending = option,
                    (None, Some(_)) => {}
                }
            } else if let Some(letters) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) {
                pending = short_option(command, letters);
            } else if let Some(below) = command.find_subcommand(word) {
                position.commands.push(below.get_name().to_owned());
                position.arguments.push(Vec::new());
                command = below;
            } else {
                position.arguments.last_mut()?.push(word.clone());
            }
        }
        position.at(command, pending, last)
    }

    fn at(mut self, command: &Command, pending: Option<&Arg>, last: &str) -> Option<Self> {
        let option = last.strip_prefix("--").and_then(|rest| rest.split_once('='));
        let argument = match (pending, option) {
            (Some(option), _) => option,
            (None, Some((name, _))) => long_option(command, name)?,
            (None, None) if last.starts_with('-') => return None,
            (None, None) => {
                let index = self.arguments.last()?.len();
                command.get_positionals().nth(index).or_else(|| command.get_positionals().last())?
            }
        };
        self.id = argument.get_id().to_string();
        self.word = last.to_owned();
        if let (None, Some((name, value))) = (pending, option) {
            (self.before, self.word) = (format!("--{name}="), value.to_owned());
        }
        Some(self)
    }

    fn names(&self) -> Option<Vec<String>> {
        let commands: Vec<&str> = self.commands.iter().map(String::as_str).collect();
        let first = || self.arguments.last().and_then(|arguments| arguments.first());
        let index = self.arguments.last()?.len();
        match (commands.as_slice(), self.id.as_str()) {
            (["control", "add-export" | "bitmap-add"], "name" | "bitmap") => None,
            (["control", _], "name" | "export") => {
                controlled_exports(&path(self.arguments.get(1)?.first()?))
            }
            (["control", _], "bitmap" | "from") => {
                controlled_bitmaps(&path(self.arguments.get(1)?.first()?), first()?)
            }
            (["backup"], "export") => controlled_exports(&path(self.options.get("control")?)),
            (["backup"], "bitmap") => match self.options.get("control") {
                Some(socket) => controlled_bitmaps(&path(socket), self.options.get("export")?),
                None => served_bitmaps(&connector(first()?)?),
            },
            (["bitmap", "add"], _) => None,
            (["bitmap", _], _) if index > 0 => {
                let image = self.options.get("from").filter(|_| index > 1);
                bitmaps_in(&path(image.or(first())?))
            }
            (["image", "snapshot", "apply" | "delete"], _) if index > 0 => {
                snapshots_in(&path(first()?))
            }
            _ => exports_at(&self.word),
        }
    }
}

/// Returns the exports of `nbd://HOST/`, the beginning of a URI, as URIs. Names that need escaping
/// are omitted.
fn exports_at(beginning: &str) -> Option<Vec<String>> {
    let (scheme, rest) = beginning.split_once("://")?;
    let (host, _) = rest.split_once('/')?;
    if !matches!(scheme, "nbd" | "nbds") || host.is_empty() || rest.contains('?') {
        return None;
    }
    let base = format!("{scheme}://{host}/");
    let exports = served_exports(&connector(&base)?)?;
    let is_plain =
        |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    let names = exports.into_iter().filter(|name| is_plain(name));
    Some(names.map(|name| format!("{base}{name}")).collect())
}

/// The user has written the URI, which may name the user's files.
fn connector(uri: &str) -> Option<Connector> {
    Some(Connector::new(uri.parse().ok()?).local_files(LocalFiles::Allowed))
}

fn long_option<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let matches =
        |option: &&Arg| option.get_long() == Some(name) && option.get_action().takes_values();
    command.get_opts().find(matches)
}

/// The option whose value is the next word: `-b`, or `-qb` with flags before it.
fn short_option<'a>(command: &'a Command, letters: &str) -> Option<&'a Arg> {
    let option = |letter: char| {
        let matches = |option: &&Arg| {
            option.get_short() == Some(letter) && option.get_action().takes_values()
        };
        command.get_opts().find(matches)
    };
    let (position, option) =
        letters.char_indices().find_map(|(at, letter)| Some((at, option(letter)?)))?;
    // Otherwise the value follows in the same word.
    (position + option.get_short()?.len_utf8() == letters.len()).then_some(option)
}

/// The path after the shell's expansion of `~`.
fn path(text: &str) -> PathBuf {
    match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(text),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Cli;

    fn position(line: &str) -> (Vec<String>, String, String) {
        let words: Vec<_> = line.split(' ').map(ToOwned::to_owned).collect();
        let found = Position::find(Cli::command(), &words).unwrap_or_default();
        (found.commands, found.id, found.word)
    }

    #[test]
    fn the_argument_at_the_cursor_is_found() {
        for (line, commands, id, word) in [
            ("nbd-cli control /s bitmap-clear vm da", "control bitmap-clear", "bitmap", "da"),
            ("nbd-cli -v control /s remove-export ", "control remove-export", "name", ""),
            ("nbd-cli backup --control /s --export vm --bitmap ", "backup", "bitmap", ""),
            ("nbd-cli backup nbd://h/x --bitmap=d", "backup", "bitmap", "d"),
            ("nbd-cli image snapshot apply a.qcow2 b", "image snapshot apply", "name", "b"),
            ("nbd-cli bitmap merge a.qcow2 x y z", "bitmap merge", "sources", "z"),
        ] {
            let commands = commands.split(' ').map(ToOwned::to_owned).collect();
            assert_eq!(position(line), (commands, id.to_owned(), word.to_owned()), "{line}");
        }
        for line in ["nbd-cli", "nbd-cli copy --fl"] {
            assert_eq!(position(line), Default::default(), "{line}");
        }
    }

    #[test]
    fn only_a_complete_host_is_asked_for_exports() {
        for beginning in ["", "nbd://", "nbd:///", "http://host/", "nbd://host/?socket=x"] {
            assert_eq!(exports_at(beginning), None, "{beginning}");
        }
    }
}
