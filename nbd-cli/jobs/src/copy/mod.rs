//! A copy from one place to another, and its parts that other jobs use.

pub(crate) mod again;
pub(crate) mod block_sum;
pub(crate) mod content;
mod crew;
pub(crate) mod destination;
pub(crate) mod dirty;
pub(crate) mod engine;
mod holes;
pub(crate) mod job;
pub(crate) mod local_file;
mod options;
pub(crate) mod plan;
pub(crate) mod shared_plan;
pub(crate) mod source;
mod stream;
pub(crate) mod sum;
pub(crate) mod verify;
mod writer;
#[doc(hidden)]
use std::sync::Arc;

use imgfmt::Format;

use self::destination::Destination;
use self::job::{Job, Settings};
pub(crate) use self::options::check_concurrency;
pub use self::options::{CopyOptions, Knowledge, Zeroes};
use self::plan::Extents;
use self::source::Source;
use self::sum::Sum;
use crate::checksum::Checksum;
use crate::connect::refuse_same_export;
use crate::error::{JobError, JobErrorKind};
use crate::location::Location;
use crate::observer::JobContext;
use crate::target::{Durable, device};

/// The result of a copy. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Size of the copied disk.
    pub size: u64,
    /// Bytes that the source reported as zero.
    pub holes: u64,
    /// The checksum of what was copied, if it was asked for.
    pub checksum: Option<Checksum>,
}

/// Copies a disk.
///
/// A local file as the destination grows as `NAME.partial` and is renamed when it is complete; an
/// existing file stays unchanged until it is replaced then. Only if that is not possible (the file
/// has other names, or its directory is not writable) is it truncated first. A server or device
/// must be at least as large as the source; anything beyond that is left unchanged. A device is
/// marked as incomplete until everything is on stable storage.
///
/// Data written to a server since its last flush is written again if the connection was lost in
/// between.
///
/// # Errors
///
/// If one side cannot be opened, read or written, if both are one export, if the source does not
/// fit, if the checksum is not the expected one, if the options are out of range, and if the job is
/// cancelled. A new file is then removed.
///
/// # Cancel safety
///
/// Dropping the future ends the copy like an error, but reports nothing; a thread may still be
/// working on one request. To observe the end, use [`JobContext::cancellation`].
pub async fn copy(
    from: &Location,
    to: &Location,
    options: &CopyOptions,
    context: &JobContext,
) -> Result<Copied, JobError> {
    refuse_same_export(from.uri(), to.uri())?;
    options.check()?;
    // The source first: an unreadable source must not destroy a destination.
    let (connect, knowledge) = (&options.connect.on_lanes(), options.knowledge);
    let source = Source::open(from, connect, options.source_locking, knowledge, context).await?;
    warn_of_container(&source, context);
    let locking = options.destination_locking;
    let destination = Destination::open(to, connect, locking, &source, context).await?;
    let extents = match knowledge {
        Knowledge::Nothing => Extents::Unknown,
        Knowledge::Holes => source.extents(0),
    };
    let settings = Settings::of_copy(options, &connect.lanes, &source, &destination)?;
    let job = Arc::new(Job::new(settings, source, destination, extents, context));
    let result = again::run(&job, options.durability == Durable::Now).await;
    let summed = match result {
        Ok(()) => summed(&job, options.expected.as_ref()).await,
        Err(error) => Err(error),
    };
    let checksum = summed.map_err(|error| incomplete(from, to, &job.destination, &error))?;
    job.destination.complete(options.durability)?;
    job.source.close().await;
    job.destination.close().await;
    let progress = job.meter.progress();
    Ok(Copied { size: progress.done, holes: progress.holes, checksum })
}

/// Returns the checksum of what was copied, if there is one, after a comparison.
async fn summed(job: &Job, expected: Option<&Checksum>) -> Result<Option<Checksum>, JobError> {
    let Some(Sum::InOrder(sum)) = &job.sum else { return Ok(None) };
    let found = sum.finish().await?;
    match expected {
        Some(expected) if *expected != found => Err(JobError::new(
            JobErrorKind::Mismatch,
            format!(
                "the source has another {} than expected: {found}; it has changed or is damaged",
                found.algorithm().name()
            ),
        )),
        _ => Ok(Some(found)),
    }
}

/// Warns if a file to be copied byte for byte is an image: that is rarely intended.
fn warn_of_container(source: &Source, context: &JobContext) {
    let Source::File { storage, path, .. } = source else { return };
    // A read error is reported by the copy.
    let format = Format::probe(&**storage, Some(path)).unwrap_or(Format::Raw);
    if format != Format::Raw {
        let advice = match format.is_supported() {
            true => "; to copy the disk inside it, use 'nbd-cli image convert'",
            false => "",
        };
        context.observer.warning(&format!(
            "'{}' is a {} image, and its file is copied as it is, byte for byte{advice}",
            path.display(),
            format.description()
        ));
    }
}

fn incomplete(
    from: &Location,
    to: &Location,
    destination: &Destination,
    error: &JobError,
) -> JobError {
    let left = match to {
        Location::File(path) => {
            if let Some(disk) = destination.device() {
                format!("; {}", device::left_behind_on(path, &disk))
            } else if let Some(left) = destination.abandon() {
                format!("; {left}")
            } else {
                format!("; '{}' is incomplete", path.display())
            }
        }
        Location::Nbd(uri) => format!("; the disk at {uri} is incomplete"),
        Location::Object(_) | Location::Standard | Location::Null => String::new(),
    };
    error.in_words(format!("copying {from} failed: {error}{left}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_export_is_not_copied_to_itself() {
        let disk: Location = "nbd+unix:///disk?socket=/nonexistent".parse().unwrap();
        let copied = copy(&disk, &disk, &CopyOptions::default(), &JobContext::default()).await;
        let error = copied.unwrap_err().to_string();
        assert!(error.contains("is the source and the destination"), "{error}");
    }
}
