//! Puts images on stores: in parts, resumable, and visible only when complete.

mod job;
mod options;
mod orphans;
mod record;
mod target;

use tokio::sync::mpsc;

use self::job::{Job, unreadable};
pub use self::options::{PushOptions, PushSource, Pushed};
use self::record::Record;
use self::target::Target;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::location::StoreUrl;
use crate::runtime::{LOOK_EVERY, boxed, runtime};
use crate::settings::StoreSettings;
use crate::store::{Bucket, key_path, s3};

/// Smallest part, in bytes; a multiple of it for images of more than 156 GiB.
const PART_LEN: u64 = 16 << 20;

/// Most parts of an object.
const PARTS_MAX: u64 = 10_000;

/// Largest object of S3, in bytes.
const OBJECT_MAX: u64 = 5 << 40;

/// Puts an image on a store. Blocks; `progress` is called on this thread with the bytes done.
///
/// The object appears when all parts are there. What an interrupted push sent is used by the next
/// one of the same image to the same address, if it is still the same.
///
/// # Errors
///
/// If the image cannot be read or changes, or the store fails or has such an object already.
pub fn push(
    source: &PushSource,
    url: &StoreUrl,
    settings: &StoreSettings,
    options: &PushOptions,
    mut progress: impl FnMut(u64),
    is_interrupted: &dyn Fn() -> bool,
) -> Result<Pushed> {
    let StoreUrl::S3 { bucket, key } = url else {
        let why = format!("cannot write to {url}: only objects of S3 stores (s3://) are written");
        return Err(StoreError::invalid(why));
    };
    if key.is_empty() || key.ends_with('/') {
        let why = format!("{url} does not name an object; write s3://{bucket}/key");
        return Err(StoreError::invalid(why));
    }
    let runtime = runtime().map_err(|error| {
        StoreError::new(StoreErrorKind::Local, format!("cannot start threads: {error}"))
    })?;
    let name = url.to_string();
    let bucket = s3(bucket, settings)?;
    let path = key_path(&name, key)?;
    let size = source.storage.len().map_err(|error| unreadable(source, &error))?;
    let part_len = part_len(size)?;
    let identity = format!("{} {name} {} {size} {part_len}", bucket.endpoint, source.name);
    let record = Record::open(options.records.as_deref(), &identity).ok_or_else(|| {
        let why =
            format!("'{}' is being put to {name} by another process; wait for it", source.name);
        StoreError::new(StoreErrorKind::Local, why)
    })?;
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let Bucket { store, completion, uploads, .. } = bucket;
    let target = Target { store, path, name, completion, uploads };
    let job = Job {
        target,
        source: source.clone(),
        options: options.clone(),
        size,
        part_len,
        done: sender,
    };
    let task = runtime.spawn(boxed(job.run(record)));
    while !task.is_finished() {
        std::thread::sleep(LOOK_EVERY);
        while let Ok(done) = receiver.try_recv() {
            progress(done);
        }
        if is_interrupted() {
            task.abort();
            // Its record is free for the next one then.
            let _ = runtime.block_on(task);
            let why = "the push was interrupted; the same command goes on with it";
            return Err(StoreError::new(StoreErrorKind::Interrupted, why));
        }
    }
    runtime.block_on(task).unwrap_or_else(|_| {
        Err(StoreError::new(StoreErrorKind::Unavailable, "the push was given up"))
    })
}

fn part_len(size: u64) -> Result<u64> {
    match size {
        0 => Err(StoreError::invalid("the image is empty; there is nothing to put on the store")),
        size if size > OBJECT_MAX => {
            Err(StoreError::invalid("the image is larger than an object may be, which is 5 TiB"))
        }
        size => Ok(size.div_ceil(PARTS_MAX).next_multiple_of(PART_LEN)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_largest_object_are_few_enough() {
        assert_eq!(part_len(1).unwrap(), PART_LEN);
        assert_eq!(part_len(PART_LEN * PARTS_MAX).unwrap(), PART_LEN);
        assert_eq!(part_len(PART_LEN * PARTS_MAX + 1).unwrap(), 2 * PART_LEN);
        assert!(OBJECT_MAX.div_ceil(part_len(OBJECT_MAX).unwrap()) <= PARTS_MAX);
        assert!(part_len(0).is_err() && part_len(OBJECT_MAX + 1).is_err());
    }
}
