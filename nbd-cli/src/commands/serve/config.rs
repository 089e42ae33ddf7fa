//! `serve --config`: a server described in a TOML file.
//!
//! The keys are the long options of the command line, and the same parser reads their values.
//! Options of the server are at the top; each `[[export]]` table has those of one export, its
//! `source` and its `name`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, Command, FromArgMatches, Id};
use nbd_jobs::serving::{Configuration, ConfiguredExport, Settings};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::args::ServeArgs;
use super::export::{ExportArgs, ExportSpec};
use super::source;
use crate::error::CommandError;

/// The key of the tables of exports.
const EXPORT: &str = "export";
/// Options of the command line that a file cannot have: they concern the file or the process that
/// reads it, or are aliases.
const ONLY_ON_COMMAND_LINE: [&str; 9] =
    ["config", "check", "fork", "run", "name", "port", "poll-max-ns", "help", "takeover"];

/// The content of a file.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) args: ServeArgs,
    pub(super) configuration: Configuration<Arc<ExportArgs>>,
}

/// An export of a file.
pub(super) type Configured = ConfiguredExport<Arc<ExportArgs>>;

/// Returns the export to be served.
pub(super) fn spec(export: &Configured) -> ExportSpec {
    let ConfiguredExport { name, source, options, .. } = export.clone();
    ExportSpec { name, source, options }
}

impl Config {
    /// Reads a file and makes all checks that open nothing.
    ///
    /// # Errors
    ///
    /// An error that names the file, the line and the key.
    pub(super) fn read(path: &Path) -> Result<Self, CommandError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            CommandError::new(format!(
                "cannot read the configuration '{}': {error}",
                path.display()
            ))
        })?;
        parse(&text).map_err(|problem| problem.in_file(path))
    }

    pub(super) fn specs(&self) -> Vec<ExportSpec> {
        self.configuration.exports.iter().map(spec).collect()
    }
}

/// Options of the command line that are allowed together with `--config`.
const BESIDE_FILE: [&str; 9] =
    ["config", "check", "fork", "run", "pid_file", "takeover", "verbose", "log_format", "log_file"];

/// Refuses options of `serve` that belong in the file.
///
/// # Errors
///
/// An error that names the option.
pub(crate) fn refuse_options_beside_file(matches: &ArgMatches) -> Result<(), CommandError> {
    let Some(("serve", serve)) = matches.subcommand() else { return Ok(()) };
    let is_given = |id: &str| serve.value_source(id) == Some(ValueSource::CommandLine);
    if !is_given("config") {
        return Ok(());
    }
    // Groups of options have the names of their structs.
    let mut options = serve.ids().map(Id::as_str).filter(|id| id.starts_with(char::is_lowercase));
    match options.find(|id| is_given(id) && !BESIDE_FILE.contains(id)) {
        None => Ok(()),
        Some(id) => Err(CommandError::new(format!(
            "--{} is not possible beside --config; write it into the file",
            id.replace('_', "-")
        ))),
    }
}

/// A mistake in a file.
#[derive(Debug)]
struct Problem {
    line: usize,
    message: String,
}

impl Problem {
    fn in_file(self, path: &Path) -> CommandError {
        CommandError::new(format!("'{}', line {}: {}", path.display(), self.line, self.message))
    }
}

/// A table whose keys are options.
struct Section<'a> {
    text: &'a str,
    /// The line of the table itself.
    line: usize,
    lines: BTreeMap<String, usize>,
    settings: Settings,
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

fn parse(text: &str) -> Result<Config, Problem> {
    let table = DeTable::parse(text).map_err(|error| {
        let line = line_of(text, error.span().map_or(0, |span| span.start));
        Problem { line, message: error.message().to_owned() }
    })?;
    let table = table.into_inner();
    let of_export = ExportArgs::augment_args(Command::new(EXPORT)).disable_help_flag(true);
    // The parser requires a source.
    let of_server = ServeArgs::augment_args(Command::new("serve"));
    let mut server = Section::new(text, 1);
    for (key, value) in table.iter().filter(|(key, _)| key.get_ref() != EXPORT) {
        if has(&of_export, key.get_ref()) {
            let message =
                format!("'{}' is an option of an export; write it below [[export]]", key.get_ref());
            return Err(server.problem(key, message));
        }
        server.add(&of_server, key, value)?;
    }
    let mut args: ServeArgs = server.parse(&of_server, &["memory:0"])?;
    args.sources.clear();
    let mut exports = Vec::new();
    for value in export_tables(text, &table)? {
        exports.push(export(text, &of_export, value)?);
    }
    check(&args, &exports, &server)?;
    let exports = exports.into_iter().map(|(_, export)| export).collect();
    Ok(Config { args, configuration: Configuration { server: server.settings, exports } })
}

/// Finds the tables of exports.
fn export_tables<'a, 'i>(
    text: &str,
    table: &'a DeTable<'i>,
) -> Result<Vec<&'a Spanned<DeValue<'i>>>, Problem> {
    let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref() == EXPORT) else {
        return Ok(Vec::new());
    };
    let wrong = || {
        let message = "write [[export]] in front of the options of each export".to_owned();
        Problem { line: line_of(text, key.span().start), message }
    };
    let tables = value.get_ref().as_array().ok_or_else(wrong)?;
    tables
        .iter()
        .map(|value| value.get_ref().is_table().then_some(value).ok_or_else(wrong))
        .collect()
}

/// Reads a table of an export.
fn export(
    text: &str,
    command: &Command,
    value: &Spanned<DeValue<'_>>,
) -> Result<(usize, Configured), Problem> {
    let line = line_of(text, value.span().start);
    let mut section = Section::new(text, line);
    let (mut name, mut source) = (None, None);
    for (key, value) in value.get_ref().as_table().into_iter().flat_map(DeTable::iter) {
        let own = match key.get_ref().as_ref() {
            "name" => &mut name,
            "source" => &mut source,
            _ => {
                section.add(command, key, value)?;
                continue;
            }
        };
        let value = value.get_ref().as_str();
        let value = value.ok_or_else(|| section.problem(key, is_no("a text", key.get_ref())))?;
        *own = Some(value.to_owned());
        section.settings.insert(key.get_ref().to_string(), vec![value.to_owned()]);
    }
    let Some(source) = source else {
        return Err(Problem { line, message: "an export needs a 'source'".to_owned() });
    };
    let options: ExportArgs = section.parse(command, &[])?;
    let only_reads = options.read_only || options.temporary || options.snapshot.is_some();
    let (name, options) = (name.unwrap_or_default(), Arc::new(options));
    let (source, settings) = (source.into(), section.settings);
    Ok((line, ConfiguredExport { name, source, only_reads, settings, options }))
}

/// Makes the checks that concern several options or exports.
fn check(
    args: &ServeArgs,
    exports: &[(usize, Configured)],
    server: &Section<'_>,
) -> Result<(), Problem> {
    if exports.is_empty() && args.control.is_none() {
        let message = "there is no [[export]], and no 'control' socket to add one".to_owned();
        return Err(Problem { line: 1, message });
    }
    for (index, (line, export)) in exports.iter().enumerate() {
        let problem = |error: CommandError| Problem { line: *line, message: error.to_string() };
        if exports[..index].iter().any(|(_, other)| other.name == export.name) {
            let message = format!("there is another export with the name '{}'", export.name);
            return Err(Problem { line: *line, message });
        }
        source::check(&spec(export), args.tls.has_credentials()).map_err(problem)?;
    }
    let is_known = |name: &&String| exports.iter().any(|(_, export)| export.name == **name);
    if let Some(unknown) = args.tls.tls_only.iter().find(|name| !is_known(name)) {
        let line = server.lines.get("tls-only").copied().unwrap_or(1);
        return Err(Problem { line, message: format!("tls-only: there is no export '{unknown}'") });
    }
    Ok(())
}

fn has(command: &Command, key: &str) -> bool {
    command.get_arguments().any(|argument| argument.get_long() == Some(key))
}

fn is_no(expected: &str, key: impl Display) -> String {
    format!("the value of '{key}' is not {expected}")
}

impl<'a> Section<'a> {
    fn new(text: &'a str, line: usize) -> Self {
        Self { text, line, lines: BTreeMap::new(), settings: BTreeMap::new() }
    }

    fn problem<T>(&self, at: &Spanned<T>, message: String) -> Problem {
        Problem { line: line_of(self.text, at.span().start), message }
    }

    /// Takes a key with its value.
    fn add(
        &mut self,
        command: &Command,
        key: &Spanned<std::borrow::Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<(), Problem> {
        let name = key.get_ref().as_ref();
        let known = command.get_arguments().find(|known| known.get_long() == Some(name));
        let known = known.filter(|_| !ONLY_ON_COMMAND_LINE.contains(&name)).ok_or_else(|| {
            let message = format!(
                "there is no option '{name}' here; the options are those of 'nbd-cli serve --help'"
            );
            self.problem(key, message)
        })?;
        let arguments = match known.get_action() {
            ArgAction::SetTrue => match value.get_ref().as_bool() {
                Some(true) => vec![format!("--{name}")],
                Some(false) => Vec::new(),
                None => return Err(self.problem(key, is_no("true or false", name))),
            },
            action => {
                let values = match value.get_ref().as_array() {
                    Some(values) if matches!(action, ArgAction::Append) => {
                        values.iter().map(|value| text_of(value.get_ref())).collect()
                    }
                    Some(_) => None,
                    None => text_of(value.get_ref()).map(|value| vec![value]),
                };
                let expected = match action {
                    ArgAction::Append => "a string or number, or a list of them",
                    _ => "a string or number",
                };
                let values = values.ok_or_else(|| self.problem(key, is_no(expected, name)))?;
                values.into_iter().map(|value| format!("--{name}={value}")).collect()
            }
        };
        self.lines.insert(name.to_owned(), line_of(self.text, key.span().start));
        self.settings.insert(name.to_owned(), arguments);
        Ok(())
    }

    /// Reads the options as the command line does.
    fn parse<T: FromArgMatches>(&self, command: &Command, more: &[&str]) -> Result<T, Problem> {
        let options = self.settings.iter();
        let options = options.filter(|(key, _)| self.lines.contains_key(*key));
        let arguments = options.flat_map(|(_, arguments)| arguments).map(String::as_str);
        let arguments = arguments.chain(more.iter().copied());
        let command = command.clone().no_binary_name(true).color(clap::ColorChoice::Never);
        let parsed = command.try_get_matches_from(arguments);
        parsed.and_then(|matches| T::from_arg_matches(&matches)).map_err(|error| Problem {
            line: self.line_of_error(&error),
            message: sentence(&error),
        })
    }

    fn line_of_error(&self, error: &clap::Error) -> usize {
        let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
            return self.line;
        };
        let option = option.trim_start_matches("--").split([' ', '=']).next().unwrap_or_default();
        self.lines.get(option).copied().unwrap_or(self.line)
    }
}

/// The value of an option of the command line.
fn text_of(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n.to_string())
        }
        DeValue::Boolean(true) => Some("on".to_owned()),
        DeValue::Boolean(false) => Some("off".to_owned()),
        _ => None,
    }
}

/// An error of the parser in one line.
fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = first.split_whitespace().collect();
    let sentence = words.join(" ");
    let sentence = sentence.strip_prefix("error: ").unwrap_or(&sentence).to_owned();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => "this is not an option".to_owned(),
        _ => sentence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_mean_what_they_mean_on_the_command_line() {
        let config = parse(
            "listen = ['127.0.0.1:0', '[::1]:0']\nmax-connections = 7\ntls-verify-peer = true\n\
             busy-poll = '0'\ncontrol = '/run/c'\n\n[[export]]\nname = 'vm'\nsource = 'a.img'\n\
             read-only = true\nhidden = false\ncache = 'none'\nallow = ['::1', 'user:0']\n\
             client-rate = '1M'\n[[export]]\nsource = 'memory:1M'\n",
        )
        .unwrap();
        assert_eq!((config.args.listen.len(), config.args.max_connections), (2, 7));
        assert!(config.args.busy_poll.is_zero() && config.args.sources.is_empty());
        let [first, second] = &config.configuration.exports[..] else { panic!("{config:?}") };
        assert_eq!(first.name, "vm");
        assert!(first.options.read_only && !first.options.hidden);
        assert_eq!(first.options.access.allow.len(), 2);
        assert_eq!(first.options.access.client_rate.map(u64::from), Some(1 << 20));
        assert_eq!((second.name.as_str(), second.options.read_only), ("", false));
    }

    #[test]
    fn mistakes_are_told_with_line_and_key() {
        let export = "[[export]]\nsource = 'memory:1M'\n";
        for (text, line, parts) in [
            (format!("\nlistne = '::1'\n{export}"), 2, &["'listne'", "serve --help"][..]),
            (format!("read-only = true\n{export}"), 1, &["'read-only'", "[[export]]"]),
            (format!("{export}cache = 'no'\n"), 3, &["--cache", "writeback"]),
            (format!("{export}reed-only = true\n"), 3, &["'reed-only'"]),
            (format!("{export}read-only = 'yes'\n"), 3, &["'read-only'", "true or false"]),
            (format!("{export}cache = ['none']\n"), 3, &["'cache'", "a string or number"]),
            (format!("{export}allow = [1.5]\n"), 3, &["'allow'", "list"]),
            (format!("{export}allow = 'vm=::1'\n"), 1, &["'vm'", "name of an export"]),
            (format!("{export}allow = 'tls:a'\n"), 1, &["--tls-psk"]),
            (format!("{export}temporary = true\nread-only = true\n"), 4, &["--read-only"]),
            ("[[export]]\nname = 'a'\n".to_owned(), 1, &["'source'"]),
            ("[[export]]\nsource = 1\n".to_owned(), 2, &["'source'", "a text"]),
            ("export = 1\n".to_owned(), 1, &["[[export]]"]),
            (String::new(), 1, &["no [[export]]"]),
            (format!("{export}{export}"), 3, &["another export", "''"]),
            (format!("tls-only = 'x'\n{export}"), 1, &["'x'"]),
            (format!("max-connections = -1\n{export}"), 1, &["--max-connections"]),
            (format!("fork = true\n{export}"), 1, &["'fork'"]),
            ("a = \n".to_owned(), 1, &[]),
        ] {
            let problem = parse(&text).map(|_| ()).unwrap_err();
            assert!(parts.iter().all(|part| problem.message.contains(part)), "{text}: {problem:?}");
            assert_eq!(problem.line, line, "{text}: {problem:?}");
        }
    }
}
