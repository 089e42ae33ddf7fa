//! `--fork`: the server in a separate process, which notifies its parent when it is ready.
//!
//! The parent starts this program again and waits for one byte on a pipe, the daemon's standard
//! output. Until that byte is sent, the daemon's errors go to the inherited standard error.

use nbd_jobs::qemu_nbd::Options;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, Stdio};

use super::refusal::Refusal;
use crate::serving::service_manager;

/// The first argument of the background process. Users never pass it: otherwise it is an unknown
/// option.
const DAEMON: &str = "--serve-for-parent";
/// The same, with sockets that a service manager passed to the parent.
const DAEMON_WITH_SOCKETS: &str = "--serve-for-parent-with-sockets";
const THIS_PROGRAM: &str = "/proc/self/exe";
const READY: &[u8] = b"R";

/// The role of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The process started by the user.
    Foreground,
    /// The process that serves with `--fork`.
    Daemon,
}

/// The state of the role at the start of the program.
#[derive(Debug)]
pub(super) struct Beginning {
    role: Role,
    /// The arguments for another start, in which the sockets belong to this process.
    start_again: Option<Vec<OsString>>,
}

impl Role {
    /// Determines the role from the arguments and removes the marker.
    pub(super) fn of(mut arguments: Vec<OsString>) -> (Beginning, Vec<OsString>) {
        let mark = arguments.first().and_then(|first| first.to_str());
        let (role, has_sockets) = match mark {
            Some(DAEMON) => (Self::Daemon, false),
            Some(DAEMON_WITH_SOCKETS) => (Self::Daemon, true),
            _ => (Self::Foreground, false),
        };
        if role == Self::Daemon {
            arguments.remove(0);
        }
        let start_again = has_sockets.then(|| arguments.clone());
        (Beginning { role, start_again }, arguments)
    }
}

impl Beginning {
    /// Enters the role: the daemon leaves its parent's session.
    ///
    /// # Errors
    ///
    /// If the program cannot be restarted to receive its sockets.
    pub(super) fn take_over(self) -> Result<Role, Refusal> {
        // Sets the name that `ps` and `killall` show, independently of the file's name.
        let _ = rustix::thread::set_name(c"qemu-nbd");
        if let Some(arguments) = self.start_again {
            // The sockets belong to the process whose number is in the environment, and a process
            // receives its environment only when it starts.
            let own = std::process::id().to_string();
            let error = this_program(DAEMON, &arguments).env("LISTEN_PID", own).exec();
            return Err(cannot_start(&error));
        }
        if self.role == Role::Daemon {
            // Fails only for a group leader; then there is no session to leave.
            let _ = rustix::process::setsid();
        }
        Ok(self.role)
    }
}

/// Starts the daemon and waits until it is ready.
///
/// # Errors
///
/// If it does not become ready; it has reported the reason.
pub(super) fn start(arguments: &[OsString]) -> Result<(), Refusal> {
    let mark = if service_manager::gave_sockets() { DAEMON_WITH_SOCKETS } else { DAEMON };
    let mut daemon = this_program(mark, arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| cannot_start(&error))?;
    let mut said = Vec::new();
    if let Some(stdout) = &mut daemon.stdout {
        let _ = stdout.take(READY.len() as u64).read_to_end(&mut said);
    }
    if said == READY {
        return Ok(());
    }
    match daemon.wait() {
        Ok(status) if status.signal().is_some() => {
            Err(Refusal::new(format!("the server did not start: {status}")))
        }
        _ => Err(Refusal::already_reported()),
    }
}

/// Reports that clients can connect, and releases the working directory; a daemon also releases
/// everything that belongs to the parent.
///
/// # Errors
///
/// If `/` or `/dev/null` cannot be used.
pub(super) fn ready(role: Role, options: &Options) -> Result<(), Refusal> {
    let failed = |what: &str, error: std::io::Error| Refusal::new(format!("{what}: {error}"));
    // Allows unmounting of a file system while this process serves, if no image is on it.
    std::env::set_current_dir("/").map_err(|error| failed("cannot change to /", error))?;
    if role == Role::Foreground {
        return Ok(());
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(|error| failed("cannot open /dev/null", error))?;
    let mut stdout = std::io::stdout().lock();
    // A parent that was killed no longer waits.
    let _ = stdout.write_all(READY).and_then(|()| stdout.flush());
    rustix::stdio::dup2_stdout(&null).map_err(|error| failed("standard output", error.into()))?;
    if !options.verbose && !options.traces {
        rustix::stdio::dup2_stderr(&null)
            .map_err(|error| failed("standard error", error.into()))?;
    }
    Ok(())
}

fn this_program(mark: &str, arguments: &[OsString]) -> Command {
    let mut command = Command::new(THIS_PROGRAM);
    command.arg0("qemu-nbd").arg(mark).args(arguments);
    command
}

fn cannot_start(error: &std::io::Error) -> Refusal {
    Refusal::new(format!("cannot start the server process from {THIS_PROGRAM}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_argument_makes_a_daemon() {
        let (beginning, rest) = Role::of(vec![DAEMON.into(), "-t".into()]);
        assert_eq!((beginning.role, rest), (Role::Daemon, vec!["-t".into()]));
        let (beginning, rest) = Role::of(vec!["-t".into(), DAEMON.into()]);
        assert_eq!((beginning.role, rest.len()), (Role::Foreground, 2));
    }
}
