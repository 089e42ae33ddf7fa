//! The workloads: one row of the table each.

use std::process::Command;

use anyhow::Result;

use super::options::Options;
use super::workload::{ClientResult, Job, Length, Pattern, Unit};
use super::{fio, load, nbdcopy};

/// One workload.
#[derive(Debug)]
pub(crate) struct Row {
    /// The name in the table, the report and the bars.
    pub(crate) name: &'static str,
    pub(crate) workload: Workload,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Requests of `block_size` bytes, `depth` of them in flight on each connection.
    Requests { client: Client, pattern: Pattern, block_size: u64, depth: u32, connections: u32 },
    /// nbdcopy of the whole disk to `null:`.
    Copy { connections: u32 },
}

/// Which program makes the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// `nbd-cli bench`.
    Load,
    /// fio with its nbd engine, whose own cost hides that of fast servers.
    Fio,
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
    many("randread-4k-qd4-c32", Pattern::RandomRead, 4, 32),
    small("randwrite-4k-qd1", Pattern::RandomWrite, 1),
    small("randwrite-4k-qd16", Pattern::RandomWrite, 16),
    small("randwrite-4k-qd64", Pattern::RandomWrite, 64),
    large("read-256k-qd16", Pattern::SequentialRead),
    large("write-256k-qd16", Pattern::SequentialWrite),
    fio("fio-randread-4k-qd1", Pattern::RandomRead, 1),
    fio("fio-randread-4k-qd16", Pattern::RandomRead, 16),
    fio("fio-randwrite-4k-qd16", Pattern::RandomWrite, 16),
    Row { name: "nbdcopy-c1", workload: Workload::Copy { connections: 1 } },
    Row { name: "nbdcopy-c4", workload: Workload::Copy { connections: 4 } },
];

const fn small(name: &'static str, pattern: Pattern, depth: u32) -> Row {
    requests(name, Client::Load, pattern, SMALL_BYTES, depth, 1)
}

const fn many(name: &'static str, pattern: Pattern, depth: u32, connections: u32) -> Row {
    requests(name, Client::Load, pattern, SMALL_BYTES, depth, connections)
}

const fn fio(name: &'static str, pattern: Pattern, depth: u32) -> Row {
    requests(name, Client::Fio, pattern, SMALL_BYTES, depth, 1)
}

const fn large(name: &'static str, pattern: Pattern) -> Row {
    requests(name, Client::Load, pattern, LARGE_BYTES, SEQUENTIAL_DEPTH, 1)
}

const fn requests(
    name: &'static str,
    client: Client,
    pattern: Pattern,
    block_size: u64,
    depth: u32,
    connections: u32,
) -> Row {
    let workload = Workload::Requests { client, pattern, block_size, depth, connections };
    Row { name, workload }
}

impl Row {
    /// Whether the row changes the disk.
    pub(crate) fn writes(&self) -> bool {
        matches!(
            self.workload,
            Workload::Requests { pattern: Pattern::RandomWrite | Pattern::SequentialWrite, .. }
        )
    }

    /// Returns the unit of its throughput.
    pub(crate) fn unit(&self) -> Unit {
        match self.workload {
            Workload::Requests { block_size: SMALL_BYTES, .. } => Unit::Requests,
            _ => Unit::Mebibytes,
        }
    }

    /// The unit of work by which server CPU time is divided: a request, or a MiB where the client
    /// chooses the requests.
    pub(crate) fn work_name(&self) -> &'static str {
        match self.workload {
            Workload::Requests { .. } => "request",
            Workload::Copy { .. } => "MiB",
        }
    }
}

/// Runs the client of `row` against the server at `uri`; `program` is `nbd-cli`.
///
/// # Errors
///
/// The client is missing, fails, or reports an error of the server.
pub(crate) fn run(
    row: &Row,
    uri: &str,
    options: &Options,
    program: Command,
) -> Result<ClientResult> {
    match row.workload {
        Workload::Requests { client, pattern, block_size, depth, connections } => {
            let length = Length::Seconds(options.seconds);
            let job = Job { pattern, block_size, depth, connections, length, unit: row.unit() };
            match client {
                Client::Load => load::run(&job, uri, options.size, program),
                Client::Fio => fio::run(&job, uri, options.size),
            }
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
            if let Workload::Requests { depth, client, connections, .. } = row.workload {
                assert_eq!(row.name.starts_with("fio-"), client == Client::Fio, "{}", row.name);
                let suffix = if connections == 1 { "" } else { &format!("-c{connections}") };
                assert!(row.name.ends_with(&format!("-qd{depth}{suffix}")), "{}", row.name);
            }
            assert_eq!(row.writes(), row.name.contains("write"), "{}", row.name);
        }
    }
}
