//! The options of a restore.

use std::num::NonZeroUsize;

use imgfmt::{Format, Locking, OpenOptions};

use crate::connect::ConnectOptions;

/// The data to verify at the end, by reading both sides and comparing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Nothing.
    #[default]
    Nothing,
    /// The copied data.
    Copied,
    /// The whole disk.
    All,
}

/// Options of a restore.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Connection options.
    pub connect: ConnectOptions,
    /// Requests in flight: 1 to 4096. By default 32.
    pub requests: NonZeroUsize,
    /// How the image is opened: its format, its locking, and the other files it may name. By
    /// default only those in its directory and below.
    pub image: OpenOptions,
    /// Format of the result, if it is a file or a device: raw or qcow2. By default raw.
    pub format: Format,
    /// Locking of a device as the destination.
    pub destination_locking: Locking,
    /// The data to verify at the end. A restore copies the whole disk, so [`Verify::Copied`] and
    /// [`Verify::All`] are the same.
    pub verify: Verify,
    /// Whether the files of the image are checked against the sums that the backups recorded.
    pub check: Check,
}

/// The check of the files of a backup against the sums that were recorded when they were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// A file that holds something else is an error.
    #[default]
    Recorded,
    /// The sums are ignored.
    Off,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            connect: ConnectOptions::default(),
            requests: NonZeroUsize::new(32).unwrap_or(NonZeroUsize::MIN),
            image: OpenOptions::new(),
            format: Format::Raw,
            destination_locking: Locking::Auto,
            verify: Verify::Nothing,
            check: Check::Recorded,
        }
    }
}
