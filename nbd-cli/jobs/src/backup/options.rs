//! What a backup is of, and how it is made.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::storage::FileStorage;
use imgfmt::{Access, Locking, OpenOptions, OpenPolicy};
use nbd_proto::NbdUri;

use crate::copy::check_concurrency;
use crate::files::open_file;
use crate::restore::Verify;
use crate::target::{self, Existing};
use crate::{ConnectOptions, JobContext, JobError};

/// Size of the clusters of a backup, in bytes.
pub(super) const CLUSTER_SIZE: u64 = 64 << 10;

/// What a backup is of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackupSource {
    /// An export, as it is: a disk that should not change while it is copied.
    Export(NbdUri),
    /// A disk that clients go on writing to, as it is at one moment: a checkpoint is begun through
    /// the control socket of its server (`nbd-cli serve --control`), copied, and ended with what
    /// came of that.
    Checkpoint {
        /// The control socket.
        socket: PathBuf,
        /// Name of the disk's export.
        export: String,
        /// Where the server can be reached, if not as it says itself.
        uri: Option<NbdUri>,
    },
}

/// What is done about a backup to the same target that was interrupted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leftover {
    /// It is an error.
    #[default]
    Refuse,
    /// The backup goes on where the former one ended, which is an error if there is none. Only
    /// right if the disk has not changed since; never for a [checkpoint](BackupSource::Checkpoint).
    Resume,
    /// It is discarded.
    Restart,
}

/// Whether a base is taken as right where that cannot be known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownBase {
    /// It is refused.
    #[default]
    Refuse,
    /// The caller knows that the bitmap began after it. A base that is known to be wrong is refused
    /// all the same.
    Trust,
}

/// Whether the files below a backup may be in use by others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// They are locked against writers.
    #[default]
    Exclusive,
    /// They are read while other programs may write to them.
    Shared,
}

/// How a backup is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackupOptions {
    /// How servers are reached.
    pub connect: ConnectOptions,
    /// Requests in flight: 1 to 4096. By default 32.
    pub requests: NonZeroUsize,
    /// Name of the bitmap of the server by which an incremental backup is made: only what is dirty
    /// in it is copied. For a full backup of a [checkpoint](BackupSource::Checkpoint), the bitmap
    /// that begins there.
    pub bitmap: Option<String>,
    /// The backup before this one, of which the new one is an overlay. Needs a bitmap.
    pub base: Option<PathBuf>,
    /// What is done about a base that may be the wrong one.
    pub unknown_base: UnknownBase,
    /// What is done about a backup that was interrupted.
    pub leftover: Leftover,
    /// What is read again at the end.
    pub verify: Verify,
    /// Which files the base may name, besides the backups below it. By default those in its
    /// directory and below.
    pub policy: OpenPolicy,
    /// How files are locked.
    pub locking: Locking,
    /// Whether the base may be in use by others.
    pub sharing: Sharing,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            connect: ConnectOptions::default(),
            requests: NonZeroUsize::new(32).unwrap_or(NonZeroUsize::MIN),
            bitmap: None,
            base: None,
            unknown_base: UnknownBase::Refuse,
            leftover: Leftover::Refuse,
            verify: Verify::Nothing,
            policy: OpenPolicy::new(),
            locking: Locking::Auto,
            sharing: Sharing::Exclusive,
        }
    }
}

/// What the parts of one backup share.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) source: &'a BackupSource,
    pub(super) target: &'a Path,
    pub(super) options: &'a BackupOptions,
    pub(super) context: &'a JobContext,
}

impl Work<'_> {
    /// Refuses what is out of range or contradicts itself.
    pub(super) fn check(&self) -> Result<(), JobError> {
        let options = self.options;
        check_concurrency(options.requests, &options.connect)?;
        if options.base.is_some() && options.bitmap.is_none() {
            return Err(JobError::invalid(
                "a base needs the bitmap that tells what has changed since (--bitmap)",
            ));
        }
        match self.source {
            BackupSource::Export(uri) => {
                options.connect.tls.check([uri])?;
                if options.bitmap.is_some() && options.base.is_none() {
                    return Err(JobError::invalid(
                        "--bitmap needs --base FILE, the backup before this one; a full backup takes \
                         neither",
                    ));
                }
            }
            BackupSource::Checkpoint { uri, .. } => {
                uri.iter().try_for_each(|uri| options.connect.tls.check([uri]))?;
                if options.leftover == Leftover::Resume {
                    return Err(JobError::invalid(
                        "the backup of a checkpoint cannot be resumed: what there is of it is of a moment \
                         that is gone",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether the target is a block device, which is overwritten.
    pub(super) fn is_on_device(&self) -> bool {
        matches!(target::look(self.target), Ok(Existing::BlockDevice))
    }

    /// Whether the server helps to tell whether the base is right.
    pub(super) fn has_control(&self) -> bool {
        matches!(self.source, BackupSource::Checkpoint { .. })
    }

    /// How images are opened.
    pub(super) fn open_options(&self) -> OpenOptions {
        let observer = Arc::clone(&self.context.observer);
        let told = move |path: &Path| observer.unlocked(path);
        let options = OpenOptions::new().locking(self.options.locking).on_unlocked(Arc::new(told));
        options.policy(self.options.policy.clone())
    }

    /// How a file is locked that is only read.
    pub(super) fn read_locking(&self) -> Locking {
        match self.options.sharing {
            Sharing::Exclusive => self.options.locking,
            Sharing::Shared => Locking::Shared,
        }
    }

    /// Opens a file itself for writing.
    pub(super) fn open_file(&self, path: &Path) -> Result<FileStorage, JobError> {
        open_file(path, Access::ReadWrite, self.options.locking, &*self.context.observer)
            .map_err(|error| JobError::image(crate::JobErrorKind::Destination, error))
    }
}
