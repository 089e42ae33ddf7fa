//! `nbd-cli checksum`: a digest of what a guest sees of a disk.
//!
//! The digest is that of the whole disk as a raw file, so that it has to be computed in order.
//! Threads read ahead of it; holes are not read.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use clap::{Args, ValueEnum};
use imgfmt::{ExtentKind, GuestOffset, GuestRange, Image};
use openssl::hash::{Hasher, MessageDigest};
use serde::Serialize;

use super::image::open::{TrustArgs, options};
use super::image::place::Place;
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable};
use crate::progress::{Progress, ProgressArgs};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli checksum disk.qcow2
  nbd-cli checksum --snapshot monday disk.qcow2
  nbd-cli checksum nbd://localhost/disk
  nbd-cli checksum --expect \"$(nbd-cli checksum disk.qcow2 | cut -d' ' -f1)\" nbd://backup/disk

The digest covers the disk as a guest sees it, backing files included. It is the same for every
format, and the one that sha256sum prints for the disk as a raw file. Holes are not read.";

/// Bytes that are read at a time.
const PIECE: u64 = 1 << 20;
/// Threads that read.
const THREADS: usize = 4;
/// Pieces, or ranges of zeroes, that are ahead of the digest.
const AHEAD: usize = 2 * THREADS;
/// Bytes of zeroes that the digest is given at a time.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Arguments of `nbd-cli checksum`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ChecksumArgs {
    /// An image: a file, or an export as an NBD URI.
    pub source: OsString,

    /// The digest.
    #[arg(short, long, value_name = "DIGEST", value_enum, default_value = "sha256")]
    pub algorithm: Algorithm,

    /// Succeed only if the digest is this one, in hexadecimal.
    #[arg(long, value_name = "HEX")]
    pub expect: Option<String>,

    /// Format of the image; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Read this internal snapshot, given by name or id, instead of the active state.
    #[arg(short, long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub progress: ProgressArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub trust: TrustArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

/// The digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    /// SHA-256, of 64 digits.
    Sha256,
    /// SHA-512, of 128 digits.
    Sha512,
}

impl Algorithm {
    fn name(self) -> &'static str {
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
}

#[derive(Serialize)]
struct Report<'a> {
    source: &'a str,
    size: u64,
    algorithm: &'a str,
    checksum: &'a str,
}

pub(crate) fn run(args: &ChecksumArgs) -> Result<Outcome, CommandError> {
    let expected = args.expect.as_deref().map(|text| parse_expected(text, args.algorithm));
    let expected = expected.transpose()?;
    let place = Place::parse_one(&args.source, &args.server, &args.trust)?;
    let mut options = args.share.apply(options(args.format, &args.trust));
    options = options.policy(args.trust.policy_with(&args.server));
    if let Some(snapshot) = &args.snapshot {
        options = options.snapshot(snapshot);
    }
    let image = place.open_or_name(&options, &args.server, "--format raw");
    let image = image.map_err(advise_sharing)?;
    let progress = Progress::new(args.progress.visibility(), Some(image.size()));
    let checksum = checksum(&image, args.algorithm, &progress);
    progress.clear();
    let checksum = checksum?;
    let source = args.source.to_string_lossy();
    if let Some(expected) = expected
        && expected != checksum
    {
        return Err(CommandError::new(format!(
            "the disk '{}' has another {} than expected: {checksum}; it has changed or is damaged",
            printable(&source),
            args.algorithm.name()
        )));
    }
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Text => output.line(&format!("{checksum}  {}", printable(&source)))?,
        ReportFormat::Json => output.json(&Report {
            source: &source,
            size: image.size(),
            algorithm: args.algorithm.name(),
            checksum: &checksum,
        })?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn parse_expected(text: &str, algorithm: Algorithm) -> Result<String, CommandError> {
    let digits = 2 * algorithm.digest().size();
    if text.len() != digits || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(CommandError::new(format!(
            "'{}' is not a {}: it has {digits} hexadecimal digits",
            printable(text),
            algorithm.name()
        )));
    }
    Ok(text.to_ascii_lowercase())
}

/// A piece to be read, and the place of its bytes.
struct Job {
    range: GuestRange,
    done: Sender<imgfmt::Result<Vec<u8>>>,
}

/// The next bytes of the disk.
enum Next {
    Zeroes(u64),
    Data(u64, Receiver<imgfmt::Result<Vec<u8>>>),
}

fn checksum(
    image: &Image,
    algorithm: Algorithm,
    progress: &Progress,
) -> Result<String, CommandError> {
    let mut hasher = Hasher::new(algorithm.digest()).map_err(|error| {
        CommandError::new(format!("OpenSSL lacks {}: {error}", algorithm.name()))
    })?;
    let (sender, receiver) = mpsc::channel::<Job>();
    let receiver = Mutex::new(receiver);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| read(image, &receiver));
        }
        // Dropped at the end, also after an error: the threads end then.
        let sender = sender;
        digest(image, &sender, &mut hasher, progress)
    })?;
    let checksum = hasher.finish().map_err(|error| failed(&error))?;
    Ok(checksum.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Reads pieces until there are no more.
fn read(image: &Image, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { range, done }) = job else { return };
        // At most `PIECE`.
        let mut buffer = vec![0; usize::try_from(range.length()).unwrap_or(0)];
        let read = image.read_at(range.offset(), &mut buffer).map(|()| buffer);
        // After an error there is no receiver.
        let _ = done.send(read);
    }
}

/// Passes the whole disk to the digest.
fn digest(
    image: &Image,
    jobs: &Sender<Job>,
    hasher: &mut Hasher,
    progress: &Progress,
) -> Result<(), CommandError> {
    let whole = range(0, image.size())?;
    let mut ahead: VecDeque<Next> = VecDeque::with_capacity(AHEAD);
    let (mut done, mut holes) = (0, 0);
    let mut take = |next: Next, hasher: &mut Hasher| -> Result<(), CommandError> {
        match next {
            Next::Zeroes(length) => {
                zeroes(hasher, length)?;
                holes += length;
                done += length;
            }
            Next::Data(length, bytes) => {
                let lost = || CommandError::new("a thread that reads the disk has failed");
                let bytes = bytes.recv().map_err(|_| lost())??;
                hasher.update(&bytes).map_err(|error| failed(&error))?;
                done += length;
            }
        }
        progress.set(done, holes);
        Ok(())
    };
    for extent in image.extents(whole) {
        let extent = extent?;
        let (mut at, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
        while at < end {
            let next = if extent.kind == ExtentKind::Data {
                // Pieces begin at multiples of their size, as clusters do.
                let length = (PIECE - at % PIECE).min(end - at);
                let (done, bytes) = mpsc::channel();
                // The threads are there as long as this sender.
                let _ = jobs.send(Job { range: range(at, length)?, done });
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
                take(first, hasher)?;
            }
        }
    }
    ahead.into_iter().try_for_each(|next| take(next, hasher))
}

fn zeroes(hasher: &mut Hasher, mut length: u64) -> Result<(), CommandError> {
    while length > 0 {
        let part = length.min(ZEROES.len() as u64);
        let bytes = ZEROES.get(..usize::try_from(part).unwrap_or(0)).unwrap_or_default();
        hasher.update(bytes).map_err(|error| failed(&error))?;
        length -= part;
    }
    Ok(())
}

fn range(offset: u64, length: u64) -> Result<GuestRange, CommandError> {
    GuestRange::new(GuestOffset::new(offset), length)
        .ok_or_else(|| CommandError::new("the disk is larger than any file can be"))
}

fn failed(error: &openssl::error::ErrorStack) -> CommandError {
    CommandError::new(format!("OpenSSL cannot compute the digest: {error}"))
}
