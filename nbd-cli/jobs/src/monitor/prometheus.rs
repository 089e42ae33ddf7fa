//! The text format of Prometheus, version 0.0.4. Written here: a library for it would have more
//! lines than this file, and its own counters.

use std::fmt::Write as _;

use nbd_proto::codec::is_plain;
use nbd_server::ServerStatistics;
use nbd_server::statistics::{ExportStatistics, LatencyHistogram};

use super::disk_map::{Allocation, DiskMap};
use crate::status::seconds_since_1970;

/// The type of the text.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// An export, and what is known of its disk.
pub(super) struct ExportSample<'a> {
    pub(super) name: &'a str,
    pub(super) size: u64,
    pub(super) statistics: &'a ExportStatistics,
    pub(super) map: Option<&'a DiskMap>,
}

/// Returns all metrics.
pub(super) fn text(server: &ServerStatistics, exports: &[ExportSample<'_>]) -> String {
    let mut metrics = Metrics::default();
    of_server(&mut metrics, server);
    of_exports(&mut metrics, exports);
    of_requests(&mut metrics, exports);
    of_disks(&mut metrics, exports);
    metrics.text
}

fn of_server(metrics: &mut Metrics, server: &ServerStatistics) {
    metrics.family("nbd_server_info", "gauge", "The server; always 1.");
    metrics.sample("nbd_server_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    if let Some(since) = server.since {
        metrics.family("nbd_server_start_time_seconds", "gauge", "Start, in seconds since 1970.");
        metrics.sample("nbd_server_start_time_seconds", &[], seconds_since_1970(since));
    }
    for (name, help, value) in [
        ("nbd_connections", "Connections, in the handshake or after it.", server.connections),
        ("nbd_connections_max", "Most connections at a time.", server.max_connections),
    ] {
        metrics.family(name, "gauge", help);
        metrics.sample(name, &[], value);
    }
    let help = "Requests that may block: waiting for a thread, and carried out by one.";
    metrics.family("nbd_pool_requests", "gauge", help);
    metrics.sample("nbd_pool_requests", &[("state", "waiting")], server.pool.waiting);
    metrics.sample("nbd_pool_requests", &[("state", "running")], server.pool.running);
    let (name, ring) = ("nbd_ring_requests_total", &server.ring);
    metrics.family(name, "counter", "Reads and writes that io_uring has carried out.");
    metrics.sample(name, &[("command", "read")], ring.reads);
    metrics.sample(name, &[("command", "write")], ring.writes);
    let name = "nbd_ring_waits_total";
    metrics.family(name, "counter", "Times that a thread polled for results, or yielded its core.");
    metrics.sample(name, &[("kind", "poll")], ring.polls);
    metrics.sample(name, &[("kind", "yield")], ring.yields);
    metrics.family("nbd_memory_bytes", "gauge", "Memory for large requests and for buffers.");
    metrics.sample("nbd_memory_bytes", &[("use", "requests")], server.pool.memory);
    metrics.sample("nbd_memory_bytes", &[("use", "buffers")], server.pool.buffers);
}

fn of_exports(metrics: &mut Metrics, exports: &[ExportSample<'_>]) {
    type Value = fn(&ExportSample<'_>) -> Option<f64>;
    let families: [(&str, &str, &str, Value); 6] = [
        ("nbd_export_size_bytes", "gauge", "Size of the disk.", |it| Some(it.size as f64)),
        ("nbd_export_clients", "gauge", "Clients that use the export.", |it| {
            Some(it.statistics.clients as f64)
        }),
        ("nbd_export_clients_total", "counter", "Clients that have used the export.", |it| {
            Some(it.statistics.clients_total as f64)
        }),
        ("nbd_export_requests_in_flight", "gauge", "Requests that are not answered.", |it| {
            Some(it.statistics.in_flight as f64)
        }),
        (
            "nbd_export_last_flush_timestamp_seconds",
            "gauge",
            "The last flush that succeeded, in seconds since 1970.",
            |it| it.statistics.last_flush.map(seconds_since_1970),
        ),
        ("nbd_export_flush_failures_total", "counter", "Failures to make writes durable.", |it| {
            Some(it.statistics.failed_flushes as f64)
        }),
    ];
    for (name, kind, help, value) in families {
        metrics.family(name, kind, help);
        for export in exports {
            if let Some(value) = value(export) {
                metrics.sample(name, &[("export", export.name)], value);
            }
        }
    }
}

fn of_requests(metrics: &mut Metrics, exports: &[ExportSample<'_>]) {
    let used = || {
        exports.iter().flat_map(|export| {
            let commands = export.statistics.requests.iter();
            let used = commands.filter(|(_, command)| command.requests() > 0);
            used.map(|(kind, command)| (export.name, kind.name(), command))
        })
    };
    let (name, help) = ("nbd_requests_total", "Answered requests, failed ones included.");
    metrics.family(name, "counter", help);
    for (export, kind, command) in used() {
        metrics.sample(name, &[("export", export), ("command", kind)], command.requests());
    }
    let (name, help) = ("nbd_request_errors_total", "Requests that were answered with an error.");
    metrics.family(name, "counter", help);
    for (export, kind, command) in used() {
        metrics.sample(name, &[("export", export), ("command", kind)], command.errors);
    }
    let (name, help) = ("nbd_request_bytes_total", "Bytes of the ranges of successful requests.");
    metrics.family(name, "counter", help);
    for (export, kind, command) in used() {
        metrics.sample(name, &[("export", export), ("command", kind)], command.bytes);
    }
    let help = "Time from the arrival of a request until its reply is ready.";
    metrics.family("nbd_request_duration_seconds", "histogram", help);
    for (export, kind, command) in used() {
        metrics.histogram("nbd_request_duration_seconds", (export, kind), &command.latency);
    }
}

fn of_disks(metrics: &mut Metrics, exports: &[ExportSample<'_>]) {
    let name = "nbd_export_allocation_bytes";
    metrics.family(name, "gauge", "What the disk consists of, as of the last walk over it.");
    for export in exports {
        let Some(allocation) = export.map.and_then(|map| map.allocation.as_ref()) else { continue };
        for (kind, bytes) in allocation.totals() {
            metrics.sample(name, &[("export", export.name), ("kind", kind)], bytes);
        }
    }
    let name = "nbd_export_dirty_bytes";
    metrics.family(name, "gauge", "Dirty bytes of the bitmaps that are offered.");
    for export in exports {
        for (bitmap, cells) in export.map.iter().flat_map(|map| &map.dirty) {
            let labels = [("export", export.name), ("bitmap", bitmap)];
            metrics.sample(name, &labels, cells.iter().sum::<u64>());
        }
    }
}

impl Allocation {
    /// Returns the classes and their bytes.
    pub(super) fn totals(&self) -> [(&'static str, u64); 4] {
        let sum = |cells: &[u64]| cells.iter().sum();
        [
            ("data", sum(&self.data)),
            ("hole", sum(&self.hole)),
            ("zero", sum(&self.zero)),
            ("hole,zero", sum(&self.hole_zero)),
        ]
    }
}

#[derive(Default)]
struct Metrics {
    text: String,
}

// Writing to a string does not fail.
impl Metrics {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.text.push_str(name);
        self.labels(labels);
        let _ = writeln!(self.text, " {value}");
    }

    fn labels(&mut self, labels: &[(&str, &str)]) {
        for (index, (label, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.text, "{label}=\"");
            for character in value.chars() {
                match character {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    // Parsers that take them for line ends are common.
                    character if character.is_control() => self.text.push('\u{fffd}'),
                    character if !is_plain(character) => {
                        let _ = write!(self.text, "\\{}", character.escape_default());
                    }
                    character => self.text.push(character),
                }
            }
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
    }

    fn histogram(&mut self, name: &str, (export, kind): (&str, &str), latency: &LatencyHistogram) {
        let common = [("export", export), ("command", kind)];
        let (bucket, mut below) = (format!("{name}_bucket"), 0);
        for (bound, count) in latency.buckets() {
            below += count;
            let bound = bound.map_or("+Inf".to_owned(), |bound| bound.as_secs_f64().to_string());
            self.sample(&bucket, &[common[0], common[1], ("le", &bound)], below);
        }
        self.sample(&format!("{name}_sum"), &common, latency.total().as_secs_f64());
        self.sample(&format!("{name}_count"), &common, below);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_one_label() {
        let mut metrics = Metrics::default();
        metrics.sample("m", &[("export", "a\"b\\c\nd\re"), ("x", "")], 1);
        assert_eq!(metrics.text, "m{export=\"a\\\"b\\\\c\\nd\u{fffd}e\",x=\"\"} 1\n");
    }

    #[test]
    fn buckets_are_cumulative_and_end_with_infinity() {
        let mut metrics = Metrics::default();
        metrics.histogram("m", ("a", "read"), &LatencyHistogram::default());
        let lines: Vec<_> = metrics.text.lines().collect();
        assert_eq!(lines[0], r#"m_bucket{export="a",command="read",le="0.000004"} 0"#);
        assert_eq!(lines[23], r#"m_bucket{export="a",command="read",le="+Inf"} 0"#);
        assert_eq!(
            lines[24..],
            [r#"m_sum{export="a",command="read"} 0"#, r#"m_count{export="a",command="read"} 0"#,]
        );
    }
}
