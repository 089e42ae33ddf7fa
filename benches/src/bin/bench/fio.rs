//! fio's nbd engine as a client.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::workload::{ClientResult, Job, Length, Pattern, Unit};
use crate::command::output_of;

/// Runs `job` over the first `size` bytes of the disk at `uri`.
///
/// # Errors
///
/// fio is missing or fails, or the server answered a request with an error.
pub(crate) fn run(job: &Job, uri: &str, size: u64) -> Result<ClientResult> {
    let mut command = Command::new("fio");
    command
        .args(["--name=bench", "--ioengine=nbd", "--output-format=json", "--group_reporting"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--rw={}", pattern_name(job.pattern)))
        .arg(format!("--bs={}", job.block_size))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--size={size}"))
        .arg(format!("--numjobs={}", job.connections))
        // Without the map of visited blocks the client has less work.
        .arg("--norandommap=1");
    match job.length {
        Length::Seconds(seconds) => {
            command.args(["--time_based".to_owned(), format!("--runtime={seconds}")]);
        }
        Length::Requests(requests) => {
            let share = requests / u64::from(job.connections);
            command.arg(format!("--number_ios={share}"));
        }
    }
    let output = output_of(&mut command)?;
    parse(&output, job).context("fio's output")
}

fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::RandomRead => "randread",
        Pattern::RandomWrite => "randwrite",
        Pattern::SequentialRead => "read",
        Pattern::SequentialWrite => "write",
    }
}

#[derive(Debug, Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Debug, Deserialize)]
struct JobOutput {
    error: i64,
    /// Percent of the run time, of all processes on average.
    usr_cpu: f64,
    sys_cpu: f64,
    read: Direction,
    write: Direction,
}

#[derive(Debug, Deserialize)]
struct Direction {
    /// Bytes per second.
    bw_bytes: f64,
    iops: f64,
    total_ios: u64,
    clat_ns: Latency,
}

#[derive(Debug, Deserialize)]
struct Latency {
    /// Nanoseconds by percentage; absent when nothing was done.
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, f64>,
}

fn parse(output: &str, job: &Job) -> Result<ClientResult> {
    // Warnings can stand before the JSON.
    let start = output.find('{').context("no JSON in it")?;
    let output: Output = serde_json::from_str(&output[start..])?;
    let done = output.jobs.first().context("no job in it")?;
    if done.error != 0 {
        bail!("the job ended with error {}", done.error);
    }
    let direction = match job.pattern {
        Pattern::RandomRead | Pattern::SequentialRead => &done.read,
        Pattern::RandomWrite | Pattern::SequentialWrite => &done.write,
    };
    if direction.total_ios == 0 {
        bail!("no request was finished");
    }
    const MEBIBYTE: f64 = 1_048_576.0;
    let throughput = match job.unit {
        Unit::Requests => direction.iops,
        Unit::Mebibytes => direction.bw_bytes / MEBIBYTE,
    };
    let p99_ns = direction.clat_ns.percentile.get("99.000000");
    Ok(ClientResult {
        throughput,
        p99_us: p99_ns.map(|nanoseconds| nanoseconds / 1000.0),
        busy: Some((done.usr_cpu + done.sys_cpu) / 100.0),
        work: direction.total_ios as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = r#"fio: a warning
{ "fio version": "fio-3.33", "jobs": [ { "jobname": "bench", "error": 0, "usr_cpu": 40.5, "sys_cpu": 34.5,
  "read": { "io_bytes": 8192, "bw_bytes": 2097152, "iops": 512.5, "total_ios": 1025,
            "clat_ns": { "min": 1, "percentile": { "50.000000": 1000, "99.000000": 2500 } } },
  "write": { "bw_bytes": 0, "iops": 0.0, "total_ios": 0, "clat_ns": { "min": 0 } } } ] }"#;

    fn job(pattern: Pattern, unit: Unit) -> Job {
        let length = Length::Seconds(2);
        Job { pattern, block_size: 4096, depth: 1, connections: 1, length, unit }
    }

    #[test]
    fn throughput_latency_and_requests_are_read() {
        let result = parse(OUTPUT, &job(Pattern::RandomRead, Unit::Requests)).expect("valid");
        let busy = Some(0.75);
        let expected = ClientResult { throughput: 512.5, p99_us: Some(2.5), busy, work: 1025.0 };
        assert_eq!(result, expected);
        let result = parse(OUTPUT, &job(Pattern::SequentialRead, Unit::Mebibytes)).expect("valid");
        assert!((result.throughput - 2.0).abs() < f64::EPSILON);
    }

    #[test]
    fn job_that_did_nothing_is_an_error() {
        let error =
            parse(OUTPUT, &job(Pattern::RandomWrite, Unit::Requests)).expect_err("no writes");
        assert!(error.to_string().contains("no request"), "{error}");
    }

    #[test]
    fn failed_job_and_foreign_text_are_errors() {
        let failed = OUTPUT.replace("\"error\": 0", "\"error\": 5");
        assert!(parse(&failed, &job(Pattern::RandomRead, Unit::Requests)).is_err());
        for text in ["", "fio: cannot connect", "{}", "{\"jobs\":[]}"] {
            assert!(parse(text, &job(Pattern::RandomRead, Unit::Requests)).is_err(), "{text}");
        }
    }
}
