//! The signals of a display on a terminal, which has to be restored before the process ends or
//! stops.

use nbd_jobs::tasks;
use rustix::process::Signal as Number;

use super::{Caught, EndSignal, NOTICES, REQUESTS, was_ignored};
use crate::error::CommandError;

/// A signal that concerns a display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TerminalSignal {
    /// Asks the program to end.
    End(EndSignal),
    /// Asks it to stop until it is continued.
    Stop,
    /// The terminal has another size.
    Resized,
}

/// Calls `act` on every signal, from a separate thread. The signals no longer end or stop the
/// process themselves.
///
/// # Errors
///
/// If the system refuses to catch them.
pub(crate) fn on_terminal_signals(
    mut act: impl FnMut(TerminalSignal) + Send + 'static,
) -> Result<(), CommandError> {
    let failed = |error| CommandError::new(format!("cannot watch for signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed)?;
    let others = [Number::HUP, Number::USR1, Number::USR2, Number::IO, Number::TSTP];
    let ends = REQUESTS.into_iter().chain(NOTICES).chain(others);
    let numbers = ends.filter(|it| !was_ignored(*it)).chain([Number::WINCH]);
    let mut caught = tasks::block_on(&runtime, async { Caught::new(numbers) })?;
    let thread = tasks::start_thread("signals", move || {
        tasks::block_on(&runtime, async {
            loop {
                act(match caught.next().await {
                    Number::WINCH => TerminalSignal::Resized,
                    Number::TSTP => TerminalSignal::Stop,
                    number => TerminalSignal::End(EndSignal(number)),
                });
            }
        });
    });
    thread.map(drop).map_err(failed)
}
