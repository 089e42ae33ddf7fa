//! What is being opened, also by threads for which no request waits any more: a program that takes
//! over must find all of it closed, and nothing is opened from then on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::{ErrorKind, Failure};

/// Counts what is being opened.
#[derive(Debug, Clone, Default)]
pub(super) struct Openings(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    count: usize,
    is_suspended: bool,
}

/// Something that is being opened. Keep it until that is exported, or closed again: drop it last. A
/// server is not taken over before.
#[derive(Debug)]
pub struct OpeningGuard(Openings);

impl Openings {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses while another program takes over.
    pub(super) fn begin(&self) -> Result<OpeningGuard, Failure> {
        let mut state = self.state();
        if state.is_suspended {
            return Err(taken_over());
        }
        state.count += 1;
        Ok(OpeningGuard(self.clone()))
    }

    /// From now on nothing is opened; refused while something is.
    pub(super) fn suspend(&self) -> Result<(), Failure> {
        let mut state = self.state();
        if state.count > 0 {
            let message = "a source is still being opened or a reload is in progress, perhaps one that \
                           was given up; try again when it has ended, or mend what hangs";
            return Err(Failure::new(ErrorKind::InUse, message));
        }
        state.is_suspended = true;
        Ok(())
    }

    pub(super) fn resume(&self) {
        self.state().is_suspended = false;
    }
}

impl Clone for OpeningGuard {
    fn clone(&self) -> Self {
        self.0.state().count += 1;
        Self(self.0.clone())
    }
}

impl Drop for OpeningGuard {
    fn drop(&mut self) {
        self.0.state().count -= 1;
    }
}

/// The answer to requests of a server that is suspended.
pub(super) fn taken_over() -> Failure {
    let message = "another program is taking this server over; connect again";
    Failure::new(ErrorKind::InUse, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_takeover_waits_for_every_holder_and_then_nothing_is_opened() {
        let openings = Openings::default();
        let first = openings.begin().unwrap();
        let second = first.clone();
        drop(first);
        assert!(openings.suspend().is_err());
        drop(second);
        openings.suspend().unwrap();
        assert!(openings.begin().is_err());
        openings.resume();
        drop(openings.begin().unwrap());
    }
}
