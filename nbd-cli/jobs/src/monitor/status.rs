//! The numbers of the status page, as JSON.

use std::time::{Duration, SystemTime};

use nbd_server::statistics::{ExportStatistics, RequestStatistics};
use nbd_server::{ClientStatistics, ServerStatistics};
use serde_json::{Map, Value, json};

use super::prometheus::seconds_since_1970;

/// Returns everything but the pictures of the disks. `describe` gives the size of an export, and
/// whether it is read-only.
pub(super) fn json(
    server: &ServerStatistics,
    describe: impl Fn(&str) -> Option<(u64, bool)>,
) -> Value {
    let bounds = server.exports.values().next().map(|export| {
        let latency = export.requests.iter().next().map(|(_, command)| command.latency);
        let latency = latency.unwrap_or_default();
        let bounds = latency.buckets().map(|(bound, _)| bound.as_ref().map(Duration::as_secs_f64));
        bounds.collect::<Vec<_>>()
    });
    let exports = server.exports.iter().filter_map(|(name, export)| {
        let (size, is_read_only) = describe(name)?;
        Some(export_json(name, export, size, is_read_only))
    });
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now": seconds_since_1970(SystemTime::now()),
        "since": server.since.map(seconds_since_1970),
        "connections": server.connections,
        "max-connections": server.max_connections,
        "pool": {
            "waiting": server.pool.waiting,
            "running": server.pool.running,
            "memory": server.pool.memory,
            "buffers": server.pool.buffers,
        },
        "latency-bounds": bounds.unwrap_or_default(),
        "exports": exports.collect::<Vec<_>>(),
        "clients": server.clients.iter().map(client_json).collect::<Vec<_>>(),
    })
}

fn export_json(name: &str, export: &ExportStatistics, size: u64, is_read_only: bool) -> Value {
    json!({
        "name": name,
        "size": size,
        "read-only": is_read_only,
        "since": seconds_since_1970(export.since),
        "clients": export.clients,
        "clients-total": export.clients_total,
        "in-flight": export.in_flight,
        "last-flush": export.last_flush.map(seconds_since_1970),
        "flush-failures": export.failed_flushes,
        "commands": commands_json(&export.requests),
        "activity": {
            "region-length": export.activity.region_length,
            "read": export.activity.read,
            "written": export.activity.written,
        },
    })
}

fn client_json(client: &ClientStatistics) -> Value {
    let ClientStatistics { client: who, requests, in_flight, .. } = client;
    json!({
        "id": who.id,
        "export": who.export,
        "address": who.to_string(),
        "since": seconds_since_1970(who.since),
        "in-flight": in_flight,
        "commands": commands_json(requests),
    })
}

/// The commands that were used.
fn commands_json(requests: &RequestStatistics) -> Value {
    let used = requests.iter().filter(|(_, command)| command.requests() > 0);
    let commands = used.map(|(kind, command)| {
        let counts: Vec<_> = command.latency.buckets().map(|(_, count)| count).collect();
        let value = json!({
            "requests": command.requests(),
            "bytes": command.bytes,
            "errors": command.errors,
            "seconds": command.latency.total().as_secs_f64(),
            "latency": counts,
        });
        (kind.name().to_owned(), value)
    });
    Value::Object(commands.collect::<Map<_, _>>())
}
