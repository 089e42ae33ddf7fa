//! The arguments of `nbd-cli bench`.

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use nbd_jobs::size::{parse_duration, parse_limit};
use nbd_proto::NbdUri;

use super::sizes::{DiskRange, WeightedSize};
use crate::connect::TlsArgs;
use crate::progress::ProgressArgs;

const AFTER_HELP: &str = "\
Only --workload read leaves the disk unchanged. The others overwrite it with useless data, and are
refused without --destroy-data.

With --verify every written block identifies itself: by its offset, the number of its writes, the
seed of the run and a checksum. A READ must return the newest block that was acknowledged, or one
that was being written at that time; after a lost connection it may also return an older one, but
none from before the last FLUSH that succeeded. At the end all written blocks are read again. They
are recorded in --verify-state, so that a later run can verify them: after a restart of the server,
a crash of its machine, a copy or a backup.

CPU time of the server is measured if it is a process of this machine: the one that listens on the unix
socket, or --server-pid. With --rate a latency begins when a request is due, not when it is sent, so
that a server that stops for a second is not measured by a single slow request.

Examples:
  nbd-cli bench nbd://localhost/disk
  nbd-cli bench --depth 1 --duration 30s --json 'nbd+unix:///disk?socket=/run/nbd.sock'
  nbd-cli bench -w mixed -b 4K:9,64K:1 --zipf 0.99 --destroy-data nbd://localhost/scratch
  nbd-cli bench -w write --verify --verify-state run.state --destroy-data nbd://localhost/scratch
  nbd-cli bench --verify-only --verify-state run.state nbd://localhost/scratch

A block that is not as it was written, like any error, ends with exit code 1.";

/// Arguments of `nbd-cli bench`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct BenchArgs {
    /// The export, as an NBD URI.
    pub uri: NbdUri,

    /// Requests to make.
    #[arg(short, long, value_enum, default_value_t = WorkloadChoice::Read)]
    pub workload: WorkloadChoice,

    /// Allow a workload that overwrites the disk.
    #[arg(long)]
    pub destroy_data: bool,

    /// Percentage of reads with `--workload mixed` [default: 70].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub read_percent: Option<u8>,

    /// The order in which blocks are used.
    #[arg(long, value_enum, default_value_t = PatternChoice::Random)]
    pub pattern: PatternChoice,

    /// Use few blocks often: the one of rank r with a frequency proportional to 1/r^THETA (0.99 is
    /// usual).
    #[arg(long, value_name = "THETA", conflicts_with = "pattern")]
    pub zipf: Option<f64>,

    /// Size of requests; several with weights as in 4K:9,64K:1.
    #[arg(
        short,
        long,
        value_name = "SIZE[:WEIGHT],…",
        default_value = "4K",
        value_delimiter = ','
    )]
    pub block_size: Vec<WeightedSize>,

    /// Requests in flight on each connection.
    #[arg(short, long, value_name = "N", default_value = "16")]
    pub depth: NonZeroU32,

    /// Connections.
    #[arg(short = 'C', long, value_name = "N", default_value = "1")]
    pub connections: NonZeroUsize,

    /// Duration of the measurement: seconds, or 500ms, 2m [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,

    /// Number of requests over all connections, instead of a duration.
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    pub requests: Option<NonZeroU64>,

    /// Duration of a warm-up before the measurement.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_limit)]
    pub warm_up: Duration,

    /// Most requests a second, over all connections.
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU64>,

    /// Part of the disk to use [default: all of it].
    #[arg(long, value_name = "OFFSET+LENGTH")]
    pub range: Option<DiskRange>,

    /// Seed of offsets and data; the report has that of the run.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Make every write, zero and trim durable before it is answered (FUA).
    #[arg(long)]
    pub fua: bool,

    /// Flush after this number of writes, zeroes and trims on a connection.
    #[arg(long, value_name = "N")]
    pub flush_every: Option<NonZeroU64>,

    /// The best form of replies to ask for.
    #[arg(long, value_enum, default_value_t = ReplyChoice::Extended)]
    pub replies: ReplyChoice,

    /// Id of the server process whose CPU time is measured.
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,

    /// Write blocks that identify themselves, and compare the data that is read with them.
    #[arg(long)]
    pub verify: bool,

    /// Write nothing; read what a run with `--verify` has written.
    ///
    /// Without `--verify-state` its --seed is needed, and each block is checked individually, so
    /// lost blocks are not found.
    #[arg(long, conflicts_with_all = ["verify", "workload", "requests", "duration"])]
    pub verify_only: bool,

    /// File that records the written blocks; with `--verify` it is created or continued.
    #[arg(long, value_name = "FILE")]
    pub verify_state: Option<PathBuf>,

    /// Time limit for connecting and for each request: seconds, or 500ms, 2m [default: 30s for
    /// connecting, none for requests].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Time limit for restoring a lost connection; 0 ends the run [default: 30s to verify, or 0].
    #[arg(long, value_name = "TIME", value_parser = parse_limit)]
    pub reconnect: Option<Duration>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub progress: ProgressArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,
}

/// Requests to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WorkloadChoice {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Reads and writes.
    Mixed,
    /// Zeroes (WRITE_ZEROES).
    Zeroes,
    /// Discards (TRIM).
    Trim,
}

/// The order in which blocks are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PatternChoice {
    /// Any block may be next.
    Random,
    /// One after the other; each connection has its own part of the range.
    Sequential,
}

/// A form of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReplyChoice {
    /// Simple replies: a hole is sent as zeroes.
    Simple,
    /// Structured replies.
    Structured,
    /// Structured replies and 64-bit lengths.
    Extended,
}
