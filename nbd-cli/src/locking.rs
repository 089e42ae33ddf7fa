//! Locking of files against other programs, by command line options.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::{Args, ValueEnum};
use imgfmt::{Locking, OpenOptions};

use crate::error::CommandError;
use crate::output::{printable, warn};

/// The locking of image files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct LockArgs {
    /// Lock image files against other programs, like QEMU.
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub locking: LockingChoice,
}

/// Whether image files are locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LockingChoice {
    /// Where the file system supports locks; elsewhere with a warning.
    #[default]
    Auto,
    /// Always: files that cannot be locked are refused.
    On,
    /// Never: two concurrent writers destroy an image.
    Off,
}

/// For commands that only read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct ShareArgs {
    /// Read an image while another program writes to it. The result may then be a mix of old and
    /// new, and an intact image may seem damaged.
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

impl LockArgs {
    pub(crate) fn locking(self) -> Locking {
        match self.locking {
            LockingChoice::Auto => Locking::Auto,
            LockingChoice::On => Locking::On,
            LockingChoice::Off => Locking::Off,
        }
    }

    /// The options for existing images.
    pub(crate) fn options(self) -> OpenOptions {
        warning(OpenOptions::new().locking(self.locking()))
    }
}

impl ShareArgs {
    /// Returns the options for an image that is only read.
    pub(crate) fn apply(self, options: OpenOptions) -> OpenOptions {
        match self.force_share {
            true => options.locking(Locking::Shared),
            false => options,
        }
    }

    /// Returns the locking of a file that is only read.
    pub(crate) fn locking(self, otherwise: LockArgs) -> Locking {
        if self.force_share { Locking::Shared } else { otherwise.locking() }
    }
}

/// Returns the options, with a warning where there are no locks.
pub(crate) fn warning(options: OpenOptions) -> OpenOptions {
    options.on_unlocked(Arc::new(warn_of_no_locks))
}

/// Warns once for each file: commands open some of them more than once.
pub(crate) fn warn_of_no_locks(path: &Path) {
    static WARNED_OF: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    let mut known = WARNED_OF.lock().unwrap_or_else(PoisonError::into_inner);
    if known.iter().any(|known| known == path) {
        return;
    }
    known.push(path.to_owned());
    warn(&format!(
        "the file system of '{}' has no locks, so other programs are not kept from writing to it \
         at the same time; add --locking off if none does",
        printable(&path.to_string_lossy())
    ));
}

/// Returns the error of a reading command, with the option that helps if another program writes.
pub(crate) fn advise_sharing(error: impl Into<CommandError>) -> CommandError {
    let error = error.into();
    match error.could_be_shared() {
        true => CommandError::new(format!("{error}, or add -U (--force-share) to read it anyway")),
        false => error,
    }
}
