//! Watching a running server from another process: its numbers, through its control socket or the
//! address of its metrics, and the rates between two moments.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use nbd_jobs::watch::{Activity, WatchSource};
//!
//! let limit = Duration::from_secs(10);
//! let source: WatchSource = "/run/nbd.control".parse()?;
//! let before = source.fetch(limit)?;
//! std::thread::sleep(Duration::from_secs(1));
//! let activity = Activity::between(&before, &source.fetch(limit)?);
//! for export in &activity.exports {
//!     println!("{}: {:?}", export.name, export.traffic.rates);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod activity;
mod http;
mod order;
mod source;
mod table;

pub use self::activity::{
    Activity, ClientActivity, ExportActivity, Latencies, Rates, ServerTraffic,
};
pub use self::order::Order;
pub use self::source::WatchSource;
pub use self::table::{Line, LineKind, table};
