//! The workloads: one row of the table each.

use anyhow::Result;

use super::options::Options;
use super::workload::{ClientResult, Pattern, Unit};
use super::{fio, nbdcopy};

/// One workload.
#[derive(Debug)]
pub(crate) struct Row {
    /// The name in the table, the report and the bars.
    pub(crate) name: &'static str,
    pub(crate) workload: Workload,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// fio with requests of `block_size` bytes, `depth` of them in flight on one connection.
    Fio { pattern: Pattern, block_size: u64, depth: u32 },
    /// nbdcopy of the whole disk to `null:`.
    Copy { connections: u32 },
}

const SMALL_BYTES: u64 = 4 << 10;
const LARGE_BYTES: u64 = 256 << 10;
/// Requests in flight of the sequential rows: 4 MiB in flight keep every server busy.
const SEQUENTIAL_DEPTH: u32 = 16;

/// All rows, in the order of the table.
pub(crate) const ROWS: &[Row] = &[
    small("randread-4k-qd1", Pattern::RandomRead, 1),
    small("randread-4k-qd16", Pattern::RandomRead, 16),
    small("randread-4k-qd64", Pattern::RandomRead, 64),
    small("randwrite-4k-qd1", Pattern::RandomWrite, 1),
    small("randwrite-4k-qd16", Pattern::RandomWrite, 16),
    small("randwrite-4k-qd64", Pattern::RandomWrite, 64),
    large("read-256k-qd16", Pattern::SequentialRead),
    large("write-256k-qd16", Pattern::SequentialWrite),
    Row { name: "nbdcopy-c1", workload: Workload::Copy { connections: 1 } },
    Row { name: "nbdcopy-c4", workload: Workload::Copy { connections: 4 } },
];

const fn small(name: &'static str, pattern: Pattern, depth: u32) -> Row {
    Row { name, workload: Workload::Fio { pattern, block_size: SMALL_BYTES, depth } }
}

const fn large(name: &'static str, pattern: Pattern) -> Row {
    let depth = SEQUENTIAL_DEPTH;
    Row { name, workload: Workload::Fio { pattern, block_size: LARGE_BYTES, depth } }
}

impl Row {
    /// Whether the row changes the disk.
    pub(crate) fn writes(&self) -> bool {
        matches!(
            self.workload,
            Workload::Fio { pattern: Pattern::RandomWrite | Pattern::SequentialWrite, .. }
        )
    }

    /// Returns the unit of its throughput.
    pub(crate) fn unit(&self) -> Unit {
        match self.workload {
            Workload::Fio { block_size: SMALL_BYTES, .. } => Unit::Requests,
            _ => Unit::Mebibytes,
        }
    }

    /// What its server CPU time is counted per: a request, or a MiB where the client chooses the
    /// requests.
    pub(crate) fn work_name(&self) -> &'static str {
        match self.workload {
            Workload::Fio { .. } => "request",
            Workload::Copy { .. } => "MiB",
        }
    }
}

/// Runs the client of `row` against the server at `uri`.
///
/// # Errors
///
/// The client is missing, fails, or reports an error of the server.
pub(crate) fn run(row: &Row, uri: &str, options: &Options) -> Result<ClientResult> {
    match row.workload {
        Workload::Fio { pattern, block_size, depth } => {
            let length = fio::Length::Seconds(options.seconds);
            let unit = row.unit();
            let job = fio::Job { pattern, block_size, depth, connections: 1, length, unit };
            fio::run(&job, uri, options.size)
        }
        Workload::Copy { connections } => {
            nbdcopy::run(uri, connections, options.size, options.seconds)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_say_what_is_measured() {
        for (index, row) in ROWS.iter().enumerate() {
            assert!(ROWS[index + 1..].iter().all(|other| other.name != row.name), "{}", row.name);
            if let Workload::Fio { depth, .. } = row.workload {
                assert!(row.name.ends_with(&format!("-qd{depth}")), "{}", row.name);
            }
            assert_eq!(row.writes(), row.name.contains("write"), "{}", row.name);
        }
    }
}
