//! The options and operands of a command line.

use std::ffi::{OsStr, OsString};

use imgfmt::Format;
use nbd_jobs::getopt::{Getopt, Known};
use nbd_jobs::text::printable;

use super::known::Opt;
use super::refusal::Refusal;
use super::secrets::Secrets;
use crate::output::ReportFormat;

/// The options and operands of one command.
#[derive(Debug)]
pub(super) struct Arguments {
    given: Vec<(Opt, OsString)>,
    pub(super) operands: Vec<OsString>,
    /// The objects of `--object`.
    pub(super) secrets: Secrets,
}

impl Arguments {
    /// Parses them; `None` if the help is wanted.
    ///
    /// # Errors
    ///
    /// If an option is unknown or lacks its value, or an object is not supported.
    pub(super) fn parse(
        known: &'static [Known<Opt>],
        words: Vec<OsString>,
    ) -> Result<Option<Self>, Refusal> {
        let mut words = Getopt::new(known, words);
        let mut given = Vec::new();
        while let Some(option) = words.next().map_err(Refusal::usage)? {
            if option.0 == Opt::Help {
                return Ok(None);
            }
            given.push(option);
        }
        let objects = given.iter().filter(|(option, _)| *option == Opt::Object);
        let objects = objects.map(|(_, object)| as_text(object)).collect::<Result<Vec<_>, _>>()?;
        let secrets = Secrets::read(&objects)?;
        Ok(Some(Self { given, operands: words.into_operands(), secrets }))
    }

    /// Returns whether an option is given.
    pub(super) fn has(&self, option: Opt) -> bool {
        self.given.iter().any(|(given, _)| *given == option)
    }

    /// Returns whether progress is shown.
    pub(super) fn wants_progress(&self) -> bool {
        self.has(Opt::Progress) && !self.has(Opt::Quiet)
    }

    /// Returns the value of an option: the last one counts.
    pub(super) fn value(&self, option: Opt) -> Option<&OsStr> {
        self.given.iter().rfind(|(given, _)| *given == option).map(|(_, value)| value.as_os_str())
    }

    /// Returns the value of an option, which must be text.
    ///
    /// # Errors
    ///
    /// If it is not valid UTF-8.
    pub(super) fn text(&self, option: Opt) -> Result<Option<String>, Refusal> {
        self.value(option).map(as_text).transpose()
    }

    /// Returns the format that an option names.
    ///
    /// # Errors
    ///
    /// If there is no such format.
    pub(super) fn format(&self, option: Opt) -> Result<Option<Format>, Refusal> {
        self.text(option)?.as_deref().map(parse_format).transpose()
    }

    /// Returns the lists of all `-o`, in order.
    ///
    /// # Errors
    ///
    /// If one is not valid UTF-8.
    pub(super) fn lists(&self) -> Result<Vec<String>, Refusal> {
        self.in_order(&[Opt::Options]).map(|(_, value)| as_text(value)).collect()
    }

    /// Returns how many of these options are given.
    pub(super) fn count(&self, options: &[Opt]) -> usize {
        self.in_order(options).count()
    }

    /// Returns those of these options that are given, with their values, in order.
    pub(super) fn in_order(&self, options: &[Opt]) -> impl Iterator<Item = (Opt, &OsStr)> {
        let given = self.given.iter().map(|(given, value)| (*given, value.as_os_str()));
        given.filter(|(given, _)| options.contains(given))
    }

    /// Returns the form of the output.
    ///
    /// # Errors
    ///
    /// If it is neither human nor json.
    pub(super) fn output(&self) -> Result<ReportFormat, Refusal> {
        match self.text(Opt::Output)?.as_deref() {
            None | Some("human") => Ok(ReportFormat::Text),
            Some("json") => Ok(ReportFormat::Json),
            Some(other) => Err(Refusal::usage(format!(
                "--output expects 'human' or 'json' not '{}'",
                printable(other)
            ))),
        }
    }

    /// Returns the only operand.
    ///
    /// # Errors
    ///
    /// If there is not exactly one.
    pub(super) fn only_operand(&self) -> Result<&OsStr, Refusal> {
        match &self.operands[..] {
            [operand] => Ok(operand),
            _ => Err(Refusal::usage("Expecting one image file name")),
        }
    }
}

fn as_text(value: impl AsRef<OsStr>) -> Result<String, Refusal> {
    let value = value.as_ref();
    let text = value.to_str().map(str::to_owned);
    text.ok_or_else(|| Refusal::new(format!("'{}' is not valid UTF-8", value.display())))
}

/// Parses the name of a format.
///
/// # Errors
///
/// If there is none of that name.
pub(super) fn parse_format(name: &str) -> Result<Format, Refusal> {
    match (name, Format::from_name(name)) {
        (_, Some(format)) => Ok(format),
        ("file" | "host_device", None) => Ok(Format::Raw),
        _ => Err(Refusal::new(format!("Unknown driver '{}'", printable(name)))),
    }
}
