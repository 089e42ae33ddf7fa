//! What a running server does: the numbers of its status page and of `top`.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Most exports, and most clients, that are accepted from a server. A few bytes of its reply would
/// become hundreds of bytes of memory otherwise.
pub(crate) const MAX_ENTRIES: usize = 65_536;

/// The numbers of a server. What an older server does not tell is empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct Status {
    /// Version of the server.
    pub version: String,
    /// Time of these numbers, in seconds since 1970.
    pub now: f64,
    /// Start of the server, in seconds since 1970.
    pub since: Option<f64>,
    /// Connections, in the handshake or after it.
    pub connections: u64,
    /// Most connections at a time.
    pub max_connections: u64,
    /// The pool of threads for requests that may block.
    pub pool: PoolStatus,
    /// The reads and writes that io_uring carries out.
    pub ring: RingStatus,
    /// Upper bounds of the buckets of all latencies, in seconds, ascending; `None` for the last
    /// one, which has no bound.
    pub latency_bounds: Vec<Option<f64>>,
    /// All exports; more than 65536 are not deserialized.
    #[serde(deserialize_with = "bounded")]
    pub exports: Vec<ExportStatus>,
    /// All clients that have selected an export; more than 65536 are not deserialized.
    #[serde(deserialize_with = "bounded")]
    pub clients: Vec<ClientStatus>,
}

/// Refuses a longer list before it takes the memory.
fn bounded<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    struct Entries<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX_ENTRIES}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = list.next_element()? {
                if entries.len() == MAX_ENTRIES {
                    return Err(A::Error::invalid_length(entries.len() + 1, &self));
                }
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    from.deserialize_seq(Entries(PhantomData))
}

/// The pool of threads for requests that may block, and the memory of large requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct PoolStatus {
    /// Requests that wait for a thread.
    pub waiting: u64,
    /// Requests that threads carry out.
    pub running: u64,
    /// Memory of large requests, in bytes.
    pub memory: u64,
    /// Memory of the buffers of busy connections, in bytes.
    pub buffers: u64,
}

/// The reads and writes that io_uring carries out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct RingStatus {
    /// Reads that were carried out completely.
    pub reads: u64,
    /// Such writes.
    pub writes: u64,
    /// Times that a thread began to poll for the ends of writes.
    pub polls: u64,
    /// Times that a thread yielded its core before it took results.
    pub yields: u64,
}

/// An export.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct ExportStatus {
    /// Its name; empty for the default export.
    pub name: String,
    /// Size, in bytes.
    pub size: u64,
    /// Whether all writes are refused.
    pub read_only: bool,
    /// Time since which it is exported, in seconds since 1970.
    pub since: f64,
    /// Clients that use it now.
    pub clients: u64,
    /// Clients that have ever used it.
    pub clients_total: u64,
    /// Requests that are not answered.
    pub in_flight: u64,
    /// The last flush that succeeded, in seconds since 1970.
    pub last_flush: Option<f64>,
    /// Failures to make writes durable.
    pub flush_failures: u64,
    /// The requests by command; commands that were not used are absent.
    pub commands: BTreeMap<String, CommandStatus>,
    /// Where on the disk requests went.
    pub activity: RegionStatus,
}

/// A client that has selected an export.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct ClientStatus {
    /// Its unique number.
    pub id: u64,
    /// Name of its export.
    pub export: String,
    /// Its address, or that and the process and the user of a unix socket, as text.
    pub address: String,
    /// Time of the connection, in seconds since 1970.
    pub since: f64,
    /// Requests that are not answered.
    pub in_flight: u64,
    /// The requests by command; commands that were not used are absent.
    pub commands: BTreeMap<String, CommandStatus>,
}

/// The answered requests of one command.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct CommandStatus {
    /// Answered requests, failed ones included.
    pub requests: u64,
    /// Bytes of the ranges of those that succeeded.
    pub bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Sum of all latencies, in seconds.
    pub seconds: f64,
    /// Requests in each bucket of latencies.
    pub latency: Vec<u64>,
}

/// Where on a disk requests went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct RegionStatus {
    /// Length of a region, in bytes.
    pub region_length: u64,
    /// For each region, the bytes of READ requests.
    pub read: Vec<u64>,
    /// For each region, the bytes of WRITE, TRIM and WRITE_ZEROES requests.
    pub written: Vec<u64>,
}

#[cfg(feature = "monitor")]
pub(crate) use self::server::seconds_since_1970;

/// The numbers of a server in this program.
#[cfg(feature = "server")]
mod server {
    use std::time::{Duration, SystemTime};

    use nbd_proto::wire::TransmissionFlags;
    use nbd_server::statistics::{ExportStatistics, RequestStatistics};
    use nbd_server::{ClientStatistics, ServerHandle, ServerStatistics};

    use super::{
        BTreeMap, ClientStatus, CommandStatus, ExportStatus, PoolStatus, RegionStatus, RingStatus,
        Status,
    };

    impl Status {
        /// Returns the numbers of a server now.
        pub fn of(server: &ServerHandle) -> Self {
            let entries: BTreeMap<_, _> = server.exports().entries().into_iter().collect();
            let ServerStatistics {
                since,
                connections,
                max_connections,
                pool,
                ring,
                exports,
                clients,
                ..
            } = server.statistics();
            let bounds = exports.values().next().map(|export| {
                let latency = export.requests.iter().next().map(|(_, command)| command.latency);
                let latency = latency.unwrap_or_default();
                let bounds = latency.buckets().map(|(bound, _)| bound);
                bounds.map(|bound| bound.as_ref().map(Duration::as_secs_f64)).collect()
            });
            let exports = exports.iter().filter_map(|(name, export)| {
                let info = entries.get(name)?.export().info();
                let is_read_only = info.flags.contains(TransmissionFlags::READ_ONLY);
                Some(export_status(name, export, info.size, is_read_only))
            });
            Self {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                now: seconds_since_1970(SystemTime::now()),
                since: since.map(seconds_since_1970),
                connections: connections as u64,
                max_connections: max_connections as u64,
                pool: PoolStatus {
                    waiting: pool.waiting as u64,
                    running: pool.running as u64,
                    memory: pool.memory,
                    buffers: pool.buffers,
                },
                ring: RingStatus {
                    reads: ring.reads,
                    writes: ring.writes,
                    polls: ring.polls,
                    yields: ring.yields,
                },
                latency_bounds: bounds.unwrap_or_default(),
                exports: exports.collect(),
                clients: clients.iter().map(client_status).collect(),
            }
        }
    }

    fn export_status(
        name: &str,
        export: &ExportStatistics,
        size: u64,
        read_only: bool,
    ) -> ExportStatus {
        ExportStatus {
            name: name.to_owned(),
            size,
            read_only,
            since: seconds_since_1970(export.since),
            clients: export.clients as u64,
            clients_total: export.clients_total,
            in_flight: export.in_flight,
            last_flush: export.last_flush.map(seconds_since_1970),
            flush_failures: export.failed_flushes,
            commands: commands(&export.requests),
            activity: RegionStatus {
                region_length: export.activity.region_length,
                read: export.activity.read.clone(),
                written: export.activity.written.clone(),
            },
        }
    }

    fn client_status(client: &ClientStatistics) -> ClientStatus {
        let ClientStatistics { client: who, requests, in_flight, .. } = client;
        ClientStatus {
            id: who.id,
            export: who.export.clone(),
            address: who.to_string(),
            since: seconds_since_1970(who.since),
            in_flight: *in_flight,
            commands: commands(requests),
        }
    }

    /// The commands that were used.
    fn commands(requests: &RequestStatistics) -> BTreeMap<String, CommandStatus> {
        let used = requests.iter().filter(|(_, command)| command.requests() > 0);
        let commands = used.map(|(kind, command)| {
            let status = CommandStatus {
                requests: command.requests(),
                bytes: command.bytes,
                errors: command.errors,
                seconds: command.latency.total().as_secs_f64(),
                latency: command.latency.buckets().map(|(_, count)| count).collect(),
            };
            (kind.name().to_owned(), status)
        });
        commands.collect()
    }

    /// Seconds since 1970; 0 for times before.
    pub(crate) fn seconds_since_1970(time: SystemTime) -> f64 {
        time.duration_since(SystemTime::UNIX_EPOCH).as_ref().map_or(0.0, Duration::as_secs_f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_cannot_send_entries_without_end() {
        for key in ["exports", "clients"] {
            let status = |count| {
                let entries = vec!["{}"; count].join(",");
                serde_json::from_str::<Status>(&format!("{{\"{key}\":[{entries}]}}"))
            };
            let most = status(MAX_ENTRIES).expect("as many as are accepted");
            assert_eq!(most.exports.len() + most.clients.len(), MAX_ENTRIES);
            assert!(status(MAX_ENTRIES + 1).is_err());
        }
    }
}
