//! `--fork` of `serve` and `mount`, and `attach`: the server in a separate process, which notifies
//! its parent when it is ready.
//!
//! The parent starts this program again and copies the server's output, up to a marker that reports
//! that clients can connect. Until then the server's errors go to the inherited standard error.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, Stdio};

use crate::error::{CommandError, Outcome};

/// The first argument of the background process. Users never pass it: otherwise it is an unknown
/// option.
const MARK: &str = "--serve-in-background";
const THIS_PROGRAM: &str = "/proc/self/exe";
const READY: u8 = 0;

/// The role of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The process started by the user.
    #[default]
    Foreground,
    /// The process that serves with `--fork`.
    Background,
}

/// Determines the role from the arguments, the first of which is the program's name, and removes
/// the marker.
pub(crate) fn role(arguments: &mut Vec<OsString>) -> Role {
    if arguments.get(1).is_none_or(|first| first != MARK) {
        return Role::Foreground;
    }
    arguments.remove(1);
    Role::Background
}

/// Starts the server in the background and prints its addresses when clients can connect. The
/// server gets `handed_over` on its standard input.
///
/// # Errors
///
/// If the server cannot be started. If it does not become ready, it has reported the reason, and
/// the status is 1.
pub(crate) fn start(arguments: &[OsString], handed_over: &[u8]) -> Result<Outcome, CommandError> {
    let failed = |error| {
        CommandError::new(format!("cannot start {THIS_PROGRAM} in the background: {error}"))
    };
    let mut server = Command::new(THIS_PROGRAM)
        .arg0("nbd-cli")
        .arg(MARK)
        .args(arguments)
        .stdin(if handed_over.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = server.stdin.take() {
        // One that has ended without reading it says why itself.
        let _ = stdin.write_all(handed_over);
    }
    let mut said = Vec::new();
    if let Some(mut stdout) = server.stdout.take() {
        stdout.read_to_end(&mut said).map_err(failed)?;
    }
    if said.pop() == Some(READY) {
        // A closed standard output is not an error: the server runs.
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(&said).and_then(|()| stdout.flush());
        return Ok(Outcome::Success);
    }
    let status = server.wait().map_err(failed)?;
    match status.signal() {
        Some(_) => {
            Err(CommandError::new(format!("the program in the background did not start: {status}")))
        }
        None => Ok(Outcome::Status(1)),
    }
}

/// Leaves the parent's session, before anything else is done.
pub(crate) fn leave_session() {
    // Fails only for a group leader; then there is no session to leave.
    let _ = rustix::process::setsid();
}

/// Reports that clients can connect and releases the parent's standard output, and its standard
/// error unless logging was requested.
///
/// # Errors
///
/// If `/dev/null` cannot be used.
pub(crate) fn ready(keeps_log: bool) -> Result<(), CommandError> {
    let failed = |error| CommandError::new(format!("cannot use /dev/null: {error}"));
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
    let mut stdout = std::io::stdout().lock();
    // A parent that was killed no longer waits.
    let _ = stdout.write_all(&[READY]).and_then(|()| stdout.flush());
    rustix::stdio::dup2_stdout(&null).map_err(|error| failed(error.into()))?;
    if !keeps_log {
        rustix::stdio::dup2_stderr(&null).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_argument_makes_a_background_process() {
        let arguments = |list: &[&str]| list.iter().map(OsString::from).collect::<Vec<_>>();
        let mut marked = arguments(&["nbd-cli", MARK, "serve"]);
        assert_eq!(role(&mut marked), Role::Background);
        assert_eq!(marked, arguments(&["nbd-cli", "serve"]));
        let mut other = arguments(&["nbd-cli", "serve", MARK]);
        assert_eq!(role(&mut other), Role::Foreground);
        assert_eq!(other.len(), 3);
    }
}
