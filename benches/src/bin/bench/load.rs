//! `nbd-cli bench` as a client. It needs the least CPU time for each request, so that the results
//! show the server.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::workload::{ClientResult, Job, Length, Pattern, Unit};
use crate::command::output_of;

/// Offsets are the same in every block.
const SEED: &str = "1";

/// Runs `job` over the first `size` bytes of the disk at `uri`; `program` is `nbd-cli`.
///
/// # Errors
///
/// The program fails, or the server answered a request with an error.
pub(crate) fn run(job: &Job, uri: &str, size: u64, program: Command) -> Result<ClientResult> {
    run_durable(job, Durable::No, uri, size, program)
}

/// When writes are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durable {
    /// At no certain time.
    No,
    /// When they are answered.
    Fua,
    /// When the FLUSH that follows so many writes is answered.
    FlushEvery(u32),
}

/// As [`run`], with writes that are durable.
///
/// # Errors
///
/// As there.
pub(crate) fn run_durable(
    job: &Job,
    durable: Durable,
    uri: &str,
    size: u64,
    mut program: Command,
) -> Result<ClientResult> {
    let (workload, pattern) = match job.pattern {
        Pattern::RandomRead => ("read", "random"),
        Pattern::RandomWrite => ("write", "random"),
        Pattern::SequentialRead => ("read", "sequential"),
        Pattern::SequentialWrite => ("write", "sequential"),
    };
    program
        .args(["bench", "--json", "--quiet", "--destroy-data", "--seed", SEED])
        .args(["--workload", workload, "--pattern", pattern])
        .arg(format!("--block-size={}", job.block_size))
        .arg(format!("--depth={}", job.depth))
        .arg(format!("--connections={}", job.connections))
        .arg(format!("--range=0+{size}"));
    match job.length {
        Length::Seconds(seconds) => program.arg(format!("--duration={seconds}s")),
        Length::Requests(requests) => program.arg(format!("--requests={requests}")),
    };
    match durable {
        Durable::No => &mut program,
        Durable::Fua => program.arg("--fua"),
        Durable::FlushEvery(writes) => program.arg(format!("--flush-every={writes}")),
    };
    let output = output_of(program.arg(uri))?;
    parse(&output, job).context("the report of nbd-cli bench")
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Output {
    seconds: f64,
    requests: u64,
    requests_per_second: f64,
    bytes_per_second: f64,
    read: Option<Kind>,
    write: Option<Kind>,
    client_cpu: Cpu,
}

#[derive(Debug, Deserialize)]
struct Kind {
    latency: Latency,
}

#[derive(Debug, Deserialize)]
struct Latency {
    p99: f64,
}

#[derive(Debug, Deserialize)]
struct Cpu {
    seconds: f64,
}

fn parse(output: &str, job: &Job) -> Result<ClientResult> {
    const MEBIBYTE: f64 = 1_048_576.0;
    let output: Output = serde_json::from_str(output)?;
    if output.requests == 0 {
        bail!("no request was finished");
    }
    let throughput = match job.unit {
        Unit::Requests => output.requests_per_second,
        Unit::Mebibytes => output.bytes_per_second / MEBIBYTE,
    };
    let kind = output.read.or(output.write);
    let busy = (output.seconds > 0.0).then(|| output.client_cpu.seconds / output.seconds);
    Ok(ClientResult {
        throughput,
        p99_us: kind.map(|kind| kind.latency.p99),
        busy,
        work: output.requests as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = r#"{ "uri": "nbd://x", "seconds": 2.0, "requests": 1000,
        "requests-per-second": 500.0, "bytes": 4096000, "bytes-per-second": 2097152.0,
        "read": { "requests": 1000, "latency": { "p50": 1.0, "p99": 2.5 } },
        "client-cpu": { "pid": 1, "seconds": 1.5, "us-per-request": 1500.0 }, "server-cpu": null }"#;

    fn job(unit: Unit) -> Job {
        let (pattern, length) = (Pattern::RandomRead, Length::Seconds(2));
        Job { pattern, block_size: 4096, depth: 1, connections: 1, length, unit }
    }

    #[test]
    fn throughput_latency_and_requests_are_read() {
        let result = parse(OUTPUT, &job(Unit::Requests)).expect("valid");
        let busy = Some(0.75);
        let expected = ClientResult { throughput: 500.0, p99_us: Some(2.5), busy, work: 1000.0 };
        assert_eq!(result, expected);
        let result = parse(OUTPUT, &job(Unit::Mebibytes)).expect("valid");
        assert!((result.throughput - 2.0).abs() < f64::EPSILON);
    }

    #[test]
    fn load_that_did_nothing_and_foreign_text_are_errors() {
        let nothing = OUTPUT.replace("\"requests\": 1000,\n", "\"requests\": 0,\n");
        for text in [nothing.as_str(), "", "{}", "nbd-cli: cannot connect"] {
            assert!(parse(text, &job(Unit::Requests)).is_err(), "{text}");
        }
    }
}
