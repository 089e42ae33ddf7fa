//! Restores a backup, or any other image, to a file, a device or a server.

mod new;
mod options;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use imgfmt::{Format, Image};
use nbd_client::ZeroMode;
use nbd_proto::wire::TransmissionFlags;

use self::new::{New, is_new};
pub use self::options::{Check, RestoreOptions, Verify};
use crate::copy::destination::Destination;
use crate::copy::job::{Job, Settings, ZeroPolicy};
use crate::copy::source::Source;
use crate::copy::sum::{OfLayers, Sum};
use crate::copy::verify::Verification;
use crate::copy::{again, check_concurrency};
use crate::error::{JobError, JobErrorKind};
use crate::layers::{self, Checked};
use crate::location::Location;
use crate::observer::JobContext;
use crate::target::device;
use crate::tasks;

/// Size of a request, in bytes.
const REQUEST_SIZE: u64 = 512 << 10;
/// Unit of zero detection, and a multiple of qcow2's sector size, in bytes.
const CLUSTER_SIZE: u64 = 64 << 10;

/// The result of a restore. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// Size of the disk.
    pub size: u64,
    /// Bytes read and written.
    pub copied: u64,
    /// Bytes known to be zero.
    pub zero: u64,
    /// Bytes compared, if the restore was verified.
    pub verified: Option<u64>,
    /// Files of the chain that hold what the backups put into them.
    pub checked: usize,
    /// Files of the chain about which that is not known; 0 without a check.
    pub unchecked: usize,
}

/// Restores the disk in an image: the newest file of a chain of backups represents the whole disk.
///
/// A file as the destination must not exist yet: it grows as `NAME.partial` and is renamed when it
/// is complete. A device or a server's disk is overwritten and must be at least as large; a device
/// is marked as incomplete until everything is written.
///
/// # Errors
///
/// If the image cannot be opened or read, if a file of it holds something else than a backup
/// recorded, if the destination exists, is too small or cannot be
/// written, if verification finds a difference, if the options are out of range, and if the job is
/// cancelled. A new file is then removed.
///
/// # Cancel safety
///
/// As for [`copy()`](crate::copy()).
pub async fn restore(
    path: &Path,
    to: &Location,
    options: &RestoreOptions,
    context: &JobContext,
) -> Result<Restored, JobError> {
    let image = Image::open(path, &options.image);
    let image = image.map_err(|error| JobError::opening(JobErrorKind::Source, error))?;
    restore_image(image, &path.display().to_string(), to, options, context).await
}

/// Restores the disk in an open image, such as a backup in a repository; `name` is its name in
/// messages. Otherwise as [`restore()`].
///
/// # Errors
///
/// As [`restore()`].
///
/// # Cancel safety
///
/// As [`restore()`].
pub async fn restore_image(
    image: Image,
    name: &str,
    to: &Location,
    options: &RestoreOptions,
    context: &JobContext,
) -> Result<Restored, JobError> {
    check_concurrency(options.requests, &options.connect)?;
    if matches!(to, Location::Null) && options.verify != Verify::Nothing {
        return Err(JobError::invalid(
            "null: keeps nothing that could be verified; leave out --verify",
        ));
    }
    let options = &RestoreOptions { connect: options.connect.on_lanes(), ..options.clone() };
    let is_new = match to {
        Location::File(path) => is_new(path)?,
        Location::Nbd(_) | Location::Null => false,
        Location::Standard | Location::Object(_) => {
            return Err(JobError::invalid(
                "a backup is restored to a file, a device or an NBD URI, or checked with null:",
            ));
        }
    };
    match (options.format, to) {
        (Format::Raw, _) | (Format::Qcow2, Location::File(_)) => {}
        (Format::Qcow2, _) => {
            return Err(JobError::invalid(
                "--output-format qcow2 is for files and devices; a server gets the disk as it is",
            ));
        }
        (other, _) => {
            return Err(JobError::invalid(format!(
                "a backup is not restored to a {} image; restore it to raw or qcow2, and convert \
                 that with 'nbd-cli image convert'",
                other.description()
            )));
        }
    }
    let source = Source::image(Arc::new(image));
    if let Location::File(path) = to {
        device::refuse_of_source(path, &source.files())?;
    }
    let size = source.size().unwrap_or_default();
    let mut new = New::begin(to, options, size, is_new, context)?;
    let result = match new.open(to, options, &source, context).await {
        Ok(destination) => fill_and_verify(to, options, source, destination, &new, context).await,
        Err(error) => Err(error),
    };
    let Filled { counts: [copied, zero], verified, checked: Checked { files, without_sum } } =
        result.map_err(|error| {
            let left = new.left_behind(to);
            error.in_words(format!("restoring '{name}' failed: {error}; {left}"))
        })?;
    new.complete(to)?;
    let (checked, unchecked) = (files, without_sum);
    Ok(Restored { size, copied, zero, verified, checked, unchecked })
}

async fn fill_and_verify(
    to: &Location,
    options: &RestoreOptions,
    source: Source,
    destination: Destination,
    new: &New,
    context: &JobContext,
) -> Result<Filled, JobError> {
    let Source::Image { image, .. } = &source else {
        return Err(JobError::source("only an image can be restored"));
    };
    let (image, size) = (image.clone(), source.size().unwrap_or_default());
    let zeroes = match destination.is_zero() {
        true => ZeroPolicy::Skip,
        false => ZeroPolicy::Write(ZeroMode::MayUnmap),
    };
    let is_image = matches!(destination, Destination::Image { .. });
    let unit = destination.alignment();
    let settings = Settings {
        requests: options.requests.get(),
        request_size: REQUEST_SIZE,
        unit: if is_image { CLUSTER_SIZE } else { unit },
        zeroes,
        sparse: Some(if is_image { CLUSTER_SIZE } else { unit.max(4096) }),
        start: 0,
        lanes: options.connect.lanes.clone(),
        sum: (options.check == Check::Recorded).then(|| Sum::OfLayers(OfLayers::new(size))),
    };
    let extents = source.extents(0);
    let job = Arc::new(Job::new(settings, source, destination, extents, context));
    // A server without FLUSH offers nothing better.
    let flushes = match &job.destination {
        Destination::Nbd { client, .. } => {
            client.info().flags.contains(TransmissionFlags::SEND_FLUSH)
        }
        _ => true,
    };
    again::run(&job, flushes).await?;
    let counts = [&job.counts().data, &job.counts().zero].map(|n| n.load(Ordering::Relaxed));
    let job = Arc::into_inner(job).ok_or_else(|| {
        JobError::new(JobErrorKind::Internal, "a task of the restore has not ended")
    })?;
    job.destination.close().await;
    job.destination.close_image()?;
    let checked = match job.sum {
        Some(Sum::OfLayers(sum)) => check(&image, sum, options, context).await?,
        _ => Checked::default(),
    };
    let verified = match options.verify {
        Verify::Nothing => None,
        Verify::Copied | Verify::All => Some(verify(to, options, new, image, context).await?),
    };
    Ok(Filled { counts, verified, checked })
}

/// What was written, before it counts.
struct Filled {
    counts: [u64; 2],
    verified: Option<u64>,
    checked: Checked,
}

/// Checks the files of the chain.
async fn check(
    image: &Arc<Image>,
    sum: OfLayers,
    options: &RestoreOptions,
    context: &JobContext,
) -> Result<Checked, JobError> {
    let (image, open, context) = (image.clone(), options.image.clone(), context.clone());
    let check = move || layers::check_chain(&image, &sum, &open, &context);
    let checked = tasks::spawn_blocking(check).await;
    let checked = checked.map_err(|error| JobError::given_up("read", &error))?;
    checked.map_err(|error| match error.kind() {
        JobErrorKind::Mismatch => {
            let words = format!("{error}, or add --no-check to restore what there is");
            error.in_words(words)
        }
        _ => error,
    })
}

async fn verify(
    to: &Location,
    options: &RestoreOptions,
    new: &New,
    image: Arc<Image>,
    context: &JobContext,
) -> Result<u64, JobError> {
    let copy = new.reopen(to, options, context).await?;
    let unit = copy.alignment();
    let source = Source::image(image);
    let extents = source.extents(0);
    let verification = Arc::new(Verification::new(source, copy, unit, extents, context));
    let result = verification.run(options.requests.get()).await;
    verification.copy.close().await;
    result
}
