//! The `nbd-cli` command line: serve, inspect, map and copy disks over the Network Block Device
//! protocol.
//!
//! [`run`] is the complete program. Every subcommand is one file below `commands` that contains its
//! arguments and its work.

pub mod args;
mod async_runtime;
pub mod commands;
mod connect;
mod context;
mod drawing;
mod error;
mod file_path;
pub mod help;
mod image_format;
mod key_file;
mod location_parser;
pub mod locking;
mod logging;
mod new_key;
pub mod objects;
mod output;
#[cfg(feature = "object-storage")]
mod passphrase;
mod progress;
mod qemu_program;
mod screen;
mod serving;
mod shown;
mod signals;
mod terminal;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::args::{Cli, Command};
use crate::error::{CommandError, CommandErrorKind, Outcome};
use crate::key_file::KeyArgs;
use crate::serving::background::{self, Role};
use crate::signals::EndSignal;

/// Runs the program with the given arguments (the first is the program's name) and returns its exit
/// code: 0 for success, 1 for any error, 2 if the property that `info --can` or `--is` checks is
/// false, 128 + N if signal N interrupted a command that writes. `serve --run` returns the status
/// of its command; `image check` and `image compare` have special exit codes.
///
/// Results go to standard output; errors, warnings and progress to standard error.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments: Vec<_> = arguments.into_iter().collect();
    let role = background::role(&mut arguments);
    if let Err(error) = signals::prepare() {
        return report(&error);
    }
    if let Some(arguments) = qemu_program::arguments_for("qemu-nbd", &arguments) {
        return ExitCode::from(commands::qemu_nbd::run(arguments.to_vec()));
    }
    if let Some(arguments) = qemu_program::arguments_for("qemu-img", &arguments) {
        return ExitCode::from(commands::qemu_img::run(arguments.to_vec()));
    }
    let command = help::wrapped_once(Cli::command());
    let parsed = command.try_get_matches_from(&arguments);
    let parsed =
        parsed.and_then(|matches| Cli::from_arg_matches(&matches).map(|cli| (cli, matches)));
    let (mut cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(message) => {
            return match commands::image::meant_by(&message) {
                Some(error) => report(&error),
                None => usage(&message, commands::image::usage_code(&arguments)),
            };
        }
    };
    if let Err(error) = commands::serve::refuse_options_beside_file(&matches) {
        return report(&error);
    }
    if let Err(error) = logging::start(cli.verbose, &cli.log) {
        return report(&error);
    }
    let forks = match &mut cli.command {
        Command::Serve(args) => {
            (args.role, args.keeps_log) = (role, cli.verbose > 0);
            args.fork
        }
        Command::Attach(args) => {
            (args.role, args.keeps_log) = (role, cli.verbose > 0);
            !args.foreground
        }
        #[cfg(feature = "mount")]
        Command::Mount(args) => {
            (args.role, args.keeps_log) = (role, cli.verbose > 0);
            args.fork
        }
        _ => false,
    };
    let keys = keys(&cli.command).filter(|_| forks);
    let outcome = match role {
        Role::Foreground if forks => {
            let handed_over = keys.map(KeyArgs::handed_over).transpose();
            handed_over.and_then(|keys| {
                let keys = keys.as_deref().map(Vec::as_slice).unwrap_or_default();
                background::start(&arguments[1..], keys)
            })
        }
        Role::Background => {
            keys.map_or(Ok(()), KeyArgs::take_over).and_then(|()| dispatch(cli.command))
        }
        Role::Foreground => dispatch(cli.command),
    };
    match outcome {
        Ok(outcome) => ExitCode::from(outcome.exit_code()),
        Err(error) => report(&error),
    }
}

/// The key files of a command that can run in the background.
fn keys(command: &Command) -> Option<&KeyArgs> {
    match command {
        Command::Serve(args) => Some(&args.export.trust.keys),
        Command::Attach(args) => Some(&args.image.trust.keys),
        #[cfg(feature = "mount")]
        Command::Mount(args) => Some(&args.trust.keys),
        _ => None,
    }
}

fn dispatch(command: Command) -> Result<Outcome, CommandError> {
    if command.writes() {
        signals::watch()?;
    }
    if command.reads_once() {
        objects::read_once();
    }
    match command {
        Command::Serve(args) => commands::serve::run(*args),
        Command::Info(args) => commands::info::run(&args),
        Command::ListMeta(args) => commands::list_meta::run(&args),
        Command::Map(args) => commands::map::run(&args),
        Command::Copy(args) => commands::copy::run(*args),
        Command::Checksum(args) => commands::checksum::run(&args),
        #[cfg(feature = "mount")]
        Command::Mount(args) => commands::mount::run(args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Attach(args) => commands::attach::run(&args),
        Command::Detach(args) => commands::detach::run(&args),
        Command::Devices(args) => commands::devices::run(&args),
        Command::Control(args) => commands::control::run(&args),
        Command::Top(args) => commands::top::run(&args),
        Command::Backup(args) => commands::backup::run(args),
        #[cfg(feature = "object-storage")]
        Command::Repo(args) => commands::repo::run(&args),
        Command::Restore(args) => commands::restore::run(&args),
        Command::Image(args) => commands::image::run(args),
        Command::QemuNbd(args) => Ok(Outcome::Status(commands::qemu_nbd::run(args.arguments))),
        Command::QemuImg(args) => Ok(Outcome::Status(commands::qemu_img::run(args.arguments))),
        Command::Bitmap(args) => commands::bitmap::run(&args),
        Command::Tls(args) => commands::tls::run(&args),
        Command::Completions(args) => commands::completions::run(&args, Cli::command()),
    }
}

/// Help and version are requested output; all other errors of the parser are usage errors.
fn usage(message: &clap::Error, code: u8) -> ExitCode {
    // A closed standard error cannot be reported.
    let _ = message.print();
    ExitCode::from(if message.use_stderr() { code } else { 0 })
}

fn report(error: &CommandError) -> ExitCode {
    match error.kind() {
        // The reader has closed the pipe, as in `nbd-cli map … | head -1`.
        CommandErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        CommandErrorKind::CopyCutShort => return ExitCode::from(signals::ENDED_BY_SIGPIPE),
        CommandErrorKind::Failure => {}
    }
    let _ = writeln!(std::io::stderr(), "nbd-cli: {error}");
    let interrupted = signals::caught().map(EndSignal::exit_status);
    interrupted.map_or(ExitCode::FAILURE, ExitCode::from)
}
