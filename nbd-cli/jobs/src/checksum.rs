//! [`checksum()`]: a digest of what a guest sees of a disk.
//!
//! The digest is that of the whole disk as a raw file, so that it has to be computed in order.
//! Threads read ahead of it; holes are not read.

use std::collections::VecDeque;
use std::fmt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use imgfmt::{ExtentKind, GuestOffset, GuestRange, Image};
use openssl::hash::{Hasher, MessageDigest};

use crate::error::{JobError, JobErrorKind};
use crate::observer::{JobContext, Meter, Phase};
use crate::text::printable;

/// Bytes that are read at a time.
const READ_LEN: u64 = 1 << 20;
/// Threads that read.
const THREADS: usize = 4;
/// Reads, or ranges of zeroes, that are ahead of the digest.
const AHEAD: usize = 2 * THREADS;
/// Bytes of zeroes that the digest is given at a time.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// The digests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChecksumAlgorithm {
    /// SHA-256, of 64 digits.
    #[default]
    Sha256,
    /// SHA-512, of 128 digits.
    Sha512,
}

impl ChecksumAlgorithm {
    /// Returns its name in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn digest(self) -> MessageDigest {
        match self {
            Self::Sha256 => MessageDigest::sha256(),
            Self::Sha512 => MessageDigest::sha512(),
        }
    }

    /// Parses a checksum in hexadecimal, in upper or lower case.
    ///
    /// # Errors
    ///
    /// A sentence, if it does not have the digits of this algorithm.
    pub fn parse(self, text: &str) -> Result<Checksum, JobError> {
        let digits = 2 * self.digest().size();
        if text.len() != digits || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(JobError::invalid(format!(
                "'{}' is not a {}: it has {digits} hexadecimal digits",
                printable(text),
                self.name()
            )));
        }
        Ok(Checksum { algorithm: self, digits: text.to_ascii_lowercase() })
    }
}

/// The digest of a disk. It is displayed in hexadecimal, in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    algorithm: ChecksumAlgorithm,
    digits: String,
}

impl Checksum {
    /// Returns the algorithm.
    #[must_use]
    pub fn algorithm(&self) -> ChecksumAlgorithm {
        self.algorithm
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.digits)
    }
}

/// A read, and the receiver of its bytes.
struct ReadAhead {
    range: GuestRange,
    done: Sender<imgfmt::Result<Vec<u8>>>,
}

/// The next bytes of the disk.
enum Next {
    Zeroes(u64),
    Data(u64, Receiver<imgfmt::Result<Vec<u8>>>),
}

/// Computes the digest of a disk as a guest sees it: the one of the disk as a raw file. Blocks, so
/// asynchronous tasks must not call it.
///
/// # Errors
///
/// If the image cannot be read, or the job is cancelled.
pub fn checksum(
    image: &Image,
    algorithm: ChecksumAlgorithm,
    context: &JobContext,
) -> Result<Checksum, JobError> {
    let mut hasher = Hasher::new(algorithm.digest()).map_err(|error| {
        let message = format!("OpenSSL lacks {}: {error}", algorithm.name());
        JobError::new(JobErrorKind::Internal, message)
    })?;
    let meter = Meter::begin(context, Phase::Reading, Some(image.size()), 0);
    let (sender, receiver) = mpsc::channel::<ReadAhead>();
    let receiver = Mutex::new(receiver);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| read(image, &receiver));
        }
        // Dropped at the end, also after an error: the threads end then.
        let sender = sender;
        digest(image, &sender, &mut hasher, &meter, context)
    })?;
    let digest = hasher.finish().map_err(|error| failed(&error))?;
    let digits = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Checksum { algorithm, digits })
}

/// Reads until there is no more to read.
fn read(image: &Image, reads: &Mutex<Receiver<ReadAhead>>) {
    loop {
        let next = reads.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(ReadAhead { range, done }) = next else { return };
        // At most `READ_LEN`.
        let mut buffer = vec![0; usize::try_from(range.length()).unwrap_or(0)];
        let read = image.read_at(range.offset(), &mut buffer).map(|()| buffer);
        // After an error there is no receiver.
        let _ = done.send(read);
    }
}

/// Passes the whole disk to the digest.
fn digest(
    image: &Image,
    reads: &Sender<ReadAhead>,
    hasher: &mut Hasher,
    meter: &Meter,
    context: &JobContext,
) -> Result<(), JobError> {
    let whole = range(0, image.size())?;
    let mut ahead: VecDeque<Next> = VecDeque::with_capacity(AHEAD);
    for extent in image.extents(whole) {
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
                Next::Data(length, bytes)
            } else {
                let length = end - at;
                at = end;
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
fn take(next: Next, hasher: &mut Hasher, meter: &Meter) -> Result<(), JobError> {
    match next {
        Next::Zeroes(length) => {
            zeroes(hasher, length)?;
            meter.add(length, length);
        }
        Next::Data(length, bytes) => {
            let lost = |_| {
                let message = "a thread that reads the disk has failed";
                JobError::new(JobErrorKind::Internal, message)
            };
            let bytes = bytes.recv().map_err(lost)?.map_err(unreadable)?;
            hasher.update(&bytes).map_err(|error| failed(&error))?;
            meter.add(length, 0);
        }
    }
    Ok(())
}

fn zeroes(hasher: &mut Hasher, mut length: u64) -> Result<(), JobError> {
    while length > 0 {
        let count = length.min(ZEROES.len() as u64);
        let bytes = ZEROES.get(..usize::try_from(count).unwrap_or(0)).unwrap_or_default();
        hasher.update(bytes).map_err(|error| failed(&error))?;
        length -= count;
    }
    Ok(())
}

fn range(offset: u64, length: u64) -> Result<GuestRange, JobError> {
    GuestRange::new(GuestOffset::new(offset), length)
        .ok_or_else(|| JobError::source("the disk is larger than any file can be"))
}

fn failed(error: &openssl::error::ErrorStack) -> JobError {
    JobError::new(JobErrorKind::Internal, format!("OpenSSL cannot compute the digest: {error}"))
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
