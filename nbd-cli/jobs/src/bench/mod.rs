//! A load generator for NBD servers, which measures throughput, latency and CPU time, and can
//! verify that the server keeps what it is given.
//!
//! ```no_run
//! use nbd_jobs::bench::{BenchOptions, bench};
//! use nbd_jobs::JobContext;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let uri = "nbd://localhost/disk".parse()?;
//! let report = bench(&uri, &BenchOptions::default(), &JobContext::default(), |_| {}).await?;
//! println!("{:.0} requests a second", report.requests_per_second);
//! # Ok(()) }
//! ```
//!
//! A few threads share the connections. They make requests and take replies on the sockets
//! themselves: the client of `nbd-client` makes the connections and hands them over. Requests are
//! gathered and written together.

mod block;
mod channel;
mod cpu;
mod crew;
mod job;
mod ledger;
mod options;
mod plan;
mod random;
mod recorder;
mod replies;
mod report;
mod shared;
mod slots;
mod source;
mod stage;
mod state;
mod targets;
mod verdict;
mod worker;

pub use self::job::bench;
pub use self::options::{
    BenchEnd, BenchOptions, BlockSize, Pattern, RequestKind, Verify, Workload,
};
pub use self::report::{
    BadBlock, BenchInterval, BenchReport, CpuReport, KindReport, LatencyReport, Stage, VerifyReport,
};
