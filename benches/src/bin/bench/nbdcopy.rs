//! nbdcopy as a client: reads the whole disk and discards it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::workload::ClientResult;
use crate::command::output_of;

const MEBIBYTE: f64 = 1_048_576.0;

/// Copies the disk of `size` bytes at `uri` to `null:`, repeatedly for `seconds` seconds.
///
/// One copy can be too short for the resolution of the server's CPU time.
///
/// # Errors
///
/// nbdcopy is missing or fails.
pub(crate) fn run(uri: &str, connections: u32, size: u64, seconds: u64) -> Result<ClientResult> {
    run_with(uri, connections, size, seconds, |_| {})
}

/// Like [`run`], with a change to each command before it starts.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn run_with(
    uri: &str,
    connections: u32,
    size: u64,
    seconds: u64,
    prepare: impl Fn(&mut Command),
) -> Result<ClientResult> {
    let start = Instant::now();
    let mut copies = 0_u32;
    while copies == 0 || start.elapsed() < Duration::from_secs(seconds) {
        let mut command = Command::new("nbdcopy");
        command.arg(format!("--connections={connections}")).args([uri, "null:"]);
        prepare(&mut command);
        output_of(&mut command)?;
        copies += 1;
    }
    Ok(result(size, copies, start.elapsed()))
}

fn result(size: u64, copies: u32, elapsed: Duration) -> ClientResult {
    ClientResult::timed(size as f64 * f64::from(copies) / MEBIBYTE, elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_and_work_are_in_mebibytes() {
        let result = result(1 << 30, 3, Duration::from_secs(2));
        assert_eq!(
            result,
            ClientResult { throughput: 1536.0, p99_us: None, busy: None, work: 3072.0 }
        );
    }
}
