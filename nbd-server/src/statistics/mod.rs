//! Statistics: requests, bytes, errors and latencies of each client and each export.
//!
//! Each connection has its own counters, which only its own task changes, so counting costs no
//! locked instruction. A query sums the connections; see
//! [`ServerHandle::statistics`](crate::ServerHandle::statistics). The clock is read twice for all
//! requests that are received together.

mod activity;
mod cell;
mod counters;
mod latency;
mod record;
mod requests;
mod tally;

pub use activity::Activity;
pub use latency::LatencyHistogram;
pub use record::ExportStatistics;
pub use requests::{CommandStatistics, RequestKind, RequestStatistics};

pub(crate) use counters::{Counters, Outcome};
pub(crate) use record::ExportRecord;
pub(crate) use tally::{Tally, Ticket};
