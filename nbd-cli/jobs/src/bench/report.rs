//! What came of a load.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::recorder::Kind;

/// What came of a load. Serialised with names in kebab-case.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BenchReport {
    /// The export.
    pub uri: String,
    /// Connections.
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: u32,
    /// The seed that repeats the load.
    pub seed: u64,
    /// Whether it was cut short by a signal.
    pub interrupted: bool,
    /// Time that was measured, in seconds.
    pub seconds: f64,
    /// Requests, flushes included.
    pub requests: u64,
    /// The same for a second.
    pub requests_per_second: f64,
    /// Bytes that were read, written, zeroed or trimmed.
    pub bytes: u64,
    /// The same for a second.
    pub bytes_per_second: f64,
    /// What the READs did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<KindReport>,
    /// What the WRITEs did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<KindReport>,
    /// What the WRITE_ZEROES did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zeroes: Option<KindReport>,
    /// What the TRIMs did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trim: Option<KindReport>,
    /// What the FLUSHes did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush: Option<KindReport>,
    /// CPU time of this process.
    pub client_cpu: CpuReport,
    /// CPU time of the server, if it is a process of this machine that is known.
    pub server_cpu: Option<CpuReport>,
    /// How often a lost connection was made again.
    pub reconnects: u64,
    /// What was verified, if anything was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyReport>,
}

/// What requests of one kind did.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct KindReport {
    /// How many there were.
    pub requests: u64,
    /// The same for a second.
    pub requests_per_second: f64,
    /// Bytes.
    pub bytes: u64,
    /// Time from when a request was sent (with a rate: was due) to its answer.
    pub latency: LatencyReport,
}

/// A distribution of latencies, in microseconds.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct LatencyReport {
    /// The shortest.
    pub min: f64,
    /// The mean.
    pub mean: f64,
    /// The standard deviation.
    pub deviation: f64,
    /// Half of all are at most this.
    pub p50: f64,
    /// 90 of 100 are at most this.
    pub p90: f64,
    /// 95 of 100 are at most this.
    pub p95: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
    /// 999 of 1000 are at most this.
    #[serde(rename = "p99.9")]
    pub p999: f64,
    /// 9999 of 10000 are at most this.
    #[serde(rename = "p99.99")]
    pub p9999: f64,
    /// The longest.
    pub max: f64,
}

/// CPU time of a process while it was measured.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct CpuReport {
    /// The process.
    pub pid: u32,
    /// User and system time, in seconds.
    pub seconds: f64,
    /// The same for a request, in microseconds; 0 without requests.
    pub us_per_request: f64,
}

/// What was verified.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VerifyReport {
    /// Size of a block, in bytes.
    pub block_size: u32,
    /// Blocks that were read and are as they have to be.
    pub good_blocks: u64,
    /// Blocks that are not.
    pub bad_blocks: u64,
    /// Without a state: blocks that hold nothing of this seed.
    pub other_blocks: u64,
    /// Some of the bad ones.
    pub examples: Vec<BadBlock>,
}

/// A block that is not as it has to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BadBlock {
    /// Offset, in bytes.
    pub offset: u64,
    /// What was found, and what should have been.
    pub found: String,
}

/// What was done in the last second, for a live display.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct BenchInterval {
    /// Since the load began.
    pub elapsed: Duration,
    /// Whether this is the warm-up, the load, or the reading at the end.
    pub stage: Stage,
    /// Length of the interval.
    pub length: Duration,
    /// Requests in it.
    pub requests: u64,
    /// Bytes in it.
    pub bytes: u64,
    /// Median, 99th percentile and maximum of the latency in it; zero without requests.
    pub latencies: [Duration; 3],
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before measuring.
    WarmUp,
    /// Measuring.
    Load,
    /// What was written is read again.
    Verify,
}

impl KindReport {
    pub(super) fn new(kind: &Kind, seconds: f64) -> Self {
        Self {
            requests: kind.requests,
            requests_per_second: per_second(kind.requests, seconds),
            bytes: kind.bytes,
            latency: LatencyReport::new(&kind.latencies),
        }
    }
}

impl LatencyReport {
    fn new(latencies: &Histogram<u64>) -> Self {
        const MICROSECOND: f64 = 1000.0;
        let at = |quantile| latencies.value_at_quantile(quantile) as f64 / MICROSECOND;
        Self {
            min: latencies.min() as f64 / MICROSECOND,
            mean: latencies.mean() / MICROSECOND,
            deviation: latencies.stdev() / MICROSECOND,
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: latencies.max() as f64 / MICROSECOND,
        }
    }
}

impl CpuReport {
    pub(super) fn new(pid: u32, used: Duration, requests: u64) -> Self {
        let seconds = used.as_secs_f64();
        let us_per_request =
            if requests == 0 { 0.0 } else { seconds * 1_000_000.0 / requests as f64 };
        Self { pid, seconds, us_per_request }
    }
}

/// A count as a rate; 0 if no time has passed.
pub(super) fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::options::RequestKind;
    use super::super::recorder::Recorder;
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_latencies() {
        let mut recorder = Recorder::default();
        for microseconds in 1..=10_000 {
            recorder.record(RequestKind::Read, 512, Duration::from_micros(microseconds));
        }
        let report = KindReport::new(recorder.kind(RequestKind::Read).expect("reads"), 2.0);
        assert_eq!((report.requests, report.bytes), (10_000, 5_120_000));
        let latency = report.latency;
        for (found, expected) in [
            (report.requests_per_second, 5000.0),
            (latency.min, 1.0),
            (latency.mean, 5000.5),
            (latency.p50, 5000.0),
            (latency.p90, 9000.0),
            (latency.p99, 9900.0),
            (latency.p999, 9990.0),
            (latency.p9999, 9999.0),
            (latency.max, 10_000.0),
        ] {
            assert!((found / expected - 1.0).abs() < 0.002, "{found} {expected}");
        }
        let json = serde_json::to_value(&latency).expect("JSON");
        assert!(json["p99.9"].is_f64() && json["min"].is_f64(), "{json}");
    }

    #[test]
    fn no_time_and_no_requests_are_no_division_by_zero() {
        assert!(per_second(7, 0.0) == 0.0);
        assert!(CpuReport::new(1, Duration::from_secs(1), 0).us_per_request == 0.0);
    }
}
