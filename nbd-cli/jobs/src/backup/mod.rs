//! Full and incremental backups of a served disk into a chain of qcow2 files.

mod below;
mod chain;
mod checkpoint;
mod job;
mod options;
mod partial;

use std::path::Path;

use self::chain::Base;
use self::checkpoint::Server;
pub use self::job::BackedUp;
use self::job::{Issued, run};
use self::options::Work;
pub use self::options::{BackupOptions, BackupSource, Leftover, Sharing, UnknownBase};
use crate::{JobContext, JobError};

/// Makes a backup of a disk.
///
/// The target is a new qcow2 file, or a block device that is overwritten. A full backup stands alone; an
/// incremental one ([`BackupOptions::base`], [`BackupOptions::bitmap`]) is an overlay of the backup before
/// it. Every backup says in its file which one it is, and a base that is known to be, or may be, another one
/// than that after which the bitmap began is refused.
///
/// While a backup runs it is `TARGET.partial`, and `TARGET.partial.json` says how far it is; when it is
/// complete it gets its name in one step.
///
/// # Errors
///
/// If the server or the control socket cannot be reached, if the base may be the wrong one, if the target
/// exists or cannot be written, if both sides differ when they are compared, if the options contradict each
/// other, and if the job is cancelled. What there is of the backup stays, for [`Leftover::Resume`]. A
/// checkpoint is ended with failure, so that nothing is forgotten that was dirty.
///
/// # Cancel safety
///
/// Dropping the future ends the backup as if the process had been killed: a checkpoint is rolled back by the
/// server, and `TARGET.partial` stays. Use [`JobContext::cancellation`] to hear of the end.
pub async fn backup(
    source: &BackupSource,
    target: &Path,
    options: &BackupOptions,
    context: &JobContext,
) -> Result<BackedUp, JobError> {
    let work = Work { source, target, options, context };
    work.check()?;
    refuse_existing(work)?;
    let base = options.base.as_deref().map(|path| Base::open(path, work)).transpose()?;
    match source {
        BackupSource::Export(uri) => run(work, uri, base.as_ref(), Issued::ours()?).await,
        BackupSource::Checkpoint { socket, export, uri } => {
            let server = Server { socket, export, uri: uri.as_ref() };
            checkpoint::backup(work, server, base.as_ref()).await
        }
    }
}

fn refuse_existing(work: Work<'_>) -> Result<(), JobError> {
    if work.is_on_device() {
        return match work.options.leftover == Leftover::Resume {
            true => Err(JobError::invalid(format!(
                "cannot resume: what is on the block device '{}' does not say how far it is; leave out \
                 --resume",
                work.target.display()
            ))),
            false => Ok(()),
        };
    }
    match work.target.symlink_metadata() {
        Ok(_) => Err(JobError::destination(format!(
            "'{}' exists already; every backup needs a file of its own",
            work.target.display()
        ))),
        Err(_) => Ok(()),
    }
}
