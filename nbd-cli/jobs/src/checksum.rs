//! [`checksum()`]: a digest of what a guest sees of a disk.
//!
//! The digest is that of the whole disk as a raw file, so that it has to be computed in order.
//! Threads read ahead of it; holes are not read.

use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use imgfmt::{ExtentKind, GuestOffset, GuestRange, Image};

pub use crate::digest::{Checksum, ChecksumAlgorithm};
use crate::digest::{Digest, Piece};
use crate::error::{JobError, JobErrorKind};
use crate::observer::{JobContext, Meter, Phase};

/// Bytes that are read at a time.
const READ_LEN: u64 = 1 << 20;
/// Bytes of a hole that the digest is given at a time: a bound on the time between two looks at the
/// cancellation.
const ZEROES_LEN: u64 = 64 << 20;
/// Threads that read.
const THREADS: usize = 4;
/// Reads, or ranges of zeroes, that are ahead of the digest.
const AHEAD: usize = 2 * THREADS;

/// A read, and the receiver of its bytes.
struct ReadAhead {
    range: GuestRange,
    done: Sender<Result<Piece, JobError>>,
}

/// The next bytes of the disk.
enum Next {
    Zeroes(u64),
    Data(Receiver<Result<Piece, JobError>>),
}

/// Computes the digest of a disk as a guest sees it, whatever its format. Blocks, so asynchronous
/// tasks must not call it.
///
/// # Errors
///
/// If the image cannot be read, or the job is cancelled.
pub fn checksum(
    image: &Image,
    algorithm: ChecksumAlgorithm,
    context: &JobContext,
) -> Result<Checksum, JobError> {
    let mut hasher = Digest::new(algorithm)?;
    let meter = Meter::begin(context, Phase::Reading, Some(image.size()), 0);
    let (sender, receiver) = mpsc::channel::<ReadAhead>();
    let receiver = Mutex::new(receiver);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| read(image, algorithm, &receiver));
        }
        // Dropped at the end, also after an error: the threads end then.
        let sender = sender;
        digest(image, &sender, &mut hasher, &meter, context)
    })?;
    hasher.finish()
}

/// Reads until there is no more to read.
fn read(image: &Image, algorithm: ChecksumAlgorithm, reads: &Mutex<Receiver<ReadAhead>>) {
    loop {
        let next = reads.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(ReadAhead { range, done }) = next else { return };
        // At most `READ_LEN`.
        let mut buffer = vec![0; usize::try_from(range.length()).unwrap_or(0)];
        let read = image.read_at(range.offset(), &mut buffer).map_err(unreadable);
        let piece = read.and_then(|()| algorithm.prepare(range.offset().bytes(), buffer.into()));
        // After an error there is no receiver.
        let _ = done.send(piece);
    }
}

/// Passes the whole disk to the digest.
fn digest(
    image: &Image,
    reads: &Sender<ReadAhead>,
    hasher: &mut Digest,
    meter: &Meter,
    context: &JobContext,
) -> Result<(), JobError> {
    let mut ahead: VecDeque<Next> = VecDeque::with_capacity(AHEAD);
    for extent in image.extents(image.whole()) {
        let extent = extent.map_err(unreadable)?;
        let (mut at, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
        while at < end {
            context
                .cancellation
                .of_image_jobs()
                .check()
                .map_err(|error| JobError::new(JobErrorKind::Interrupted, error.to_string()))?;
            let next = if extent.kind == ExtentKind::Data {
                // Reads begin at multiples of their size, as clusters do.
                let length = (READ_LEN - at % READ_LEN).min(end - at);
                let (done, bytes) = mpsc::channel();
                // The threads are there as long as this sender.
                let _ = reads.send(ReadAhead { range: range(at, length)?, done });
                at += length;
                Next::Data(bytes)
            } else {
                let length = ZEROES_LEN.min(end - at);
                at += length;
                Next::Zeroes(length)
            };
            ahead.push_back(next);
            if ahead.len() >= AHEAD
                && let Some(first) = ahead.pop_front()
            {
                take(first, hasher, meter)?;
            }
        }
    }
    ahead.into_iter().try_for_each(|next| take(next, hasher, meter))
}

/// Passes the next bytes to the digest.
fn take(next: Next, hasher: &mut Digest, meter: &Meter) -> Result<(), JobError> {
    match next {
        Next::Zeroes(length) => {
            hasher.add(&Piece::Zeroes(length))?;
            meter.add(length, length);
        }
        Next::Data(bytes) => {
            let lost = |_| {
                let message = "a thread that reads the disk has failed";
                JobError::new(JobErrorKind::Internal, message)
            };
            let piece = bytes.recv().map_err(lost)??;
            hasher.add(&piece)?;
            meter.add(piece.length(), 0);
        }
    }
    Ok(())
}

fn range(offset: u64, length: u64) -> Result<GuestRange, JobError> {
    GuestRange::new(GuestOffset::new(offset), length)
        .ok_or_else(|| JobError::source("the disk is larger than any file can be"))
}

#[allow(clippy::needless_pass_by_value)] // For map_err.
fn unreadable(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Source, error)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use imgfmt::storage::MemoryStorage;
    use imgfmt::{Durability, Format, HostOffset, OpenOptions, Storage as _};

    use super::*;

    fn disk() -> Image {
        let storage = Arc::new(MemoryStorage::new((3 << 20) + 5));
        storage.write_at(HostOffset::new(1 << 20), &[7; 70_000], Durability::Cached).unwrap();
        Image::from_storage(storage, &OpenOptions::new().format(Format::Raw)).unwrap()
    }

    #[test]
    fn the_digest_is_that_of_the_bytes() {
        let mut bytes = vec![0; (3 << 20) + 5];
        bytes[1 << 20..][..70_000].fill(7);
        let expected = openssl::sha::sha256(&bytes).map(|byte| format!("{byte:02x}")).concat();
        let algorithm = ChecksumAlgorithm::Sha256;
        let found = checksum(&disk(), algorithm, &JobContext::default()).unwrap();
        assert_eq!(found.to_string(), expected);
        assert_eq!(algorithm.parse(&expected.to_uppercase()).unwrap(), found);
        assert!(algorithm.parse(&expected[1..]).is_err());
    }

    #[test]
    fn a_cancelled_checksum_ends_with_the_reason() {
        let context = JobContext::default();
        context.cancellation.cancel("interrupted by SIGINT");
        let error = checksum(&disk(), ChecksumAlgorithm::Sha512, &context).unwrap_err();
        assert_eq!(error.kind(), JobErrorKind::Interrupted);
        assert_eq!(error.to_string(), "interrupted by SIGINT");
    }
}
