//! The outcome of a run: samples, medians, ratios and verdicts.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::bars::{BARS, Bar, BarReport, Limit, Ratio, Verdict, is_met};
use super::contest::GroupReport;
use super::machine::Machine;
use super::options::{Options, PageCache};
use super::rows::Row;
use super::sample::{Measured, Sample};
use super::servers::Server;
use super::statistics::median_sample;

/// All results of a run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) rounds: usize,
    pub(crate) seconds_per_block: u64,
    pub(crate) size_bytes: u64,
    pub(crate) page_cache: PageCache,
    pub(crate) rows: Vec<RowReport>,
    pub(crate) bars: Vec<BarReport>,
    /// The other groups of rows.
    #[serde(default)]
    pub(crate) groups: Vec<GroupReport>,
    /// Omitted servers and blocks, with the reason.
    pub(crate) notes: Vec<String>,
}

/// One row of the table.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RowReport {
    pub(crate) name: String,
    /// IOPS or MiB/s.
    pub(crate) throughput_unit: String,
    /// The unit of work for CPU time.
    pub(crate) work_name: String,
    pub(crate) servers: Vec<ServerReport>,
    /// Our throughput divided by that of the fastest peer.
    pub(crate) throughput_to_peer: Option<f64>,
    /// Our throughput divided by that of the floor.
    pub(crate) throughput_to_floor: Option<f64>,
    /// Our CPU time divided by that of the cheapest peer.
    pub(crate) cpu_to_peer: Option<f64>,
    /// Our 99th percentile divided by that of the peer with the lowest.
    pub(crate) p99_to_peer: Option<f64>,
}

/// The result of one server in one row.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ServerReport {
    pub(crate) server: Server,
    pub(crate) median: Sample,
    pub(crate) samples: Vec<Sample>,
}

impl Report {
    /// Summarises the blocks of a run.
    pub(crate) fn new(
        options: &Options,
        rows: &[&Row],
        measured: Vec<Measured>,
        groups: Vec<GroupReport>,
        notes: Vec<String>,
    ) -> Self {
        let rows: Vec<RowReport> = rows.iter().map(|row| RowReport::new(row, &measured)).collect();
        Self {
            machine: Machine::describe(),
            rounds: options.rounds,
            seconds_per_block: options.seconds,
            size_bytes: options.size,
            page_cache: options.page_cache,
            bars: judge(&rows),
            rows,
            groups,
            notes,
        }
    }

    /// Reads a report that [`Report::write`] wrote.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is not a report.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the report {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a report", path.display()))
    }

    /// Writes the report as JSON.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

impl RowReport {
    fn new(row: &Row, measured: &[Measured]) -> Self {
        let servers = Server::ALL
            .iter()
            .filter_map(|&server| {
                let samples: Vec<Sample> = measured
                    .iter()
                    .filter(|block| block.row == row.name && block.server == server)
                    .map(|block| block.sample)
                    .collect();
                Some(ServerReport { server, median: median_sample(&samples)?, samples })
            })
            .collect();
        let mut report = Self {
            name: row.name.to_owned(),
            throughput_unit: row.unit().suffix().to_owned(),
            work_name: row.work_name().to_owned(),
            servers,
            throughput_to_peer: None,
            throughput_to_floor: None,
            cpu_to_peer: None,
            p99_to_peer: None,
        };
        report.compute_ratios();
        report
    }

    /// The medians of `server`, if it was measured.
    pub(crate) fn median_of(&self, server: Server) -> Option<&Sample> {
        self.servers.iter().find(|report| report.server == server).map(|report| &report.median)
    }

    /// The peer with the highest throughput, whatever its mode.
    pub(crate) fn fastest_peer(&self) -> Option<&ServerReport> {
        self.peers().max_by(|a, b| a.median.throughput.total_cmp(&b.median.throughput))
    }

    /// The peer with the lowest CPU time.
    pub(crate) fn cheapest_peer(&self) -> Option<&ServerReport> {
        self.peers().min_by(|a, b| a.median.cpu_us_per_work.total_cmp(&b.median.cpu_us_per_work))
    }

    /// The lowest 99th percentile among the peers, in microseconds.
    pub(crate) fn lowest_peer_p99_us(&self) -> Option<f64> {
        self.peers().filter_map(|peer| peer.median.p99_us).min_by(f64::total_cmp)
    }

    fn peers(&self) -> impl Iterator<Item = &ServerReport> {
        self.servers.iter().filter(|report| report.server.is_peer())
    }

    fn compute_ratios(&mut self) {
        let Some(ours) = self.median_of(Server::Ours).copied() else { return };
        self.throughput_to_peer =
            self.fastest_peer().map(|peer| ours.throughput / peer.median.throughput);
        self.throughput_to_floor =
            self.median_of(Server::Floor).map(|floor| ours.throughput / floor.throughput);
        self.cpu_to_peer =
            self.cheapest_peer().map(|peer| ours.cpu_us_per_work / peer.median.cpu_us_per_work);
        self.p99_to_peer =
            self.lowest_peer_p99_us().and_then(|peer| ours.p99_us.map(|p99| p99 / peer));
    }
}

/// Judges the bars of the rows that were run.
fn judge(rows: &[RowReport]) -> Vec<BarReport> {
    BARS.iter()
        .filter_map(|bar| {
            let row = rows.iter().find(|row| row.name == bar.row)?;
            Some(judge_one(bar, row))
        })
        .collect()
}

fn judge_one(bar: &Bar, row: &RowReport) -> BarReport {
    let (what, measured) = match bar.ratio {
        Ratio::ThroughputToPeer => ("throughput / best peer", row.throughput_to_peer),
        Ratio::ThroughputToFloor => ("throughput / floor", row.throughput_to_floor),
        Ratio::CpuToPeer => ("server CPU / cheapest peer", row.cpu_to_peer),
    };
    let (relation, limit) = match bar.limit {
        Limit::AtLeast(limit) => ("at least", limit),
        Limit::AtMost(limit) => ("at most", limit),
    };
    let verdict = match measured {
        None => Verdict::NotMeasured,
        Some(ratio) if is_met(bar.limit, ratio) => Verdict::Pass,
        Some(_) => Verdict::Fail,
    };
    BarReport {
        row: bar.row.to_owned(),
        requirement: format!("{what} {relation} {limit:.1}"),
        measured,
        verdict,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::rows::ROWS;

    fn block(server: Server, throughput: f64, cpu_us_per_work: f64) -> Measured {
        let sample = Sample {
            throughput,
            p99_us: Some(100.0),
            client_busy: Some(0.9),
            cpu_us_per_work,
            peak_memory_kib: 2048.0,
            page_cache: None,
        };
        Measured { row: ROWS[0].name, server, sample }
    }

    /// A report of the first row: ours 300 IOPS, the fastest peer 200, the cheapest 8 us.
    pub(crate) fn example() -> Report {
        let measured = vec![
            block(Server::Ours, 100.0, 2.0),
            block(Server::Ours, 300.0, 3.0),
            block(Server::Ours, 900.0, 4.0),
            block(Server::Floor, 600.0, 1.0),
            block(Server::QemuNbd, 200.0, 20.0),
            block(Server::Nbdkit, 150.0, 8.0),
        ];
        let rows = vec![RowReport::new(&ROWS[0], &measured)];
        Report {
            machine: Machine::describe(),
            rounds: 3,
            seconds_per_block: 2,
            size_bytes: 1 << 20,
            page_cache: PageCache::Pages,
            bars: judge(&rows),
            rows,
            groups: Vec::new(),
            notes: vec!["nbd-server: nbd-server is not installed".to_owned()],
        }
    }

    #[test]
    fn ratios_take_medians_and_the_best_peer_for_each_measure() {
        let report = example();
        let row = &report.rows[0];
        assert_eq!(row.throughput_to_peer, Some(1.5));
        assert_eq!(row.throughput_to_floor, Some(0.5));
        assert_eq!(row.cpu_to_peer, Some(3.0 / 8.0));
        assert_eq!(row.p99_to_peer, Some(1.0));
        assert_eq!(row.fastest_peer().map(|peer| peer.server), Some(Server::QemuNbd));
    }

    #[test]
    fn bars_of_rows_that_ran_are_judged() {
        let verdicts: Vec<Verdict> = example().bars.iter().map(|bar| bar.verdict).collect();
        assert_eq!(verdicts, [Verdict::Pass, Verdict::Pass, Verdict::Fail]);
        let alone = RowReport::new(&ROWS[0], &[block(Server::Ours, 1.0, 1.0)]);
        let verdicts = judge(&[alone]);
        assert!(verdicts.iter().all(|bar| bar.verdict == Verdict::NotMeasured));
    }

    #[test]
    fn written_report_can_be_read_again() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("report.json");
        example().write(&path).expect("written");
        let report = Report::read(&path).expect("readable");
        assert_eq!(report.rows[0].servers.len(), 4);
        assert_eq!(report.bars, example().bars);
        assert!(Report::read(&directory.path().join("none.json")).is_err());
    }
}
