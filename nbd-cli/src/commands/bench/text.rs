//! The report and the live display, as text.

use std::time::Duration;

use nbd_jobs::bench::{BenchInterval, BenchReport, KindReport, Stage, VerifyReport};
use nbd_jobs::size::ByteSize;

const MEBIBYTE: f64 = 1_048_576.0;

/// The lines of a report.
pub(super) fn report(report: &BenchReport) -> Vec<String> {
    let kinds = [
        ("read", &report.read),
        ("write", &report.write),
        ("zeroes", &report.zeroes),
        ("trim", &report.trim),
        ("flush", &report.flush),
    ];
    let mut lines = vec![
        format!(
            "{}: depth {} on {} connection(s), {:.2} s{}, seed {}",
            report.uri,
            report.depth,
            report.connections,
            report.seconds,
            if report.interrupted { " (interrupted)" } else { "" },
            report.seed
        ),
        format!(
            "{:8}{:>12}{:>12}{:>10}{:>11}{:>11}{:>11}{:>11}{:>11}",
            "", "requests", "a second", "MiB/s", "mean", "p50", "p99", "p99.9", "max"
        ),
    ];
    for (name, kind) in kinds {
        lines.extend(kind.as_ref().map(|kind| kind_line(name, kind, report.seconds)));
    }
    let server = match &report.server_cpu {
        Some(cpu) => format!("{:.2} us of the server (process {})", cpu.us_per_request, cpu.pid),
        None => "the server's is unknown".to_owned(),
    };
    lines.push(format!(
        "CPU time of a request: {:.2} us of this client, {server}",
        report.client_cpu.us_per_request
    ));
    if report.reconnects > 0 {
        lines.push(format!("{} connection(s) were lost and made again", report.reconnects));
    }
    lines.extend(report.verify.as_ref().map(verify_line));
    lines
}

fn kind_line(name: &str, kind: &KindReport, seconds: f64) -> String {
    let bytes = if seconds > 0.0 { kind.bytes as f64 / seconds / MEBIBYTE } else { 0.0 };
    let latency = &kind.latency;
    let mut line =
        format!("{name:8}{:>12}{:>12.0}{bytes:>10.1}", kind.requests, kind.requests_per_second);
    for microseconds in [latency.mean, latency.p50, latency.p99, latency.p999, latency.max] {
        line.push_str(&format!("{:>11}", time(microseconds)));
    }
    line
}

fn verify_line(verify: &VerifyReport) -> String {
    let size = ByteSize(verify.block_size.into());
    let good = verify.good_blocks;
    let mut line = match verify.bad_blocks {
        0 => format!("verified: {good} blocks of {size} are as they were written"),
        bad => format!("verified: {good} blocks of {size} are as they were written, {bad} ARE NOT"),
    };
    if verify.other_blocks > 0 {
        line.push_str(&format!("; {} hold other data", verify.other_blocks));
    }
    for block in &verify.examples {
        line.push_str(&format!("\n  offset {}: found {}", block.offset, block.found));
    }
    line
}

/// The progress in the last second.
pub(super) fn live(interval: &BenchInterval) -> String {
    let seconds = interval.length.as_secs_f64().max(1e-9);
    let [median, p99, longest] =
        interval.latencies.map(|it: Duration| time(it.as_secs_f64() * 1e6));
    let stage = match interval.stage {
        Stage::WarmUp => " (warm-up)",
        Stage::Load => "",
        Stage::Verify => " (reading again)",
    };
    format!(
        "{:>5.0} s {:>10.0} requests/s {:>8.1} MiB/s  p50 {median}, p99 {p99}, max {longest}{stage}",
        interval.elapsed.as_secs_f64(),
        interval.requests as f64 / seconds,
        interval.bytes as f64 / seconds / MEBIBYTE,
    )
}

/// A time in a suitable unit.
fn time(microseconds: f64) -> String {
    match microseconds {
        it if it < 1000.0 => format!("{it:.1} us"),
        it if it < 1_000_000.0 => format!("{:.2} ms", it / 1000.0),
        it => format!("{:.2} s", it / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_unit_that_suits_them() {
        for (microseconds, text) in
            [(0.0, "0.0 us"), (52.34, "52.3 us"), (1234.0, "1.23 ms"), (2_500_000.0, "2.50 s")]
        {
            assert_eq!(time(microseconds), text);
        }
    }
}
