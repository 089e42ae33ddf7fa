//! The options of a load.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use nbd_proto::wire::ReplyMode;

use crate::connect::ConnectOptions;

/// The load that [`bench()`](super::bench()) generates.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BenchOptions {
    /// The connections. `connections` is their number (1 to 256); each has `depth` requests
    /// in flight.
    pub connect: ConnectOptions,
    /// The best form of replies to negotiate.
    pub reply_mode: ReplyMode,
    /// The mix of requests. By default reads.
    pub workload: Workload,
    /// The order of offsets. By default random.
    pub pattern: Pattern,
    /// Sizes of requests, by weight. By default 4 KiB.
    pub block_sizes: Vec<BlockSize>,
    /// Requests in flight on each connection: 1 to 4096. By default 16.
    pub depth: NonZeroU32,
    /// Most requests a second, over all connections. By default there is no limit.
    pub rate: Option<NonZeroU64>,
    /// The end of the load. By default after 10 seconds.
    pub end: BenchEnd,
    /// Time before measuring begins.
    pub warm_up: Duration,
    /// The part of the disk that is used: offset, and length if not to the end. In bytes.
    pub range: (u64, Option<u64>),
    /// Seed of offsets and data, which repeats a load. By default a random one.
    pub seed: Option<u64>,
    /// Whether writes, zeroes and trims have the flag FUA.
    pub fua: bool,
    /// Number of writes, zeroes and trims on a connection after which it flushes.
    pub flush_every: Option<NonZeroU64>,
    /// The process of the server, whose CPU time is reported; by default the peer of a unix socket.
    pub server_pid: Option<u32>,
    /// The verification of data.
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
    /// Returns whether the load changes the disk.
    pub fn writes(&self) -> bool {
        !matches!(self.workload, Workload::Read) && !matches!(self.verify, Verify::Only { .. })
    }
}

/// The mix of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// READ and WRITE.
    Mixed {
        /// Percentage of reads: 0 to 100.
        read_percent: u8,
    },
    /// WRITE_ZEROES.
    Zeroes,
    /// TRIM.
    Trim,
}

/// The order of offsets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Uniformly distributed.
    Random,
    /// Sequential; each connection has its own part of the range.
    Sequential,
    /// Zipfian: the block of rank r has a frequency proportional to `r^-theta`.
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
    /// Frequency in proportion to the other weights; at least 1.
    pub weight: u32,
}

/// The end of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchEnd {
    /// After this time, warm-up not included.
    After(Duration),
    /// After this number of requests, flushes and warm-up not included.
    Requests(u64),
}

/// The verification of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verify {
    /// None.
    Off,
    /// Written blocks identify themselves, and data that is read is compared with them. At the end
    /// all written blocks are read again.
    Written {
        /// The file that records the written blocks for later runs. An existing one is continued.
        state: Option<PathBuf>,
    },
    /// Reads the blocks of an earlier run, and writes nothing.
    Only {
        /// The file of that run. Without it each block is checked on its own: its offset, its seed
        /// and its checksum.
        state: Option<PathBuf>,
    },
}

/// A kind of request.
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

    /// Returns the verb of messages: `read`, `write zeroes`.
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
