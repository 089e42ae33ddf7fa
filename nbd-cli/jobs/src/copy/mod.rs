//! A copy from one place to another, and the parts of it that other jobs use.

pub(crate) mod again;
mod content;
pub(crate) mod destination;
pub(crate) mod dirty;
pub(crate) mod engine;
mod holes;
pub(crate) mod job;
mod options;
pub(crate) mod plan;
pub(crate) mod source;
mod stream;
pub(crate) mod verify;
#[doc(hidden)]
use std::sync::Arc;

use imgfmt::Format;

use self::destination::Destination;
use self::job::{Job, Settings};
pub(crate) use self::options::check_concurrency;
pub use self::options::{CopyOptions, Knowledge, Zeroes};
use self::plan::Extents;
use self::source::Source;
use crate::location::Location;
use crate::target::{Durable, device};
use crate::{JobContext, JobError};

/// What a copy did. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// Size of what was copied.
    pub size: u64,
    /// How much of that the source knew to be zero.
    pub holes: u64,
}

/// Copies a disk.
///
/// A local file as the destination grows as `NAME.partial` and gets its name when it is complete; a
/// file that was there is replaced then and stays as it was until then. Only where that is not
/// possible (it has other names, or its directory may not be written to) is it emptied first. A
/// server or device must be at least as large as the source; anything beyond that is left
/// unchanged. A device is marked as incomplete until everything is on stable storage.
///
/// What was written to a server since its last flush is written again if the connection was lost
/// meanwhile.
///
/// # Errors
///
/// If one side cannot be opened, read or written, if the source does not fit, if the options are
/// out of range, and if the job is cancelled. A new file is removed then.
///
/// # Cancel safety
///
/// Dropping the future ends the copy as an error does, but says nothing; a thread may still be at
/// work on one request. Use [`JobContext::cancellation`] to hear of it.
pub async fn copy(
    from: &Location,
    to: &Location,
    options: &CopyOptions,
    context: &JobContext,
) -> Result<Copied, JobError> {
    options.check()?;
    // The source first: what cannot be read must not cost anybody a destination.
    let (connect, knowledge) = (&options.connect, options.knowledge);
    let source = Source::open(from, connect, options.source_locking, knowledge, context).await?;
    warn_of_container(&source, context);
    let locking = options.destination_locking;
    let destination = Destination::open(to, connect, locking, &source, context).await?;
    let extents = match knowledge {
        Knowledge::Nothing => Extents::Unknown,
        Knowledge::Holes => source.extents(0),
    };
    let settings = Settings::of_copy(options, &source, &destination);
    let job = Arc::new(Job::new(&settings, source, destination, extents, context));
    let result = again::run(&job, options.durability == Durable::Now).await;
    result.map_err(|error| incomplete(from, to, &job.destination, &error))?;
    job.destination.complete(options.durability)?;
    job.source.close().await;
    job.destination.close().await;
    let progress = job.meter.progress();
    Ok(Copied { size: progress.done, holes: progress.holes })
}

/// Says that a file which is an image is copied with its container: that is rarely what is meant.
fn warn_of_container(source: &Source, context: &JobContext) {
    let Source::File { storage, path, .. } = source else { return };
    // What cannot be read now is said when it is copied.
    let format = Format::probe(&**storage).unwrap_or(Format::Raw);
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
        Location::File(path) if let Some(disk) = destination.device() => {
            format!("; {}", device::left_behind_on(path, &disk))
        }
        Location::File(_) if let Some(left) = destination.abandon() => format!("; {left}"),
        Location::File(path) => format!("; '{}' is incomplete", path.display()),
        Location::Nbd(uri) => format!("; the disk at {uri} is incomplete"),
        Location::Standard | Location::Null => String::new(),
    };
    error.in_words(format!("copying {from} failed: {error}{left}"))
}
