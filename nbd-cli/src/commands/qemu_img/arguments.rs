//! The options of the commands.

use std::ffi::{OsStr, OsString};

use nbd_jobs::getopt::{Getopt, Known, Takes};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::text::printable;

use super::refusal::Refusal;
use crate::output::ReportFormat;

/// An option; one name in all commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opt {
    Help,
    Quiet,
    Progress,
    Format,
    SecondFormat,
    ImageOpts,
    TargetImageOpts,
    TargetFormat,
    Options,
    Object,
    Output,
    Share,
    Cache,
    SourceCache,
    Backing,
    BackingFormat,
    Unsafe,
    BackingChain,
    Repair,
    StartOffset,
    MaxLength,
    Strict,
    Size,
    Snapshot,
    Compress,
    NoCreate,
    TargetIsZero,
    SparseSize,
    Bitmaps,
    SkipBroken,
    Rate,
    Parallel,
    CopyRange,
    Salvage,
    OutOfOrder,
    /// An option that a command does not have.
    None,
}

const fn flag(short: u8, long: &'static str, means: Opt) -> Known<Opt> {
    known(short, long, Takes::Nothing, means)
}

const fn value(short: u8, long: &'static str, means: Opt) -> Known<Opt> {
    known(short, long, Takes::Value, means)
}

const fn known(short: u8, long: &'static str, takes: Takes, means: Opt) -> Known<Opt> {
    let short = if short == 0 { None } else { Some(short) };
    Known { short, long, takes, means }
}

pub(super) const CREATE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    value(b'o', "options", Opt::Options),
    value(b'b', "backing", Opt::Backing),
    value(b'F', "backing-format", Opt::BackingFormat),
    flag(b'u', "backing-unsafe", Opt::Unsafe),
    value(0, "object", Opt::Object),
];

pub(super) const INFO: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(b'b', "backing-chain", Opt::BackingChain),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
    value(0, "output", Opt::Output),
];

pub(super) const CHECK: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'T', "cache", Opt::SourceCache),
    flag(b'U', "force-share", Opt::Share),
    value(0, "output", Opt::Output),
    value(b'r', "repair", Opt::Repair),
    value(0, "object", Opt::Object),
];

pub(super) const MAP: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b's', "start-offset", Opt::StartOffset),
    value(b'l', "max-length", Opt::MaxLength),
    value(0, "output", Opt::Output),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const COMPARE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "a-format", Opt::Format),
    value(b'F', "b-format", Opt::SecondFormat),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(b's', "strict", Opt::Strict),
    value(b'T', "cache", Opt::SourceCache),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const MEASURE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'O', "target-format", Opt::TargetFormat),
    value(b's', "size", Opt::Size),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'l', "snapshot", Opt::Snapshot),
    value(b'o', "options", Opt::Options),
    value(0, "output", Opt::Output),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const CONVERT: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "source-format", Opt::Format),
    flag(0, "source-image-opts", Opt::ImageOpts),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'l', "source-snapshot", Opt::Snapshot),
    value(0, "snapshot", Opt::Snapshot),
    value(b'T', "source-cache", Opt::SourceCache),
    value(b'O', "target-format", Opt::TargetFormat),
    flag(0, "target-image-opts", Opt::TargetImageOpts),
    value(b'o', "target-options", Opt::Options),
    flag(b'c', "compress", Opt::Compress),
    value(b't', "target-cache", Opt::Cache),
    value(b'B', "backing", Opt::Backing),
    value(b'F', "backing-format", Opt::BackingFormat),
    flag(b'n', "no-create", Opt::NoCreate),
    flag(0, "target-is-zero", Opt::TargetIsZero),
    value(b'S', "sparse-size", Opt::SparseSize),
    flag(0, "bitmaps", Opt::Bitmaps),
    flag(0, "skip-broken-bitmaps", Opt::SkipBroken),
    flag(b'U', "force-share", Opt::Share),
    value(b'r', "rate", Opt::Rate),
    value(b'm', "parallel", Opt::Parallel),
    flag(b'C', "copy-range-offloading", Opt::CopyRange),
    flag(0, "salvage", Opt::Salvage),
    flag(b'W', "oob-writes", Opt::OutOfOrder),
    value(0, "object", Opt::Object),
];

/// The options and operands of one command.
#[derive(Debug)]
pub(super) struct Arguments {
    given: Vec<(Opt, OsString)>,
    pub(super) operands: Vec<OsString>,
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
        let arguments = Self { given, operands: words.into_operands() };
        for (_, object) in arguments.given.iter().filter(|(option, _)| *option == Opt::Object) {
            check_object(&as_text(object)?)?;
        }
        Ok(Some(arguments))
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

    /// Returns the lists of all `-o`, in order.
    ///
    /// # Errors
    ///
    /// If one is not valid UTF-8.
    pub(super) fn texts(&self, option: Opt) -> Result<Vec<String>, Refusal> {
        let all = self.given.iter().filter(|(given, _)| *given == option);
        all.map(|(_, value)| as_text(value)).collect()
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

/// Refuses objects that would have to be used. A secret alone does nothing.
fn check_object(text: &str) -> Result<(), Refusal> {
    let mut properties = KeyValues::parse(text, Some("qom-type")).map_err(Refusal::new)?;
    let kind = properties.take("qom-type").unwrap_or_default();
    if properties.take("id").is_none() {
        return Err(Refusal::new("Parameter 'id' is missing"));
    }
    match kind.as_str() {
        "secret" => Ok(()),
        "" => Err(Refusal::new("Parameter 'qom-type' is missing")),
        kind => Err(Refusal::new(format!(
            "--object {} is not supported; for a server with TLS give the URI nbds://…, whose \
             parameters name the credentials",
            printable(kind)
        ))),
    }
}
