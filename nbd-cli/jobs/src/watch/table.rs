//! The activity of a server as lines of text.

use super::activity::{Activity, ServerTraffic};
use crate::text::printable;

/// Columns from which on all values are shown.
const WIDE: usize = 100;

/// A line, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its text, without control characters.
    pub text: String,
    /// What it is.
    pub kind: LineKind,
}

/// What a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineKind {
    /// Text.
    Plain,
    /// The names of columns.
    Heads,
}

/// Returns the lines for a terminal of that many columns. `rows` is the most lines; without it
/// there are all. Long names go beyond the last column.
pub fn table(activity: &Activity, columns: usize, rows: Option<usize>) -> Vec<Line> {
    let is_wide = columns >= WIDE;
    let mut lines = summary(activity).map(plain).to_vec();
    let (exports, clients) = (activity.exports.len(), activity.clients.len());
    let (for_exports, for_clients) = shares(rows, exports, clients);
    let rows = activity.exports.iter().map(|export| {
        let size = bytes(export.size as f64);
        let access = if export.read_only { ", read-only" } else { "" };
        let values = values(&export.traffic, is_wide);
        let name = shown(&export.name);
        format!("{values} {:>7} {size:>6}  {name}{access}", export.clients)
    });
    let first = format!("{} CLIENTS   SIZE  EXPORT", heads(is_wide));
    section(&mut lines, first, rows, exports, for_exports);
    let rows = activity.clients.iter().map(|client| {
        let (age, values) = (seconds(client.connected), values(&client.traffic, is_wide));
        format!("{values} {age:>14}  {}, {}", shown(&client.export), printable(&client.address))
    });
    let first = format!("{}      CONNECTED  CLIENT OF EXPORT", heads(is_wide));
    section(&mut lines, first, rows, clients, for_clients);
    lines
}

fn plain(text: String) -> Line {
    Line { text, kind: LineKind::Plain }
}

fn summary(activity: &Activity) -> [String; 2] {
    let Activity { total, pool, .. } = activity;
    let uptime = activity.uptime.map_or_else(|| "-".to_owned(), seconds);
    let rates = total.rates.unwrap_or_default();
    let latency = |choose: fn(&super::Latencies) -> f64| {
        total.latency.as_ref().map(choose).map_or_else(|| "-".to_owned(), duration)
    };
    [
        format!(
            "Version {}, up {uptime}, {} of {} connections, {} requests in threads, {} waiting",
            printable(&activity.version),
            activity.connections,
            activity.max_connections,
            pool.running,
            pool.waiting
        ),
        format!(
            "{}/s read, {}/s written, {} requests/s, latency {} (99 of 100: {}), {} in flight, {} \
             errors",
            bytes(rates.bytes_read),
            bytes(rates.bytes_written),
            count(rates.requests),
            latency(|it| it.p50),
            latency(|it| it.p99),
            total.in_flight,
            total.errors
        ),
    ]
}

/// How many lines exports and clients get: an empty line and the names of columns are before each.
fn shares(rows: Option<usize>, exports: usize, clients: usize) -> (usize, usize) {
    let Some(rows) = rows else { return (exports, clients) };
    let rest = rows.saturating_sub(2 + 4);
    let for_exports = exports.max(1).min(rest.saturating_sub(clients.max(1)).max(rest / 2));
    (for_exports, rest.saturating_sub(for_exports))
}

fn section(
    lines: &mut Vec<Line>,
    heads: String,
    rows: impl Iterator<Item = String>,
    count: usize,
    most: usize,
) {
    lines.push(plain(String::new()));
    lines.push(Line { text: heads, kind: LineKind::Heads });
    if count == 0 {
        lines.push(plain("none".to_owned()));
    } else if count <= most {
        lines.extend(rows.map(plain));
    } else {
        let shown = most.saturating_sub(1);
        lines.extend(rows.take(shown).map(plain));
        lines.push(plain(format!("... and {} more", count - shown)));
    }
}

fn heads(is_wide: bool) -> String {
    let tail = if is_wide { "  P99.9" } else { "" };
    format!(" READ/s WRITE/s  REQ/s    P50    P99{tail} QUEUE ERRORS")
}

fn values(traffic: &ServerTraffic, is_wide: bool) -> String {
    let none = || "-".to_owned();
    let rates = traffic.rates.as_ref();
    let latency = traffic.latency.as_ref();
    let tail = match latency.map(|it| duration(it.p99_9)) {
        _ if !is_wide => String::new(),
        tail => format!(" {:>6}", tail.unwrap_or_else(none)),
    };
    format!(
        "{:>7} {:>7} {:>6} {:>6} {:>6}{tail} {:>5} {:>6}",
        rates.map_or_else(none, |it| bytes(it.bytes_read)),
        rates.map_or_else(none, |it| bytes(it.bytes_written)),
        rates.map_or_else(none, |it| count(it.requests)),
        latency.map_or_else(none, |it| duration(it.p50)),
        latency.map_or_else(none, |it| duration(it.p99)),
        count(traffic.in_flight as f64),
        count(traffic.errors as f64),
    )
}

fn shown(name: &str) -> String {
    if name.is_empty() { "(default export)".to_owned() } else { printable(name) }
}

/// At most 5 characters: `999`, `1.0K`, `999M`.
fn bytes(bytes: f64) -> String {
    scaled(bytes, 1024.0, &["", "K", "M", "G", "T", "P", "E"])
}

/// At most 5 characters: `999`, `1.0k`, `999M`.
fn count(number: f64) -> String {
    scaled(number, 1000.0, &["", "k", "M", "G", "T", "P", "E"])
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 99.95);
    format!("{value:.decimals$}{}", units[unit])
}

/// The latency of a request.
fn duration(seconds: f64) -> String {
    match seconds {
        ..0.9995e-3 => format!("{:.0}us", seconds * 1e6),
        ..0.9995 => format!("{:.*}ms", usize::from(seconds < 0.00995), seconds * 1e3),
        _ => format!("{seconds:.1}s"),
    }
}

/// A time that has passed.
fn seconds(seconds: f64) -> String {
    let seconds = seconds as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::super::activity::ClientActivity;
    use super::*;
    use crate::status::{ExportStatus, Status};

    fn activity(exports: usize, clients: usize) -> Activity {
        let export = |index| ExportStatus { name: format!("e{index}"), ..Default::default() };
        let status = Status { exports: (0..exports).map(export).collect(), ..Default::default() };
        let mut activity = Activity::between(&status, &status);
        activity.clients = (0..clients as u64)
            .map(|id| ClientActivity {
                id,
                address: "a\u{1b}[2J".to_owned(),
                export: String::new(),
                connected: 61.0,
                traffic: ServerTraffic::default(),
            })
            .collect();
        activity
    }

    #[test]
    fn values_stay_in_their_columns() {
        for (value, text) in [(0.0, "0"), (999.4, "999"), (999.5, "1.0K"), (1e30, "867361737988E")]
        {
            assert_eq!(bytes(value), text);
        }
        assert_eq!([bytes(1536.0), bytes(102.0 * 1024.0)], ["1.5K", "102K"]);
        assert_eq!([count(12_345.0), count(999_999.0)], ["12.3k", "1.0M"]);
        let durations = [4e-6, 0.9996e-3, 2.5e-3, 0.0335, 2.0].map(duration);
        assert_eq!(durations, ["4us", "1.0ms", "2.5ms", "34ms", "2.0s"]);
        for columns in [80, 120] {
            let lines = table(&activity(1, 1), columns, None);
            let at = |row: usize, what: &str| lines[row].text.find(what);
            assert_eq!(at(3, "EXPORT"), at(4, "e0"), "{lines:?}");
            assert_eq!(at(6, "CLIENT OF"), at(7, "(default export), a\\u{1b}[2J"), "{lines:?}");
        }
    }

    #[test]
    fn a_small_terminal_is_never_exceeded() {
        for (exports, clients) in [(0, 0), (1, 1), (3, 100), (100, 3), (100, 100)] {
            for rows in 8..40 {
                let lines = table(&activity(exports, clients), 80, Some(rows));
                assert!(lines.len() <= rows, "{exports} {clients} {rows}: {}", lines.len());
            }
            let all = table(&activity(exports, clients), 80, None);
            assert_eq!(all.len(), 6 + exports.max(1) + clients.max(1));
        }
        let lines = table(&activity(100, 3), 80, Some(24));
        assert_eq!(lines.iter().filter(|line| line.text.contains("a\\u{1b}")).count(), 3);
        assert!(lines.iter().any(|line| line.text == "... and 86 more"), "{lines:?}");
    }
}
