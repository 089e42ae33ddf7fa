//! The figures of a run.

use std::time::{Duration, Instant};

use super::judge::Judge;

/// The results of one judge so far.
#[derive(Debug)]
struct Row {
    name: &'static str,
    unit: &'static str,
    /// Rounds in progress, so that workers choose different judges.
    running: u32,
    /// Rounds that have begun.
    begun: u64,
    rounds: u64,
    judged: u64,
    violations: u64,
    time: Duration,
}

/// The outcome of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing was wrong with this many cases.
    Judged(u64),
    /// Something was wrong.
    Failed,
    /// It was interrupted.
    Abandoned,
}

/// The figures of all judges.
#[derive(Debug)]
pub(super) struct Report {
    rows: Vec<Row>,
    start: Instant,
}

impl Report {
    pub(super) fn new(judges: &[Box<dyn Judge>]) -> Self {
        let row = |judge: &dyn Judge| Row {
            name: judge.name(),
            unit: judge.unit(),
            running: 0,
            begun: 0,
            rounds: 0,
            judged: 0,
            violations: 0,
            time: Duration::ZERO,
        };
        Self { rows: judges.iter().map(|judge| row(&**judge)).collect(), start: Instant::now() }
    }

    /// Returns the judge with the least time so far, and the number of its rounds before this one.
    pub(super) fn begin_round(&mut self) -> (usize, u64) {
        let next = self.rows.iter().enumerate().min_by_key(|(_, row)| (row.running, row.time));
        let index = next.map_or(0, |(index, _)| index);
        let row = &mut self.rows[index];
        row.running += 1;
        row.begun += 1;
        (index, row.begun - 1)
    }

    /// Records a round.
    pub(super) fn end_round(&mut self, index: usize, time: Duration, outcome: Outcome) {
        let row = &mut self.rows[index];
        row.running -= 1;
        row.time += time;
        match outcome {
            Outcome::Judged(count) => row.judged += count,
            Outcome::Failed => row.violations += 1,
            Outcome::Abandoned => return,
        }
        row.rounds += 1;
    }

    /// Returns the judges with a round in progress.
    pub(super) fn running(&self) -> String {
        let rows = self.rows.iter().filter(|row| row.running > 0);
        rows.map(|row| row.name).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn violations(&self) -> u64 {
        self.rows.iter().map(|row| row.violations).sum()
    }

    pub(super) fn print_minute(&self) {
        let figures: Vec<String> = self
            .rows
            .iter()
            .map(|row| format!("{} {} {}", row.name, row.judged, row.unit))
            .collect();
        let minutes = self.start.elapsed().as_secs() / 60;
        println!("soak: {minutes} min: {}; {} violations", figures.join(", "), self.violations());
    }

    pub(super) fn print_summary(&self) {
        println!("| judge | rounds | judged | violations | seconds |");
        println!("|---|---:|---:|---:|---:|");
        for row in &self.rows {
            println!(
                "| {} | {} | {} {} | {} | {:.0} |",
                row.name,
                row.rounds,
                row.judged,
                row.unit,
                row.violations,
                row.time.as_secs_f64()
            );
        }
        let total: u64 = self.rows.iter().map(|row| row.rounds).sum();
        println!(
            "soak: {total} rounds in {:.0} s, {} violations",
            self.start.elapsed().as_secs_f64(),
            self.violations()
        );
    }
}
