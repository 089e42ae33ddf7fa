//! `nbd-cli checksum`: the digest of a disk as a guest sees it.

use std::ffi::OsString;

use clap::{Args, ValueEnum};
use nbd_jobs::checksum::{ChecksumAlgorithm, checksum};
use nbd_jobs::object;
use serde::Serialize;

use super::image::location;
use super::image::open::{TrustArgs, options};
use crate::connect::ServerArgs;
use crate::error::{CommandError, Outcome};
use crate::image_format::ImageFormat;
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable};
use crate::progress::ProgressArgs;
use crate::shown::Shown;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli checksum disk.qcow2
  nbd-cli checksum --snapshot monday disk.qcow2
  nbd-cli checksum -a blkhash nbd://localhost/disk
  nbd-cli checksum --expect \"$(nbd-cli checksum disk.qcow2 | cut -d' ' -f1)\" nbd://backup/disk

The digest covers the disk as a guest sees it, backing files included. It is the same for every
format, and the one that sha256sum prints for the disk as a raw file. Holes are not read.
'-a blkhash' uses several cores, and passes over holes: it is the faster one for large disks. It is
the digest of blksum and of 'nbdcopy --blkhash'.";

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
    /// The block hash of blksum and nbdcopy (SHA-256, blocks of 64 KiB), of 64 digits.
    Blkhash,
}

impl From<Algorithm> for ChecksumAlgorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256,
            Algorithm::Sha512 => Self::Sha512,
            Algorithm::Blkhash => Self::Blkhash,
        }
    }
}

#[derive(Serialize)]
struct ChecksumReport<'a> {
    source: &'a str,
    size: u64,
    algorithm: &'a str,
    checksum: &'a str,
}

pub(crate) fn run(args: &ChecksumArgs) -> Result<Outcome, CommandError> {
    let algorithm = ChecksumAlgorithm::from(args.algorithm);
    let expected = args.expect.as_deref().map(|text| algorithm.parse(text)).transpose()?;
    let location = location::parse_one(&args.source, &args.server, &args.trust)?;
    let mut options = args.share.apply(options(args.format, &args.trust));
    options = options.policy(args.trust.policy_with(&args.server));
    if let Some(snapshot) = &args.snapshot {
        options = options.snapshot(snapshot);
    }
    let image = location.open_or_name(&options, &args.server.remotes(), "--format raw");
    let image = image.map_err(advise_sharing)?;
    let shown = Shown::new(args.progress.visibility());
    let checksum = checksum(&image, algorithm, &shown.context());
    shown.clear();
    let checksum = checksum?;
    let source = object::shown(&args.source.to_string_lossy());
    if let Some(expected) = expected
        && expected != checksum
    {
        return Err(CommandError::new(format!(
            "the disk '{}' has another {} than expected: {checksum}; it has changed or is damaged",
            printable(&source),
            algorithm.name()
        )));
    }
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Text => output.line(&format!("{checksum}  {}", printable(&source)))?,
        ReportFormat::Json => output.json(&ChecksumReport {
            source: &source,
            size: image.size(),
            algorithm: algorithm.name(),
            checksum: &checksum.to_string(),
        })?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}
