//! The source and the options of a backup.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::storage::FileStorage;
use imgfmt::{Access, Locking, NewKey, OpenOptions, OpenPolicy, Passphrase};
use nbd_proto::NbdUri;

use crate::connect::ConnectOptions;
use crate::copy::check_concurrency;
use crate::error::{JobError, JobErrorKind};
use crate::files::open_file;
use crate::observer::JobContext;
use crate::restore::Verify;
use crate::target::{self, Existing};

/// Cluster size of a backup, in bytes.
pub(super) const CLUSTER_SIZE: u64 = 64 << 10;

/// The source of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackupSource {
    /// An export in its current state: the disk should not change during the copy.
    Export(NbdUri),
    /// A disk in use, at one moment: a checkpoint is started through the control socket of its
    /// server (`nbd-cli serve --control`), copied, and ended with the result.
    Checkpoint {
        /// The control socket.
        socket: PathBuf,
        /// Name of the disk's export.
        export: String,
        /// Address of the server, if it differs from the one that the server reports.
        uri: Option<NbdUri>,
    },
}

/// The treatment of an interrupted backup to the same target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leftover {
    /// Report an error.
    #[default]
    Refuse,
    /// Resume where the interrupted backup ended; an error if there is none. Only valid if the disk
    /// has not changed since; never for a [checkpoint](BackupSource::Checkpoint).
    Resume,
    /// Discard it.
    Restart,
}

/// The treatment of a base whose correctness cannot be determined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownBase {
    /// Refuse it.
    #[default]
    Refuse,
    /// Accept it: the caller knows that the bitmap started after it. A base that is known to be
    /// wrong is still refused.
    Trust,
}

/// The locking of the files below a backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// They are locked against writers.
    #[default]
    Exclusive,
    /// They are read although other programs may write to them.
    Shared,
}

/// Options of a backup.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackupOptions {
    /// Connection options.
    pub connect: ConnectOptions,
    /// Requests in flight: 1 to 4096. By default 32.
    pub requests: NonZeroUsize,
    /// Name of the server's bitmap for an incremental backup: only its dirty ranges are copied. For
    /// a full backup of a [checkpoint](BackupSource::Checkpoint), the bitmap that starts there.
    pub bitmap: Option<String>,
    /// The previous backup, of which the new one is an overlay. Needs a bitmap.
    pub base: Option<PathBuf>,
    /// The treatment of a base that may be the wrong one.
    pub unknown_base: UnknownBase,
    /// The treatment of an interrupted backup.
    pub leftover: Leftover,
    /// The data to verify at the end.
    pub verify: Verify,
    /// The files that the base may name, besides the backups below it. By default those in its
    /// directory and below.
    pub policy: OpenPolicy,
    /// Encrypts the new backup with LUKS and this key. A backup on an encrypted base needs one.
    pub encryption: Option<NewKey>,
    /// The passphrases of encrypted files below the backup. That of the new one is tried as well.
    pub passphrases: Vec<Passphrase>,
    /// File locking.
    pub locking: Locking,
    /// Locking of the base.
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
            encryption: None,
            passphrases: Vec::new(),
            locking: Locking::Auto,
            sharing: Sharing::Exclusive,
        }
    }
}

/// Shared state of the parts of one backup.
#[derive(Clone, Copy)]
pub(super) struct BackupJob<'a> {
    pub(super) source: &'a BackupSource,
    pub(super) target: &'a Path,
    pub(super) options: &'a BackupOptions,
    pub(super) context: &'a JobContext,
}

impl BackupJob<'_> {
    /// Refuses options that are out of range or contradict each other.
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

    /// Returns whether the target is a block device, which is overwritten.
    pub(super) fn is_on_device(&self) -> bool {
        matches!(target::look(self.target), Ok(Existing::BlockDevice))
    }

    /// Returns whether the server helps to determine whether the base is right.
    pub(super) fn has_control(&self) -> bool {
        matches!(self.source, BackupSource::Checkpoint { .. })
    }

    /// Returns the options for opening images.
    pub(super) fn open_options(&self) -> OpenOptions {
        let observer = Arc::clone(&self.context.observer);
        let told = move |path: &Path| observer.unlocked(path);
        let mut options =
            OpenOptions::new().locking(self.options.locking).on_unlocked(Arc::new(told));
        options.passphrases.clone_from(&self.options.passphrases);
        let new = self.options.encryption.as_ref().map(NewKey::passphrase);
        options.passphrases.extend(new.cloned());
        options.policy(self.options.policy.clone())
    }

    /// Returns the lock of a file that is read only.
    pub(super) fn read_locking(&self) -> Locking {
        match self.options.sharing {
            Sharing::Exclusive => self.options.locking,
            Sharing::Shared => Locking::Shared,
        }
    }

    /// Opens a file itself for writing.
    pub(super) fn open_file(&self, path: &Path) -> Result<FileStorage, JobError> {
        open_file(path, Access::ReadWrite, self.options.locking, &*self.context.observer)
            .map_err(|error| JobError::image(JobErrorKind::Destination, error))
    }
}
