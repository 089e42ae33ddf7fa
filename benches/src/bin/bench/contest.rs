//! Rows of a group: contenders that do the same work.
//!
//! Blocks are interleaved like those of the raw rows: rounds, then rows, then contenders, whose
//! order rotates by one in every round.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::bars::{BarReport, Limit, Verdict, is_met};
use super::lab::Lab;
use super::notes::note;
use super::page_caches::PageCaches;
use super::sample::Sample;
use super::statistics::median_sample;

/// The main contender of this workspace. Its other contenders have this prefix and `-`, and are not
/// peers.
pub(crate) const OURS: &str = "ours";
/// The contender that does the least work that the row allows. It is not a peer.
pub(crate) const FLOOR: &str = "floor";
/// What is near the floor: this share of its throughput.
const OF_FLOOR: f64 = 0.9;

/// One row.
pub(crate) struct Contest {
    /// The name in the table and the report, unique among all groups.
    pub(crate) name: String,
    /// The unit of throughput, such as `IOPS`.
    pub(crate) throughput_unit: &'static str,
    /// The unit of work for CPU time, such as `request`.
    pub(crate) work_name: &'static str,
    pub(crate) contenders: Vec<Contender>,
}

/// One server or tool in a row.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) measure: Measure,
}

/// Measures one block.
pub(crate) type Measure = Box<dyn Fn(&Lab<'_>) -> Result<Sample>>;

/// One requirement for [`OURS`].
#[derive(Debug)]
pub(crate) struct ContestBar {
    /// The row's name.
    pub(crate) row: String,
    pub(crate) against: Against,
    pub(crate) limit: Limit,
}

/// The divisor of our throughput in the row.
#[derive(Debug)]
pub(crate) enum Against {
    /// None: the bar is the throughput itself.
    Nothing,
    /// The fastest contender of a peer.
    BestPeer,
    /// The fastest contender of a peer, if the floor reaches the limit. Otherwise the kernel
    /// forbids it, and the limit is [`OF_FLOOR`] of the floor.
    BestPeerUpToFloor,
    /// The contender of a peer with the least CPU time for the same work. The ratio compares CPU
    /// times, not throughput.
    BestPeerPerCore,
    /// The same up to the floor, as with throughput.
    BestPeerPerCoreUpToFloor,
    /// The contender of this name in the same row.
    Contender(&'static str),
    /// Our throughput in the row of this name.
    OursInRow(String),
    /// Our CPU time for the same work in the row of this name. The ratio compares CPU times, not
    /// throughput.
    OursInRowPerCore(String),
}

/// The results of a group.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GroupReport {
    pub(crate) name: String,
    pub(crate) rows: Vec<ContestReport>,
    pub(crate) bars: Vec<BarReport>,
}

/// The results of one row.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ContestReport {
    pub(crate) name: String,
    pub(crate) throughput_unit: String,
    pub(crate) work_name: String,
    pub(crate) contenders: Vec<ContenderReport>,
}

/// The results of one contender in one row.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ContenderReport {
    pub(crate) name: String,
    pub(crate) median: Sample,
    pub(crate) samples: Vec<Sample>,
}

/// Measures every row in every round. A failed block becomes a note.
pub(crate) fn run(
    contests: &[Contest],
    lab: &Lab<'_>,
    notes: &mut Vec<String>,
) -> Vec<ContestReport> {
    let wanted: Vec<Vec<&Contender>> = contests
        .iter()
        .map(|contest| {
            contest.contenders.iter().filter(|who| lab.options.wants_server(who.name)).collect()
        })
        .collect();
    let mut samples: Vec<Vec<Vec<Sample>>> =
        wanted.iter().map(|contenders| vec![Vec::new(); contenders.len()]).collect();
    let rounds = lab.options.rounds;
    let mut page_caches = PageCaches::default();
    for round in 0..rounds {
        for (row, contest) in contests.iter().enumerate() {
            for turn in 0..wanted[row].len() {
                let index = (turn + round) % wanted[row].len();
                let contender = wanted[row][index];
                let place = format!("round {}/{rounds} {}", round + 1, contest.name);
                lab.files.forget();
                let sample = (contender.measure)(lab)
                    .and_then(|sample| page_caches.check(&contest.name, &lab.files, sample));
                match sample {
                    Ok(sample) => {
                        let text = sample.describe(contest.throughput_unit, contest.work_name);
                        eprintln!("{place} {:18} {text}", contender.name);
                        samples[row][index].push(sample);
                    }
                    Err(error) => note(notes, format!("{place} {}: {error:#}", contender.name)),
                }
            }
        }
    }
    let mut reports = Vec::new();
    for ((contest, contenders), samples) in contests.iter().zip(wanted).zip(samples) {
        let contenders = contenders.iter().zip(samples).filter_map(|(contender, samples)| {
            let median = median_sample(&samples)?;
            Some(ContenderReport { name: contender.name.to_owned(), median, samples })
        });
        reports.push(ContestReport {
            name: contest.name.clone(),
            throughput_unit: contest.throughput_unit.to_owned(),
            work_name: contest.work_name.to_owned(),
            contenders: contenders.collect(),
        });
    }
    reports
}

impl ContestReport {
    /// Returns the medians of the contender of this name, if it was measured.
    pub(crate) fn median_of(&self, name: &str) -> Option<&Sample> {
        self.contenders.iter().find(|contender| contender.name == name).map(|found| &found.median)
    }

    /// Returns the fastest contender of a peer.
    pub(crate) fn fastest_peer(&self) -> Option<&ContenderReport> {
        self.peers().max_by(|a, b| a.median.throughput.total_cmp(&b.median.throughput))
    }

    /// The least CPU time of a peer for the same work.
    fn cheapest_peer(&self) -> Option<f64> {
        self.peers().map(|peer| peer.median.cpu_us_per_work).min_by(f64::total_cmp)
    }

    fn peers(&self) -> impl Iterator<Item = &ContenderReport> {
        self.contenders
            .iter()
            .filter(|contender| !contender.name.starts_with(OURS) && contender.name != FLOOR)
    }
}

/// Judges the bars of the rows that were run.
pub(crate) fn judge(bars: &[ContestBar], rows: &[ContestReport]) -> Vec<BarReport> {
    bars.iter()
        .filter_map(|bar| {
            let row = rows.iter().find(|row| row.name == bar.row)?;
            let measured = ratio(&bar.against, row, rows);
            let what = match &bar.against {
                Against::Nothing => format!("throughput in {}", row.throughput_unit),
                Against::BestPeer | Against::BestPeerUpToFloor => {
                    "throughput / best peer".to_owned()
                }
                Against::BestPeerPerCore | Against::BestPeerPerCoreUpToFloor => {
                    "work per CPU time / best peer".to_owned()
                }
                Against::Contender(name) => format!("throughput / {name}"),
                Against::OursInRow(name) => format!("throughput / {name}"),
                Against::OursInRowPerCore(name) => format!("work per CPU time / {name}"),
            };
            let (limit, why) = limit(bar, row);
            let verdict = match measured {
                None => Verdict::NotMeasured,
                Some(ratio) if is_met(limit, ratio) => Verdict::Pass,
                Some(_) => Verdict::Fail,
            };
            let (relation, limit) = match limit {
                Limit::AtLeast(limit) => ("at least", limit),
                Limit::AtMost(limit) => ("at most", limit),
            };
            let requirement = format!("{what} {relation} {limit}{why}");
            Some(BarReport { row: bar.row.clone(), requirement, measured, verdict })
        })
        .collect()
}

/// The limit that applies in a row, and why it is not that of the bar.
fn limit(bar: &ContestBar, row: &ContestReport) -> (Limit, String) {
    let floor = || match bar.against {
        Against::BestPeerUpToFloor => {
            Some(row.median_of(FLOOR)?.throughput / row.fastest_peer()?.median.throughput)
        }
        Against::BestPeerPerCoreUpToFloor => {
            Some(row.cheapest_peer()? / row.median_of(FLOOR)?.cpu_us_per_work)
        }
        _ => None,
    };
    if let Limit::AtLeast(wanted) = bar.limit
        && let Some(most) = floor()
        && most < wanted
    {
        // As the report shows it.
        let limit = (most * OF_FLOOR * 100.0).round() / 100.0;
        let why = format!(" ({OF_FLOOR} of the floor, which reaches {most:.2} and not {wanted})");
        return (Limit::AtLeast(limit), why);
    }
    (bar.limit, String::new())
}

fn ratio(against: &Against, row: &ContestReport, rows: &[ContestReport]) -> Option<f64> {
    let ours = row.median_of(OURS)?;
    let other = match against {
        Against::Nothing => return Some(ours.throughput),
        Against::BestPeer | Against::BestPeerUpToFloor => row.fastest_peer()?.median,
        Against::BestPeerPerCore | Against::BestPeerPerCoreUpToFloor => {
            return Some(row.cheapest_peer()? / ours.cpu_us_per_work);
        }
        Against::Contender(name) => *row.median_of(name)?,
        Against::OursInRow(name) => *ours_in(name, rows)?,
        Against::OursInRowPerCore(name) => {
            return Some(ours_in(name, rows)?.cpu_us_per_work / ours.cpu_us_per_work);
        }
    };
    Some(ours.throughput / other.throughput)
}

/// Our medians in the row of this name.
fn ours_in<'a>(name: &str, rows: &'a [ContestReport]) -> Option<&'a Sample> {
    rows.iter().find(|row| row.name == name)?.median_of(OURS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, contenders: &[(&str, f64)]) -> ContestReport {
        let contenders = contenders.iter().map(|&(name, throughput)| {
            let median = Sample {
                throughput,
                p99_us: None,
                client_busy: None,
                cpu_us_per_work: 100.0 / throughput,
                peak_memory_kib: 1.0,
                page_cache: None,
            };
            ContenderReport { name: name.to_owned(), median, samples: vec![median] }
        });
        ContestReport {
            name: name.to_owned(),
            throughput_unit: "IOPS".to_owned(),
            work_name: "request".to_owned(),
            contenders: contenders.collect(),
        }
    }

    #[test]
    fn bars_compare_with_peers_with_other_contenders_and_with_other_rows() {
        let rows = [
            row(
                "one",
                &[("ours", 40.0), ("ours-raw", 50.0), (FLOOR, 90.0), ("a", 10.0), ("b", 20.0)],
            ),
            row("four", &[("ours", 60.0)]),
            row("low", &[("ours", 24.0), (FLOOR, 25.0), ("a", 20.0)]),
        ];
        let bar = |row: &str, against, limit| ContestBar {
            row: row.to_owned(),
            against,
            limit: Limit::AtLeast(limit),
        };
        let bars = [
            bar("one", Against::BestPeer, 2.0),
            bar("one", Against::Contender("ours-raw"), 0.9),
            bar("four", Against::OursInRow("one".to_owned()), 1.0),
            bar("four", Against::BestPeer, 1.0),
            bar("absent", Against::BestPeer, 1.0),
            bar("one", Against::BestPeerPerCore, 2.0),
            bar("one", Against::Nothing, 41.0),
            bar("four", Against::OursInRowPerCore("one".to_owned()), 1.5),
            bar("one", Against::BestPeerUpToFloor, 2.5),
            bar("low", Against::BestPeerPerCoreUpToFloor, 1.5),
            bar("low", Against::BestPeerUpToFloor, 1.5),
        ];
        let judged = judge(&bars, &rows);
        let outcome: Vec<_> = judged.iter().map(|bar| (bar.measured, bar.verdict)).collect();
        assert_eq!(
            outcome,
            [
                (Some(2.0), Verdict::Pass),
                (Some(0.8), Verdict::Fail),
                (Some(1.5), Verdict::Pass),
                (None, Verdict::NotMeasured),
                (Some(2.0), Verdict::Pass),
                (Some(40.0), Verdict::Fail),
                (Some(1.5), Verdict::Pass),
                (Some(2.0), Verdict::Fail),
                (Some(1.2), Verdict::Pass),
                (Some(1.2), Verdict::Pass),
            ]
        );
        assert_eq!(
            judged.last().map(|bar| &*bar.requirement),
            Some(
                "throughput / best peer at least 1.13 (0.9 of the floor, which reaches 1.25 and not 1.5)"
            )
        );
    }
}
