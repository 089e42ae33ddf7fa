//! `nbd-cli copy`: copy a disk between NBD servers, local files, block devices and pipes.

use std::num::NonZeroUsize;

use clap::Args;
use imgfmt::Access;
use nbd_jobs::checksum::ChecksumAlgorithm;
use nbd_jobs::size::ByteSize;
use nbd_jobs::{
    Copied, CopyOptions, DescribedLocation, Durable, JobContext, JobErrorKind, Knowledge, Location,
    Zeroes,
};

use super::checksum::Algorithm;
use crate::async_runtime::block_on;
use crate::connect::{ConnectionArgs, TlsArgs};
use crate::error::{CommandError, Outcome};
use crate::location_parser::LocationParser;
use crate::locking::{LockArgs, ShareArgs, advise_sharing};
use crate::objects::ObjectArgs;
use crate::output::{Output, printable, refuse_terminal};
use crate::progress::{ProgressArgs, RateArgs};
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Sources and destinations:
  nbd://…, nbd+unix://…   an NBD server (nbds://…, nbds+unix://… with TLS)
  disk.img, /dev/vg/lv    a local file or block device, byte for byte, even if it is an image: to
                          copy the disk inside an image use 'nbd-cli image convert'
  -                       standard input or standard output
  null:                   nothing: an empty source, or a destination that discards all data

A local destination file grows as NAME.partial and is renamed when it is complete; an existing file
stays unchanged until it is replaced then. Only if that is not possible (the file has other names,
or its directory is not writable) is it truncated first. A server or device as the destination must
be at least as large as the source; anything beyond that is left unchanged. The previous data of a
device is lost at once, and the device is marked as incomplete until everything is on stable
storage, so that a part of a disk is never mistaken for the whole.
Holes and zeroes become holes where the destination supports them.

Examples:
  nbd-cli copy nbd://localhost/disk backup.img
  nbd-cli copy -p disk.img nbd://backup.example.org/disk
  nbd-cli copy --destination-is-zero --flush disk.img 'nbd+unix:///new?socket=/run/nbd.sock'
  nbd-cli copy --tls-psk keys.psk nbds://alice@backup.example.org/disk disk.img
  nbd-cli copy nbd://localhost/disk - | zstd > disk.zst
  nbd-cli copy --checksum=blkhash nbd://localhost/disk backup.img

A lost connection is restored (--reconnect). If it led to the destination, everything since the last
flush is written again: a restarted server may have lost it.

A copy that fails reports the offset and exits with 1, and an interrupted one exits with 128 + the
signal's number; an incomplete new file is then removed. After kill -9 NAME.partial is left, which
may be removed.";

/// Largest request, in bytes; larger ones would only need more memory.
const MAX_REQUEST_SIZE: u64 = 32 << 20;
/// Smallest and largest unit of zero detection.
const MIN_SPARSE_SIZE: u64 = 512;

/// Arguments of `nbd-cli copy`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CopyArgs {
    /// The source.
    #[arg(value_parser = LocationParser)]
    pub source: DescribedLocation,

    /// The destination.
    #[arg(value_parser = LocationParser)]
    pub destination: DescribedLocation,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub connection: ConnectionArgs,

    /// Requests in flight.
    #[arg(short = 'R', long, value_name = "N", default_value = "64")]
    pub requests: NonZeroUsize,

    /// Size of a request.
    #[arg(long, value_name = "SIZE", default_value = "256K")]
    pub request_size: ByteSize,

    /// Allocate the complete destination, zeroes included.
    #[arg(long)]
    pub allocated: bool,

    /// The destination already reads as zero: do not write zeroes.
    #[arg(long, alias = "target-is-zero")]
    pub destination_is_zero: bool,

    /// Make the copy durable before the command ends.
    #[arg(long)]
    pub flush: bool,

    /// Do not ask the source for its holes.
    #[arg(long)]
    pub no_extents: bool,

    /// Detect zeroes in the data in units of this size (a power of two); 0 switches detection off.
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4K")]
    pub sparse: ByteSize,

    /// Compute a checksum of the copied data, without a second read, and print it on standard
    /// output: sha256 unless another one is given.
    #[arg(
        long,
        value_name = "DIGEST",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "sha256"
    )]
    pub checksum: Option<Algorithm>,

    /// Succeed only if that checksum is this one, in hexadecimal; a new file is removed otherwise.
    #[arg(long, value_name = "HEX", requires = "checksum")]
    pub expect: Option<String>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub locks: LockArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub rate: RateArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub progress: ProgressArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub objects: Box<ObjectArgs>,
}

pub(crate) fn run(args: CopyArgs) -> Result<Outcome, CommandError> {
    check(&args)?;
    let options = options(&args)?;
    let copied = block_on(copy(&args, &options))?;
    if let Some(checksum) = copied.checksum {
        let mut output = Output::new();
        output.line(&format!("{checksum}  {}", shown_name(&args.source.location)))?;
        output.finish()?;
    }
    Ok(Outcome::Success)
}

fn check(args: &CopyArgs) -> Result<(), CommandError> {
    let ends = [&args.source.location, &args.destination.location];
    args.tls.check(ends.into_iter().filter_map(Location::uri))?;
    let request = args.request_size.bytes();
    if !request.is_power_of_two() || !(512..=MAX_REQUEST_SIZE).contains(&request) {
        return Err(CommandError::new(format!(
            "--request-size {} is invalid; give a power of two from 512 to 32M",
            args.request_size
        )));
    }
    let sparse = args.sparse.bytes();
    if sparse != 0 && !(sparse.is_power_of_two() && sparse >= MIN_SPARSE_SIZE) {
        return Err(CommandError::new(format!(
            "--sparse {} is invalid; give 0 or a power of two of at least 512",
            args.sparse
        )));
    }
    args.connection.check(args.requests)?;
    if args.destination.location == Location::Standard {
        refuse_terminal()?;
    }
    if args.checksum.is_some() && args.destination.location == Location::Standard {
        return Err(CommandError::new(
            "--checksum prints on standard output, which is the destination; give another destination",
        ));
    }
    Ok(())
}

async fn copy(args: &CopyArgs, options: &CopyOptions) -> Result<Copied, CommandError> {
    let shown = Shown::new(args.progress.visibility());
    let context = JobContext { rate_limit: args.rate.limit(), ..shown.context() };
    let (from, to) = (&args.source.location, &args.destination.location);
    let result = nbd_jobs::copy(from, to, options, &context).await;
    match &result {
        Ok(_) => shown.finish(),
        Err(_) => shown.clear(),
    }
    result.map_err(|error| match error.kind() {
        JobErrorKind::Source => advise_sharing(error),
        _ => error.into(),
    })
}

/// Returns the name of a source on the line of its checksum.
fn shown_name(source: &Location) -> String {
    match source {
        Location::File(path) => printable(&path.to_string_lossy()),
        Location::Standard => "-".to_owned(),
        other => printable(&other.to_string()),
    }
}

/// Returns the options of the job.
fn options(args: &CopyArgs) -> Result<CopyOptions, CommandError> {
    let mut options = CopyOptions::default();
    options.connect = args.connection.options(&args.tls);
    options.connect.objects = args.objects.opener();
    options.requests = args.requests;
    options.request_size = args.request_size.bytes();
    options.zeroes = match (args.allocated, args.destination_is_zero) {
        (true, _) => Zeroes::Allocate,
        (_, true) => Zeroes::Skip,
        _ => Zeroes::PunchHoles,
    };
    options.knowledge = if args.no_extents { Knowledge::Nothing } else { Knowledge::Holes };
    options.sparse = Some(args.sparse.bytes()).filter(|sparse| *sparse != 0);
    options.durability = if args.flush { Durable::Now } else { Durable::Later };
    let (reading, writing) = (args.share.locking(args.locks), args.locks.locking());
    options.source_locking = args.source.locking(Access::ReadOnly, reading)?;
    options.destination_locking = args.destination.locking(Access::ReadWrite, writing)?;
    options.checksum = args.checksum.map(ChecksumAlgorithm::from);
    if let (Some(algorithm), Some(expected)) = (options.checksum, &args.expect) {
        options.expected = Some(algorithm.parse(expected)?);
    }
    Ok(options)
}
