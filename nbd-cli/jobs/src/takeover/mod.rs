//! One server takes over from another: listening sockets, connections and images.
//!
//! ```text
//!   successor                                     predecessor
//!   {"command":"takeover"}     ---------------->  control socket; pauses, closes its images
//!                              <----------------  {"result":{}}, manager, disks, sockets, connections, COMPLETE
//!   opens images, adopts; READY --------------->
//!                              <----------------  GO
//!   SERVING                    ---------------->  exits
//! ```
//!
//! Descriptors travel over the same unix socket. The control socket is among them, so that it has a
//! listener at every moment: clients that connect meanwhile are served by the program that goes on.
//! Only one of both has the images open. Until SERVING the predecessor can go on: it says
//! ABANDONED, waits until the successor has closed the connection, and opens its images again. A
//! successor that is READY and loses the predecessor serves, because no other program does.

mod predecessor;
mod successor;
mod wire;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::time::Duration;

pub use self::predecessor::Successor;
pub use self::successor::{Predecessor, TakenOver};

/// The service manager that has started a server, and wants to hear from its successor: a program
/// that it has not started as the main process of a service has no such environment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceManager {
    /// Where it is notified: a path, or an abstract name after `@`, as in `NOTIFY_SOCKET`.
    pub notify_socket: OsString,
    /// The longest time between two notifications, if it watches.
    pub watchdog: Option<Duration>,
}

impl ServiceManager {
    /// A manager with this `NOTIFY_SOCKET`, which watches if it has a limit.
    #[must_use]
    pub const fn new(notify_socket: OsString, watchdog: Option<Duration>) -> Self {
        Self { notify_socket, watchdog }
    }
}

/// The reason why a takeover did not come about.
#[derive(Debug)]
#[non_exhaustive]
pub enum TakeoverError {
    /// The other program has ended, or has given up without a reason.
    Gone,
    /// The other program has given up.
    Abandoned {
        /// Its reason, a sentence.
        reason: String,
    },
    /// The other program does not do what the two agreed on.
    Unexpected {
        /// What was unexpected.
        what: &'static str,
    },
    /// The connection between the two failed.
    Io(io::Error),
}

impl fmt::Display for TakeoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the other server has ended in the middle of it"),
            Self::Abandoned { reason } => f.write_str(reason),
            Self::Unexpected { what } => write!(f, "the other server sent {what}"),
            Self::Io(error) if error.kind() == io::ErrorKind::WouldBlock => {
                f.write_str("the other server did not answer in time")
            }
            Self::Io(error) => write!(f, "the connection to the other server failed: {error}"),
        }
    }
}

impl std::error::Error for TakeoverError {}

impl From<io::Error> for TakeoverError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Self::Gone,
            _ => Self::Io(error),
        }
    }
}
