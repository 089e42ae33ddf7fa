//! The effect of each signal.
//!
//! *Servers* are `serve` and `qemu-nbd`. *Writers* are the commands that create or change a disk:
//! `copy`, `backup`, `restore`, `bitmap` and `image convert`, `commit`, `rebase`, `resize` and
//! `snapshot`. `top` restores the terminal before a signal ends or stops it; a second request to
//! end does not wait for the display. The other commands (`info`, `map`, `control` and so on) leave
//! nothing unfinished: there every signal but SIGPIPE and SIGXFSZ has its default effect.
//!
//! | signal | servers | writers |
//! |---|---|---|
//! | SIGINT, SIGTERM, SIGQUIT | orderly end with status 0; a second one ends at once, with 128 + its number | end between two steps, with 128 + the number; a second one ends at once |
//! | SIGHUP | `serve` reads its TLS credentials and the file of `--config` again, if it has any, opens its log file again, and goes on; if its terminal is gone it ends in order. `qemu-nbd` ends in order, as QEMU's does | as SIGINT |
//! | SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGPWR | orderly end; further ones change nothing | as SIGINT; further ones change nothing |
//! | SIGUSR1, SIGUSR2, SIGIO | nothing | the default: the process is killed; the commands of `qemu-img` that show progress say on SIGUSR1 how far they are |
//! | SIGXFSZ | the write fails, and its client gets ENOSPC | the write fails, and the command says why |
//! | SIGPIPE | the write fails: a client has left | the write fails: the reader has left |
//! | SIGCHLD, SIGURG, SIGWINCH | nothing | nothing |
//! | SIGTSTP, SIGTTIN, SIGTTOU, SIGSTOP, SIGCONT | job control: stopped, and later continued where it was | the same |
//!
//! A signal that was ignored when the program started (`nohup`, `command &` in a script) stays
//! ignored, except SIGINT and SIGTERM in servers: QEMU's server catches them in any case, and
//! scripts that start a server with `&` rely on it. A program that `serve --run` starts inherits
//! none of this: the signals caught here are reset there.
//!
//! QEMU's qemu-nbd ends cleanly on SIGHUP, SIGINT and SIGTERM; it continues after SIGUSR1, SIGALRM
//! and SIGIO; SIGQUIT, SIGXFSZ, SIGUSR2, SIGXCPU, SIGVTALRM, SIGPROF and SIGPWR kill it, and its
//! socket remains.

mod interruption;
mod prompt;
mod server;
mod terminal;
mod usr1;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use nbd_jobs::tasks;
use rustix::process::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(crate) use self::interruption::{
    cancellation, caught, interrupter, note_temporary_file, stop_if_interrupted, watch,
};
pub(crate) use self::prompt::with_restored_terminal;
pub(crate) use self::server::{EndSignals, Hangup, on_hangup};
pub(crate) use self::terminal::{TerminalSignal, on_terminal_signals};
pub(crate) use self::usr1::{was_requested, watch_requests};
use crate::error::CommandError;

/// Signals with which a user or a program asks another one to end.
const REQUESTS: [Number; 3] = [Number::INT, Number::TERM, Number::QUIT];

/// Signals of timers, limits and the power supply. Some of them recur.
const NOTICES: [Number; 5] =
    [Number::ALARM, Number::VTALARM, Number::PROF, Number::XCPU, Number::POWER];

/// The exit status of a program that SIGPIPE ended. This program ignores the signal, and the failed
/// write ends the command.
pub(crate) const ENDED_BY_SIGPIPE: u8 = 128 + 13;

/// A signal that has asked the program to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndSignal(Number);

impl EndSignal {
    /// Returns its number.
    pub(crate) fn number(self) -> i32 {
        self.0.as_raw()
    }

    /// Returns the exit status of a program that it ended.
    pub(crate) fn exit_status(self) -> u8 {
        u8::try_from(128 + self.number()).unwrap_or(u8::MAX)
    }

    /// Returns its name.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Number::INT => "SIGINT",
            Number::TERM => "SIGTERM",
            Number::QUIT => "SIGQUIT",
            Number::HUP => "SIGHUP",
            Number::ALARM => "SIGALRM",
            Number::VTALARM => "SIGVTALRM",
            Number::PROF => "SIGPROF",
            Number::XCPU => "SIGXCPU",
            _ => "SIGPWR",
        }
    }

    /// Returns whether a user or program sent it on purpose, so that a repetition is intended.
    pub(crate) fn is_request(self) -> bool {
        REQUESTS.contains(&self.0)
    }
}

/// Whether the signals that ask for the end are caught by the work of this process.
static ARE_CAUGHT: AtomicBool = AtomicBool::new(false);

/// Signals that are caught.
struct Caught(Vec<(Number, Signal)>);

impl Caught {
    fn new(numbers: impl IntoIterator<Item = Number>) -> Result<Self, CommandError> {
        let caught = numbers.into_iter().map(|number| {
            let caught = signal(SignalKind::from_raw(number.as_raw()));
            caught.map(|caught| (number, caught)).map_err(|error| {
                CommandError::new(format!("cannot catch signal {}: {error}", number.as_raw()))
            })
        });
        let caught = caught.collect::<Result<Vec<_>, _>>()?;
        if caught.iter().any(|(number, _)| *number == Number::TERM) {
            ARE_CAUGHT.store(true, Ordering::SeqCst);
        }
        Ok(Self(caught))
    }

    /// Waits for the next signal.
    ///
    /// # Cancel safety
    ///
    /// Safe: a signal that arrives between two calls is reported by the next one.
    async fn next(&mut self) -> Number {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Number> {
        for (number, signal) in &mut self.0 {
            if signal.poll_recv(cx).is_ready() {
                return Poll::Ready(*number);
            }
        }
        Poll::Pending
    }
}

/// The signals that were ignored when the program started: bit `n - 1` for signal `n`.
static IGNORED_AT_START: OnceLock<u64> = OnceLock::new();

/// Called once, before everything else: records the ignored signals, and catches SIGXFSZ, so that a
/// write beyond a limit (`ulimit -f`, LimitFSIZE=, or the largest file of the file system) fails
/// instead of killing the process.
///
/// # Errors
///
/// If the system refuses to catch it.
pub(crate) fn prepare() -> Result<(), CommandError> {
    ignored_at_start();
    let failed = |error| CommandError::new(format!("cannot catch SIGXFSZ: {error}"));
    // A handler remains after its runtime has ended. It does nothing: its existence is enough.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed)?;
    let caught =
        tasks::block_on(&runtime, async { signal(SignalKind::from_raw(Number::XFSZ.as_raw())) });
    caught.map(drop).map_err(failed)
}

fn ignored_at_start() -> u64 {
    *IGNORED_AT_START.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        ignored_in(&status)
    })
}

/// Finds the mask in the kernel's description of a process; without it no signal counts as ignored.
fn ignored_in(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

fn was_ignored(number: Number) -> bool {
    ignored_at_start() >> (number.as_raw() - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_found() {
        let status = "Name:\tx\nSigBlk:\t0000000000000004\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored_in(status), 0x1001);
        assert_eq!(ignored_in("Name:\tx\nSigIgn:\tnonsense\n"), 0);
        assert_eq!(ignored_in(""), 0);
    }

    #[test]
    fn every_signal_that_ends_a_program_has_its_name() {
        let named = REQUESTS.into_iter().chain(NOTICES).chain([Number::HUP]).map(EndSignal);
        let names: Vec<_> = named.map(EndSignal::name).collect();
        assert_eq!(names.iter().filter(|name| **name == "SIGPWR").count(), 1, "{names:?}");
        assert_eq!(EndSignal(Number::INT).exit_status(), 130);
    }
}
