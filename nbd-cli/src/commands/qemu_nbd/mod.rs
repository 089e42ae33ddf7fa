//! `nbd-cli qemu-nbd`, or the program under the name `qemu-nbd`: the command line of QEMU's disk
//! server, for scripts and programs that call it.
//!
//! The options are parsed like getopt_long and have the same meaning; unsupported ones are refused
//! by name. Errors are lines on standard error that begin with `qemu-nbd: `, and the exit code is 0
//! or 1.

mod daemon;
mod device;
mod getopt;
mod help;
mod list;
mod objects;
mod options;
mod refusal;
mod server;
mod source;
mod tls;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Args;

use self::daemon::{Beginning, Role};
use self::options::{Options, Wanted};
use self::refusal::{Refusal, complain, print};
use crate::logging::{self, LogArgs};
use crate::output::warn;

/// The arguments of qemu-nbd, which has a separate parser.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct QemuNbdArgs {
    /// Options and a file, as for qemu-nbd; see `nbd-cli qemu-nbd --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    pub arguments: Vec<OsString>,
}

/// Returns the arguments for qemu-nbd, without its name, if the whole command line is one.
pub(crate) fn arguments_for_qemu_nbd(arguments: &[OsString]) -> Option<&[OsString]> {
    let (program, rest) = arguments.split_first()?;
    if Path::new(program).file_name() == Some(OsStr::new("qemu-nbd")) {
        return Some(rest);
    }
    match rest.split_first() {
        Some((command, rest)) if command == "qemu-nbd" => Some(rest),
        _ => None,
    }
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
    let options = match options::parse(arguments.clone())? {
        Wanted::Help => return print(help::HELP),
        Wanted::Version => return print(&help::version()),
        Wanted::TraceHelp => {
            complain("there are no single trace events here; any pattern logs what happens");
            return Ok(());
        }
        Wanted::Work(options) => options,
    };
    let role = beginning.take_over()?;
    check(&options)?;
    if options.disconnect {
        return device::disconnect(&options);
    }
    // As in QEMU, the daemon of a device stays in the foreground if it is to say something.
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

/// Refuses contradictory options, in the order in which QEMU detects them.
fn check(options: &Options) -> Result<(), Refusal> {
    if options.list {
        check_list(options)?;
    }
    if daemon::service_manager_gave_sockets() {
        check_activation(options)?;
    }
    check_tls(options)?;
    if options.selinux_label {
        return Err(Refusal::new(match options.socket {
            None => "--selinux-label is not permitted without --socket",
            Some(_) => "--selinux-label is not supported; label the socket with chcon",
        }));
    }
    if options.list {
        return Ok(());
    }
    if options.files.len() != 1 {
        return Err(Refusal::usage("Invalid number of arguments"));
    }
    if options.image_options && options.format.is_some() {
        return Err(Refusal::new("--image-opts and -f are mutually exclusive"));
    }
    Ok(())
}

fn check_list(options: &Options) -> Result<(), Refusal> {
    let wrong = if !options.files.is_empty() {
        "a file name"
    } else if options.says_something_about_the_disk() {
        "per-device settings"
    } else if options.fork {
        "forking"
    } else {
        return Ok(());
    };
    Err(Refusal::new(format!("List mode is incompatible with {wrong}")))
}

fn check_activation(options: &Options) -> Result<(), Refusal> {
    let wrong = if options.connect.is_some() {
        "NBD device"
    } else if options.socket.is_some() {
        "Unix socket"
    } else if options.bind.is_some() {
        "The interface"
    } else if options.port.is_some() {
        "TCP port number"
    } else if options.selinux_label {
        "SELinux label"
    } else if options.list {
        return Err(Refusal::new("List mode is incompatible with socket activation"));
    } else {
        return match std::env::var("LISTEN_FDS").as_deref().map(str::trim) {
            Ok("1") => Ok(()),
            _ => Err(Refusal::new("socket activation is supported with LISTEN_FDS=1 only")),
        };
    };
    Err(Refusal::new(format!("{wrong} can't be set when using socket activation")))
}

fn check_tls(options: &Options) -> Result<(), Refusal> {
    let Some(id) = &options.tls_creds else {
        return match (&options.tls_authz, &options.tls_hostname) {
            (Some(_), _) => Err(Refusal::new("--tls-authz is not permitted without --tls-creds")),
            (_, Some(_)) => {
                Err(Refusal::new("--tls-hostname is not permitted without --tls-creds"))
            }
            _ => Ok(()),
        };
    };
    if options.connect.is_some() {
        return Err(Refusal::new("TLS is for clients on sockets, not for kernel devices (-c)"));
    }
    if options.tls_authz.is_some() && options.list {
        return Err(Refusal::new("TLS authorization is incompatible with export list"));
    }
    if options.tls_hostname.is_some() && !options.list {
        return Err(Refusal::new("TLS hostname is only supported with export list"));
    }
    options.objects.credentials(id, options.list).map(drop).map_err(Refusal::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &[&str]) -> Option<Vec<OsString>> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        arguments_for_qemu_nbd(&words).map(<[OsString]>::to_vec)
    }

    #[test]
    fn the_name_or_the_first_word_says_that_it_is_qemu_nbd() {
        let expected = Some(vec![OsString::from("-t"), "disk".into()]);
        assert_eq!(found(&["/usr/bin/qemu-nbd", "-t", "disk"]), expected);
        assert_eq!(found(&["qemu-nbd", "-t", "disk"]), expected);
        assert_eq!(found(&["nbd-cli", "qemu-nbd", "-t", "disk"]), expected);
        assert_eq!(found(&["nbd-cli", "serve", "qemu-nbd"]), None);
        assert_eq!(found(&["nbd-cli"]), None);
    }
}
