//! `nbd-cli qemu-img`, or the program under the name `qemu-img`: the command line of QEMU's image
//! tool, for scripts and programs that call it.
//!
//! Options, output and exit codes are those of qemu-img; unsupported options are refused by name.
//! Errors are lines on standard error that begin with `qemu-img: `.

mod amend;
mod amend_keys;
mod arguments;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod encryption;
mod help;
mod info;
mod known;
mod map;
mod measure;
mod options;
mod place;
mod progress;
mod rebase;
mod refusal;
mod resize;
mod secrets;
mod snapshot;
mod text;

use std::ffi::OsString;
use std::io::{Write as _, stderr};

use clap::Args;
use nbd_jobs::getopt::Known;
use nbd_jobs::text::printable;

use self::arguments::Arguments;
use self::known::Opt;
use self::refusal::{Refusal, complain};
use crate::qemu_program::version;
use crate::signals;

/// The arguments of qemu-img, which has a separate parser.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct QemuImgArgs {
    /// A command and its options, as for qemu-img; see `nbd-cli qemu-img --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

/// A command of qemu-img.
struct Command {
    name: &'static str,
    meaning: &'static str,
    /// The operands, for the help.
    operands: &'static str,
    options: &'static [Known<Opt>],
    /// Whether a signal must not simply kill it.
    writes: bool,
    run: fn(&Arguments) -> Result<u8, Refusal>,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "amend",
        meaning: "Change the version or a feature of a qcow2 image",
        operands: "FILE",
        options: known::AMEND,
        writes: false,
        run: amend::run,
    },
    Command {
        name: "bench",
        meaning: "Measure how fast requests to an image are",
        operands: "FILE",
        options: known::BENCH,
        writes: true,
        run: bench::run,
    },
    Command {
        name: "bitmap",
        meaning: "Change a dirty bitmap of an image",
        operands: "FILE BITMAP",
        options: known::BITMAP,
        writes: true,
        run: bitmap::run,
    },
    Command {
        name: "check",
        meaning: "Check an image for leaks and damage, and repair them",
        operands: "FILE",
        options: known::CHECK,
        writes: false,
        run: check::run,
    },
    Command {
        name: "commit",
        meaning: "Write an overlay into its backing file",
        operands: "FILE",
        options: known::COMMIT,
        writes: true,
        run: commit::run,
    },
    Command {
        name: "compare",
        meaning: "Check whether two images hold the same disk",
        operands: "FILE1 FILE2",
        options: known::COMPARE,
        writes: false,
        run: compare::run,
    },
    Command {
        name: "convert",
        meaning: "Copy an image to another one",
        operands: "SOURCE TARGET",
        options: known::CONVERT,
        writes: true,
        run: convert::run,
    },
    Command {
        name: "create",
        meaning: "Create an image",
        operands: "FILE [SIZE]",
        options: known::CREATE,
        writes: true,
        run: create::run,
    },
    Command {
        name: "dd",
        meaning: "Copy a part of a disk into a new image",
        operands: "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
        options: known::DD,
        writes: true,
        run: dd::run,
    },
    Command {
        name: "info",
        meaning: "Describe an image",
        operands: "FILE",
        options: known::INFO,
        writes: false,
        run: info::run,
    },
    Command {
        name: "map",
        meaning: "Show where the parts of a disk are stored",
        operands: "FILE",
        options: known::MAP,
        writes: false,
        run: map::run,
    },
    Command {
        name: "measure",
        meaning: "Compute the size of the file of a new image",
        operands: "[FILE]",
        options: known::MEASURE,
        writes: false,
        run: measure::run,
    },
    Command {
        name: "rebase",
        meaning: "Change the backing file of an overlay",
        operands: "FILE",
        options: known::REBASE,
        writes: true,
        run: rebase::run,
    },
    Command {
        name: "resize",
        meaning: "Change the size of a disk",
        operands: "FILE [+-]SIZE",
        options: known::RESIZE,
        writes: true,
        run: resize::run,
    },
    Command {
        name: "snapshot",
        meaning: "List, create, apply and delete internal snapshots",
        operands: "FILE",
        options: known::SNAPSHOT,
        writes: true,
        run: snapshot::run,
    },
];

/// Runs qemu-img with its arguments (without its name) and returns its exit code.
pub(crate) fn run(arguments: Vec<OsString>) -> u8 {
    let mut command = None;
    carry_out(arguments, &mut command).unwrap_or_else(|refusal| {
        if let Some(message) = &refusal.message {
            complain(message);
        }
        if refusal.is_usage {
            let command = command.map_or_else(String::new, |name| format!(" {name}"));
            // There is no remedy for a closed standard error.
            let _ = writeln!(stderr(), "Try 'qemu-img{command} --help' for more info");
        }
        match signals::caught() {
            Some(signal) if refusal.code != 0 => signal.exit_status(),
            _ => refusal.code,
        }
    })
}

fn carry_out(words: Vec<OsString>, found: &mut Option<&'static str>) -> Result<u8, Refusal> {
    let mut words = words.into_iter();
    let name = loop {
        let Some(word) = words.next() else { return Err(Refusal::usage("Not enough arguments")) };
        match word.to_str() {
            Some("-h" | "--help" | "help") => return text::print(&help_of_program()),
            Some("-V" | "--version") => {
                return text::print(&version("qemu-img", "qemu-img version"));
            }
            Some("-T" | "--trace") => drop(words.next()),
            Some(option) if option.starts_with("--trace=") => {}
            Some(option) if option.starts_with("-T") => {}
            Some(option) if option.starts_with('-') => {
                return Err(Refusal::usage(format!("unrecognized option '{}'", printable(option))));
            }
            _ => break word.to_string_lossy().into_owned(),
        }
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return Err(Refusal::usage(format!("Command not found: {}", printable(&name))));
    };
    *found = Some(command.name);
    let mut words: Vec<_> = words.collect();
    if command.name == "resize" {
        words = resize::with_size_as_operand(words);
    }
    let Some(arguments) = Arguments::parse(command.options, words)? else {
        return text::print(&help_of(command));
    };
    if command.writes {
        signals::watch()?;
    }
    (command.run)(&arguments)
}

fn help_of_program() -> String {
    let commands: Vec<_> = COMMANDS.iter().map(|command| (command.name, command.meaning)).collect();
    help::program(&commands)
}

fn help_of(command: &Command) -> String {
    help::command(command.name, command.meaning, command.operands, command.options)
}
