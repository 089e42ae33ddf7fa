//! The measurements of one block.

use serde::{Deserialize, Serialize};

use super::cache_state::CacheState;
use super::process::Usage;
use super::servers::Server;
use super::workload::ClientResult;

/// The numbers of one block, or their medians.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// IOPS or MiB/s, depending on the row.
    pub(crate) throughput: f64,
    /// 99th percentile of the latency in microseconds.
    pub(crate) p99_us: Option<f64>,
    /// Share of a core that each process of the client used.
    #[serde(default)]
    pub(crate) client_busy: Option<f64>,
    /// The server's CPU time in microseconds per request, or per MiB for nbdcopy.
    pub(crate) cpu_us_per_work: f64,
    /// Peak memory of the server's processes in KiB.
    pub(crate) peak_memory_kib: f64,
    /// What the page cache held of the files when the block began.
    #[serde(default)]
    pub(crate) page_cache: Option<CacheState>,
}

/// One block.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) row: &'static str,
    pub(crate) server: Server,
    pub(crate) sample: Sample,
}

impl Sample {
    /// Combines the measurements of the client and of the server.
    pub(crate) fn new(result: ClientResult, usage: Usage) -> Self {
        Self {
            throughput: result.throughput,
            p99_us: result.p99_us,
            client_busy: result.busy,
            cpu_us_per_work: usage.cpu_us as f64 / result.work,
            peak_memory_kib: usage.peak_memory_kib as f64,
            page_cache: None,
        }
    }

    /// One line for the terminal.
    pub(crate) fn describe(&self, throughput_unit: &str, work_name: &str) -> String {
        let p99 = self.p99_us.map_or_else(String::new, |p99| format!(", p99 {p99:.0} us"));
        let cached = self
            .page_cache
            .map_or_else(String::new, |state| format!(", cached {}", state.describe()));
        format!(
            "{:9.0} {}, {:.1} us CPU per {}{p99}, {:.1} MiB{cached}",
            self.throughput,
            throughput_unit,
            self.cpu_us_per_work,
            work_name,
            self.peak_memory_kib / 1024.0,
        )
    }
}
