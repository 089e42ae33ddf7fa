//! What a load consists of.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use nbd_proto::wire::ReplyMode;

use crate::connect::ConnectOptions;

/// The load that [`bench()`](super::bench()) generates.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BenchOptions {
    /// How connections are made. `connections` is their number (1 to 256); each has `depth` requests
    /// in flight.
    pub connect: ConnectOptions,
    /// The best form of replies to ask for.
    pub reply_mode: ReplyMode,
    /// Which requests are made. By default reads.
    pub workload: Workload,
    /// In which order. By default random.
    pub pattern: Pattern,
    /// Sizes of requests, by weight. By default 4 KiB.
    pub block_sizes: Vec<BlockSize>,
    /// Requests in flight on each connection: 1 to 4096. By default 16.
    pub depth: NonZeroU32,
    /// Most requests a second, over all connections. By default there is no limit.
    pub rate: Option<NonZeroU64>,
    /// When the load ends. By default after 10 seconds.
    pub end: BenchEnd,
    /// Time before measuring begins.
    pub warm_up: Duration,
    /// The part of the disk that is used: offset, and length if not to the end. In bytes.
    pub range: (u64, Option<u64>),
    /// Seed of offsets and data; the same load has the same. By default one is chosen.
    pub seed: Option<u64>,
    /// Whether writes, zeroes and trims ask for FUA.
    pub fua: bool,
    /// Flushes after so many writes, zeroes and trims on each connection.
    pub flush_every: Option<NonZeroU64>,
    /// The process whose CPU time is that of the server; by default the one at the other end of a unix
    /// socket.
    pub server_pid: Option<u32>,
    /// Whether data is verified.
    pub verify: Verify,
}

impl Default for BenchOptions {
    fn default() -> Self {
        const DEPTH: NonZeroU32 = NonZeroU32::new(16).expect("16 is not zero");
        let connect = ConnectOptions {
            connections: std::num::NonZeroUsize::MIN,
            ..ConnectOptions::default()
        };
        Self {
            connect,
            reply_mode: ReplyMode::Extended,
            workload: Workload::Read,
            pattern: Pattern::Random,
            block_sizes: vec![BlockSize { length: 4096, weight: 1 }],
            depth: DEPTH,
            rate: None,
            end: BenchEnd::After(Duration::from_secs(10)),
            warm_up: Duration::ZERO,
            range: (0, None),
            seed: None,
            fua: false,
            flush_every: None,
            server_pid: None,
            verify: Verify::Off,
        }
    }
}

impl BenchOptions {
    /// Whether it changes the disk.
    pub fn writes(&self) -> bool {
        !matches!(self.workload, Workload::Read) && !matches!(self.verify, Verify::Only { .. })
    }
}

/// Which requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// READ, and WRITE for the rest.
    Mixed {
        /// How many of 100 requests are reads: 0 to 100.
        read_percent: u8,
    },
    /// WRITE_ZEROES.
    Zeroes,
    /// TRIM.
    Trim,
}

/// In which order blocks are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Every block is as likely as every other.
    Random,
    /// One block after the other; each connection has a part of the range to itself.
    Sequential,
    /// Few blocks are frequent: that of rank r with a frequency proportional to `r^-theta`.
    Zipfian {
        /// Above 0, at most 10; 0.99 is usual.
        theta: f64,
    },
}

/// A size of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Length, in bytes: 512 to 32 MiB.
    pub length: u32,
    /// How often it is chosen, in proportion to the other weights; at least 1.
    pub weight: u32,
}

/// When a load ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchEnd {
    /// After this time, warm-up not included.
    After(Duration),
    /// After so many requests, flushes and warm-up not included.
    Requests(u64),
}

/// Whether data is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verify {
    /// No.
    Off,
    /// Blocks are written that say what they are, and what is read is compared with what was written;
    /// at the end everything that was written is read again.
    Written {
        /// Where it is kept what was written, for later runs. What it says already is continued.
        state: Option<PathBuf>,
    },
    /// Nothing is written: what an earlier run wrote is read.
    Only {
        /// What that run kept. Without it only each block by itself is looked at: its offset, its seed
        /// and its checksum.
        state: Option<PathBuf>,
    },
}

/// A kind of request, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// WRITE_ZEROES.
    Zeroes,
    /// TRIM.
    Trim,
    /// FLUSH.
    Flush,
}

impl RequestKind {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Zeroes, Self::Trim, Self::Flush];

    /// The verb of messages: `read`, `write zeroes`.
    pub const fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Zeroes => "write zeroes",
            Self::Trim => "trim",
            Self::Flush => "flush",
        }
    }
}
