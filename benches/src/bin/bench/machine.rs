//! The machine of the benchmark.

use std::fs;
use std::process::Command;
use std::thread;

use serde::{Deserialize, Serialize};

/// The machine and the versions of the programs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) processor: String,
    pub(crate) memory_kib: u64,
    pub(crate) kernel: String,
    /// The first line of each program's version output.
    pub(crate) programs: Vec<String>,
}

impl Machine {
    /// Describes this machine.
    pub(crate) fn describe() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processor = value_of(&read("/proc/cpuinfo"), "model name").unwrap_or_default();
        let memory = value_of(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let programs = [
            ("qemu-nbd", "--version"),
            ("nbdkit", "--version"),
            ("nbd-server", "-V"),
            ("nbdcopy", "--version"),
            ("fio", "--version"),
        ];
        Self {
            cores: thread::available_parallelism().map_or(1, usize::from),
            processor,
            memory_kib: memory.trim_end_matches("kB").trim().parse().unwrap_or(0),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            programs: programs.iter().filter_map(|(name, flag)| version(name, flag)).collect(),
        }
    }
}

/// The value behind `key` and a colon.
fn value_of(text: &str, key: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().to_owned())
}

fn version(program: &str, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    // nbd-server writes its version to standard error.
    let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    String::from_utf8_lossy(&said).lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_key() {
        let text = "processor\t: 0\nmodel name\t: A: B\nMemTotal:       24 kB\n";
        assert_eq!(value_of(text, "model name").as_deref(), Some("A: B"));
        assert_eq!(value_of(text, "MemTotal").as_deref(), Some("24 kB"));
        assert_eq!(value_of(text, "cores"), None);
    }
}
