//! The counters of one export.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::activity::Activity;
use super::counters::Counters;
use super::requests::RequestStatistics;

/// The work of an export. All counters begin when its [`ExportEntry`](crate::export::ExportEntry)
/// is created.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportStatistics {
    /// The time at which the entry was created.
    pub since: SystemTime,
    /// Number of clients that use it now.
    pub clients: usize,
    /// Number of clients that have ever used it.
    pub clients_total: u64,
    /// Answered requests of all clients, present and past.
    pub requests: RequestStatistics,
    /// Number of requests of present clients that are not answered yet.
    pub in_flight: u64,
    /// The bytes read and changed by regions of the disk.
    pub activity: Activity,
    /// The time of the last successful FLUSH; `None` if there was none.
    pub last_flush: Option<SystemTime>,
    /// Number of failures to make writes durable.
    pub failed_flushes: u64,
}

/// Collects the counters of an export's connections. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct ExportRecord {
    since: SystemTime,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    present: Vec<Arc<Counters>>,
    clients_total: u64,
    /// The requests of clients that have left.
    past: RequestStatistics,
    past_activity: Option<Activity>,
}

impl Default for ExportRecord {
    fn default() -> Self {
        Self { since: SystemTime::now(), state: Arc::default() }
    }
}

impl ExportRecord {
    pub(super) fn enter(&self, counters: &Arc<Counters>) {
        let mut state = self.state();
        state.present.push(Arc::clone(counters));
        state.clients_total += 1;
    }

    pub(super) fn leave(&self, counters: &Arc<Counters>) {
        let mut state = self.state();
        state.present.retain(|present| !Arc::ptr_eq(present, counters));
        state.past.add(&counters.requests());
        let activity = counters.activity();
        match &mut state.past_activity {
            Some(past) => past.add(&activity),
            none => *none = Some(activity),
        }
    }

    /// The sums of all clients of a disk of `size` bytes.
    pub(crate) fn statistics(
        &self,
        size: u64,
        last_flush: Option<SystemTime>,
        failed_flushes: u64,
    ) -> ExportStatistics {
        let state = self.state();
        let mut requests = state.past;
        let mut activity = Activity::new(size);
        if let Some(past) = &state.past_activity {
            activity.add(past);
        }
        for counters in &state.present {
            requests.add(&counters.requests());
            activity.add(&counters.activity());
        }
        ExportStatistics {
            since: self.since,
            clients: state.present.len(),
            clients_total: state.clients_total,
            requests,
            in_flight: state.present.iter().map(|counters| counters.in_flight()).sum(),
            activity,
            last_flush,
            failed_flushes,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
