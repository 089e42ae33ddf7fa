//! How soon a thread lets others have its core.
//!
//! A thread that computes for long gives way at once to connections and clients that wake up; its
//! share of the cores stays what it is. Systems without such a setting (before Linux 6.12) are left
//! as they are.

use std::cell::Cell;
use std::time::Duration;

use crate::sys;

/// The time slice of a thread that computes: several times the system's default.
const COMPUTING_SLICE: Duration = Duration::from_millis(20);

/// The use that a thread makes of its core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// It waits for most of the time, and has the time slice of the [workers](crate::worker).
    Waits,
    /// It computes for long.
    Computes,
}

thread_local! {
    /// The pace of this thread; `None` before it is set.
    static PACE: Cell<Option<Pace>> = const { Cell::new(None) };
}

/// Sets the pace of this thread and returns the former one.
pub(crate) fn set(pace: Pace) -> Pace {
    let former = PACE.replace(Some(pace));
    if former != Some(pace) {
        sys::set_time_slice(match pace {
            Pace::Waits => sys::SHORTEST_SLICE,
            Pace::Computes => COMPUTING_SLICE,
        });
    }
    former.unwrap_or(Pace::Waits)
}
