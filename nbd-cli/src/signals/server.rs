//! The signals of servers.

use std::fs::File;

use nbd_jobs::tasks;
use rustix::process::Signal as Number;

use super::{Caught, EndSignal, NOTICES, was_ignored};
use crate::error::CommandError;

/// The effect of SIGHUP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hangup {
    /// It ends the server.
    Ends,
    /// It ends the server if its terminal is gone. Otherwise it makes the server read its files
    /// again.
    EndsWithTerminal,
}

/// The signals that ask a server to end.
pub(crate) struct EndSignals {
    caught: Caught,
    /// A signal that arrived while [`meanwhile`](Self::meanwhile) waited.
    pending: Option<EndSignal>,
    hangup: Hangup,
    had_terminal: bool,
}

impl EndSignals {
    /// Starts to catch them; from now on they no longer end the process themselves.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub(crate) fn new(hangup: Hangup) -> Result<Self, CommandError> {
        let polite = [Number::QUIT, Number::HUP].into_iter().chain(NOTICES);
        let polite = polite.filter(|number| !was_ignored(*number));
        // Catching them is enough: the handlers remain.
        drop(Caught::new([Number::USR1, Number::USR2, Number::IO])?);
        Ok(Self {
            caught: Caught::new([Number::INT, Number::TERM].into_iter().chain(polite))?,
            pending: None,
            hangup,
            had_terminal: has_terminal(),
        })
    }

    /// Waits for the next signal.
    ///
    /// # Cancel safety
    ///
    /// Safe: a signal that arrives between two calls is reported by the next one.
    pub(crate) async fn next(&mut self) -> EndSignal {
        if let Some(signal) = self.pending.take() {
            return signal;
        }
        loop {
            let number = self.caught.next().await;
            let goes_on = number == Number::HUP
                && self.hangup == Hangup::EndsWithTerminal
                && (!self.had_terminal || has_terminal());
            if !goes_on {
                return EndSignal(number);
            }
        }
    }

    /// Waits for the next signal that was sent on purpose: further signals of a timer, a limit or a
    /// lost terminal only repeat a known fact.
    ///
    /// # Cancel safety
    ///
    /// As [`next`](Self::next).
    pub(crate) async fn insisted(&mut self) -> EndSignal {
        loop {
            let signal = self.next().await;
            if signal.is_request() {
                return signal;
            }
        }
    }

    /// Waits for work that cannot be abandoned in the middle, such as opening an image. A first
    /// signal is reported by the next call of [`next`](Self::next), a second one ends the process
    /// at once.
    pub(crate) async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let first = tokio::select! {
            done = &mut work => return done,
            first = self.next() => first,
        };
        let done = tokio::select! {
            done = work => done,
            second = self.insisted() => std::process::exit(second.exit_status().into()),
        };
        self.pending = Some(first);
        done
    }
}

/// Calls `act` on every SIGHUP, in the current runtime.
///
/// # Errors
///
/// If the system refuses to catch the signal.
pub(crate) fn on_hangup(act: impl Fn() + Send + 'static) -> Result<(), CommandError> {
    let mut hangups = Caught::new([Number::HUP])?;
    tasks::spawn(async move {
        loop {
            hangups.next().await;
            act();
        }
    });
    Ok(())
}

/// Returns whether the process has a controlling terminal.
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}
