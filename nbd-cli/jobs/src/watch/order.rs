//! The order of exports and clients.

use std::cmp::Ordering;
use std::str::FromStr;

use super::activity::{Activity, ServerTraffic};

/// The order of exports and clients. All but that by name begin with the largest value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// By bytes per second.
    #[default]
    Throughput,
    /// By requests per second.
    Requests,
    /// By the latency of 99 of 100 requests.
    Latency,
    /// By requests that are not answered.
    Queue,
    /// By errors.
    Errors,
    /// By name of the export.
    Name,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Throughput, Self::Requests, Self::Latency, Self::Queue, Self::Errors, Self::Name];

    /// Returns its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::Requests => "requests",
            Self::Latency => "latency",
            Self::Queue => "queue",
            Self::Errors => "errors",
            Self::Name => "name",
        }
    }

    /// Returns the one after it.
    #[must_use]
    pub fn next(self) -> Self {
        let index = Self::ALL.iter().position(|it| *it == self).unwrap_or_default();
        Self::ALL[(index + 1) % Self::ALL.len()]
    }

    /// Sorts the exports and the clients; those that are alike by name.
    pub fn apply(self, activity: &mut Activity) {
        activity
            .exports
            .sort_by(|a, b| self.compare(&a.traffic, &b.traffic).then_with(|| a.name.cmp(&b.name)));
        activity.clients.sort_by(|a, b| {
            let by_traffic = self.compare(&a.traffic, &b.traffic);
            by_traffic.then_with(|| a.export.cmp(&b.export)).then_with(|| a.id.cmp(&b.id))
        });
    }

    fn compare(self, a: &ServerTraffic, b: &ServerTraffic) -> Ordering {
        let value = |traffic: &ServerTraffic| match self {
            Self::Throughput => {
                traffic.rates.map_or(0.0, |rates| rates.bytes_read + rates.bytes_written)
            }
            Self::Requests => traffic.rates.map_or(0.0, |rates| rates.requests),
            Self::Latency => traffic.latency.map_or(0.0, |latency| latency.p99),
            Self::Queue => traffic.in_flight as f64,
            Self::Errors => traffic.errors as f64,
            Self::Name => 0.0,
        };
        value(b).total_cmp(&value(a))
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|order| order.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("there is no order '{text}'; give one of {names}")
        })
    }
}
