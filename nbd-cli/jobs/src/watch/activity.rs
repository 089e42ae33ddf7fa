//! The rates between two moments.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::status::{ClientStatus, CommandStatus, ExportStatus, PoolStatus, Status};

/// Commands that change a disk, by their names in a [`Status`].
const CHANGES: [&str; 3] = ["write", "trim", "write_zeroes"];

/// What a server did between two moments.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Activity {
    /// The later moment, in seconds since 1970.
    pub now: f64,
    /// Time between the two, in seconds.
    pub seconds: f64,
    /// Version of the server.
    pub version: String,
    /// Time since its start, in seconds.
    pub uptime: Option<f64>,
    /// Connections, in the handshake or after it.
    pub connections: u64,
    /// Most connections at a time.
    pub max_connections: u64,
    /// The pool of threads for requests that may block.
    pub pool: PoolStatus,
    /// All exports together.
    pub total: ServerTraffic,
    /// The exports, in the order of the server.
    pub exports: Vec<ExportActivity>,
    /// The clients, in the order of their arrival.
    pub clients: Vec<ClientActivity>,
}

/// The requests of an export, of a client or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ServerTraffic {
    /// Absent if it was not there at the earlier moment, or began anew since.
    pub rates: Option<Rates>,
    /// Absent without requests between the two moments.
    pub latency: Option<Latencies>,
    /// Requests that are not answered.
    pub in_flight: u64,
    /// Requests that were answered with an error since the beginning.
    pub errors: u64,
}

/// What was done in a second, on average.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Rates {
    /// Requests, failed ones included.
    pub requests: f64,
    /// Bytes of READ requests that succeeded.
    pub bytes_read: f64,
    /// Bytes of WRITE, TRIM and WRITE_ZEROES requests that succeeded.
    pub bytes_written: f64,
}

/// Percentiles of latencies, in seconds: upper bounds of the buckets in which they lie.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Latencies {
    /// Half of the requests took no longer.
    pub p50: f64,
    /// 99 of 100 requests took no longer.
    pub p99: f64,
    /// 999 of 1000 requests took no longer.
    #[serde(rename = "p99.9")]
    pub p99_9: f64,
}

/// An export.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ExportActivity {
    /// Its name; empty for the default export.
    pub name: String,
    /// Size, in bytes.
    pub size: u64,
    /// Whether all writes are refused.
    pub read_only: bool,
    /// Clients that use it now.
    pub clients: u64,
    /// Its requests.
    #[serde(flatten)]
    pub traffic: ServerTraffic,
}

/// A client that has selected an export.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ClientActivity {
    /// Its unique number.
    pub id: u64,
    /// Its address, as text.
    pub address: String,
    /// Name of its export.
    pub export: String,
    /// Time since it connected, in seconds.
    pub connected: f64,
    /// Its requests.
    #[serde(flatten)]
    pub traffic: ServerTraffic,
}

impl Activity {
    /// Returns what happened from one moment to the next.
    pub fn between(before: &Status, now: &Status) -> Self {
        let seconds = (now.now - before.now).max(0.0);
        // Another server has other counters.
        let is_same = before.since == now.since && seconds > 0.0;
        // Maps, so that very many cost no more than their number.
        fn key(export: &ExportStatus) -> (&str, u64) {
            (&export.name, export.since.to_bits())
        }
        let earlier_exports = before.exports.iter().filter(|_| is_same).map(|it| (key(it), it));
        let earlier_exports: HashMap<_, _> = earlier_exports.collect();
        let earlier_clients = before.clients.iter().filter(|_| is_same).map(|it| (it.id, it));
        let earlier_clients: HashMap<_, _> = earlier_clients.collect();
        let bounds = &now.latency_bounds;
        let interval = Interval { seconds, bounds };
        let mut all = (Sum::default(), Sum::default());
        let mut total = ServerTraffic::default();
        let mut exports = Vec::new();
        for export in &now.exports {
            let (after, earlier) = (Sum::of(&export.commands), earlier_exports.get(&key(export)));
            let earlier = earlier.map(|it| Sum::of(&it.commands));
            let traffic = interval.traffic(&after, earlier.as_ref(), export.in_flight);
            total.in_flight = total.in_flight.saturating_add(traffic.in_flight);
            total.errors = total.errors.saturating_add(traffic.errors);
            if let Some(earlier) = &earlier {
                all.0.add(earlier);
                all.1.add(&after);
            }
            let ExportStatus { size, read_only, clients, .. } = *export;
            exports.push(ExportActivity {
                name: export.name.clone(),
                size,
                read_only,
                clients,
                traffic,
            });
        }
        if is_same {
            let together = interval.traffic(&all.1, Some(&all.0), 0);
            (total.rates, total.latency) = (together.rates, together.latency);
        }
        let clients = now.clients.iter().map(|client| {
            interval.client(client, earlier_clients.get(&client.id).copied(), now.now)
        });
        Self {
            now: now.now,
            seconds,
            version: now.version.clone(),
            uptime: now.since.map(|since| (now.now - since).max(0.0)),
            connections: now.connections,
            max_connections: now.max_connections,
            pool: now.pool,
            total,
            exports,
            clients: clients.collect(),
        }
    }
}

/// The commands of an export or a client together.
#[derive(Default)]
struct Sum {
    requests: u64,
    read: u64,
    written: u64,
    errors: u64,
    latency: Vec<u64>,
}

impl Sum {
    fn of(commands: &BTreeMap<String, CommandStatus>) -> Self {
        let mut sum = Self::default();
        for (name, command) in commands {
            let is_change = CHANGES.contains(&name.as_str());
            let bytes = |is_counted| if is_counted { command.bytes } else { 0 };
            sum.add(&Self {
                requests: command.requests,
                read: bytes(name == "read"),
                written: bytes(is_change),
                errors: command.errors,
                latency: command.latency.clone(),
            });
        }
        sum
    }

    /// Saturates: the numbers are a server's.
    fn add(&mut self, other: &Self) {
        for (mine, theirs) in [
            (&mut self.requests, other.requests),
            (&mut self.read, other.read),
            (&mut self.written, other.written),
            (&mut self.errors, other.errors),
        ] {
            *mine = mine.saturating_add(theirs);
        }
        if self.latency.len() < other.latency.len() {
            self.latency.resize(other.latency.len(), 0);
        }
        for (mine, theirs) in self.latency.iter_mut().zip(&other.latency) {
            *mine = mine.saturating_add(*theirs);
        }
    }
}

struct Interval<'a> {
    seconds: f64,
    bounds: &'a [Option<f64>],
}

impl Interval<'_> {
    fn traffic(&self, after: &Sum, before: Option<&Sum>, in_flight: u64) -> ServerTraffic {
        let rate = |after: u64, before: u64| after.saturating_sub(before) as f64 / self.seconds;
        ServerTraffic {
            rates: before.map(|before| Rates {
                requests: rate(after.requests, before.requests),
                bytes_read: rate(after.read, before.read),
                bytes_written: rate(after.written, before.written),
            }),
            latency: before.and_then(|before| self.latencies(after, before)),
            in_flight,
            errors: after.errors,
        }
    }

    fn latencies(&self, after: &Sum, before: &Sum) -> Option<Latencies> {
        let earlier = before.latency.iter().copied().chain(std::iter::repeat(0));
        let counts = after.latency.iter().zip(earlier);
        let counts: Vec<_> = counts.map(|(after, before)| after.saturating_sub(before)).collect();
        let all = counts.iter().fold(0_u64, |sum, count| sum.saturating_add(*count));
        if all == 0 {
            return None;
        }
        let quantile = |part: f64| {
            let mut below = 0_u64;
            let mut largest = 0.0;
            for (count, bound) in counts.iter().zip(self.bounds) {
                below = below.saturating_add(*count);
                // The last bucket has no bound: it counts as twice the one before.
                largest = bound.unwrap_or(largest * 2.0);
                if below as f64 >= all as f64 * part {
                    break;
                }
            }
            largest
        };
        Some(Latencies { p50: quantile(0.5), p99: quantile(0.99), p99_9: quantile(0.999) })
    }

    fn client(
        &self,
        client: &ClientStatus,
        earlier: Option<&ClientStatus>,
        now: f64,
    ) -> ClientActivity {
        let earlier = earlier.map(|it| Sum::of(&it.commands));
        let after = Sum::of(&client.commands);
        ClientActivity {
            id: client.id,
            address: client.address.clone(),
            export: client.export.clone(),
            connected: (now - client.since).max(0.0),
            traffic: self.traffic(&after, earlier.as_ref(), client.in_flight),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(now: f64, since: f64, reads: u64, latency: [u64; 3]) -> Status {
        let (bytes, latency) = (reads * 4096, latency.to_vec());
        let read = CommandStatus { requests: reads, bytes, errors: 1, latency, seconds: 0.0 };
        let commands = BTreeMap::from([("read".to_owned(), read)]);
        let export = ExportStatus { since: 5.0, commands: commands.clone(), ..Default::default() };
        let client = ClientStatus { id: 7, since, commands, ..Default::default() };
        Status {
            now,
            since: Some(since),
            latency_bounds: vec![Some(1e-3), Some(2e-3), None],
            exports: vec![export],
            clients: vec![client],
            ..Default::default()
        }
    }

    #[test]
    fn rates_are_those_between_the_two_moments() {
        let (before, now) =
            (status(10.0, 1.0, 100, [100, 0, 0]), status(12.0, 1.0, 300, [250, 40, 10]));
        let activity = Activity::between(&before, &now);
        let traffic = activity.exports[0].traffic;
        let rates = Rates { requests: 100.0, bytes_read: 409_600.0, bytes_written: 0.0 };
        assert_eq!(traffic.rates, Some(rates));
        let latency = Latencies { p50: 1e-3, p99: 4e-3, p99_9: 4e-3 };
        assert_eq!((traffic.latency, traffic.errors), (Some(latency), 1));
        assert_eq!(activity.clients[0].traffic, traffic);
        assert_eq!(activity.total, traffic);
        assert_eq!((activity.uptime, activity.clients[0].connected), (Some(11.0), 11.0));
    }

    #[test]
    fn what_was_not_there_before_has_no_rates() {
        let (before, now) = (status(10.0, 1.0, 100, [100, 0, 0]), status(12.0, 11.0, 3, [3, 0, 0]));
        for before in [&before, &Status::default(), &now] {
            let activity = Activity::between(before, &now);
            assert_eq!(activity.exports[0].traffic.rates, None, "{before:?}");
            assert_eq!((activity.total.rates, activity.total.latency), (None, None));
        }
    }

    #[test]
    fn very_many_are_found_among_very_many() {
        let many = |now, reads| {
            let mut status = status(now, 1.0, reads, [reads, 0, 0]);
            let (export, client) = (status.exports.remove(0), status.clients.remove(0));
            for id in 0..50_000_u32 {
                // Long names with the same beginning are slow to compare one by one.
                let name = format!("{:0>100}", id % 25_000);
                let since = f64::from(id / 25_000);
                status.exports.push(ExportStatus { name, since, ..export.clone() });
                status.clients.push(ClientStatus { id: u64::from(id), ..client.clone() });
            }
            status.exports.reverse();
            status
        };
        let activity = Activity::between(&many(10.0, 1), &many(11.0, 3));
        let traffics = activity.exports.iter().map(|it| it.traffic);
        let mut traffics = traffics.chain(activity.clients.iter().map(|it| it.traffic));
        assert!(traffics.all(|it| it.rates.is_some_and(|rates| rates.requests == 2.0)));
    }

    #[test]
    fn numbers_that_make_no_sense_are_no_error() {
        let mut now = status(12.0, 1.0, 1, [u64::MAX; 3]);
        now.latency_bounds.truncate(1);
        now.clients.push(now.clients[0].clone());
        let before = status(f64::NEG_INFINITY, 1.0, 9, [9; 3]);
        let activity = Activity::between(&before, &now);
        let rates = activity.exports[0].traffic.rates.expect("rates");
        assert_eq!(rates.requests, 0.0);
        Activity::between(&now, &Status::default());
    }
}
