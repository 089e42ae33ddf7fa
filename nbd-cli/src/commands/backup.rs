//! `nbd-cli backup`: full and incremental backups of a served disk into a chain of qcow2 files.

mod args;
mod operands;
mod report;
#[cfg(feature = "object-storage")]
mod repository;

use std::num::NonZeroUsize;

use nbd_jobs::{BackupOptions, BackupSource, JobContext, Leftover, Sharing, UnknownBase};

pub use self::args::{BackupArgs, Verify};
use self::report::BackupReport;
use crate::async_runtime::block_on;
use crate::error::{CommandError, Outcome};
use crate::shown::Shown;
use crate::signals;

pub(crate) fn run(mut args: BackupArgs) -> Result<Outcome, CommandError> {
    args.connection.check(args.requests.unwrap_or(NonZeroUsize::MIN))?;
    #[cfg(feature = "object-storage")]
    if args.repository.name.is_some() {
        return repository::run(&args);
    }
    args.assign_operands()?;
    let args = &args;
    if args.control.is_none() || args.source.is_some() {
        args.tls.check(&args.source)?;
    }
    let shown = Shown::new(args.summary.visibility());
    let (target, options) = (&args.target, options(args)?);
    let source = source(args)?;
    // Caught before there is a checkpoint: otherwise a signal would kill the process, and the
    // checkpoint would remain and cost space and time.
    signals::watch()?;
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let work = async { Ok(nbd_jobs::backup(&source, target, &options, &context).await?) };
    let result = block_on(work);
    shown.clear();
    let report = BackupReport::new(args, result?);
    if let Some(format) = args.summary.format() {
        report.print(format)?;
    }
    Ok(Outcome::Success)
}

/// Returns the source of the backup.
fn source(args: &BackupArgs) -> Result<BackupSource, CommandError> {
    match (&args.control, &args.source) {
        (Some(socket), uri) => Ok(BackupSource::Checkpoint {
            socket: socket.clone(),
            export: args.export.clone().unwrap_or_default(),
            uri: uri.clone(),
        }),
        (None, Some(uri)) => Ok(BackupSource::Export(uri.clone())),
        (None, None) => Err(CommandError::new("give the disk's URI, or --control")),
    }
}

/// Returns the options of the job.
fn options(args: &BackupArgs) -> Result<BackupOptions, CommandError> {
    let mut options = BackupOptions::default();
    options.connect = args.connection.options(&args.tls);
    options.requests = args.requests.unwrap_or(options.requests);
    options.bitmap.clone_from(&args.bitmap);
    options.base.clone_from(&args.base);
    options.unknown_base = if args.trust_base { UnknownBase::Trust } else { UnknownBase::Refuse };
    options.leftover = match (args.resume, args.restart) {
        (true, _) => Leftover::Resume,
        (_, true) => Leftover::Restart,
        _ => Leftover::Refuse,
    };
    options.verify = args.verified();
    options.policy = args.trust().policy();
    options.encryption = args.new_key()?;
    options.passphrases = args.keys.passphrases();
    options.locking = args.locks.locking();
    options.sharing = if args.share.force_share { Sharing::Shared } else { Sharing::Exclusive };
    Ok(options)
}
