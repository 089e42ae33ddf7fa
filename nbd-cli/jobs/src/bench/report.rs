//! The results of a load.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::recorder::Kind;

/// The results of a load. Serialised with names in kebab-case.
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
    /// Whether the load was interrupted.
    pub interrupted: bool,
    /// Measured time, in seconds.
    pub seconds: f64,
    /// Number of requests, flushes included.
    pub requests: u64,
    /// The same per second.
    pub requests_per_second: f64,
    /// Bytes read, written, zeroed or trimmed.
    pub bytes: u64,
    /// The same per second.
    pub bytes_per_second: f64,
    /// The READs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<KindReport>,
    /// The WRITEs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<KindReport>,
    /// The WRITE_ZEROES requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zeroes: Option<KindReport>,
    /// The TRIMs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trim: Option<KindReport>,
    /// The FLUSHes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush: Option<KindReport>,
    /// CPU time of this process.
    pub client_cpu: CpuReport,
    /// CPU time of the server, if it is a known process of this machine.
    pub server_cpu: Option<CpuReport>,
    /// Number of restored connections.
    pub reconnects: u64,
    /// The result of the verification, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyReport>,
}

/// The requests of one kind.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct KindReport {
    /// Their number.
    pub requests: u64,
    /// The same per second.
    pub requests_per_second: f64,
    /// Bytes.
    pub bytes: u64,
    /// Time from sending a request (with a rate: from its due time) to its answer.
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
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The 99.9th percentile.
    #[serde(rename = "p99.9")]
    pub p999: f64,
    /// The 99.99th percentile.
    #[serde(rename = "p99.99")]
    pub p9999: f64,
    /// The longest.
    pub max: f64,
}

/// CPU time of a process during the measurement.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct CpuReport {
    /// The process.
    pub pid: u32,
    /// User and system time, in seconds.
    pub seconds: f64,
    /// The same per request, in microseconds; 0 without requests.
    pub us_per_request: f64,
}

/// The result of a verification.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VerifyReport {
    /// Size of a block, in bytes.
    pub block_size: u32,
    /// Blocks with the expected contents.
    pub good_blocks: u64,
    /// Blocks with other contents.
    pub bad_blocks: u64,
    /// Without a file: blocks without data of this seed.
    pub other_blocks: u64,
    /// Some of the blocks with other contents.
    pub examples: Vec<BadBlock>,
}

/// A block with other contents than expected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BadBlock {
    /// Offset, in bytes.
    pub offset: u64,
    /// The found and the expected contents.
    pub found: String,
}

/// The progress in the last second, for a live display.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct BenchInterval {
    /// Time since the start of the load.
    pub elapsed: Duration,
    /// The phase of the run.
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
    /// The warm-up before the measurement.
    WarmUp,
    /// The measurement.
    Load,
    /// The written blocks are read again.
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

/// Returns a count per second; 0 if no time has passed.
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
