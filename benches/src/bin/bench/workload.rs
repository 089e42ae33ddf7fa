//! The operations and results of a client, in the terms of every row.

use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    RandomRead,
    RandomWrite,
    SequentialRead,
    SequentialWrite,
}

/// The unit of a throughput.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Requests,
    Mebibytes,
}

impl Unit {
    /// The unit's name behind a number.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Requests => "IOPS",
            Self::Mebibytes => "MiB/s",
        }
    }
}

/// What a client that makes requests has to do.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) pattern: Pattern,
    /// Bytes of one request.
    pub(crate) block_size: u64,
    /// Requests in flight on each connection.
    pub(crate) depth: u32,
    pub(crate) connections: u32,
    pub(crate) length: Length,
    /// What the throughput counts.
    pub(crate) unit: Unit,
}

/// When a job is over.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Length {
    Seconds(u64),
    /// After this many requests, over all connections.
    Requests(u64),
}

/// The client's measurements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ClientResult {
    /// IOPS or MiB/s, as [`Unit`] says.
    pub(crate) throughput: f64,
    /// 99th percentile of the latency in microseconds, if the client measures it.
    pub(crate) p99_us: Option<f64>,
    /// Share of a core that each of its processes used, if the client measures it.
    pub(crate) busy: Option<f64>,
    /// The amount of work, in requests, or in MiB where the client chooses the requests.
    pub(crate) work: f64,
}

impl ClientResult {
    /// Creates the result of a client that measures nothing itself.
    pub(crate) fn timed(work: f64, elapsed: Duration) -> Self {
        Self { throughput: work / elapsed.as_secs_f64(), p99_us: None, busy: None, work }
    }
}
