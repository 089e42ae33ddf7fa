//! Full and incremental backups of a served disk into a chain of qcow2 files.

mod below;
mod chain;
pub(crate) mod checkpoint;
mod job;
mod options;
mod partial;

use std::path::Path;

use self::chain::Base;
#[cfg(feature = "object-storage")]
pub(crate) use self::chain::chain_problem;
use self::checkpoint::Server;
pub use self::job::BackedUp;
#[cfg(feature = "object-storage")]
pub(crate) use self::job::connect_to_disk;
#[cfg(feature = "object-storage")]
pub(crate) use self::job::context_of;
use self::job::{Issued, run};
use self::options::BackupJob;
pub use self::options::{BackupOptions, BackupSource, Leftover, Sharing, UnknownBase};
use crate::error::JobError;
use crate::observer::JobContext;

/// Makes a backup of a disk.
///
/// The target is a new qcow2 file, or a block device that is overwritten. A full backup stands
/// alone; an incremental one ([`BackupOptions::base`], [`BackupOptions::bitmap`]) is an overlay of
/// the previous backup. Every backup records its identity in its file. A base that is not, or may
/// not be, the backup after which the bitmap started is refused.
///
/// A running backup is `TARGET.partial`, with its progress in `TARGET.partial.json`; when complete
/// it is renamed in one step.
///
/// # Example
///
/// A full backup of an export that does not change meanwhile. Incremental backups of a disk in use
/// have a [`BackupSource::Checkpoint`], a bitmap and a base, as in `examples/backup.rs`.
///
/// ```
/// use nbd_jobs::{BackupOptions, BackupSource, JobContext, backup};
///
/// # let directory = tempfile::tempdir()?;
/// # let target = directory.path().join("full.qcow2");
/// # tokio::runtime::Runtime::new()?.block_on(async move {
/// # let exports = nbd_server::ExportRegistry::new();
/// # let disk = std::sync::Arc::new(nbd_server::export::MemoryExport::new(1 << 20));
/// # exports.add("disk", nbd_server::export::ExportEntry::new(disk))?;
/// # let mut server = nbd_server::Server::new(Default::default(), exports);
/// # let address = nbd_server::ListenAddress::Tcp("127.0.0.1:0".to_owned());
/// # let uri = server.listen(&address).await?.remove(0).uri("disk");
/// # let mut server = server.start();
/// let source = BackupSource::Export(uri); // such as "nbd://localhost/disk".parse()?
/// let made = backup(&source, &target, &BackupOptions::default(), &JobContext::default()).await?;
/// assert_eq!((made.size, made.zero), (1 << 20, 1 << 20));
/// # server.shutdown();
/// # server.wait().await?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// If the server or the control socket cannot be reached, if the base may be the wrong one, if the
/// target exists or cannot be written, if verification finds a difference, if the options
/// contradict each other, and if the job is cancelled. The partial backup is kept for
/// [`Leftover::Resume`]. A checkpoint is ended as failed, so that no dirty bits are lost.
///
/// # Cancel safety
///
/// Dropping the future ends the backup like killing the process: the server rolls back a
/// checkpoint, and `TARGET.partial` is kept. To observe the end, use [`JobContext::cancellation`].
pub async fn backup(
    source: &BackupSource,
    target: &Path,
    options: &BackupOptions,
    context: &JobContext,
) -> Result<BackedUp, JobError> {
    let options = &BackupOptions { connect: options.connect.on_lanes(), ..options.clone() };
    let work = BackupJob { source, target, options, context };
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

fn refuse_existing(work: BackupJob<'_>) -> Result<(), JobError> {
    if work.is_on_device() {
        return match work.options.leftover == Leftover::Resume {
            true => Err(JobError::invalid(format!(
                "cannot resume: the block device '{}' has no record of its progress; leave out \
                 --resume",
                work.target.display()
            ))),
            false => Ok(()),
        };
    }
    match work.target.symlink_metadata() {
        Ok(_) if work.target.is_dir() => Err(JobError::destination(format!(
            "'{}' is a directory; for a backup in a repository add --name NAME, otherwise give the \
             name of a new file",
            work.target.display()
        ))),
        Ok(_) => Err(JobError::destination(format!(
            "'{}' exists already; every backup needs a file of its own",
            work.target.display()
        ))),
        Err(_) => Ok(()),
    }
}
