//! `nbd-cli qemu-nbd`, or the program under the name `qemu-nbd`: the command line of QEMU's disk
//! server, for scripts and programs that call it.
//!
//! The options are parsed like getopt_long and have the same meaning; unsupported ones are refused
//! by name. Errors are lines on standard error that begin with `qemu-nbd: `, and the exit code is 0
//! or 1.

mod daemon;
mod device;
mod help;
mod list;
mod refusal;
mod server;
mod source;

use std::ffi::OsString;

use clap::Args;
use nbd_jobs::qemu_nbd::{Activation, Wanted, parse};

use self::daemon::{Beginning, Role};
use self::refusal::{Refusal, complain, print};
use crate::logging::{self, LogArgs};
use crate::output::warn;
use crate::qemu_program::version;
use crate::serving::service_manager;

/// The arguments of qemu-nbd, which has a separate parser.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct QemuNbdArgs {
    /// Options and a file, as for qemu-nbd; see `nbd-cli qemu-nbd --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

/// Runs qemu-nbd with its arguments (without its name) and returns its exit code.
pub(crate) fn run(arguments: Vec<OsString>) -> u8 {
    let (beginning, arguments) = Role::of(arguments);
    match carry_out(beginning, arguments) {
        Ok(()) => 0,
        Err(refusal) => {
            for line in refusal.message.as_deref().into_iter().chain(refusal.advice) {
                complain(line);
            }
            1
        }
    }
}

fn carry_out(beginning: Beginning, arguments: Vec<OsString>) -> Result<(), Refusal> {
    let options = match parse(arguments.clone())? {
        Wanted::Help => return print(help::HELP),
        Wanted::Version => return print(&version("qemu-nbd", "qemu-nbd")),
        Wanted::TraceHelp => {
            complain("there are no individual trace events here; any pattern enables the log");
            return Ok(());
        }
        Wanted::Work(options) => options,
    };
    let role = beginning.take_over()?;
    options.check(activation())?;
    if options.disconnect {
        return device::disconnect(&options);
    }
    // As in QEMU, the daemon of a device stays in the foreground if it has output.
    let is_daemon = options.fork || (options.connect.is_some() && !options.verbose);
    if is_daemon && role == Role::Foreground {
        return daemon::start(&arguments);
    }
    // QEMU's -v reports on kernel devices only. Scripts compare the output.
    let levels = if options.traces { 2 } else { 0 };
    if let Err(error) = logging::start(levels, &LogArgs::default()) {
        warn(&error.to_string());
    }
    match (options.list, &options.connect) {
        (true, _) => list::run(&options),
        (false, Some(device)) => device::connect(&options, device, role),
        (false, None) => server::run(&options, role),
    }
}

/// Returns the sockets that a service manager has given to this process.
fn activation() -> Activation {
    if !service_manager::gave_sockets() {
        return Activation::None;
    }
    match std::env::var("LISTEN_FDS").as_deref().map(str::trim) {
        Ok("1") => Activation::OneSocket,
        _ => Activation::OtherSockets,
    }
}
